"""What a real model on a real Triton must do through `TritonBackend`, wherever it runs.

Here it is SmolLM2 on the CPU. `make gpu-check` runs the same on the Triton that FOREBAY_CHECK_TRITON names, with its
model and how that is asked in FOREBAY_CHECK_BACKEND: the fields of a policy's backend, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from backends.backend import Timeouts
from backends.errors import BackendTimeout
from backends.load_signals import MetricsPage
from backends.openai_http import new_session
from backends.triton.backend import TritonBackend
from backends.triton.model import TritonModel
from backends.triton.server import TritonServer as Connection
from policies.routing_policy import TritonBackendSpec
from tests.calls import collect, make_call, texts_of, whole_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_loop")]

SMOLLM2 = """
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{{ "<|im_start|>assistant\n" }}"""
SCHEMA = {
    "type": "object",
    "properties": {"age": {"enum": [30, 40]}},
    "required": ["age"],
    "additionalProperties": False,
}
WITHIN_S = 120.0
TIMEOUTS = Timeouts(first_token_s=60, connect_s=5)
LONG = {"max_tokens": 600, "messages": [{"role": "user", "content": "Write a very long story about a river."}]}
LONG_PROMPT = [{"role": "user", "content": "Write a story about a river. " * 150}]


def _spec(request: pytest.FixtureRequest) -> TritonBackendSpec:
    """The model to check: the one that was named, else the small one on a Triton of our own."""
    if url := os.environ.get("FOREBAY_CHECK_TRITON"):
        said = json.loads(os.environ.get("FOREBAY_CHECK_BACKEND") or '{"model": "forebay"}')
        return msgspec.convert({**said, "kind": "triton", "url": url}, TritonBackendSpec)
    server = request.getfixturevalue("triton_llms")
    return TritonBackendSpec(
        url=f"grpc://{server.grpc_address}",
        model="small_llm",
        chat_template=SMOLLM2,
        stop=("<|im_end|>",),
        metrics_url=server.metrics_url,
    )


@pytest.fixture(scope="module")
def spec(request: pytest.FixtureRequest) -> TritonBackendSpec:
    return _spec(request)


@pytest.fixture
async def backend(spec: TritonBackendSpec) -> AsyncIterator[TritonBackend]:
    model = TritonModel(
        name=spec.model,
        folder=None if spec.model_folder is None else Path(spec.model_folder),
        chat_template=spec.chat_template,
        stop=spec.stop,
        adds_bos=spec.adds_bos,
        metrics_name=spec.metrics_model,
    )
    session = new_session()
    page = None if spec.metrics_url is None else MetricsPage(spec.metrics_url, lambda: session)
    backend = TritonBackend("live", Connection(spec.url or "", backend="live", model=spec.model), model, metrics=page)
    yield backend
    await backend.aclose()
    await session.close()


def call(**fields: Any) -> Any:
    asked = {"temperature": 0, "max_tokens": 24, "messages": [{"role": "user", "content": "Name three colors."}]}
    return make_call(**{**asked, **fields}, within_s=WITHIN_S, timeouts=TIMEOUTS)


async def test_it_gets_ready_and_says_what_it_can_do(backend: TritonBackend) -> None:
    await backend.check(within_s=WITHIN_S)
    assert backend.capabilities is not None


async def test_a_stream_and_a_whole_answer_are_the_same_text_with_the_same_usage(backend: TritonBackend) -> None:
    whole, streamed = await collect(backend, call()), await collect(backend, call(stream=True))
    assert texts_of(whole) == texts_of(streamed) != [""]
    assert len(streamed) > 3
    assert whole[-1].usage == streamed[-1].usage
    assert whole[-1].usage is not None
    assert whole[-1].usage.prompt_tokens > 3
    assert 0 < whole[-1].usage.completion_tokens <= 24


async def test_an_answer_ends_for_its_length_or_at_a_stop_sequence(backend: TritonBackend) -> None:
    answer = whole_of(await collect(backend, call(max_tokens=3)))
    assert answer["choices"][0]["finish_reason"] == "length"
    [text] = texts_of(await collect(backend, call()))
    word = text.split()[1]
    cut = whole_of(await collect(backend, call(stop=[word])))["choices"][0]
    assert cut["message"]["content"] == text[: text.index(word)]
    assert cut["finish_reason"] == "stop"


async def test_log_probabilities_belong_to_the_text(backend: TritonBackend) -> None:
    await backend.check(within_s=WITHIN_S)
    if "logprobs" not in (backend.capabilities or ()):
        pytest.skip("the model gives none")
    choice = whole_of(await collect(backend, call(logprobs=True)))["choices"][0]
    entries = choice["logprobs"]["content"]
    assert all(entry["logprob"] <= 0 for entry in entries)
    assert "".join(entry["token"] for entry in entries).startswith(choice["message"]["content"])


async def test_a_schema_binds_the_answer(backend: TritonBackend) -> None:
    await backend.check(within_s=WITHIN_S)
    if "json_schema" not in (backend.capabilities or ()):
        pytest.skip("the model has no guided decoding")
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    messages = [{"role": "user", "content": "Give a person as JSON."}]
    [text] = texts_of(await collect(backend, call(messages=messages, response_format=wanted, max_tokens=64)))
    assert json.loads(text)["age"] in (30, 40)


async def test_equal_seeds_give_equal_answers(backend: TritonBackend) -> None:
    asked = call(temperature=1.0, seed=7)
    assert texts_of(await collect(backend, asked)) == texts_of(await collect(backend, asked))


@pytest.mark.parametrize("after", [0, 5])
async def test_leaving_frees_the_engine(backend: TritonBackend, spec: TritonBackendSpec, after: int) -> None:
    """Before the first token, or in mid-stream: the engine's own count of running requests goes back to what it was."""
    if spec.metrics_url is None:
        pytest.skip("no metrics to see it by")
    run = asyncio.get_running_loop().create_task(backend.run())
    try:
        await _until(lambda: backend.load.running is not None)
        before = backend.load.running or 0
        asked = call(**LONG, stream=True) if after else call(messages=LONG_PROMPT, stream=True)
        async with aclosing(backend.answer(asked)) as events:
            if after:
                for _ in range(after):
                    await anext(events)
            else:
                asking = asyncio.get_running_loop().create_task(anext(events))
                await _until(lambda: (backend.load.running or 0) > before or asking.done())
                asking.cancel()
                await asyncio.wait([asking])
        left_at = time.monotonic()
        await _until(lambda: backend.load.age_s < time.monotonic() - left_at and (backend.load.running or 0) <= before)
    finally:
        run.cancel()
        await asyncio.wait([run])


async def test_a_deadline_is_kept(backend: TritonBackend) -> None:
    await backend.check(within_s=WITHIN_S)
    with pytest.raises(BackendTimeout):
        await collect(backend, make_call(**LONG, temperature=0, within_s=0.5))


async def test_many_at_once_are_all_answered(backend: TritonBackend) -> None:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(collect(backend, call(stream=True, max_tokens=8))) for _ in range(32)]
    assert len({texts_of(task.result())[0] for task in tasks}) <= 3  # batches differ in their last bits
    assert all(texts_of(task.result())[0] for task in tasks)


async def _until(holds: Any) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.02)
