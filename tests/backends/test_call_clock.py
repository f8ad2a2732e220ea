"""The clocks of a call: each wait ends with its phase, and nothing of them stays behind."""

from __future__ import annotations

import asyncio
import gc

import pytest

from backends.backend import Timeouts
from backends.call_clock import CallClock
from backends.errors import BackendTimeout
from tests.calls import make_call


async def no_end() -> None:
    await asyncio.get_running_loop().create_future()


async def turns(count: int) -> str:
    for _ in range(count):
        await asyncio.sleep(0)
    return "done"


def clock_of(*, stream: bool = True, within_s: float = 60.0, **timeouts: float) -> CallClock:
    return CallClock(make_call(stream=stream, within_s=within_s, timeouts=Timeouts(**timeouts)), "a")


@pytest.mark.parametrize(
    ("clock", "began", "phase"),
    [
        ({"first_token_s": 0.01}, False, "first_token"),
        ({"first_token_s": 0.01, "idle_s": 0.02}, True, "idle"),
        ({"idle_s": 0.01}, True, "idle"),
        ({"total_s": 0.01}, True, "total"),
        ({"within_s": 0.01}, False, "total"),
        ({"stream": False, "first_token_s": 0.001, "total_s": 0.01}, False, "total"),
    ],
)
async def test_a_wait_ends_with_its_phase(clock: dict[str, float], began: bool, phase: str) -> None:
    with clock_of(**clock) as waits:  # type: ignore[arg-type]
        if began:
            waits.began()
        with pytest.raises(BackendTimeout) as failure:
            await waits.wait(no_end())
    assert failure.value.phase == phase


async def test_each_wait_has_the_whole_of_its_time_and_only_that() -> None:
    """The alarm rings too early for the second wait, once for nobody, and too late for the last one."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    with clock_of(idle_s=0.05) as clock:
        assert await clock.wait(turns(3)) == "done"
        clock.began()
        for _ in range(3):
            assert await clock.wait(asyncio.sleep(0.03, "done")) == "done"
        await asyncio.sleep(0.06)
        with pytest.raises(BackendTimeout):
            await clock.wait(no_end())
    assert 0.19 <= loop.time() - began < 1.0


async def test_an_engine_that_never_lets_us_wait_meets_the_clock_all_the_same() -> None:
    with clock_of(total_s=0.0) as clock, pytest.raises(BackendTimeout):
        await clock.wait(turns(0))


async def test_a_reader_that_is_cancelled_is_cancelled() -> None:
    with clock_of() as clock:
        reader = asyncio.get_running_loop().create_task(clock.wait(no_end()))
        await turns(1)
        reader.cancel()
        await asyncio.wait([reader])
        assert reader.cancelled()


async def test_a_reader_that_is_cancelled_as_its_time_runs_out_is_cancelled() -> None:
    with clock_of(total_s=0.01) as clock:
        reader = asyncio.get_running_loop().create_task(clock.wait(no_end()))
        # Before the alarm's turn and in it: both find the reader waiting.
        asyncio.get_running_loop().call_at(asyncio.get_running_loop().time() + 0.01, reader.cancel)
        await asyncio.wait([reader])
        assert reader.cancelled() or isinstance(reader.exception(), BackendTimeout)
        assert reader.cancelling() == int(reader.cancelled())


async def test_a_time_out_leaves_no_cancellation_behind() -> None:
    with clock_of(total_s=0.01) as clock, pytest.raises(BackendTimeout):
        await clock.wait(no_end())
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_a_failure_of_what_is_awaited_is_its_own() -> None:
    async def fails() -> None:
        await turns(1)
        raise ValueError("mine")

    with clock_of() as clock, pytest.raises(ValueError, match="mine"):
        await clock.wait(fails())


async def test_a_call_that_has_ended_leaves_no_alarm_set() -> None:
    with CallClock(make_call(stream=True, within_s=3600), "a") as clock:
        await clock.wait(turns(2))
        assert alarms() == 1
    del clock
    assert alarms() == 0


def alarms() -> int:
    """How many somebody holds: an event loop holds those that are set."""
    gc.collect()
    return sum(type(thing).__name__ == "_Alarm" for thing in gc.get_objects())
