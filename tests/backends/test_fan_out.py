"""What is particular to fanning out; the rest is in `tests/contract/test_backends.py`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.backend import Call, Load
from backends.chat import Event, parse_event
from backends.errors import BackendFailed, BackendOverloaded, BackendProtocolError
from backends.fan_out import FanOut
from backends.openai_http import OpenAIBackend
from backends.scripted import Script, ScriptedBackend
from tests.calls import collect, make_call, texts_of, whole_of
from tests.upstream import Upstream, answers, completion


def seed_of(call: Call) -> int:
    assert call.request.seed is not None
    return call.request.seed


class Parts:
    """An engine that remembers its calls and answers each with its seed."""

    def __init__(self, script: Script | None = None) -> None:
        self.calls: list[Call] = []
        self._script = script or Script(prompt_tokens=10)
        self.backend = ScriptedBackend("a", self.play)

    def play(self, call: Call) -> Script:
        self.calls.append(call)
        return msgspec.structs.replace(self._script, tokens=(f"seed {call.request.seed}",))


@pytest.mark.parametrize("stream", [True, False])
async def test_choices_are_split_into_calls_with_their_own_n_and_seed(stream: bool) -> None:
    parts = Parts()
    events = await collect(FanOut(parts.backend, 2), make_call(stream=stream, n=5, seed=40))
    asked = [(call.request.n, call.request.seed) for call in parts.calls]
    assert asked == [(2, 40), (2, 42), (1, 44)]
    for call in parts.calls:
        fields = {name: msgspec.json.decode(raw) for name, raw in call.request.fields.items()}
        assert (fields["n"], fields["seed"]) == (call.request.n, call.request.seed)
    assert texts_of(events) == ["seed 40", "seed 40", "seed 42", "seed 42", "seed 44"]
    assert [choice["index"] for choice in whole_of(events)["choices"]] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("stream", [True, False])
async def test_usage_is_the_sum_over_all_calls_and_comes_once(stream: bool) -> None:
    parts = Parts(Script(prompt_tokens=10, cached_tokens=4, reasoning=("r",)))
    events = await collect(FanOut(parts.backend, 1), make_call(stream=stream, n=3, seed=0))
    assert whole_of(events)["usage"] == {
        "prompt_tokens": 30,
        "completion_tokens": 6,
        "total_tokens": 36,
        "prompt_tokens_details": {"cached_tokens": 12},
        "completion_tokens_details": {"reasoning_tokens": 3},
    }
    assert [event.usage is not None for event in events] == [False] * (len(events) - 1) + [True]


@pytest.mark.parametrize("stream", [True, False])
async def test_usage_is_missing_where_one_call_reports_none(stream: bool) -> None:
    engine = ScriptedBackend("a", lambda call: Script(reports_usage=seed_of(call) != 1))
    events = await collect(FanOut(engine, 1), make_call(stream=stream, n=3, seed=0))
    assert all(event.usage is None for event in events)


async def test_what_fits_in_one_call_passes_through_untouched() -> None:
    parts = Parts()
    call = make_call(stream=True, n=2, seed=1)
    await collect(FanOut(parts.backend, 2), call)
    assert parts.calls == [call]


async def test_a_list_of_prompts_passes_through_to_an_engine_that_takes_lists() -> None:
    parts = Parts()
    call = make_call("text_completion", prompt=["one", "two"], n=4)
    await collect(FanOut(parts.backend, 1), call)
    assert parts.calls == [call]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_list_of_prompts_is_taken_apart_for_an_engine_that_takes_one(stream: bool) -> None:
    parts = Parts()
    call = make_call("text_completion", prompt=["one", [2, 2]], n=2, seed=5, stream=stream)
    events = await collect(FanOut(parts.backend, 1, one_prompt=True), call)

    asked = [(msgspec.json.decode(part.request.fields["prompt"]), part.request.n) for part in parts.calls]
    assert asked == [("one", 1), ("one", 1), ([2, 2], 1), ([2, 2], 1)]
    assert [part.request.prompts for part in parts.calls] == [1, 1, 1, 1]
    choices = whole_of(events)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert [choice["text"] for choice in choices] == ["seed 5", "seed 6", "seed 7", "seed 8"]


@pytest.mark.parametrize("stream", [True, False])
async def test_the_first_call_that_fails_cancels_the_others(stream: bool) -> None:
    def play(call: Call) -> Script:
        return Script(fault="overloaded", retry_after_s=3.0) if seed_of(call) == 1 else Script(fault="hang")

    engine = ScriptedBackend("a", play)
    with pytest.raises(BackendOverloaded) as failure:
        await collect(FanOut(engine, 1), make_call(stream=stream, n=3, seed=0))
    assert failure.value.retry_after_s == 3.0
    assert (engine.calls, engine.cancelled, engine.in_flight) == (3, 2, 0)


async def test_a_failure_after_many_unread_events_is_still_raised() -> None:
    def play(call: Call) -> Script:
        return Script(tokens=("x",) * 200, fault="error" if seed_of(call) == 0 else "none", fault_after_tokens=150)

    with pytest.raises(BackendFailed):
        await collect(FanOut(ScriptedBackend("a", play), 1), make_call(stream=True, n=2, seed=0))


async def test_a_reader_that_stops_stops_the_engine_too() -> None:
    engine = ScriptedBackend("a", Script(tokens=("x",) * 10_000))
    async with aclosing(FanOut(engine, 1).answer(make_call(stream=True, n=2))) as events:
        await anext(events)
        for _ in range(500):
            await asyncio.sleep(0)
        assert engine.events < 100
    assert engine.in_flight == 0


@pytest.mark.parametrize("stream", [True, False])
async def test_cancelled_at_any_step_of_the_loop_every_call_is_hung_up(stream: bool) -> None:
    engine = ScriptedBackend(
        "a", Script(tokens=("x",) * 5, first_token_delay_s=0.0, fault="hang", fault_after_tokens=4)
    )
    backend = FanOut(engine, 1)
    for steps in range(30):
        task = asyncio.get_running_loop().create_task(collect(backend, make_call(stream=stream, n=3)))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert engine.in_flight == 0
    assert engine.cancelled == engine.calls > 0


async def test_an_engine_that_will_not_stream_is_still_answered_as_a_stream() -> None:
    async with Upstream() as upstream:
        engine = OpenAIBackend("a", upstream.url)
        upstream.plays(*answers(completion("Hello", prompt_tokens=3, completion_tokens=2)))
        events = await collect(FanOut(engine, 1), make_call(stream=True, n=2))
        await engine.aclose()
    assert not any(event.whole for event in events)
    assert texts_of(events) == ["Hello", "Hello"]
    assert whole_of(events)["usage"]["total_tokens"] == 10


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 12), max_n=st.integers(1, 5), stream=st.booleans())
def test_any_n_through_any_engine_gives_n_finished_choices(n: int, max_n: int, stream: bool) -> None:
    async def run() -> dict[str, Any]:
        return whole_of(await collect(FanOut(ScriptedBackend("a"), max_n), make_call(stream=stream, n=n)))

    choices = asyncio.run(run())["choices"]
    assert [choice["index"] for choice in choices] == list(range(n))
    assert all(choice["finish_reason"] == "stop" for choice in choices)


class Doors:
    """An engine whose answers wait until the test lets them through."""

    def __init__(self) -> None:
        self.name = "doors"
        self.load = Load()
        self.waiting: list[asyncio.Future[None]] = []
        self._engine = ScriptedBackend("doors")

    async def answer(self, call: Call) -> AsyncGenerator[Event, None]:
        door = asyncio.get_running_loop().create_future()
        self.waiting.append(door)
        await door
        async with aclosing(self._engine.answer(call)) as events:
            async for event in events:
                yield event

    async def check(self, *, within_s: float) -> None: ...

    async def aclose(self) -> None: ...


async def test_only_so_many_calls_are_in_flight_at_once() -> None:
    engine = Doors()
    async with asyncio.TaskGroup() as group:
        answer = group.create_task(collect(FanOut(engine, 1, at_once=3), make_call(n=8)))
        opened = 0
        while opened < 8:
            while len(engine.waiting) < min(opened + 3, 8):
                await asyncio.sleep(0)
            for _ in range(20):
                await asyncio.sleep(0)
            assert len(engine.waiting) == min(opened + 3, 8)
            engine.waiting[opened].set_result(None)
            opened += 1
    assert len(texts_of(answer.result())) == 8


async def test_four_calls_are_in_flight_where_nothing_else_is_said() -> None:
    engine = ScriptedBackend("a", Script(fault="hang"))
    async with asyncio.TaskGroup() as group:
        task = group.create_task(collect(FanOut(engine, 1), make_call(n=60)))
        for _ in range(100):
            await asyncio.sleep(0)
        assert engine.in_flight == engine.calls == 4
        task.cancel()
    assert engine.in_flight == 0


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("whole", [True, False])
async def test_a_frame_that_is_read_in_part_and_unreadable_as_a_whole_is_the_engines_fault(
    stream: bool, whole: bool
) -> None:
    frame = b'{"choices":[{"index":0,"message":{"content":"x"},"finish_reason":"stop"}],"x_odd":1e999}'

    class Odd(Doors):
        async def answer(self, call: Call) -> AsyncGenerator[Event, None]:
            yield parse_event(frame, whole=whole or not stream)

    with pytest.raises(BackendProtocolError) as failure:
        await collect(FanOut(Odd(), 1), make_call(stream=stream, n=2))
    assert (failure.value.backend, failure.value.model) == ("doors", "small")
