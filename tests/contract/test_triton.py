"""Triton, for real: every dialect, cancellation that the model sees, reloads, restarts, a hundred streams at once.

What every backend promises is in `test_backends.py`, where Triton stands among the others.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import tokenizers
from msgspec import Raw
from msgspec.structs import replace

from backends.backend import Timeouts
from backends.chat import Event, Usage
from backends.errors import (
    BackendError,
    BackendFailed,
    BackendOverloaded,
    BackendProtocolError,
    BackendRefusedCredentials,
    BackendTimeout,
    BackendUnreachable,
    RequestRejected,
)
from backends.load_signals import MetricsPage
from backends.openai_http import new_session
from backends.triton.backend import TritonBackend
from backends.triton.model import ASK_WITHIN_S, TritonModel
from backends.triton.server import KEEPALIVE_S
from backends.triton.server import TritonServer as Server
from gateway.triton_install import Installation, Ports, triton_command
from tests.calls import collect, collect_into, make_call, texts_of, whole_of
from tests.triton import TritonServer
from tests.triton_models import BLS, ENSEMBLE_OLD, LLMAPI, Piece, Script

pytestmark = pytest.mark.usefixtures("one_loop")

CHATML = """
{%- if tools %}<tools>{{ tools | tojson }}</tools>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}<|im_start|>assistant
"""
TOKENS = ("Hel", "lo ", "wörld")
DIALECTS = ["bls", "bls_cumulative", "bls_unsaid", "ensemble_old", "llmapi", "llmapi_unary"]
STREAMING = DIALECTS[:-1]

MakeBackend = Callable[..., TritonBackend]


@pytest.fixture
async def backends() -> AsyncIterator[MakeBackend]:
    """Makes backends, and closes them: `backends(server, "bls")`."""
    made: list[TritonBackend] = []

    def make(
        server: TritonServer,
        name: str,
        metrics: MetricsPage | None = None,
        real_codes: bool | None = None,
        **settings: Any,
    ) -> TritonBackend:
        model = TritonModel(name=name, **{"chat_template": CHATML, "stop": ("<|im_end|>",), **settings})
        connection = Server(f"grpc://{server.grpc_address}", backend="a", model=name, real_codes=real_codes)
        made.append(TritonBackend("a", connection, model, metrics=metrics, watch_every_s=0.05))
        return made[-1]

    yield make
    for backend in made:
        await backend.aclose()


def says(script: Script) -> list[dict[str, Any]]:
    return [{"role": "user", "content": str(script)}]


async def ask(backend: TritonBackend, script: Script, **fields: Any) -> dict[str, Any]:
    return whole_of(await collect(backend, make_call(messages=says(script), **fields)))


def choice_of(answer: dict[str, Any]) -> dict[str, Any]:
    choice: dict[str, Any] = answer["choices"][0]
    return choice


@pytest.fixture(params=[True, False], ids=["stream", "whole"])
def stream(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("operation", ["chat", "text_completion"])
async def test_every_dialect_gives_the_same_answer(
    triton: TritonServer, backends: MakeBackend, name: str, operation: Any, stream: bool
) -> None:
    script = Script(pieces=TOKENS)
    said = {"messages": says(script)} if operation == "chat" else {"prompt": str(script)}
    events = await collect(backends(triton, name), make_call(operation, stream=stream, **said))
    assert [event.whole for event in events] == [True] if not stream else not any(event.whole for event in events)
    assert texts_of(events, operation) == ["".join(TOKENS)]
    assert choice_of(whole_of(events, operation))["finish_reason"] == "stop"


@pytest.mark.parametrize("name", STREAMING)
async def test_a_stream_shows_each_piece_when_it_comes(triton: TritonServer, backends: MakeBackend, name: str) -> None:
    events = await collect(backends(triton, name), make_call(stream=True, messages=says(Script(pieces=TOKENS))))
    shown = [event.choices[0].delta.content for event in events if event.choices and event.choices[0].delta]
    assert [text for text in shown if text] == list(TOKENS)


async def test_what_a_request_asks_reaches_the_model_as_typed_tensors(
    triton: TritonServer, backends: MakeBackend
) -> None:
    fields: dict[str, Any] = {
        "temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": ["x"], "max_tokens": 5, "presence_penalty": 0.5,
        "frequency_penalty": 0.25, "min_tokens": 2, "repetition_penalty": 1.5, "top_k": 3, "bad_words": ["b"],
        "response_format": {"type": "json_object"}, "logprobs": True,
    }  # fmt: skip
    call = replace(make_call(messages=says(Script()), **fields), request_id="typed")
    await collect(backends(triton, "bls"), call)
    seen = triton.event("received", request_id="typed")["tensors"]
    assert {name: (tensor["dtype"], tensor["shape"], tensor["values"]) for name, tensor in seen.items()} == {
        "text_input": ("bytes", [1, 1], [seen["text_input"]["values"][0]]),
        "max_tokens": ("int32", [1, 1], [5]),
        "min_tokens": ("int32", [1, 1], [2]),
        "temperature": ("float32", [1, 1], [0.5]),
        "top_p": ("float32", [1, 1], [pytest.approx(0.9)]),
        "top_k": ("int32", [1, 1], [3]),
        "seed": ("uint64", [1, 1], [7]),
        "stop_words": ("bytes", [1, 2], ["x", "<|im_end|>"]),
        "bad_words": ("bytes", [1, 1], ["b"]),
        "presence_penalty": ("float32", [1, 1], [0.5]),
        "frequency_penalty": ("float32", [1, 1], [0.25]),
        "repetition_penalty": ("float32", [1, 1], [1.5]),
        "guided_decoding_guide_type": ("bytes", [1, 1], ["json"]),
        "return_log_probs": ("bool", [1, 1], [True]),
        "stream": ("bool", [1, 1], [True]),
        "exclude_input_in_output": ("bool", [1, 1], [True]),
        "return_num_input_tokens": ("bool", [1, 1], [True]),
        "return_num_output_tokens": ("bool", [1, 1], [True]),
    }
    assert seen["text_input"]["values"][0].startswith("<|im_start|>user\n")
    assert seen["text_input"]["values"][0].endswith("<|im_start|>assistant")


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("ensemble_old", {"max_tokens": [[5]], "random_seed": [[7]], "stop_words": [["<|im_end|>"]]}),
        ("llmapi", {"sampling_param_max_tokens": [5], "sampling_param_seed": [7], "streaming": [True]}),
    ],
)
async def test_the_older_and_the_newer_interface_are_asked_in_their_own_words(
    triton: TritonServer, backends: MakeBackend, name: str, tensors: dict[str, Any]
) -> None:
    call = make_call(messages=says(Script()), max_tokens=5, seed=7)
    await collect(backends(triton, name), replace(call, request_id=f"own-words-{name}"))
    seen = triton.event("received", request_id=f"own-words-{name}")["tensors"]
    for tensor, values in tensors.items():
        flat = values[0] if isinstance(values[0], list) else values
        assert seen[tensor]["values"] == flat
        assert len(seen[tensor]["shape"]) == (2 if isinstance(values[0], list) else 1)


async def test_a_model_that_drafts_is_told_how_much_and_answers_in_one_piece(
    triton: TritonServer, backends: MakeBackend, stream: bool
) -> None:
    call = make_call(stream=stream, messages=says(Script(pieces=TOKENS)))
    backend = backends(triton, "vision", draft_tokens=4)
    assert texts_of(await collect(backend, replace(call, request_id=f"draft-{stream}")))
    tensors = triton.event("received", request_id=f"draft-{stream}")["tensors"]
    assert tensors["num_draft_tokens"]["values"] == [4]
    assert tensors["stream"]["values"] == [False]


async def test_tokens_are_the_models_own_count(triton: TritonServer, backends: MakeBackend) -> None:
    script = Script(pieces=[Piece("ab", tokens=3), Piece("c", tokens=1)], prompt_tokens=11)
    events = await collect(backends(triton, "bls"), make_call(stream=True, messages=says(script)))
    assert events[-1].usage == Usage(prompt_tokens=11, completion_tokens=4)
    assert events[-1].is_usage_only


async def test_without_counts_and_without_a_tokenizer_no_usage_is_made_up(
    triton: TritonServer, backends: MakeBackend, stream: bool
) -> None:
    call = make_call(stream=stream, messages=says(Script(pieces=TOKENS)))
    events = await collect(backends(triton, "ensemble_old"), call)
    assert [event.usage for event in events if event.usage is not None] == []


async def test_log_probabilities_come_with_their_tokens(
    triton: TritonServer, backends: MakeBackend, stream: bool
) -> None:
    pieces = [Piece("Hi", log_probs=(-0.5,)), Piece(" there", log_probs=(-1.5,))]
    answer = await ask(backends(triton, "bls"), Script(pieces=pieces), stream=stream, logprobs=True)
    assert choice_of(answer)["logprobs"]["content"] == [
        {"token": "Hi", "logprob": -0.5, "bytes": [72, 105], "top_logprobs": []},
        {"token": " there", "logprob": -1.5, "bytes": list(b" there"), "top_logprobs": []},
    ]


async def test_what_lies_behind_a_stop_sequence_is_not_shown_nor_are_its_log_probabilities(
    triton: TritonServer, backends: MakeBackend, stream: bool
) -> None:
    pieces = [Piece("Hi", log_probs=(-0.5,)), Piece(" S", log_probs=(-1.5,)), Piece("TOP more", log_probs=(-2.5,))]
    answer = await ask(
        backends(triton, "bls"), Script(pieces=[*pieces, "never"]), stream=stream, logprobs=True, stop="STOP"
    )
    choice = choice_of(answer)
    assert choice["message"]["content"] == "Hi "
    assert choice["finish_reason"] == "stop"
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == ["Hi", " S"]


async def test_a_model_that_runs_past_a_stop_sequence_is_stopped(triton: TritonServer, backends: MakeBackend) -> None:
    script = Script(pieces=["a", "STOP", *["x"] * 500], delay_ms=5)
    call = replace(make_call(messages=says(script), stop="STOP"), request_id="past-the-stop")
    await collect(backends(triton, "bls"), call)
    assert triton.event("cancelled", request_id="past-the-stop")["after"] < 50


@pytest.mark.parametrize(("max_tokens", "reason"), [(3, "length"), (4, "stop")])
async def test_an_answer_that_used_up_its_tokens_ended_for_its_length(
    triton: TritonServer, backends: MakeBackend, max_tokens: int, reason: str
) -> None:
    answer = await ask(backends(triton, "bls"), Script(pieces=TOKENS), max_tokens=max_tokens)
    assert choice_of(answer)["finish_reason"] == reason


async def test_a_dialect_that_says_why_it_ended_is_believed(triton: TritonServer, backends: MakeBackend) -> None:
    backend = backends(triton, "llmapi")
    assert choice_of(await ask(backend, Script(finish_reason="length")))["finish_reason"] == "length"
    with pytest.raises(BackendProtocolError, match="cancelled"):
        await ask(backend, Script(finish_reason="cancelled"))
    with pytest.raises(BackendProtocolError, match="broke off"):
        await ask(backend, Script(finish_reason="None"))


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALLS = {
    "hermes": [
        "One moment.\n<tool",
        '_call>\n{"name": "weather", "argu',
        'ments": {"city": "Pa',
        'ris"}}\n</tool_call>',
    ],
    "llama3": ['{"name": "weather", ', '"parameters": {"city": "Pa', 'ris"}}'],
}


@pytest.mark.parametrize("tool_format", ["hermes", "llama3"])
async def test_tool_calls_are_read_out_of_the_models_own_format(
    triton: TritonServer, backends: MakeBackend, tool_format: Any, stream: bool
) -> None:
    backend = backends(triton, "bls", tool_format=tool_format)
    answer = await ask(backend, Script(pieces=CALLS[tool_format]), stream=stream, tools=TOOLS)
    choice = choice_of(answer)
    [call] = choice["message"]["tool_calls"]
    assert (call["type"], call["function"]["name"]) == ("function", "weather")
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    assert choice["finish_reason"] == "tool_calls"
    assert (choice["message"].get("content") or "").strip() == ("One moment." if tool_format == "hermes" else "")


async def test_arguments_of_a_tool_call_stream_as_they_are_written(triton: TritonServer, backends: MakeBackend) -> None:
    backend = backends(triton, "bls", tool_format="hermes")
    events = await collect(backend, make_call(stream=True, tools=TOOLS, messages=says(Script(pieces=CALLS["hermes"]))))
    calls = [json.loads(bytes(raw)) for event in events for raw in _tool_calls(event)]
    assert calls[0]["function"] == {"name": "weather", "arguments": ""}
    assert [call["function"]["arguments"] for call in calls[1:]] == ['{"city": "Pa', 'ris"}']


def _tool_calls(event: Event) -> tuple[Any, ...]:
    delta = event.choices[0].delta if event.choices else None
    return (delta.tool_calls or ()) if delta else ()


async def test_a_call_that_is_demanded_binds_the_model_to_its_schema(
    triton: TritonServer, backends: MakeBackend
) -> None:
    backend = backends(triton, "bls", tool_format="hermes")
    script = Script(pieces=['{"name": "weather", "arguments": {}}'])
    call = make_call(messages=says(script), tools=TOOLS, tool_choice="required")
    answer = whole_of(await collect(backend, replace(call, request_id="demanded")))
    assert choice_of(answer)["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": "{}"}
    seen = triton.event("received", request_id="demanded")["tensors"]
    assert seen["guided_decoding_guide_type"]["values"] == ["json_schema"]
    assert "weather" in seen["guided_decoding_guide"]["values"][0]


async def test_a_call_that_may_not_be_made_shows_the_model_no_tools(
    triton: TritonServer, backends: MakeBackend
) -> None:
    backend = backends(triton, "bls", tool_format="hermes")
    answer = await ask(backend, Script(pieces=CALLS["hermes"]), tools=TOOLS, tool_choice="none")
    assert "<tool_call>" in choice_of(answer)["message"]["content"]
    assert choice_of(answer)["finish_reason"] == "stop"


IMAGE = "data:image/png;base64,iVBORw0KGgo="


def _with_image(url: str) -> list[dict[str, Any]]:
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": url}}]
    return [{"role": "user", "content": parts}]


def call_with_image(url: str, request_id: str) -> Any:
    call = make_call(messages=_with_image(url))
    request = replace(call.request, has_images=True)
    return replace(call, request=request, request_id=request_id)


async def test_an_image_inside_the_request_reaches_the_model(triton: TritonServer, backends: MakeBackend) -> None:
    backend = backends(triton, "vision", chat_template="{{ messages[0].content[1].type }}")
    assert backend.capabilities is None
    await collect(backend, call_with_image(IMAGE, "image"))
    seen = triton.event("received", request_id="image")["tensors"]
    assert seen["image_url_input"]["values"] == ["data:image/jpeg;base64,iVBORw0KGgo="], "the one label it knows"
    assert seen["text_input"]["values"] == ["image"]
    assert "vision" in (backend.capabilities or ())


async def test_the_model_is_handed_no_address_that_a_client_chose(triton: TritonServer, backends: MakeBackend) -> None:
    for url in ("http://169.254.169.254/latest", "file:///etc/passwd", "data:text/html,x", "data:image/svg+xml,x"):
        with pytest.raises(RequestRejected, match="data: URLs"):
            await collect(backends(triton, "vision"), call_with_image(url, "address"))
    assert triton.events("received", request_id="address") == []
    with pytest.raises(RequestRejected, match="text only"):
        await collect(backends(triton, "bls"), call_with_image(IMAGE, "text-only"))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"tools": TOOLS}, "tools"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"x_unknown": 1}, "x_unknown"),
        ({"messages": [{"role": "user", "content": "x"}], "reasoning_effort": "high"}, "reasoning_effort"),
    ],
)
async def test_bad_input_is_refused_by_its_field_and_never_reaches_the_model(
    triton: TritonServer, backends: MakeBackend, fields: dict[str, Any], param: str
) -> None:
    call = replace(make_call(**fields), request_id=f"bad-{param}")
    with pytest.raises(RequestRejected) as refused:
        await collect(backends(triton, "bls", calls_tools=False), call)
    assert refused.value.param == param
    assert param in refused.value.message
    assert triton.events("received", request_id=f"bad-{param}") == []


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("INTERNAL", BackendFailed),
        ("UNAVAILABLE", BackendUnreachable),
        ("INVALID_ARG", RequestRejected),
        ("NOT_FOUND", BackendRefusedCredentials),
        ("UNSUPPORTED", BackendProtocolError),
    ],
)
async def test_an_error_of_the_model_is_known_by_its_code_before_and_after_the_first_token(
    triton: TritonServer, backends: MakeBackend, code: Any, error: type[BackendError]
) -> None:
    for after in (0, 2):
        script = Script(pieces=TOKENS, error_after=after, error="boom", code=code)
        seen: list[Event] = []
        backend = backends(triton, "bls", real_codes=True)
        with pytest.raises(error) as failure:
            await collect_into(seen, backend, make_call(stream=True, messages=says(script)))
        assert type(failure.value) is error
        assert "boom" in failure.value.message
        assert (texts_of(seen) if seen else [""]) == ["".join(TOKENS[:after])]


async def test_an_old_server_is_not_asked_for_codes_and_its_errors_are_known_by_their_text(
    triton: TritonServer, backends: MakeBackend
) -> None:
    """See `REAL_CODES_SINCE`: the server here is an old one."""
    full = ("Exceeds maximum queue size", "Request timeout expired")
    for error, kind in (("boom", BackendFailed), *((error, BackendOverloaded) for error in full)):
        with pytest.raises(kind, match=error):
            await ask(backends(triton, "bls"), Script(error_after=1, error=error, code="UNAVAILABLE"))


@pytest.mark.parametrize("real_codes", [True, False])
@pytest.mark.parametrize(("operation", "param"), [("chat", "messages"), ("text_completion", "prompt")])
async def test_a_prompt_that_is_too_long_is_the_clients_fault(
    triton: TritonServer, backends: MakeBackend, real_codes: bool, operation: Any, param: str
) -> None:
    script = Script(error_after=0, error="Prompt length (5000) exceeds maximum input length (4096)")
    said = {"messages": says(script)} if operation == "chat" else {"prompt": str(script)}
    with pytest.raises(RequestRejected) as refused:
        await collect(backends(triton, "bls", real_codes=real_codes), make_call(operation, **said))
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", param)
    assert not refused.value.upstream_fault


@pytest.mark.parametrize("garbage", ["no_text", "no_outputs"])
async def test_a_response_that_is_none_is_a_protocol_error(
    triton: TritonServer, backends: MakeBackend, garbage: Any, stream: bool
) -> None:
    script = Script(pieces=["a", Piece("b", garbage=garbage)])
    with pytest.raises(BackendProtocolError):
        await ask(backends(triton, "bls"), script, stream=stream)


@pytest.mark.parametrize("name", STREAMING)
async def test_cancelling_before_the_first_token_stops_the_model(
    triton: TritonServer, backends: MakeBackend, name: str, stream: bool
) -> None:
    backend = backends(triton, name)
    request_id = f"before-{name}-{stream}"
    call = make_call(stream=stream, messages=says(Script(pieces=TOKENS, first_delay_ms=60_000)), within_s=60)
    task = asyncio.get_running_loop().create_task(collect(backend, replace(call, request_id=request_id)))
    await asyncio.to_thread(triton.event, "received", request_id=request_id)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert (await asyncio.to_thread(triton.event, "cancelled", request_id=request_id))["after"] == 0
    assert backend.load.in_flight == 0


async def test_closing_in_mid_stream_stops_the_model(triton: TritonServer, backends: MakeBackend) -> None:
    script = Script(pieces=["x"] * 1000, delay_ms=5)
    call = replace(make_call(stream=True, messages=says(script)), request_id="middle")
    async with aclosing(backends(triton, "bls").answer(call)) as events:
        for _ in range(4):
            await anext(events)
    assert (await asyncio.to_thread(triton.event, "cancelled", request_id="middle"))["after"] < 50


@pytest.mark.parametrize(
    ("timeouts", "within_s", "hang_after", "phase"),
    [
        (Timeouts(first_token_s=0.1), 5.0, 0, "first_token"),
        (Timeouts(idle_s=0.1), 5.0, 1, "idle"),
        (Timeouts(total_s=0.2), 5.0, 1, "total"),
        (Timeouts(), 0.2, 1, "total"),
    ],
)
async def test_a_clock_that_runs_out_stops_the_model(
    triton: TritonServer, backends: MakeBackend, timeouts: Timeouts, within_s: float, hang_after: int, phase: str
) -> None:
    backend = backends(triton, "bls")
    await backend.check(within_s=5)
    request_id = f"clock-{phase}-{within_s}"
    script = Script(pieces=TOKENS, hang_after=hang_after)
    call = make_call(stream=True, messages=says(script), timeouts=timeouts, within_s=within_s)
    with pytest.raises(BackendTimeout) as failure:
        await collect(backend, replace(call, request_id=request_id))
    assert failure.value.phase == phase
    await asyncio.to_thread(triton.event, "cancelled", request_id=request_id)


async def test_a_hundred_streams_share_one_connection_and_keep_apart(
    triton: TritonServer, backends: MakeBackend
) -> None:
    backend = backends(triton, "bls")

    async def one(number: int) -> tuple[str, list[str]]:
        own = [f"{number}:", *(f"{number}.{step} " for step in range(5))]
        call = make_call(stream=True, messages=says(Script(pieces=own, delay_ms=5)), within_s=60)
        return "".join(own), texts_of(await collect(backend, call))

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(number)) for number in range(100)]
    for task in tasks:
        expected, said = task.result()
        assert said == [expected]
    assert backend.load.in_flight == 0


async def test_a_model_is_ready_only_after_it_answered_a_first_request(
    triton: TritonServer, backends: MakeBackend
) -> None:
    before = len(triton.events("received", request_id="warm-up"))
    backend = backends(triton, "bls")
    await backend.check(within_s=5)
    await backend.check(within_s=5)
    assert len(triton.events("received", request_id="warm-up")) == before + 1


async def test_a_model_that_is_none_says_which_and_why(triton: TritonServer, backends: MakeBackend) -> None:
    with pytest.raises(BackendProtocolError, match="model 'broken_interface' has no text_input: it takes INPUT0"):
        await backends(triton, "broken_interface").check(within_s=5)
    with pytest.raises(BackendRefusedCredentials, match="no model 'nobody' in its repository"):
        await backends(triton, "nobody").check(within_s=5)


async def test_capabilities_are_what_the_engine_says(triton: TritonServer, backends: MakeBackend) -> None:
    known = {}
    for name in ("bls", "ensemble_old", "llmapi"):
        backend = backends(triton, name, tool_format="hermes")
        await backend.check(within_s=5)
        known[name] = backend.capabilities
    assert known == {
        "bls": {"tools", "json_schema", "logprobs"},
        "ensemble_old": {"tools", "logprobs"},
        "llmapi": {"tools", "vision"},
    }


async def test_load_is_the_engines_own(triton: TritonServer, backends: MakeBackend) -> None:
    session = new_session()
    try:
        backend = backends(triton, "bls", metrics=MetricsPage(triton.metrics_url, lambda: session))
        gauges = {
            "request_metrics": {"waiting": 7, "scheduled": 3, "active": 10},
            "kv_cache_block_metrics": {"fraction": 0.5},
        }
        await ask(backend, Script(metrics=gauges))
        run = asyncio.get_running_loop().create_task(backend.run())
        try:
            async with asyncio.timeout(5):
                while backend.load.queued is None:
                    await asyncio.sleep(0.02)
            load = backend.load
            assert (load.queued, load.running, load.kv_cache_ratio) == (7, 3, 0.5)
            assert load.age_s < 5
        finally:
            run.cancel()
            await asyncio.wait([run])
    finally:
        await session.close()


@pytest.fixture
async def running(backends: MakeBackend) -> AsyncIterator[Callable[..., TritonBackend]]:
    """As `backends`, and they run as they do in a gateway."""
    tasks: list[asyncio.Task[None]] = []

    def make(server: TritonServer, name: str, **settings: Any) -> TritonBackend:
        backend = backends(server, name, **settings)
        tasks.append(asyncio.get_running_loop().create_task(backend.run()))
        return backend

    yield make
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


StartTriton = Callable[..., TritonServer]


@pytest.mark.slow
async def test_a_reload_with_another_interface_is_noticed(start_triton: StartTriton, running: MakeBackend) -> None:
    server = await asyncio.to_thread(start_triton)
    backend = running(server, "bls")
    assert choice_of(await ask(backend, Script(pieces=TOKENS)))["message"]["content"] == "".join(TOKENS)
    for dialect, seed in ((ENSEMBLE_OLD, "random_seed"), (LLMAPI, "sampling_param_seed"), (BLS, "seed")):
        server.write("bls", dialect)
        await asyncio.to_thread(server.load, "bls")
        call = replace(make_call(messages=says(Script(pieces=TOKENS)), seed=7), request_id=f"as-{seed}")
        assert texts_of(await collect(backend, call)) == ["".join(TOKENS)]
        assert seed in server.event("received", request_id=f"as-{seed}")["tensors"]


@pytest.mark.slow
async def test_a_model_that_was_reloaded_is_warmed_up_again(start_triton: StartTriton, running: MakeBackend) -> None:
    server = await asyncio.to_thread(start_triton)
    backend = running(server, "bls")
    await ask(backend, Script())
    warmed_up = len(server.events("received", request_id="warm-up"))
    await asyncio.to_thread(server.load, "bls")
    async with asyncio.timeout(10):
        while len(server.events("received", request_id="warm-up")) == warmed_up:
            await asyncio.sleep(0.02)


@pytest.mark.slow
async def test_unloading_lets_answers_in_flight_end_and_is_then_said(
    start_triton: StartTriton, running: MakeBackend
) -> None:
    server = await asyncio.to_thread(start_triton)
    backend, other = running(server, "bls"), running(server, "llmapi")
    script = Script(pieces=["x"] * 40, delay_ms=10)
    call = replace(make_call(stream=True, messages=says(script), within_s=30), request_id="in-flight")
    answering = asyncio.get_running_loop().create_task(collect(backend, call))
    await asyncio.to_thread(server.event, "received", request_id="in-flight")
    await backend.unload_model(within_s=5)
    assert texts_of(await answering) == ["x" * 40]
    async with asyncio.timeout(10):
        while True:
            try:
                await backend.check(within_s=5)
            except BackendOverloaded as error:
                if "UNAVAILABLE" in error.message:
                    break
            await asyncio.sleep(0.02)
    with pytest.raises(BackendOverloaded, match="model 'bls' is UNAVAILABLE"):
        await ask(backend, Script())
    assert choice_of(await ask(other, Script(pieces=TOKENS)))["message"]["content"] == "".join(TOKENS)
    await backend.load_model(within_s=30)
    assert choice_of(await ask(backend, Script(pieces=TOKENS)))["message"]["content"] == "".join(TOKENS)


@pytest.mark.slow
async def test_a_server_that_was_killed_is_used_again_once_it_is_back(
    start_triton: StartTriton, running: MakeBackend
) -> None:
    server = await asyncio.to_thread(start_triton)
    backend = running(server, "bls")
    script = Script(pieces=["x"] * 200, delay_ms=10)
    call = replace(make_call(stream=True, messages=says(script), within_s=30), request_id="killed")
    answering = asyncio.get_running_loop().create_task(collect(backend, call))
    await asyncio.to_thread(server.event, "received", request_id="killed")
    await asyncio.to_thread(server.kill)
    with pytest.raises(BackendUnreachable):
        await answering
    with pytest.raises((BackendUnreachable, BackendTimeout)):
        await ask(backend, Script())
    await asyncio.to_thread(server.start)
    async with asyncio.timeout(10):
        while True:
            try:
                answer = await ask(backend, Script(pieces=TOKENS))
                break
            except BackendError:
                await asyncio.sleep(0.05)
    assert choice_of(answer)["message"]["content"] == "".join(TOKENS)


async def test_a_closed_backend_cuts_what_is_in_flight(triton: TritonServer, backends: MakeBackend) -> None:
    backend = backends(triton, "bls")
    call = make_call(stream=True, messages=says(Script(pieces=TOKENS, hang_after=1)), within_s=30)
    answering = asyncio.get_running_loop().create_task(collect(backend, replace(call, request_id="closed")))
    await asyncio.to_thread(triton.event, "received", request_id="closed")
    await backend.aclose()
    with pytest.raises(BackendUnreachable):
        await answering
    await asyncio.to_thread(triton.event, "cancelled", request_id="closed")


async def test_a_second_image_is_refused_where_the_model_has_place_for_one(
    triton: TritonServer, backends: MakeBackend
) -> None:
    """Triton would find fault with the tensor's shape, which looks as if the gateway had asked wrongly."""
    messages = [*_with_image(IMAGE), *_with_image(IMAGE)]
    with pytest.raises(RequestRejected, match="one image a request, not 2") as refused:
        await collect(backends(triton, "vision"), make_call(messages=messages))
    assert refused.value.param == "messages"
    await collect(backends(triton, "llmapi"), replace(make_call(messages=messages), request_id="two-images"))
    assert triton.event("received", request_id="two-images")["tensors"]["image_url"]["shape"] == [2]


@pytest.mark.parametrize(
    ("raw", "why"), [(b"[" * 5000 + b"]" * 5000, "nested too deeply"), (rb'{"\ud800": 1}', "not valid JSON")]
)
async def test_a_field_that_nobody_can_read_is_the_clients_fault(
    triton: TritonServer, backends: MakeBackend, raw: bytes, why: str
) -> None:
    call = make_call()
    request = replace(call.request, fields={**call.request.fields, "logit_bias": Raw(raw)})
    with pytest.raises(RequestRejected, match=why):
        await collect(backends(triton, "bls"), replace(call, request=request))


async def test_a_long_conversation_is_rendered_where_it_holds_up_nobody(triton: TritonServer) -> None:
    rendered_in = []

    def now() -> datetime:
        rendered_in.append(threading.get_ident())
        return datetime.now(UTC)

    model = TritonModel(name="bls", chat_template="{{ strftime_now('%Y') }}{{ messages[0].content }}")
    backend = TritonBackend("a", Server(f"grpc://{triton.grpc_address}", backend="a", model="bls"), model, now=now)
    try:
        for size in (10, 100_000):
            await collect(backend, make_call(messages=[{"role": "user", "content": "x" * size}]))
        assert [ident == threading.get_ident() for ident in rendered_in] == [True, False]
    finally:
        await backend.aclose()


async def test_no_more_is_asked_than_the_context_window_leaves(
    triton: TritonServer, backends: MakeBackend, tmp_path: Path
) -> None:
    """An engine that ends there, told to go on, would seem to have ended of its own accord."""
    words = {word: number for number, word in enumerate(["?", "a", "b", "c"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 20}')
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    for adds_bos, left in ((True, 16), (False, 17)):
        backend = backends(triton, "bls", folder=tmp_path, adds_bos=adds_bos)
        for wanted, told in ((5, 5), (100, left), (None, left)):
            call = make_call("text_completion", prompt="a b c", **({} if wanted is None else {"max_tokens": wanted}))
            request_id = f"window-{adds_bos}-{wanted}"
            await collect(backend, replace(call, request_id=request_id))
            assert triton.event("received", request_id=request_id)["tensors"]["max_tokens"]["values"] == [told]


async def test_an_answer_that_begins_as_its_prompt_does_is_not_cut(triton: TritonServer, backends: MakeBackend) -> None:
    events = await collect(backends(triton, "llmapi_unary"), make_call("text_completion", prompt="Hello"))
    assert texts_of(events, "text_completion") == ["Hello there!"]


async def test_a_model_that_reached_a_stop_sequence_is_stopped_though_nobody_reads_on(
    triton: TritonServer, backends: MakeBackend
) -> None:
    script = Script(pieces=["a", "STOP", *["x"] * 1000], delay_ms=5)
    call = replace(make_call(stream=True, messages=says(script), stop="STOP"), request_id="reached-the-stop")
    async with aclosing(backends(triton, "bls").answer(call)) as events:
        async for event in events:
            if event.choices and event.choices[0].finish_reason:
                break
        await asyncio.to_thread(triton.event, "cancelled", request_id="reached-the-stop")


async def test_a_call_that_fails_late_does_not_have_the_model_looked_at_that_was_looked_at_since(
    triton: TritonServer, backends: MakeBackend
) -> None:
    backend = backends(triton, "bls")
    await backend.check(within_s=5)
    before = len(triton.events("received", request_id="warm-up"))
    late = Script(pieces=["a", Piece("b", garbage="no_text")], delay_ms=400)
    failing = asyncio.get_running_loop().create_task(ask(backend, late, stream=True))
    with pytest.raises(BackendProtocolError):
        await ask(backend, Script(pieces=[Piece("a", garbage="no_text")]))
    await ask(backend, Script())
    assert len(triton.events("received", request_id="warm-up")) == before + 1
    with pytest.raises(BackendProtocolError):
        await failing
    await ask(backend, Script())
    assert len(triton.events("received", request_id="warm-up")) == before + 1


async def test_a_model_folder_that_is_gone_is_said_and_used_again_once_it_is_back(
    triton: TritonServer, running: MakeBackend, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    backend = running(triton, "bls", folder=folder)
    await backend.check(within_s=5)
    folder.rename(tmp_path / "away")
    async with asyncio.timeout(5):
        while backend.capabilities is not None:
            await asyncio.sleep(0.02)
    with pytest.raises(BackendProtocolError, match="is not a folder"):
        await backend.check(within_s=5)
    (tmp_path / "away").rename(folder)
    async with asyncio.timeout(5):
        while backend.capabilities is None:
            await asyncio.sleep(0.02)


async def test_a_server_that_accepts_and_says_nothing_takes_the_connect_time_and_no_more(running: MakeBackend) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        silent: Any = SimpleNamespace(grpc_address=f"127.0.0.1:{listener.getsockname()[1]}")
        backend = running(silent, "bls")
        await asyncio.sleep(0)  # `run` is on its way, and waits longer than a call does
        began = asyncio.get_running_loop().time()
        with pytest.raises(BackendTimeout) as failure:
            await collect(backend, make_call(timeouts=Timeouts(connect_s=0.3)))
        assert failure.value.phase == "connect"
        assert asyncio.get_running_loop().time() - began < 2
        with pytest.raises(BackendTimeout):
            async with asyncio.timeout(0.5):
                await backend.check(within_s=0.5)


async def test_a_long_silence_is_broken_no_more_often_than_triton_lets_a_client(
    triton_installation: Installation, tmp_path: Path
) -> None:
    """With pings every 30 s a stream that was silent for 150 s was ended by Triton: too_many_pings."""
    ports = Ports(http=1, grpc=2, metrics=3)
    command = triton_command(triton_installation, repository=tmp_path, ports=ports)
    server = triton_installation.server / "bin" / "tritonserver"
    told = await asyncio.to_thread(
        subprocess.run, [server, "--help"], env=command.env, capture_output=True, text=True, check=False
    )
    option = (told.stdout + told.stderr).partition("--grpc-http2-min-recv-ping-interval-without-data")[2]
    least_ms = re.search(r"Default is (\d+)", option)
    assert least_ms is not None
    assert int(least_ms[1]) < KEEPALIVE_S * 1000


async def test_a_server_far_away_is_reached(triton: TritonServer, backends: MakeBackend) -> None:
    async def far(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server = await asyncio.open_connection("127.0.0.1", triton.ports.grpc)
        async with asyncio.TaskGroup() as group:
            group.create_task(_carry(reader, server[1]))
            group.create_task(_carry(server[0], writer))

    async with await asyncio.start_server(far, "127.0.0.1", 0) as link:
        address = f"127.0.0.1:{link.sockets[0].getsockname()[1]}"
        backend = TritonBackend(
            "a", Server(f"grpc://{address}", backend="a", model="bls"), TritonModel(name="bls", chat_template=CHATML)
        )
        try:
            assert await ask(backend, Script())
        finally:
            await backend.aclose()


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while part := await reader.read(65_536):
            await asyncio.sleep(0.15)
            writer.write(part)
    finally:
        writer.close()


@pytest.mark.slow
async def test_while_a_model_is_warmed_up_it_says_so_and_closing_fails_who_waits_for_it(
    start_triton: StartTriton, backends: MakeBackend
) -> None:
    server = await asyncio.to_thread(start_triton)
    models = server.children()
    for process in models:
        process.suspend()  # the server still answers for its models, and they no more
    try:
        backend = backends(server, "bls")
        waiting = asyncio.get_running_loop().create_task(collect(backend, make_call(within_s=30)))
        with pytest.raises(BackendOverloaded, match="is being warmed up"):
            async with asyncio.timeout(0.5):
                await backend.check(within_s=0.5)
        await backend.aclose()
        await asyncio.wait([waiting], timeout=5)
        assert not waiting.cancelled()
        with pytest.raises(BackendUnreachable):
            waiting.result()
    finally:
        for process in models:
            process.resume()


def _is_stopped(process: psutil.Process) -> bool:
    return all(psutil.Process(thread.id).status() == psutil.STATUS_STOPPED for thread in process.threads())


@pytest.mark.slow
async def test_a_server_too_busy_to_be_asked_keeps_its_models_in_use(
    start_triton: StartTriton, running: MakeBackend
) -> None:
    server = await asyncio.to_thread(start_triton)
    backend = running(server, "bls")
    await backend.check(within_s=5)
    process = psutil.Process(server.pid)
    process.suspend()
    while not _is_stopped(process):
        await asyncio.sleep(0.01)
    with pytest.raises(BackendTimeout, match=r"did not answer for model 'bls' within 0\.5 s"):
        await backend.check(within_s=0.5)
    await asyncio.sleep(ASK_WITHIN_S + 0.5)
    process.resume()
    await ask(backend, Script())
    assert len(server.events("received", request_id="warm-up")) == 1
