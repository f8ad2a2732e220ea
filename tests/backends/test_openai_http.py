"""What is particular to engines over HTTP; the rest is in `tests/contract/test_backends.py`."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import aiohttp
import pytest

from backends.backend import Timeouts
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
from backends.openai_http import OpenAIBackend, new_session
from tests.calls import collect, make_call, texts_of
from tests.upstream import (
    Close,
    Hang,
    Head,
    Raw,
    Reset,
    Send,
    Upstream,
    answers,
    chunk,
    completion,
    event,
    finish,
    sse,
    usage,
)

ANSWER = (chunk(role="assistant"), chunk("Hel"), chunk("lo"), finish(), usage(3, 2))


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with Upstream() as upstream:
        yield upstream


@pytest.fixture
async def backend(upstream: Upstream) -> AsyncIterator[OpenAIBackend]:
    backend = OpenAIBackend("a", upstream.url, wall_clock=lambda: 1_700_000_000.0)
    yield backend
    await backend.aclose()


async def test_a_frame_is_relayed_as_the_bytes_it_came_in(backend: OpenAIBackend, upstream: Upstream) -> None:
    head = b'{ "id":"chatcmpl-1","x":[1.50, 12345678901234567890], "object" : "chat.completion.chunk","created":1,'
    head += b'"model":"upstream-model", "choices" :[{"index":0,"delta":'
    first = head + b'{"role":"assistant","content":"\\u00fc"},"finish_reason":null}]}'
    middle = head + b'{"content":"\\u00fc", "y": 1e2}}]}'
    last = head + b'{},"finish_reason":"stop"}]}'
    upstream.plays(*sse(*(b"data: " + frame + b"\r\n\r\n" for frame in (first, middle, last))))
    assert [event.raw for event in await collect(backend, make_call(stream=True))] == [first, middle, last]


async def test_only_the_model_and_include_usage_are_rewritten(upstream: Upstream) -> None:
    backend = OpenAIBackend("a", upstream.url, upstream_model="org/Real-Model")
    upstream.plays(*sse(*ANSWER))
    call = make_call(stream=True, stream_options={"include_usage": False, "chunk": 2}, logit_bias={"1": -3}, user="u")
    await collect(backend, call)
    sent = {name: json.loads(bytes(raw)) for name, raw in call.request.fields.items()}
    assert upstream.requests[-1].json == {
        **sent,
        "model": "org/Real-Model",
        "stream_options": {"chunk": 2, "include_usage": True},
    }
    upstream.plays(*answers(completion("x")))
    await collect(backend, make_call())
    assert "stream_options" not in upstream.requests[-1].json
    assert [received.path for received in upstream.requests] == ["/v1/chat/completions"] * 2
    await backend.aclose()


async def test_the_engine_is_sent_our_headers_and_nothing_of_the_client(upstream: Upstream) -> None:
    backend = OpenAIBackend("a", upstream.url, api_key="ours", headers={"X-Team": "t"})
    upstream.plays(*sse(*ANSWER))
    await collect(backend, make_call(stream=True))
    headers = upstream.requests[-1].headers
    assert headers["authorization"] == "Bearer ours"
    assert headers["x-team"] == "t"
    assert headers["x-request-id"] == "req-1"
    assert set(headers) == {
        "host", "accept", "accept-encoding", "authorization", "content-length", "content-type", "user-agent",
        "x-request-id", "x-team",
    }  # fmt: skip
    await backend.aclose()


async def test_a_key_may_go_bare_in_a_header_of_its_own_and_a_query_with_every_url(upstream: Upstream) -> None:
    query = {"api-version": "2024-10-21", "a b": "c&d"}
    backend = OpenAIBackend("a", upstream.url, api_key="ours", api_key_header="api-key", query=query)
    upstream.plays(*answers(completion("x")))
    await collect(backend, make_call())
    await backend.check(within_s=1.0)
    asked, checked = upstream.requests
    assert asked.headers["api-key"] == checked.headers["api-key"] == "ours"
    assert "authorization" not in asked.headers
    assert asked.path == "/v1/chat/completions?api-version=2024-10-21&a+b=c%26d"
    assert checked.path == "/v1/models?api-version=2024-10-21&a+b=c%26d"
    await backend.aclose()


async def test_a_call_waits_for_a_free_connection_within_its_connect_time(upstream: Upstream) -> None:
    backend = OpenAIBackend("a", upstream.url, max_connections=2)
    upstream.plays(*sse(*ANSWER))
    answered = []
    async with asyncio.TaskGroup() as group:
        for _ in range(7):
            answered.append(group.create_task(collect(backend, make_call(stream=True))))
    assert {tuple(texts_of(task.result())) for task in answered} == {("Hello",)}
    assert upstream.connections == 2
    await backend.aclose()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_call_that_finds_no_connection_free_in_time_is_overload_and_no_fault(
    upstream: Upstream, stream: bool
) -> None:
    backend = OpenAIBackend("a", upstream.url, max_connections=1)
    upstream.plays(Head(), Send(event(chunk("x", role="assistant"))), Hang())
    async with aclosing(backend.answer(make_call(stream=True))) as events:
        await anext(events)
        for timeouts, error in (
            (Timeouts(connect_s=0.05), BackendOverloaded),
            (Timeouts(total_s=0.05), BackendTimeout),
        ):
            with pytest.raises(error) as failure:
                await collect(backend, make_call(stream=stream, timeouts=timeouts))
            assert type(failure.value) is error
    assert len(upstream.requests) == 1
    upstream.plays(*answers(completion("y")))
    assert texts_of(await collect(backend, make_call())) == ["y"]
    await backend.aclose()


async def test_a_call_cancelled_at_any_step_gives_its_connection_back(upstream: Upstream) -> None:
    backend = OpenAIBackend("a", upstream.url, max_connections=1)
    upstream.plays(*sse(*ANSWER))
    for steps in range(40):
        calls = [asyncio.get_running_loop().create_task(collect(backend, make_call(stream=True))) for _ in range(2)]
        for _ in range(steps):
            await asyncio.sleep(0)
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        assert texts_of(await collect(backend, make_call(stream=True, timeouts=Timeouts(connect_s=0.5)))) == ["Hello"]
    await backend.aclose()


async def test_closing_the_backend_fails_a_call_that_waits_for_a_connection(upstream: Upstream) -> None:
    backend = OpenAIBackend("a", upstream.url, max_connections=1)
    upstream.plays(Hang())
    async with asyncio.TaskGroup() as group:
        calls = [group.create_task(failure_of(backend, stream=True)) for _ in range(2)]
        await upstream.until_asked()
        await backend.aclose()
    assert [type(call.result()) for call in calls] == [BackendUnreachable] * 2
    assert len(upstream.requests) == 1


async def test_a_stream_that_is_packed_though_plain_was_asked_for_is_read(
    backend: OpenAIBackend, upstream: Upstream
) -> None:
    packer = zlib.compressobj(wbits=31)
    pieces = [packer.compress(event(frame)) + packer.flush(zlib.Z_SYNC_FLUSH) for frame in ANSWER]
    head = Head(headers={"Content-Type": "text/event-stream", "Content-Encoding": "gzip"})
    upstream.plays(head, *map(Send, pieces), Send(packer.flush()))
    assert texts_of(await collect(backend, make_call(stream=True))) == ["Hello"]
    assert upstream.requests[-1].headers["accept-encoding"] == "identity"


async def test_a_stream_that_is_packed_wrongly_is_a_protocol_error(backend: OpenAIBackend, upstream: Upstream) -> None:
    head = Head(headers={"Content-Type": "text/event-stream", "Content-Encoding": "gzip"})
    upstream.plays(head, Send(event(chunk("x"))))
    with pytest.raises(BackendProtocolError):
        await collect(backend, make_call(stream=True))


async def test_without_a_key_no_authorization_is_sent(backend: OpenAIBackend, upstream: Upstream) -> None:
    upstream.plays(*answers(completion("x")))
    await collect(backend, make_call())
    assert "authorization" not in upstream.requests[-1].headers


async def test_cookies_are_not_kept(upstream: Upstream) -> None:
    backend = OpenAIBackend("a", upstream.url.replace("127.0.0.1", "localhost"))
    upstream.plays(*answers(completion("x"), Set_Cookie="a=b"))
    await collect(backend, make_call())
    await collect(backend, make_call())
    assert "cookie" not in upstream.requests[-1].headers
    await backend.aclose()


async def test_a_large_request_arrives_whole(backend: OpenAIBackend, upstream: Upstream) -> None:
    upstream.plays(*answers(completion("x")))
    long = "ü" * 2_000_000
    await collect(backend, make_call(messages=[{"role": "user", "content": long}]))
    assert upstream.requests[-1].json["messages"][0]["content"] == long


@pytest.mark.parametrize("done", [True, False])
async def test_a_connection_is_used_again_after_answers_of_every_kind(
    backend: OpenAIBackend, upstream: Upstream, done: bool
) -> None:
    for _ in range(3):
        upstream.plays(*sse(*ANSWER, done=done))
        assert texts_of(await collect(backend, make_call(stream=True))) == ["Hello"]
        upstream.plays(*answers(completion("x")))
        await collect(backend, make_call())
        upstream.plays(*answers({"error": {"message": "no"}}, 400))
        with pytest.raises(RequestRejected):
            await collect(backend, make_call())
    assert upstream.connections == 1


async def test_a_connection_is_not_used_again_after_an_answer_that_was_given_up(
    backend: OpenAIBackend, upstream: Upstream
) -> None:
    upstream.plays(*sse(*ANSWER))
    async with aclosing(backend.answer(make_call(stream=True))) as events:
        await anext(events)
    assert texts_of(await collect(backend, make_call(stream=True))) == ["Hello"]
    assert upstream.connections == 2


async def test_an_engine_that_keeps_the_stream_open_after_done_costs_the_connection_and_no_time(
    backend: OpenAIBackend, upstream: Upstream
) -> None:
    upstream.plays(*sse(*ANSWER), Hang())
    assert texts_of(await collect(backend, make_call(stream=True, within_s=1.0))) == ["Hello"]
    await upstream.until_hung_up()


@pytest.mark.parametrize("end", [Close(), Reset(), Hang()])
async def test_an_answer_whose_choices_have_finished_is_not_lost_for_want_of_its_end(
    backend: OpenAIBackend, upstream: Upstream, end: Any
) -> None:
    upstream.plays(*sse(*ANSWER, done=False), end)
    call = make_call(stream=True, timeouts=Timeouts(idle_s=0.1), within_s=3.0)
    assert texts_of(await collect(backend, call)) == ["Hello"]


async def test_a_stream_that_ends_before_all_that_began_finished_is_broken(
    backend: OpenAIBackend, upstream: Upstream
) -> None:
    upstream.plays(*sse(chunk("a", 0), chunk("b", 1), finish(0), usage(1, 1)))
    with pytest.raises(BackendProtocolError, match="broke off"):
        await collect(backend, make_call(stream=True, n=2))


async def test_an_engine_that_ends_neither_stream_nor_connection_is_left_within_seconds(
    backend: OpenAIBackend, upstream: Upstream
) -> None:
    upstream.plays(*sse(*ANSWER, done=False), Hang())
    started = asyncio.get_running_loop().time()
    await collect(backend, make_call(stream=True, timeouts=Timeouts(idle_s=4)))
    assert asyncio.get_running_loop().time() - started < 2
    await upstream.until_hung_up()


async def test_a_choice_that_has_not_begun_is_waited_for_and_missed(backend: OpenAIBackend, upstream: Upstream) -> None:
    upstream.plays(*sse(chunk("a", 0), finish(0), done=False), Hang())
    with pytest.raises(BackendTimeout) as failure:
        await collect(backend, make_call(stream=True, n=2, timeouts=Timeouts(idle_s=0.05)))
    assert failure.value.phase == "idle"


def text_of_prompt(index: int) -> dict[str, Any]:
    choice = {"index": index, "text": "a", "logprobs": None, "finish_reason": "stop"}
    return {**chunk(), "object": "text_completion", "choices": [choice]}


async def test_of_several_prompts_each_is_waited_for(backend: OpenAIBackend, upstream: Upstream) -> None:
    call = make_call("text_completion", prompt=["x", "y"], stream=True, timeouts=Timeouts(idle_s=0.05))
    upstream.plays(*sse(text_of_prompt(0), done=False), Hang())
    with pytest.raises(BackendTimeout) as failure:
        await collect(backend, call)
    assert failure.value.phase == "idle"


async def test_a_stream_that_ends_before_all_choices_began_is_broken_unless_the_engine_says_that_it_is_done(
    backend: OpenAIBackend, upstream: Upstream
) -> None:
    for done in (True, False):
        upstream.plays(*sse(chunk("a", 0), finish(0), usage(1, 1), done=done))
        call = make_call(stream=True, n=2)
        if done:
            assert texts_of(await collect(backend, call)) == ["a"]
        else:
            with pytest.raises(BackendProtocolError, match="broke off"):
                await collect(backend, call)


async def test_a_deadline_holds_even_where_there_is_more_to_read(backend: OpenAIBackend, upstream: Upstream) -> None:
    upstream.plays(*sse(*ANSWER))
    seen: list[int] = []
    with pytest.raises(BackendTimeout):
        await read_slowly(seen, backend, within_s=0.05)
    assert len(seen) < len(ANSWER)


async def read_slowly(seen: list[int], backend: OpenAIBackend, within_s: float) -> None:
    async with aclosing(backend.answer(make_call(stream=True, within_s=within_s))) as events:
        async for one in events:
            seen.append(len(one.raw))
            await asyncio.sleep(0.1)


async def test_a_stream_waits_for_the_choices_that_have_not_begun(backend: OpenAIBackend, upstream: Upstream) -> None:
    upstream.plays(*sse(chunk("a", 0), finish(0), chunk("b", 1), finish(1), usage(1, 2)))
    assert texts_of(await collect(backend, make_call(stream=True, n=2))) == ["a", "b"]


@pytest.mark.parametrize("frames", [(), (b": nothing\n\n",), (b"data: [DONE]\n\n",), (event(usage(1, 0)),)])
async def test_a_stream_without_a_choice_is_broken(
    backend: OpenAIBackend, upstream: Upstream, frames: tuple[bytes, ...]
) -> None:
    upstream.plays(Head(), *map(Send, frames))
    with pytest.raises(BackendProtocolError):
        await collect(backend, make_call(stream=True))


async def test_the_last_frame_counts_without_its_blank_line(backend: OpenAIBackend, upstream: Upstream) -> None:
    upstream.plays(Head(), Send(event(chunk("x"))), Send(event(finish()).rstrip()))
    assert texts_of(await collect(backend, make_call(stream=True))) == ["x"]


async def test_a_last_frame_cut_short_is_a_broken_answer(backend: OpenAIBackend, upstream: Upstream) -> None:
    upstream.plays(Head(), Send(event(chunk("x"))), Send(event(finish())[:-20]))
    with pytest.raises(BackendProtocolError, match="broke off"):
        await collect(backend, make_call(stream=True))


@pytest.mark.parametrize(
    "frame",
    [b"data: null\n\n", b"data: 5\n\n", b'data: {"choices": 3}\n\n', b'data: {"x": "\xff"}\n\n', b"data: {}}\n\n"],
)
async def test_a_frame_that_is_not_openais_json_is_never_yielded(
    backend: OpenAIBackend, upstream: Upstream, frame: bytes
) -> None:
    upstream.plays(*sse(chunk("x"), frame, finish()))
    with pytest.raises(BackendProtocolError):
        await collect(backend, make_call(stream=True))


async def test_a_frame_beyond_4_mib_is_refused(backend: OpenAIBackend, upstream: Upstream) -> None:
    upstream.plays(Head(), *[Send(b"x" * 1_000_000)] * 6)
    with pytest.raises(BackendProtocolError, match="4194304"):
        await collect(backend, make_call(stream=True))


async def test_an_error_may_be_null_or_a_word_of_the_answer(backend: OpenAIBackend, upstream: Upstream) -> None:
    upstream.plays(*sse({**chunk('the "error" is'), "error": None}, finish()))
    assert texts_of(await collect(backend, make_call(stream=True))) == ['the "error" is']


@pytest.mark.parametrize(
    ("frame", "error"),
    [
        ({"error": {"message": "m", "type": "server_error", "code": None}}, BackendFailed),
        ({"error": {"message": "m", "code": 502}}, BackendFailed),
        ({"error": {"message": "m", "type": "BadRequestError", "code": 400, "param": "p"}}, RequestRejected),
        ({"error": {"message": "m", "type": "exceed_context_size_error"}}, RequestRejected),
        ({"error": {"message": "m", "type": "tokens", "code": "rate_limit_exceeded"}}, BackendOverloaded),
        ({"error": {"message": "m", "type": "overloaded_error"}}, BackendOverloaded),
        ({"error": "m", "error_type": "overloaded"}, BackendOverloaded),
        ({"error": "m", "error_type": "validation"}, RequestRejected),
        ({"error": {"message": "m", "code": "model_not_found"}}, BackendRefusedCredentials),
        ({"error": {"message": "m", "code": 504}}, BackendTimeout),
        ({"error": "boom"}, BackendFailed),
    ],
)
@pytest.mark.parametrize("before", [(), (chunk("x"),)])
async def test_an_error_inside_a_200_stream_is_an_error_by_its_own_word(
    backend: OpenAIBackend, upstream: Upstream, before: Any, frame: dict[str, Any], error: type[BackendError]
) -> None:
    upstream.plays(*sse(*before, frame))
    with pytest.raises(error) as failure:
        await collect(backend, make_call(stream=True))
    assert type(failure.value) is error


async def test_an_event_named_error_is_one_whatever_it_holds(backend: OpenAIBackend, upstream: Upstream) -> None:
    upstream.plays(*sse(b'event: error\ndata: {"message": "gone", "type": "overloaded_error"}\n\n'))
    with pytest.raises(BackendOverloaded, match="gone"):
        await collect(backend, make_call(stream=True))


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (400, {"error": {"message": "m", "type": "t", "code": "c", "param": "p"}}, RequestRejected),
        (400, {"error": {"message": "m", "code": "model_not_found"}}, BackendRefusedCredentials),
        (401, {"error": {"message": "Incorrect API key provided: sk-secret"}}, BackendRefusedCredentials),
        (402, {"error": {"message": "m"}}, BackendRefusedCredentials),
        (403, b"forbidden", BackendRefusedCredentials),
        (404, {"error": {"message": "m"}}, BackendRefusedCredentials),
        (404, b"<html>", BackendRefusedCredentials),
        (408, {}, BackendTimeout),
        (413, b"too large", RequestRejected),
        (422, {"detail": [{"loc": ["body", "x"], "msg": "m"}]}, RequestRejected),
        (429, {"error": {"message": "m"}}, BackendOverloaded),
        (500, {"error": {"message": "m"}}, BackendFailed),
        (502, b"<html>bad gateway</html>", BackendFailed),
        (503, {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}, BackendOverloaded),
        (504, b"", BackendTimeout),
        (529, {"error": {"message": "m"}}, BackendOverloaded),
        (302, b"", BackendProtocolError),
    ],
)
async def test_a_status_that_is_not_200_is_an_error_by_its_cause(
    backend: OpenAIBackend, upstream: Upstream, status: int, body: object, error: type[BackendError]
) -> None:
    upstream.plays(*answers(body, status, Location="/elsewhere"))
    with pytest.raises(error) as failure:
        await collect(backend, make_call(stream=True))
    assert type(failure.value) is error
    assert "sk-secret" not in str(failure.value)
    assert len(upstream.requests) == 1


async def test_an_error_nested_beyond_the_stack_is_still_an_error_by_its_status(
    backend: OpenAIBackend, upstream: Upstream
) -> None:
    upstream.plays(*answers(b'{"error":' + b"[" * 5000 + b"]" * 5000 + b"}", 500))
    with pytest.raises(BackendFailed):
        await collect(backend, make_call())


async def test_a_last_frame_nested_beyond_the_stack_is_passed_over(backend: OpenAIBackend, upstream: Upstream) -> None:
    upstream.plays(*sse(*ANSWER, done=False), Send(b"data: " + b"[" * 5000 + b"]" * 5000))
    assert texts_of(await collect(backend, make_call(stream=True))) == ["Hello"]


async def test_a_rejection_carries_the_engines_own_words(backend: OpenAIBackend, upstream: Upstream) -> None:
    upstream.plays(*answers({"error": {"message": "bad n", "type": "t", "code": "c", "param": "n"}}, 422))
    with pytest.raises(RequestRejected) as failure:
        await collect(backend, make_call())
    rejection = failure.value
    assert (rejection.message, rejection.status, rejection.error_type) == ("bad n", 422, "t")
    assert (rejection.code, rejection.param) == ("c", "n")


@pytest.mark.parametrize(
    ("headers", "retry_after_s"),
    [
        ({"Retry_After": "7"}, 7.0),
        ({"Retry_After": "0.5"}, 0.5),
        ({"Retry_After": "Tue, 14 Nov 2023 22:13:50 GMT"}, 30.0),
        ({"Retry_After": "Tue, 14 Nov 2023 22:00:00 GMT"}, 0.0),
        ({"Retry_After": "-3"}, 0.0),
        ({"Retry_After": "nan"}, None),
        ({"Retry_After": "soon"}, None),
        ({"retry_after_ms": "250", "Retry_After": "9"}, 0.25),
        ({}, None),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
async def test_the_engines_retry_after_is_kept_in_seconds(
    backend: OpenAIBackend, upstream: Upstream, status: int, headers: dict[str, str], retry_after_s: float | None
) -> None:
    upstream.plays(*answers({"error": {"message": "busy"}}, status, **headers))
    with pytest.raises(BackendOverloaded) as failure:
        await collect(backend, make_call())
    assert failure.value.retry_after_s == retry_after_s


async def test_a_json_answer_to_a_request_for_a_stream_is_one_whole_event(
    backend: OpenAIBackend, upstream: Upstream
) -> None:
    upstream.plays(*answers(completion("Hello")))
    [only] = await collect(backend, make_call(stream=True))
    assert only.whole
    assert texts_of([only]) == ["Hello"]


@pytest.mark.parametrize("body", [{}, {"choices": []}, {"choices": None}, [], b"", b"data: {}\n\n", b"<html>"])
async def test_a_whole_answer_without_a_choice_is_a_protocol_error(
    backend: OpenAIBackend, upstream: Upstream, body: object
) -> None:
    upstream.plays(*answers(body))
    with pytest.raises(BackendProtocolError):
        await collect(backend, make_call())


async def test_a_whole_answer_has_a_largest_size(backend: OpenAIBackend, upstream: Upstream) -> None:
    upstream.plays(Head(headers={"Content-Type": "application/json"}), *[Send(b" " * 1_048_576)] * 33)
    with pytest.raises(BackendProtocolError, match="33554432"):
        await collect(backend, make_call())


async def test_what_does_not_speak_http_is_a_protocol_error(backend: OpenAIBackend, upstream: Upstream) -> None:
    upstream.plays(Raw(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"), Hang())
    with pytest.raises(BackendProtocolError):
        await collect(backend, make_call())


async def test_an_engine_that_is_not_there_is_unreachable(upstream: Upstream, unused_tcp_port: int) -> None:
    backend = OpenAIBackend("a", f"http://127.0.0.1:{unused_tcp_port}/v1")
    for stream in (True, False):
        with pytest.raises(BackendUnreachable):
            await collect(backend, make_call(stream=stream))
    with pytest.raises(BackendUnreachable):
        await backend.check(within_s=1.0)
    await backend.aclose()


async def test_a_connection_that_does_not_come_meets_the_connect_clock(full_listener: int) -> None:
    backend = OpenAIBackend("a", f"http://127.0.0.1:{full_listener}/v1")
    with pytest.raises(BackendTimeout) as failure:
        await collect(backend, make_call(stream=True, timeouts=Timeouts(connect_s=0.1)))
    assert failure.value.phase == "connect"
    await backend.aclose()


async def test_frames_without_content_do_not_stop_the_first_token_clock(
    backend: OpenAIBackend, upstream: Upstream
) -> None:
    upstream.plays(*sse(chunk(role="assistant", content=""), b": alive\n\n", chunk(), done=False), Hang())
    with pytest.raises(BackendTimeout) as failure:
        await collect(backend, make_call(stream=True, timeouts=Timeouts(first_token_s=0.1, idle_s=0.01)))
    assert failure.value.phase == "first_token"


async def test_a_slow_reader_does_not_run_out_the_idle_clock(backend: OpenAIBackend, upstream: Upstream) -> None:
    upstream.plays(*sse(*ANSWER))
    seen = 0
    async with aclosing(backend.answer(make_call(stream=True, timeouts=Timeouts(idle_s=0.02)))) as events:
        async for _ in events:
            seen += 1
            await asyncio.sleep(0.03)
    assert seen == len(ANSWER)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("given_session", [True, False])
async def test_closing_the_backend_fails_the_calls_in_flight(
    upstream: Upstream, stream: bool, given_session: bool
) -> None:
    session = new_session() if given_session else None
    backend = OpenAIBackend("a", upstream.url, session=session)
    upstream.plays(Head(), Send(event(chunk("x"))), Hang())
    async with asyncio.TaskGroup() as group:
        call = group.create_task(failure_of(backend, stream))
        await upstream.until_asked()
        await backend.aclose()
    assert isinstance(call.result(), BackendUnreachable)
    await upstream.until_hung_up()
    if session is not None:
        assert not session.closed
        await session.close()


async def test_a_session_closed_under_its_backend_makes_it_unreachable(upstream: Upstream) -> None:
    session = new_session()
    backend = OpenAIBackend("a", upstream.url, session=session)
    await session.close()
    assert isinstance(await failure_of(backend, stream=True), BackendUnreachable)


async def failure_of(backend: OpenAIBackend, stream: bool) -> BackendError | None:
    try:
        await collect(backend, make_call(stream=stream))
    except BackendError as error:
        return error
    return None


@pytest.mark.parametrize("stream", [True, False])
async def test_cancelled_at_any_step_of_the_loop_it_leaves_nothing_behind(
    backend: OpenAIBackend, upstream: Upstream, stream: bool
) -> None:
    upstream.plays(*(sse(*ANSWER, done=False) if stream else ()), Hang())
    for steps in range(40):
        task = asyncio.get_running_loop().create_task(collect(backend, make_call(stream=stream)))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert backend.load.in_flight == 0
    assert upstream.requests
    await upstream.until_hung_up(len(upstream.requests))


@pytest.mark.parametrize(
    ("acts", "error"),
    [
        (answers({"data": []}), None),
        (answers({"error": {"message": "no such path"}}, 404), None),
        (answers({"error": {"message": "Loading model", "type": "unavailable_error"}}, 503), BackendOverloaded),
        (answers({}, 401), BackendRefusedCredentials),
        (answers({}, 500), BackendFailed),
        ((Hang(),), BackendTimeout),
        ((Close(),), BackendUnreachable),
    ],
)
async def test_a_check_says_why_the_engine_cannot_answer(
    backend: OpenAIBackend, upstream: Upstream, acts: Any, error: type[BackendError] | None
) -> None:
    upstream.plays(*acts)
    if error is None:
        await backend.check(within_s=1.0)
    else:
        with pytest.raises(error):
            await backend.check(within_s=0.1)
    assert upstream.requests[-1].path == "/v1/models"


@pytest.mark.parametrize("url", ["", "localhost:8000/v1", "ftp://x/v1", "/v1"])
def test_a_base_url_that_is_none_is_refused_at_once(url: str) -> None:
    with pytest.raises(ValueError, match="no http"):
        OpenAIBackend("a", url)


async def test_backends_can_share_one_session(upstream: Upstream) -> None:
    async with new_session() as session:
        upstream.plays(*answers(completion("x")))
        for name in ("a", "b"):
            backend = OpenAIBackend(name, upstream.url, session=session)
            await collect(backend, make_call())
            await backend.aclose()
        assert isinstance(session, aiohttp.ClientSession)
    assert upstream.connections == 1
