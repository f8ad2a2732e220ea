"""Room at an engine: how many calls a backend takes at once, and who waits for a place.

`Slots` is the seam of admission. `ImmediateSlots` has no queue: a place is free now, or the backend counts as
overloaded and the next candidate is asked. Fair queueing between tenants will stand behind the same protocol, which is
why a `Flow` says who asks and how much.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Protocol

import msgspec

from backends.errors import BackendOverloaded


class Flow(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks for a place and for how much: what a fair queue weighs."""

    tenant_id: str
    tokens: int = 0
    priority: int = 0


class Slot(Protocol):
    """A place at a backend, given back by `release`. Idempotent."""

    def release(self) -> None: ...


class Slots(Protocol):
    async def acquire(self, backend: str, flow: Flow, *, deadline: float) -> Slot:
        """A place at `backend`, at the latest by `deadline` (event-loop clock).

        Raises `BackendOverloaded` where there is none in time, with an honest `retry_after_s` if one is known.
        """


class ImmediateSlots:
    """A bound per backend on calls in flight in this worker, and no queue."""

    def __init__(self) -> None:
        self.limits: Mapping[str, int] = {}
        """By backend; one that is not named has none. Replaced as a whole when the policy changes."""
        self._taken: Counter[str] = Counter()

    async def acquire(self, backend: str, flow: Flow, *, deadline: float) -> Slot:
        limit = self.limits.get(backend)
        if limit is not None and self._taken[backend] >= limit:
            raise BackendOverloaded(
                f"backend '{backend}' has all of its {limit} places taken", backend=backend, retry_after_s=1.0
            )
        self._taken[backend] += 1
        return _Place(self._taken, backend)


class _Place:
    __slots__ = ("_backend", "_taken")

    def __init__(self, taken: Counter[str], backend: str) -> None:
        self._taken = taken
        self._backend: str | None = backend

    def release(self) -> None:
        if self._backend is not None:
            self._taken[self._backend] -= 1
            self._backend = None
