"""The clocks of one call: which phase a wait belongs to, and when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

from backends.backend import Call
from backends.errors import BackendTimeout

T = TypeVar("T")


class CallClock:
    """Bounds the waits of one call. Made when the call begins, in the running event loop.

    Until `began` is called a wait belongs to the first token, where the answer is streamed to the client; from then on
    each is `idle`. All end with the call's deadline and its `total`. Raises `BackendTimeout` naming the phase.
    """

    def __init__(self, call: Call, backend: str) -> None:
        self._call = call
        self._backend = backend
        self._loop = asyncio.get_running_loop()
        now = self._loop.time()
        self._end = min(call.deadline, now + call.timeouts.total_s)
        self._first_token_by = now + call.timeouts.first_token_s
        self._began = not call.request.stream

    def began(self) -> None:
        """The reader has got content."""
        self._began = True

    @property
    def connect_by(self) -> float:
        """Until when a connection must stand; event-loop clock, seconds."""
        return min(self._end, self._loop.time() + self._call.timeouts.connect_s)

    async def wait(self, pending: Coroutine[object, object, T]) -> T:
        """Await `pending` for as long as the phase may take."""
        phase, until = self._phase()
        try:
            async with asyncio.timeout_at(until):
                # An engine that never lets us wait would otherwise never meet a clock.
                if self._loop.time() >= until:
                    raise TimeoutError
                return await pending
        except TimeoutError as error:
            message = f"the engine's {phase} time ran out"
            raise BackendTimeout(message, phase=phase, backend=self._backend, model=self._call.model) from error
        finally:
            pending.close()

    def _phase(self) -> tuple[str, float]:
        if not self._call.request.stream:
            return "total", self._end
        if self._began:
            phase, until = "idle", self._loop.time() + self._call.timeouts.idle_s
        else:
            phase, until = "first_token", self._first_token_by
        return (phase, until) if until <= self._end else ("total", self._end)
