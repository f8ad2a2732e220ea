"""The group that owns every task: what crashes is told, what must run runs again, what ends is let end."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from gateway.background import Background


class Stumbling:
    """A loop that crashes as soon as it is begun, a clock it can move, and a sleep that is over when it begins."""

    def __init__(self, crashes: int) -> None:
        self.now = 1000.0
        self.delays: list[float] = []
        self.begun = 0
        self.steady = asyncio.Event()
        self.lasts_s = 0.0
        self._crashes = crashes

    def clock(self) -> float:
        return self.now

    async def sleep(self, delay_s: float) -> None:
        self.delays.append(round(delay_s, 6))
        self.now += delay_s
        await asyncio.sleep(0)

    async def run(self) -> None:
        self.begun += 1
        if self.begun > self._crashes:
            self.steady.set()
            await asyncio.Event().wait()
        self.now += self.lasts_s
        raise ZeroDivisionError(self.begun)


def group(world: Stumbling, told: list[tuple[str, str]] | None = None) -> Background:
    crashes = told if told is not None else []
    return Background(lambda name, error: crashes.append((name, repr(error))), sleep=world.sleep, clock=world.clock)


async def test_a_loop_that_crashes_is_told_and_begun_again_ever_later() -> None:
    world = Stumbling(crashes=9)
    told: list[tuple[str, str]] = []
    async with group(world, told) as background:
        background.keep(world.run, "poller")
        with anyio.fail_after(5):
            await world.steady.wait()
    assert told == [("poller", f"ZeroDivisionError({number})") for number in range(1, 10)]
    assert world.delays == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]


async def test_a_loop_that_ran_for_a_minute_starts_again_as_if_it_never_had_crashed() -> None:
    world = Stumbling(crashes=6)
    world.lasts_s = 59.0
    async with group(world) as background:
        background.keep(world.run, "poller")
        while world.begun < 3:
            await asyncio.sleep(0)
        world.lasts_s = 60.0
        with anyio.fail_after(5):
            await world.steady.wait()
    assert world.delays[:3] == [0.1, 0.2, 0.4]
    assert set(world.delays[3:]) == {0.1}


async def test_a_loop_is_in_trouble_for_a_minute_after_its_crash() -> None:
    world = Stumbling(crashes=1)
    async with group(world) as background:
        background.keep(world.run, "poller")
        background.keep(Stumbling(0).run, "other")
        await world.steady.wait()
        assert background.troubled == ("poller",)
        world.now += 59.0
        assert background.troubled == ("poller",)
        world.now += 1.0
        assert background.troubled == ()


async def test_a_loop_that_returns_is_not_begun_again() -> None:
    begun = []

    async def once() -> None:
        begun.append(1)

    world = Stumbling(0)
    async with group(world) as background:
        background.keep(once, "once")
        for _ in range(10):
            await asyncio.sleep(0)
    assert (begun, world.delays) == ([1], [])


async def test_leaving_ends_a_loop_in_its_work_and_in_its_pause() -> None:
    paused = asyncio.Event()

    async def pause(delay_s: float) -> None:
        paused.set()
        await asyncio.Event().wait()

    world = Stumbling(0)
    with anyio.fail_after(5):
        async with Background(lambda name, error: None, sleep=pause) as background:
            background.keep(Stumbling(1).run, "pausing")
            background.keep(world.run, "working")
            await paused.wait()
            await world.steady.wait()
    assert world.begun == 1


async def test_work_that_crashes_is_told_and_harms_no_other() -> None:
    told: list[tuple[str, str]] = []
    done = []

    async def crash() -> None:
        raise ZeroDivisionError

    async def work() -> None:
        await asyncio.sleep(0)
        done.append(1)

    async with group(Stumbling(0), told) as background:
        tasks = [background.spawn(crash()), background.spawn(work())]
        await asyncio.wait(tasks)
    assert done == [1]
    assert [error for _, error in told] == ["ZeroDivisionError()"]


async def test_leaving_asks_work_to_end_and_lets_it_finish_what_it_shields() -> None:
    finished = []

    async def work(scope: anyio.CancelScope) -> None:
        with scope:
            with anyio.CancelScope(shield=True):
                for _ in range(10):
                    await asyncio.sleep(0)
                finished.append(1)
            await asyncio.Event().wait()

    async with Background(lambda name, error: None) as background:
        scope = anyio.CancelScope()
        background.spawn(work(scope), scope.cancel)
        await asyncio.sleep(0)
    assert finished == [1]


async def test_leaving_breaks_off_what_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.background.END_WITHIN_S", 0.05)

    async def stubborn() -> None:
        await asyncio.Event().wait()

    with anyio.fail_after(5):
        async with Background(lambda name, error: None) as background:
            task = background.spawn(stubborn(), lambda: None)
    assert task.cancelled()
