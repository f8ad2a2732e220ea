"""Identical requests in flight share one upstream call: a `Flight`, its `Follower`s, and the worker's `Flights`.

A flight belongs to the worker, not to the request that opened it. It publishes a head once it is committed, then
events; every follower gets the head and all events from the first, whenever it joined. The last follower to leave
cancels the flight. A slow follower never stalls it: the flight waits only while even the fastest follower lags by more
than `max_lag_bytes`, which for a flight with one follower means that a slow reader slows its own upstream.

States of a flight:  open → committed → ended, or → failed from either. Everything happens on one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, Protocol, TypeVar

import anyio

from backends.chat import Event

H = TypeVar("H")

MAX_LAG_BYTES = 1024 * 1024
MAX_SHARED_BYTES = 8 * 1024 * 1024
"""Past this much answer a flight takes no late joiners, and lets go of what all of its followers have taken."""


class Task(Protocol):
    def add_done_callback(self, done: Callable[[Any], object], /) -> object: ...


class Spawn(Protocol):
    """Starts a coroutine in the worker's background group, which owns it from then on and may ask it to `end`."""

    def __call__(self, work: Coroutine[Any, Any, None], end: Callable[[], object], /) -> Task: ...


class FlightAbandoned(Exception):
    """The flight was cancelled: nobody was listening any more, or the worker stops."""


class Flight(Generic[H]):
    """One upstream call and those who listen to it. The producer's side; a `Follower` is the other."""

    def __init__(self, *, max_lag_bytes: int = MAX_LAG_BYTES) -> None:
        self._max_lag_bytes = max_lag_bytes
        self._events: list[Event] = []
        self._let_go = 0  # events before those
        self._published_bytes = 0
        self._head: H | None = None
        self._error: Exception | None = None
        self._done = False
        self._followers: set[Follower[H]] = set()
        self._producer: asyncio.Future[None] | None = None
        self.scope = anyio.CancelScope()
        """What the flight runs in. Not its task's `cancel`, which would break into the shielded ends of a call."""
        self.on_landed: Callable[[], object] = _nothing

    @property
    def head(self) -> H | None:
        return self._head

    @property
    def published_bytes(self) -> int:
        return self._published_bytes

    def commit(self, head: H) -> None:
        """Publish the head. From here on a failure can only end the answer, not replace it."""
        self._head = head
        self._wake()

    async def publish(self, event: Event) -> None:
        """Hand an event to every follower; wait while all of them lag too far behind."""
        self._events.append(event)
        self._published_bytes += len(event.raw)
        self._wake()
        while self._followers and self._least_lag_bytes() > self._max_lag_bytes:
            self._producer = asyncio.get_running_loop().create_future()
            await self._producer

    def land(self, error: Exception | None = None) -> None:
        """End the flight, well or with an error. Only the first call counts."""
        if self._done:
            return
        self._done = True
        self._error = error
        self.on_landed()
        self._wake()

    def abort(self) -> None:
        """Cancel the flight: its followers are told at once, what it shields still comes to its end."""
        self.land(FlightAbandoned())
        self.scope.cancel()  # before the producer could be woken, so that it does not take another step

    def join(self) -> Follower[H]:
        """A new follower, from the first event on. Only while the flight is `joinable`."""
        follower = Follower(self)
        self._followers.add(follower)
        return follower

    @property
    def landed(self) -> bool:
        return self._done

    @property
    def joinable(self) -> bool:
        return not self._done and self._published_bytes <= MAX_SHARED_BYTES

    def _since(self, position: int) -> list[Event]:
        return self._events[position - self._let_go :]

    def _least_lag_bytes(self) -> int:
        return self._published_bytes - max(follower.taken_bytes for follower in self._followers)

    def _wake(self) -> None:
        for follower in self._followers:
            follower.wake()

    def _advanced(self) -> None:
        if not self.joinable and self._followers:
            taken_by_all = min(follower.position for follower in self._followers)
            del self._events[: taken_by_all - self._let_go]
            self._let_go = taken_by_all
        if self._producer is not None and not self._producer.done():
            self._producer.set_result(None)

    def _leave(self, follower: Follower[H]) -> None:
        self._followers.discard(follower)
        if not self._followers and not self._done:
            self.abort()
        self._advanced()


class Follower(Generic[H]):
    """One listener of a flight, with its own place in it."""

    __slots__ = ("_flight", "_waiting", "position", "taken_bytes")

    def __init__(self, flight: Flight[H]) -> None:
        self._flight = flight
        self._waiting: asyncio.Future[None] | None = None
        self.position = 0
        """Number of events taken so far."""
        self.taken_bytes = 0

    async def head(self) -> H:
        """The flight's head, once it is committed. Raises the flight's error where it fails before that."""
        flight = self._flight
        while flight._head is None:
            if flight._done:
                raise flight._error or FlightAbandoned()
            await self._wait()
        return flight._head

    async def take(self) -> list[Event]:
        """All events published since the last call, at least one; empty at the end of the answer.

        Raises the flight's error once every event before it was taken.
        """
        flight = self._flight
        while not (events := flight._since(self.position)):
            if flight._done:
                if flight._error is not None:
                    raise flight._error
                return []
            await self._wait()
        self.position += len(events)
        self.taken_bytes = flight.published_bytes
        flight._advanced()
        return events

    def leave(self) -> None:
        """Stop listening. The last one to leave cancels the flight. Idempotent."""
        self._flight._leave(self)

    def wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def _wait(self) -> None:
        self._waiting = asyncio.get_running_loop().create_future()
        await self._waiting


class Flights(Generic[H]):
    """The flights of one worker, by exact key. A key holds the tenant, so followers are always of one tenant."""

    def __init__(self, spawn: Spawn) -> None:
        self._spawn = spawn
        self._by_key: dict[str, Flight[H]] = {}
        self._in_air: set[Flight[H]] = set()

    def __len__(self) -> int:
        """Flights that others may join."""
        return len(self._by_key)

    def join(self, key: str | None) -> Follower[H] | None:
        """Follow the flight under `key`, if there is one to join."""
        flight = self._by_key.get(key) if key is not None else None
        return flight.join() if flight is not None and flight.joinable else None

    def open(self, key: str | None, fly: Callable[[Flight[H]], Awaitable[None]]) -> Follower[H]:
        """Start a flight and follow it. Under a `key` others may join it; without one it stays private.

        `fly` publishes to the flight it is given; what it raises becomes the flight's error.
        """
        flight = Flight[H]()
        follower = flight.join()
        if key is not None and key not in self._by_key:
            self._by_key[key] = flight
            flight.on_landed = lambda: self._by_key.pop(key)
        self._in_air.add(flight)
        self._spawn(self._run(flight, fly), flight.scope.cancel).add_done_callback(lambda _: self._gone(flight))
        return follower

    def abort_all(self) -> None:
        """End every flight now, the private ones too: their followers are told `FlightAbandoned`.

        Those that have landed and are still at their own business, such as keeping the answer, are left to it.
        """
        for flight in tuple(self._in_air):
            if not flight.landed:
                flight.abort()

    def _gone(self, flight: Flight[H]) -> None:
        self._in_air.discard(flight)
        flight.land(FlightAbandoned())  # a task that is cancelled before its first step never ran the `finally` below

    async def _run(self, flight: Flight[H], fly: Callable[[Flight[H]], Awaitable[None]]) -> None:
        if flight._done:
            return  # everybody left before it began
        error: Exception | None = FlightAbandoned()
        try:
            with flight.scope:
                await fly(flight)
                error = None
        except Exception as raised:  # noqa: BLE001 - whatever it is, it is the followers' to render
            error = raised
        finally:
            flight.land(error)


def _nothing() -> None:
    pass
