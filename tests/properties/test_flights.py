"""Whoever follows a flight hears all of it, in order; a flight lives exactly as long as somebody listens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.chat import Event
from cache.inflight import MAX_SHARED_BYTES, Flight, FlightAbandoned, Flights, Follower
from gateway.background import END_WITHIN_S, Background

KEY = "k"
HUNG_S = 10.0


class Failed(Exception):
    pass


def event(number: int, size_bytes: int = 1) -> Event:
    return Event(raw=f"{number}".encode().rjust(size_bytes))


def numbers(events: list[Event]) -> list[int]:
    return [int(event.raw) for event in events]


async def turns(count: int) -> None:
    """Let everybody else go on for `count` turns of the loop."""
    for _ in range(count):
        await asyncio.sleep(0)


@asynccontextmanager
async def airport() -> AsyncGenerator[tuple[Flights[str], Background], None]:
    """Flights and their group. When it is left there must be nothing in the air."""
    crashes: list[BaseException] = []
    async with Background(lambda name, error: crashes.append(error)) as background:
        with anyio.fail_after(HUNG_S):
            flights = Flights[str](background.spawn)
            yield flights, background
            while background._spawned:
                await asyncio.sleep(0)
    assert len(flights) == 0
    assert crashes == []


@dataclass(frozen=True)
class Flying:
    """How a producer behaves: `pauses[i]` turns before event i, then `ending` turns and the end."""

    pauses: list[int]
    ending: int
    fails: bool
    commits: bool


@dataclass(frozen=True)
class Listening:
    """How a follower behaves. It leaves politely after some events, or is cancelled in the midst of anything."""

    joins_after: int
    pause: int
    leaves_after: int | None
    cancelled_after: int | None


@dataclass
class Tracked:
    """What happened, as seen from outside."""

    flown: int = 0
    listeners: dict[Flight[str], set[Follower[str]]] = field(default_factory=dict)
    cancelled_while_heard: int = 0
    complete: int = 0


FLYING = st.builds(
    Flying,
    pauses=st.lists(st.integers(0, 3), max_size=6),
    ending=st.integers(0, 3),
    fails=st.booleans(),
    commits=st.sampled_from([True, True, True, False]),
)
LISTENING = st.builds(
    Listening,
    joins_after=st.integers(0, 12),
    pause=st.integers(0, 3),
    leaves_after=st.sampled_from([None, None, 0, 1, 3]),
    cancelled_after=st.none() | st.none() | st.integers(0, 12),
)


def producer(plan: Flying, tracked: Tracked) -> Callable[[Flight[str]], Awaitable[None]]:
    async def fly(flight: Flight[str]) -> None:
        tracked.flown += 1
        try:
            if plan.commits:
                flight.commit("head")
            for number, pause in enumerate(plan.pauses if plan.commits else []):
                await turns(pause)
                await flight.publish(event(number))
            await turns(plan.ending)
        except asyncio.CancelledError:
            tracked.cancelled_while_heard += len(tracked.listeners.get(flight, ()))
            raise
        if plan.fails or not plan.commits:
            raise Failed

    return fly


async def listen(flights: Flights[str], plan: Flying, listening: Listening, tracked: Tracked, may_die: bool) -> None:
    await turns(listening.joins_after)
    follower = flights.join(KEY) or flights.open(KEY, producer(plan, tracked))
    heard: list[int] = []
    listeners = tracked.listeners.setdefault(follower._flight, set())
    listeners.add(follower)
    try:
        try:
            assert await follower.head() == "head"
            while listening.leaves_after is None or len(heard) < listening.leaves_after:
                events = await follower.take()
                if not events:
                    assert not plan.fails
                    break
                heard += numbers(events)
                await turns(listening.pause)
            else:
                return  # it leaves before the end
        except Failed:
            assert plan.fails or not plan.commits
        except FlightAbandoned:
            assert may_die
            return
        assert heard == list(range(len(plan.pauses) if plan.commits else 0))
        tracked.complete += 1
    finally:
        assert heard == list(range(len(heard)))
        listeners.discard(follower)
        follower.leave()
        follower.leave()


async def cancel_after(count: int, cancel: Callable[[], object]) -> None:
    await turns(count)
    cancel()


@settings(max_examples=150, deadline=None)
@given(flying=FLYING, listening=st.lists(LISTENING, min_size=1, max_size=5))
async def test_every_follower_hears_everything_and_nobody_else_ends_it(
    flying: Flying, listening: list[Listening]
) -> None:
    tracked = Tracked()
    async with airport() as (flights, _), asyncio.TaskGroup() as group:
        for one in listening:
            task = group.create_task(listen(flights, flying, one, tracked, may_die=False))
            if one.cancelled_after is not None:
                group.create_task(cancel_after(one.cancelled_after, task.cancel))

    assert tracked.cancelled_while_heard == 0
    stayed = [one for one in listening if one.leaves_after is None and one.cancelled_after is None]
    assert tracked.complete >= len(stayed)


@settings(max_examples=100, deadline=None)
@given(flying=FLYING, listening=st.lists(LISTENING, min_size=1, max_size=3), killed_after=st.integers(0, 10))
async def test_a_worker_that_ends_its_flights_leaves_nobody_waiting(
    flying: Flying, listening: list[Listening], killed_after: int
) -> None:
    tracked = Tracked()
    async with airport() as (flights, background), asyncio.TaskGroup() as group:
        for one in listening:
            group.create_task(listen(flights, flying, one, tracked, may_die=True))
        await turns(killed_after)
        for task in tuple(background._spawned):
            task.cancel()


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 8), max_size=12),
    paces=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    leaver=st.integers(0, 30),
)
async def test_a_producer_is_at_most_the_lag_ahead_of_its_fastest_listener(
    sizes: list[int], paces: list[int], leaver: int
) -> None:
    max_lag_bytes = 10
    flight = Flight[str](max_lag_bytes=max_lag_bytes)
    taken = dict.fromkeys((flight.join() for _ in paces), 0)

    async def produce() -> None:
        for number, size in enumerate(sizes):
            await flight.publish(event(number, size))
            if taken:
                assert flight.published_bytes - max(taken.values()) <= max_lag_bytes
        flight.land()

    async def consume(follower: Follower[str], pace: int) -> None:
        try:
            while events := await follower.take():
                taken[follower] += sum(len(event.raw) for event in events)
                await turns(pace)
            assert taken[follower] == sum(sizes)
        finally:
            taken.pop(follower)
            follower.leave()

    with anyio.fail_after(HUNG_S):
        async with asyncio.TaskGroup() as group:
            group.create_task(produce())
            tasks = [group.create_task(consume(*one)) for one in zip(tuple(taken), paces, strict=True)]
            if len(tasks) > 1:
                group.create_task(cancel_after(leaver, tasks[0].cancel))


async def test_a_lone_reader_that_stops_reading_stops_its_producer() -> None:
    published = []

    async def fly(flight: Flight[str]) -> None:
        flight.commit("head")
        for number in range(5):
            await flight.publish(event(number, 600_000))
            published.append(number)

    async with airport() as (flights, _):
        reader = flights.open(KEY, fly)
        await reader.head()
        await turns(20)
        assert published == [0]  # the second waits: with it, more than a mebibyte is unread

        assert numbers(await reader.take()) == [0, 1]
        await turns(20)
        assert published == [0, 1, 2]
        reader.leave()
    assert published == [0, 1, 2]


async def test_a_reader_that_stops_reading_stops_nobody_else() -> None:
    async def fly(flight: Flight[str]) -> None:
        flight.commit("head")
        for number in range(8):
            await flight.publish(event(number, 600_000))

    async with airport() as (flights, _):
        asleep, awake = flights.open(KEY, fly), flights.join(KEY)
        assert awake is not None
        heard = []
        while events := await awake.take():
            heard += numbers(events)
        assert heard == list(range(8))
        assert numbers(await asleep.take()) == list(range(8))


async def test_a_failure_before_the_head_is_everybodys_and_one_after_it_comes_last() -> None:
    gate = asyncio.Event()

    async def fails_before(flight: Flight[str]) -> None:
        await gate.wait()
        raise Failed

    async def fails_after(flight: Flight[str]) -> None:
        flight.commit("head")
        await flight.publish(event(0))
        raise Failed

    async with airport() as (flights, _):
        followers = [flights.open("a", fails_before), flights.join("a")]
        gate.set()
        for follower in followers:
            assert follower is not None
            with pytest.raises(Failed):
                await follower.head()

        late = flights.open("b", fails_after)
        await turns(3)
        assert await late.head() == "head"
        assert numbers(await late.take()) == [0]
        for _ in range(2):
            with pytest.raises(Failed):
                await late.take()


async def test_the_last_to_leave_ends_the_flight_and_the_next_to_come_opens_another() -> None:
    async def fly(flight: Flight[str]) -> None:
        await asyncio.Event().wait()

    async with airport() as (flights, background):
        first, second = flights.open(KEY, fly), flights.join(KEY)
        assert second is not None
        await turns(2)
        first.leave()
        await turns(2)
        assert len(background._spawned) == 1

        second.leave()
        assert flights.join(KEY) is None  # at once, though the task is still on its way out
        other = flights.open(KEY, fly)
        await turns(3)
        assert len(background._spawned) == 1
        other.leave()


async def test_a_flight_that_everybody_left_before_it_began_never_begins() -> None:
    begun = []

    async def fly(flight: Flight[str]) -> None:
        begun.append(flight)

    async with airport() as (flights, _):
        flights.open(KEY, fly).leave()
    assert begun == []


async def test_a_flight_that_is_ended_before_its_first_step_lands_all_the_same() -> None:
    async def fly(flight: Flight[str]) -> None:
        raise AssertionError

    async with airport() as (flights, background):
        follower = flights.open(KEY, fly)
        for task in tuple(background._spawned):
            task.cancel()
        with pytest.raises(FlightAbandoned):
            await follower.head()
        assert flights.join(KEY) is None


async def test_leaving_never_breaks_into_what_a_flight_shields() -> None:
    settled = []
    ended = asyncio.Event()

    async def fly(flight: Flight[str]) -> None:
        flight.commit("head")
        with anyio.move_on_after(5, shield=True):
            await ended.wait()
            settled.append(flight)

    async with airport() as (flights, _):
        follower = flights.open(KEY, fly)
        await follower.head()
        follower.leave()
        await turns(3)
        ended.set()
    assert len(settled) == 1


async def test_what_a_flight_does_after_it_landed_is_its_own() -> None:
    kept = []

    async def fly(flight: Flight[str]) -> None:
        flight.commit("head")
        flight.land()
        await turns(5)
        kept.append(flight)

    async with airport() as (flights, _):
        follower = flights.open(KEY, fly)
        await follower.head()
        assert await follower.take() == []
        follower.leave()
    assert len(kept) == 1


async def test_a_flight_too_large_to_replay_takes_nobody_in_and_spoils_no_other() -> None:
    async def fly(flight: Flight[str]) -> None:
        flight.commit("head")
        await flight.publish(event(0, MAX_SHARED_BYTES + 1))
        await asyncio.Event().wait()

    async with airport() as (flights, _):
        first = flights.open(KEY, fly)
        await first.take()
        assert flights.join(KEY) is None
        second = flights.open(KEY, fly)  # private, since the first still holds the key
        await second.take()
        second.leave()
        assert len(flights) == 1
        first.leave()


@pytest.mark.parametrize("naps", [(0, 0), (0, 3), (3, 0), (2, 5)])
async def test_what_a_large_flight_lets_go_of_everybody_has_heard(naps: tuple[int, int]) -> None:
    size_bytes = MAX_SHARED_BYTES // 3

    async def fly(flight: Flight[str]) -> None:
        flight.commit("head")
        for number in range(9):
            await flight.publish(event(number, size_bytes))
            await asyncio.sleep(0)

    async def hear(follower: Follower[str], nap: int) -> list[int]:
        heard = []
        while events := await follower.take():
            heard += numbers(events)
            await turns(nap)
        follower.leave()
        return heard

    async with airport() as (flights, _):
        followers = [flights.open(KEY, fly), flights.join(KEY)]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(hear(one, nap)) for one, nap in zip(followers, naps, strict=True) if one]
    assert [task.result() for task in tasks] == [list(range(9))] * 2


async def test_without_a_key_a_flight_stays_private() -> None:
    async def fly(flight: Flight[str]) -> None:
        await asyncio.Event().wait()

    async with airport() as (flights, _):
        follower = flights.open(None, fly)
        assert flights.join(None) is None
        assert len(flights) == 0
        follower.leave()


async def test_all_flights_are_ended_at_once_and_what_they_shield_is_not_broken_into() -> None:
    settled = []

    async def fly(flight: Flight[str]) -> None:
        flight.commit("head")
        try:
            await asyncio.Event().wait()
        finally:
            with anyio.move_on_after(5, shield=True):
                await turns(5)
                settled.append(flight)

    async with airport() as (flights, _):
        followers = [flights.open(KEY, fly), flights.join(KEY), flights.open(None, fly)]
        await turns(2)
        unbegun = flights.open("other", fly)
        flights.abort_all()
        assert len(flights) == 0
        for follower in [*followers, unbegun]:
            assert follower is not None
            with pytest.raises(FlightAbandoned):
                await follower.take()
        assert settled == []
    assert len(settled) == 2


async def test_ending_all_flights_leaves_those_that_have_landed_to_their_own_business() -> None:
    kept = []
    gate = asyncio.Event()

    async def fly(flight: Flight[str]) -> None:
        flight.commit("head")
        flight.land()
        await gate.wait()
        kept.append(flight)

    async with airport() as (flights, _):
        follower = flights.open(KEY, fly)
        assert await follower.take() == []
        flights.abort_all()
        gate.set()
        await turns(3)
        flights.abort_all()
    assert len(kept) == 1


async def test_leaving_the_group_ends_a_flight_at_once_and_lets_it_finish_what_it_shields() -> None:
    settled = []

    async def fly(flight: Flight[str]) -> None:
        with anyio.CancelScope(shield=True):
            await turns(5)
            settled.append(flight)
        await asyncio.Event().wait()

    async with Background(lambda name, error: None) as background:
        follower = Flights[str](background.spawn).open(KEY, fly)
        await turns(2)
        left_at = anyio.current_time()
    assert anyio.current_time() - left_at < END_WITHIN_S / 2
    assert len(settled) == 1
    with pytest.raises(FlightAbandoned):
        await follower.head()


@settings(max_examples=60, deadline=None)
@given(paces=st.lists(st.integers(0, 6), min_size=1, max_size=4), leaver=st.integers(0, 30), count=st.integers(0, 12))
async def test_past_its_shared_size_a_flight_keeps_only_what_somebody_has_still_to_take(
    paces: list[int], leaver: int, count: int
) -> None:
    flight = Flight[str](max_lag_bytes=MAX_SHARED_BYTES)
    followers = [flight.join() for _ in paces]
    heard: dict[Follower[str], list[int]] = {follower: [] for follower in followers}
    published = 0

    async def produce() -> None:
        nonlocal published
        for number in range(count):
            published += 1
            await flight.publish(event(number, 1 if number else MAX_SHARED_BYTES + 1))
            await turns(1)
        flight.land()

    async def consume(follower: Follower[str], pace: int) -> None:
        try:
            while events := await follower.take():
                heard[follower] += numbers(events)
                assert len(flight._events) == published - min(len(taken) for taken in heard.values())
                await turns(pace)
            assert heard[follower] == list(range(count))
        finally:
            heard.pop(follower)
            follower.leave()
            if heard:
                assert len(flight._events) == published - min(len(taken) for taken in heard.values())

    with anyio.fail_after(HUNG_S):
        async with asyncio.TaskGroup() as group:
            group.create_task(produce())
            tasks = [group.create_task(consume(*one)) for one in zip(followers, paces, strict=True)]
            if len(tasks) > 1:
                group.create_task(cancel_after(leaver, tasks[0].cancel))
