"""The clocks of one call: which phase a wait belongs to, and when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import TracebackType
from typing import Self, TypeVar

from backends.backend import Call
from backends.errors import BackendTimeout

T = TypeVar("T")


class CallClock:
    """Bounds the waits of one call, one after another. Entered when the call begins, in the running event loop.

    Until `began` is called a wait belongs to the first token, where the answer is streamed to the client; from then on
    each is `idle`. All end with the call's deadline and its `total`. Raises `BackendTimeout` naming the phase.
    """

    def __init__(self, call: Call, backend: str) -> None:
        self._call = call
        self._backend = backend
        self._loop = asyncio.get_running_loop()
        self._alarm = _Alarm(self._loop)
        now = self._loop.time()
        self._end = min(call.deadline, now + call.timeouts.total_s)
        self._first_token_by = now + call.timeouts.first_token_s
        self._began = not call.request.stream

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self._alarm.stop()

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
            with self._alarm.at(until):
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


class _Alarm:
    """`asyncio.timeout_at` for one block after another, without a timer for each.

    An answer waits for every token, and to take a timer back costs the event loop as much as what it guards. So the
    one timer stays set from block to block; when it rings too early it is moved, and where nothing waits it is dropped.
    """

    __slots__ = ("_cancelling", "_loop", "_rang", "_task", "_timer", "_until")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[object] | None = None
        self._until = 0.0
        self._cancelling = 0
        self._rang = False

    def at(self, until: float) -> Self:
        """What is entered next raises `TimeoutError` at `until` (event-loop clock, seconds)."""
        self._until = until
        if self._timer is None or until < self._timer.when():
            self._set()
        return self

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def __enter__(self) -> None:
        self._rang = False
        self._task = task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine that is awaited runs in one
        self._cancelling = task.cancelling()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        # As `asyncio.timeout` does: our cancellation is taken back, and another one beside it goes on.
        if self._rang and task is not None and task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def _set(self) -> None:
        self.stop()
        self._timer = self._loop.call_at(self._until, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if self._task is None:
            return
        if self._loop.time() < self._until:
            self._set()
        else:
            self._rang = True
            self._task.cancel()
