"""The contract of `backends.backend.Backend`, over every implementation of it."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import msgspec
import pytest

from backends.backend import Backend, Call, Timeouts
from backends.chat import Event, Message, Usage
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
from backends.fan_out import FanOut
from backends.openai_http import OpenAIBackend
from backends.scripted import Script, ScriptedBackend
from backends.triton.backend import TritonBackend
from backends.triton.model import TritonModel
from backends.triton.server import TritonServer as Connection
from tests import triton_models
from tests.calls import MODEL, collect, collect_into, make_call, texts_of, whole_of
from tests.triton import TritonServer
from tests.upstream import (
    Act,
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
    usage,
)

pytestmark = pytest.mark.usefixtures("one_loop")

TOKENS = ("Hel", "lo ", "wörld")
PROMPT_TOKENS = 7


class Rig(ABC):
    """A backend and the engine behind it. `n` is how many choices the suite asks it for."""

    backend: Backend
    n = 1
    carries_unknown_fields = True
    """Whether a field that nobody knows goes to the engine. Typed tensors leave no room for one: it is refused."""
    says_retry_after = True
    cannot_play: frozenset[str] = frozenset()
    """Faults that the engine's protocol does not have."""

    @abstractmethod
    def plays(self, script: Script) -> None:
        """From now on, what the engine does with every request."""

    @abstractmethod
    async def until_hung_up(self) -> None:
        """Return when the engine has seen us leave all the calls of one answer."""

    @abstractmethod
    def asked(self) -> list[dict[str, Any]]:
        """The bodies that reached the engine."""


class ScriptedRig(Rig):
    def __init__(self) -> None:
        self.backend = self.engine = ScriptedBackend("a")
        self._calls: list[Call] = []

    def plays(self, script: Script) -> None:
        def play(call: Call) -> Script:
            self._calls.append(call)
            return script

        self.engine.script = play

    async def until_hung_up(self) -> None:
        assert self.engine.cancelled == self.engine.calls
        assert self.engine.in_flight == 0

    def asked(self) -> list[dict[str, Any]]:
        return [msgspec.json.decode(msgspec.json.encode(call.request.fields)) for call in self._calls]


class HttpRig(Rig):
    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.backend = OpenAIBackend("a", upstream.url)
        self._script = Script()

    def plays(self, script: Script) -> None:
        self.upstream.plays_for = lambda received: _acts(script, received.json.get("stream", False), received.path)

    async def until_hung_up(self) -> None:
        await self.upstream.until_hung_up(len(self.upstream.requests))

    def asked(self) -> list[dict[str, Any]]:
        return [received.json for received in self.upstream.requests]


class TritonRig(Rig):
    """A real Triton and its scripted model, which finds its script in the prompt."""

    carries_unknown_fields = False
    says_retry_after = False
    # A BLS model gives no finish_reason: the end of its stream is the end. A broken connection has tests of its own.
    cannot_play = frozenset({"truncate", "reset"})

    def __init__(self, server: TritonServer, *, alone: bool) -> None:
        self.server = server
        if not alone:
            # Of several calls that fail together each cancels the others while they end, which this Triton does not
            # always survive (see REAL_CODES_SINCE). What a fan-out makes of failures is seen over the other engines.
            self.cannot_play |= frozenset({"unreachable", "overloaded", "error", "refused", "reject"})
            self.cannot_play |= frozenset({"garbage", "midstream_error"})
        connection = Connection(f"grpc://{server.grpc_address}", backend="a", model="bls", real_codes=True)
        model = TritonModel(name="bls", chat_template="{{ messages[-1].content }}")
        self.backend = self._prompted = Prompted(TritonBackend("a", connection, model))
        self._before = len(server.events())

    def plays(self, script: Script) -> None:
        self._prompted.prompt = str(_as_triton_plays(script))

    async def until_hung_up(self) -> None:
        async with asyncio.timeout(5):
            while len(self._events("cancelled")) < len(self._events("received")):
                await asyncio.sleep(0.002)

    def asked(self) -> list[dict[str, Any]]:
        return self._events("received")

    def _events(self, kind: str) -> list[dict[str, Any]]:
        events = self.server.events()[self._before :]
        return [event for event in events if event["event"] == kind and event["id"] != "warm-up"]


class Prompted:
    """A backend whose every request says `prompt`."""

    def __init__(self, backend: TritonBackend) -> None:
        self._backend = backend
        self.prompt = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def answer(self, call: Call) -> Any:
        chat = call.request.operation == "chat"
        said: dict[str, Any] = {"messages": [{"role": "user", "content": self.prompt}]} if chat else {}
        fields = call.request.with_fields(**(said or {"prompt": self.prompt}))
        messages = tuple(Message(**message) for message in said.get("messages", ()))
        request = msgspec.structs.replace(call.request, fields=fields, messages=messages, prompt=self.prompt)
        return self._backend.answer(msgspec.structs.replace(call, request=request))


def _as_triton_plays(script: Script) -> triton_models.Script:
    after = script.fault_after_tokens
    codes: dict[str, tuple[Any, str]] = {
        "unreachable": ("UNAVAILABLE", "gone"),
        "overloaded": ("UNAVAILABLE", "Exceeds maximum queue size"),
        "error": ("INTERNAL", "broken"),
        "midstream_error": ("INTERNAL", "boom"),
        "refused": ("NOT_FOUND", "no such model"),
        "reject": ("INVALID_ARG", "no"),
    }
    code, said = codes.get(script.fault, ("INTERNAL", ""))
    pieces: list[str | triton_models.Piece] = list(script.tokens)
    if script.fault == "garbage":
        pieces[after:] = [triton_models.Piece(garbage="no_text")]
    return triton_models.Script(
        pieces=pieces,
        prompt_tokens=script.prompt_tokens or 0,
        hang_after=after if script.fault == "hang" else None,
        error_after=after if script.fault in codes else None,
        error=said,
        code=code,
    )


class FanOutRig(Rig):
    n = 3

    def __init__(self, inner: Rig) -> None:
        self._inner = inner
        self.backend = FanOut(inner.backend, 1)
        self.carries_unknown_fields = inner.carries_unknown_fields
        self.says_retry_after = inner.says_retry_after
        self.cannot_play = inner.cannot_play

    def plays(self, script: Script) -> None:
        self._inner.plays(script)

    async def until_hung_up(self) -> None:
        await self._inner.until_hung_up()

    def asked(self) -> list[dict[str, Any]]:
        return self._inner.asked()


def _acts(script: Script, stream: bool, path: str) -> tuple[Act, ...]:
    """The script as an HTTP engine would play it."""
    before = {
        "unreachable": (Close(),),
        "overloaded": answers({"error": {"message": "busy"}}, 503, Retry_After=str(script.retry_after_s)),
        "error": answers({"error": {"message": "broken"}}, 500),
        "refused": answers({"error": {"message": "bad key sk-1234"}}, 401),
        "reject": answers({"error": {"message": "no", "code": "scripted", "type": "invalid_request_error"}}, 400),
    }
    if script.fault in before:
        return before[script.fault]
    if stream:
        return _stream_acts(script, chat="chat" in path)
    whole: dict[str, tuple[Act, ...]] = {
        "hang": (Hang(),),
        "garbage": answers(b'{"choices": [oops'),
        "truncate": (Head(200, {"Content-Length": "1000"}), Raw(b'{"choices": ['), Close()),
        "midstream_error": answers({"error": {"message": "boom", "code": 500}}),
        "reset": (Reset(),),
    }
    if script.fault in whole:
        return whole[script.fault]
    text = "".join(script.tokens)
    answer = completion(text, prompt_tokens=PROMPT_TOKENS, completion_tokens=len(script.tokens))
    if "chat" not in path:
        answer["choices"] = [{"index": 0, "text": text, "finish_reason": "stop"}]
    return answers(answer)


def _stream_acts(script: Script, chat: bool) -> tuple[Act, ...]:
    faults: dict[str, tuple[Act, ...]] = {
        "hang": (Hang(),),
        "truncate": (),
        "garbage": (Send(b"data: {oops\n\n"),),
        "midstream_error": (Send(event({"error": {"message": "boom", "type": "server_error"}})),),
        "reset": (Reset(),),
    }
    frames = [chunk(role="assistant"), *map(chunk, script.tokens)]
    ending = [finish(), usage(PROMPT_TOKENS, len(script.tokens))]
    if not chat:
        frames = [_text_chunk(token) for token in ("", *script.tokens)]
        ending[0] = _text_chunk("", "stop")
    if script.fault == "none":
        return (Head(), *(Send(event(frame)) for frame in frames + ending), Send(b"data: [DONE]\n\n"))
    shown = frames[: script.fault_after_tokens + 1] if script.fault_after_tokens else []
    return (Head(), *(Send(event(frame)) for frame in shown), *faults[script.fault])


def _text_chunk(text: str, finish_reason: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "finish_reason": finish_reason}
    return {**chunk(), "object": "text_completion", "choices": [choice]}


RIGS = ["scripted", "http", "triton", "fan_out over scripted", "fan_out over http", "fan_out over triton"]


@pytest.fixture(params=RIGS)
async def rig(request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    async with Upstream() as upstream:
        inner: Rig
        if "triton" in request.param:
            inner = TritonRig(request.getfixturevalue("triton"), alone="fan_out" not in request.param)
        else:
            inner = HttpRig(upstream) if "http" in request.param else ScriptedRig()
        yield FanOutRig(inner) if "fan_out" in request.param else inner
        await inner.backend.aclose()


@pytest.fixture(params=[True, False], ids=["stream", "whole"])
def stream(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def good(**more: Any) -> Script:
    return Script(tokens=TOKENS, prompt_tokens=PROMPT_TOKENS, **more)


@pytest.mark.parametrize("operation", ["chat", "text_completion"])
async def test_an_answer_is_whole_or_a_stream_as_asked_with_all_text_and_usage(
    rig: Rig, stream: bool, operation: Any
) -> None:
    rig.plays(good())
    events = await collect(rig.backend, make_call(operation, stream=stream, n=rig.n))

    assert [event.whole for event in events] == [True] if not stream else not any(event.whole for event in events)
    assert texts_of(events, operation) == ["".join(TOKENS)] * rig.n
    assert {choice["finish_reason"] for choice in whole_of(events, operation)["choices"]} == {"stop"}
    assert [event.usage for event in events if event.usage is not None][-1] == Usage(
        prompt_tokens=PROMPT_TOKENS * rig.n, completion_tokens=len(TOKENS) * rig.n
    )
    assert rig.backend.load.in_flight == 0


async def test_every_frame_of_an_answer_has_the_same_id(rig: Rig) -> None:
    rig.plays(good())
    events = await collect(rig.backend, make_call(stream=True, n=rig.n))
    assert len({msgspec.json.decode(event.raw)["id"] for event in events}) == 1


async def test_fields_that_nobody_knows_reach_the_engine_untouched(rig: Rig, stream: bool) -> None:
    if not rig.carries_unknown_fields:
        pytest.skip("refused by name, see test_triton.py")
    rig.plays(good())
    odd: dict[str, Any] = {"x_unknown": {"deep": [1, None, "ü"]}, "temperature": 0.1, "stream_options": {"x": 1}}
    await collect(rig.backend, make_call(stream=stream, n=rig.n, **odd))
    for asked in rig.asked():
        assert asked["x_unknown"] == odd["x_unknown"]
        assert asked["temperature"] == 0.1
        assert asked["stream_options"]["x"] == 1
        assert asked["model"] == MODEL
    assert len(rig.asked()) == rig.n


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("unreachable", BackendUnreachable),
        ("overloaded", BackendOverloaded),
        ("error", BackendFailed),
        ("refused", BackendRefusedCredentials),
        ("reject", RequestRejected),
        ("garbage", BackendProtocolError),
        ("midstream_error", BackendFailed),
        ("reset", BackendUnreachable),
    ],
)
async def test_a_failure_before_the_first_event_is_an_error_by_its_cause(
    rig: Rig, stream: bool, fault: Any, error: type[BackendError]
) -> None:
    if fault in rig.cannot_play:
        pytest.skip("not to be played")
    rig.plays(good(fault=fault, retry_after_s=2.0))
    with pytest.raises(error) as failure:
        await collect(rig.backend, make_call(stream=stream, n=rig.n))
    assert type(failure.value) is error
    assert (failure.value.backend, failure.value.model) == ("a", MODEL)
    assert failure.value.retry_after_s == (2.0 if fault == "overloaded" and rig.says_retry_after else None)
    assert rig.backend.load.in_flight == 0


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("garbage", BackendProtocolError),
        ("midstream_error", BackendFailed),
        ("reset", BackendProtocolError),
        ("truncate", BackendProtocolError),
    ],
)
@pytest.mark.parametrize("after", [1, 2, 3])
async def test_a_stream_that_fails_later_raises_after_what_came_before(
    rig: Rig, fault: Any, error: type[BackendError], after: int
) -> None:
    if fault in rig.cannot_play:
        pytest.skip("not to be played")
    rig.plays(good(fault=fault, fault_after_tokens=after))
    seen: list[Event] = []
    with pytest.raises(error):
        await collect_into(seen, rig.backend, make_call(stream=True, n=rig.n))
    # One choice shows exactly its tokens; of several, one may fail while another's tokens are still on their way.
    assert (texts_of(seen)[0] == "".join(TOKENS[:after])) or rig.n > 1


async def test_an_answer_that_breaks_off_is_never_whole(rig: Rig) -> None:
    if "truncate" in rig.cannot_play:
        pytest.skip("not to be played")
    rig.plays(good(fault="truncate", fault_after_tokens=1))
    with pytest.raises(BackendError):
        await collect(rig.backend, make_call(n=rig.n))


@pytest.mark.parametrize(
    ("after", "timeouts", "within_s", "phase"),
    [
        (0, Timeouts(first_token_s=0.05), 5.0, "first_token"),
        (2, Timeouts(idle_s=0.05), 5.0, "idle"),
        (0, Timeouts(total_s=0.05), 5.0, "total"),
        (2, Timeouts(total_s=0.1), 5.0, "total"),
        (2, Timeouts(), 0.1, "total"),
    ],
)
async def test_a_stream_that_hangs_meets_the_clock_of_its_phase(
    rig: Rig, after: int, timeouts: Timeouts, within_s: float, phase: str
) -> None:
    rig.plays(good(fault="hang", fault_after_tokens=after))
    with pytest.raises(BackendTimeout) as failure:
        await collect(rig.backend, make_call(stream=True, n=rig.n, timeouts=timeouts, within_s=within_s))
    assert failure.value.phase == phase
    assert rig.backend.load.in_flight == 0


async def test_a_whole_answer_may_take_until_the_deadline_and_no_longer(rig: Rig) -> None:
    rig.plays(good(fault="hang"))
    started = asyncio.get_running_loop().time()
    with pytest.raises(BackendTimeout) as failure:
        await collect(
            rig.backend, make_call(n=rig.n, timeouts=Timeouts(first_token_s=0.01, idle_s=0.01), within_s=0.15)
        )
    assert failure.value.phase == "total"
    assert 0.14 <= asyncio.get_running_loop().time() - started < 1


async def test_a_call_whose_deadline_has_passed_fails_at_once(rig: Rig, stream: bool) -> None:
    rig.plays(good(fault="hang"))
    with pytest.raises(BackendTimeout):
        await collect(rig.backend, make_call(stream=stream, n=rig.n, within_s=-1))


@pytest.mark.parametrize("after", [0, 1, 3])
async def test_cancelling_hangs_up_on_the_engine_wherever_it_is(rig: Rig, stream: bool, after: int) -> None:
    rig.plays(good(fault="hang", fault_after_tokens=after))
    waiting = asyncio.Event()
    expected = (after + 1 if after else 0) * rig.n if stream else 0

    async def consume() -> None:
        seen = 0
        if not expected:
            waiting.set()
        async with aclosing(rig.backend.answer(make_call(stream=stream, n=rig.n))) as events:
            async for _ in events:
                seen += 1
                if seen == expected:
                    waiting.set()

    task = asyncio.get_running_loop().create_task(consume())
    await waiting.wait()
    while len(rig.asked()) < rig.n:
        await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    await rig.until_hung_up()
    assert rig.backend.load.in_flight == 0


@pytest.mark.parametrize("after", [1, 2])
async def test_closing_after_an_event_hangs_up_on_the_engine(rig: Rig, after: int) -> None:
    rig.plays(good(fault="hang", fault_after_tokens=3))
    async with aclosing(rig.backend.answer(make_call(stream=True, n=rig.n))) as events:
        for _ in range(after * rig.n):
            await anext(events)
    assert rig.backend.load.in_flight == 0
    await rig.until_hung_up()


async def test_closing_without_consuming_asks_the_engine_nothing(rig: Rig, stream: bool) -> None:
    rig.plays(good())
    await rig.backend.answer(make_call(stream=stream, n=rig.n)).aclose()
    assert rig.asked() == []
    assert rig.backend.load.in_flight == 0


async def test_calls_in_flight_are_counted(rig: Rig) -> None:
    rig.plays(good(fault="hang", fault_after_tokens=3))
    async with aclosing(rig.backend.answer(make_call(stream=True, n=rig.n))) as events:
        for _ in range(2 * rig.n):
            await anext(events)
        assert rig.backend.load.in_flight == rig.n
    assert rig.backend.load.in_flight == 0


async def test_a_closed_backend_is_unreachable(rig: Rig, stream: bool) -> None:
    rig.plays(good())
    await rig.backend.aclose()
    with pytest.raises(BackendUnreachable):
        await collect(rig.backend, make_call(stream=stream, n=rig.n))
