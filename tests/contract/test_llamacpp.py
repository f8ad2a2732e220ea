"""The contract of `backends.backend.Backend` against a real llama.cpp with a real model, and what it does otherwise."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

import pytest

from backends.backend import Backend, Timeouts
from backends.errors import BackendOverloaded, BackendTimeout, BackendUnreachable, RequestRejected
from backends.fan_out import FanOut
from backends.llamacpp import LlamaCppBackend
from backends.templates import ChatTemplate
from tests.calls import collect, make_call, texts_of, whole_of
from tests.engines import SMOLLM2, llamacpp_server

pytestmark = pytest.mark.skipif(not SMOLLM2.exists(), reason=f"no weights at {SMOLLM2.relative_to(SMOLLM2.parents[2])}")

CHATML = """
{%- for message in messages %}
{{ raise_exception('no such role') if message.role == 'narrator' }}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{{ "<|im_start|>assistant\n" }}"""
SHORT: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "seed": 1}


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    with llamacpp_server(SMOLLM2) as url:
        yield url


@pytest.fixture
async def templated(engine: str) -> AsyncIterator[LlamaCppBackend]:
    template = ChatTemplate(CHATML, now=lambda: datetime.now(UTC))
    backend = LlamaCppBackend("a", engine, chat_template=template, stop=["<|im_end|>"])
    yield backend
    await backend.aclose()


@pytest.fixture(params=["own template", "our template"])
async def backend(request: pytest.FixtureRequest, engine: str) -> AsyncIterator[LlamaCppBackend]:
    template = ChatTemplate(CHATML, now=lambda: datetime.now(UTC)) if request.param == "our template" else None
    backend = LlamaCppBackend("a", engine, chat_template=template, stop=["<|im_end|>"])
    yield backend
    await backend.aclose()


@pytest.fixture(params=[True, False], ids=["stream", "whole"])
def stream(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


async def busy_slots(engine: str) -> int:
    slots = await asyncio.to_thread(_get, engine.removesuffix("/v1") + "/slots")
    return sum(slot["is_processing"] for slot in slots)


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=5) as response:
        return json.load(response)


async def until_idle(engine: str) -> None:
    async with asyncio.timeout(5):
        while await busy_slots(engine):
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("operation", ["chat", "text_completion"])
async def test_a_real_answer_has_text_an_end_and_usage(backend: Backend, stream: bool, operation: Any) -> None:
    events = await collect(backend, make_call(operation, stream=stream, **SHORT, within_s=30))
    answer = whole_of(events, operation)
    assert [event.whole for event in events] == [True] if not stream else len(events) > 3
    assert texts_of(events, operation)[0].strip()
    assert answer["choices"][0]["finish_reason"] in ("stop", "length")
    assert answer["object"] == ("chat.completion" if operation == "chat" else "text_completion")
    usage = next(event.usage for event in reversed(events) if event.usage is not None)
    assert usage.prompt_tokens >= 3
    assert 1 <= usage.completion_tokens <= 8


async def test_a_stream_and_a_whole_answer_are_the_same_answer(backend: Backend) -> None:
    streamed = await collect(backend, make_call(stream=True, **SHORT, within_s=30))
    whole = await collect(backend, make_call(**SHORT, within_s=30))
    assert texts_of(streamed) == texts_of(whole)


async def test_our_template_and_the_models_own_make_the_same_answer(engine: str, templated: Backend) -> None:
    own = LlamaCppBackend("a", engine)
    messages = [{"role": "system", "content": "You list things."}, {"role": "user", "content": "Name three colors."}]
    texts = [
        texts_of(await collect(backend, make_call(messages=messages, **SHORT, within_s=30)))
        for backend in (own, templated)
    ]
    await own.aclose()
    assert texts[0] == texts[1]


async def test_log_probabilities_come_in_the_shape_of_chat(backend: Backend, stream: bool) -> None:
    call = make_call(stream=stream, **SHORT, logprobs=True, top_logprobs=2, within_s=30)
    logprobs = whole_of(await collect(backend, call))["choices"][0]["logprobs"]["content"]
    assert logprobs
    for entry in logprobs:
        assert entry["logprob"] <= 0
        assert len(entry["top_logprobs"]) == 2


async def test_asked_for_no_alternatives_none_are_given(templated: Backend) -> None:
    call = make_call(**SHORT, logprobs=True, within_s=30)
    logprobs = whole_of(await collect(templated, call))["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in logprobs] == [[]] * len(logprobs)


async def test_a_json_schema_binds_the_answer(backend: Backend) -> None:
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer"}},
        "required": ["age"],
        "additionalProperties": False,
    }
    format_ = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    call = make_call(response_format=format_, max_tokens=30, temperature=0, within_s=30)
    [text] = texts_of(await collect(backend, call))
    assert re.match(r'\s*\{\s*"age"\s*:\s*-?\d+', text)


async def test_a_json_object_is_one(templated: Backend) -> None:
    messages = [{"role": "user", "content": 'Answer with {"a": 1}'}]
    call = make_call(
        messages=messages, response_format={"type": "json_object"}, max_tokens=20, temperature=0, within_s=30
    )
    [text] = texts_of(await collect(templated, call))
    assert re.match(r"\s*\{", text)


async def test_the_clients_stop_sequences_are_kept_next_to_ours(templated: Backend) -> None:
    messages = [{"role": "user", "content": "Count: one two three four five"}]
    plain = texts_of(await collect(templated, make_call(messages=messages, **SHORT, within_s=30)))[0]
    word = plain.split()[1]
    for stop in (word, [word]):
        call = make_call(messages=messages, **SHORT, stop=stop, within_s=30)
        assert texts_of(await collect(templated, call))[0] == plain[: plain.index(word)]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "picture"}}, "response_format"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "messages"),
    ],
)
async def test_what_a_plain_completion_cannot_do_is_rejected_by_name(
    templated: Backend, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(RequestRejected) as failure:
        await collect(templated, make_call(**fields))
    assert failure.value.param == param


async def test_a_prompt_beyond_the_context_window_is_rejected(backend: Backend, stream: bool) -> None:
    messages = [{"role": "user", "content": "word " * 2000}]
    with pytest.raises(RequestRejected) as failure:
        await collect(backend, make_call(messages=messages, stream=stream, within_s=30))
    assert failure.value.error_type == "exceed_context_size_error"


async def test_several_choices_are_answered_and_counted_when_fanned_out(backend: Backend, stream: bool) -> None:
    call = make_call(stream=stream, n=3, max_tokens=4, temperature=1.0, seed=3, within_s=30)
    events = await collect(FanOut(backend, 1), call)
    answer = whole_of(events)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 12


async def test_a_client_that_leaves_frees_the_slot_at_once(backend: Backend, engine: str, stream: bool) -> None:
    call = make_call(stream=stream, max_tokens=400, temperature=0, ignore_eos=True, within_s=60)
    task = asyncio.get_running_loop().create_task(collect(backend, call))
    async with asyncio.timeout(10):
        while not await busy_slots(engine):
            await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait([task])
    assert backend.load.in_flight == 0
    await until_idle(engine)


async def test_closing_in_the_middle_frees_the_slot_at_once(backend: Backend, engine: str) -> None:
    call = make_call(stream=True, max_tokens=400, temperature=0, ignore_eos=True, within_s=60)
    async with aclosing(backend.answer(call)) as events:
        for _ in range(3):
            await anext(events)
    await until_idle(engine)


async def test_a_deadline_ends_a_long_answer(backend: Backend, engine: str) -> None:
    call = make_call(max_tokens=400, temperature=0, ignore_eos=True, within_s=0.3)
    with pytest.raises(BackendTimeout):
        await collect(backend, call)
    await until_idle(engine)


async def test_while_its_model_loads_it_is_overloaded_and_then_it_answers() -> None:
    with llamacpp_server(SMOLLM2, ready=False) as url:
        backend = LlamaCppBackend("a", url)
        seen: set[type[Exception]] = set()
        async with asyncio.timeout(60):
            while True:
                try:
                    await backend.check(within_s=1.0)
                    break
                except (BackendUnreachable, BackendOverloaded) as error:
                    seen.add(type(error))
                    await asyncio.sleep(0.005)
        assert BackendOverloaded in seen
        timeouts = Timeouts(first_token_s=30)
        assert texts_of(await collect(backend, make_call(**SHORT, timeouts=timeouts, within_s=30)))[0]
        await backend.aclose()
