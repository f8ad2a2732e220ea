"""The worker's background group: the one owner of every task that outlives the request that began it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from types import TracebackType
from typing import Any, Self

import anyio

OnCrash = Callable[[str, BaseException], None]
Loop = Callable[[], Coroutine[Any, Any, None]]

END_WITHIN_S = 5.0
"""How long what was asked to end may take to clean up when the group is left."""
BREAK_OFF_WITHIN_S = 1.0
"""How long it may take after that, when it was broken off."""

RESTART_AFTER_S = 0.1
RESTART_AT_MOST_AFTER_S = 5.0
STEADY_AFTER_S = 60.0
"""A loop that ran this long before it crashed is restarted as if it never had."""
TROUBLED_FOR_S = 60.0


class Background:
    """Owns tasks. One that raises is reported to `on_crash` and harms no other; leaving the group ends all.

    Not an `asyncio.TaskGroup`, which ends every task when one fails: a flight that crashes is one request's trouble.
    `sleep` and `clock` (seconds, monotonic) are the time between the restarts of loops.
    """

    def __init__(
        self,
        on_crash: OnCrash,
        *,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_crash = on_crash
        self._sleep = sleep
        self._clock = clock
        self._spawned: dict[asyncio.Task[None], Callable[[], object]] = {}
        self._loops: set[asyncio.Task[None]] = set()
        self._crashed_at: dict[str, float] = {}

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._loops:
            task.cancel()
        for end in tuple(self._spawned.values()):
            end()
        await self._gone(END_WITHIN_S)
        for task in self._spawned:
            task.cancel()
        await self._gone(BREAK_OFF_WITHIN_S)

    @property
    def troubled(self) -> tuple[str, ...]:
        """The loops that crashed within the last minute, by name."""
        now = self._clock()
        return tuple(name for name, at in self._crashed_at.items() if now - at < TROUBLED_FOR_S)

    def spawn(self, work: Coroutine[Any, Any, None], end: Callable[[], object] | None = None) -> asyncio.Task[None]:
        """Start work that ends by itself, such as a flight.

        `end` asks it to end early, when the group is left. By default its task is cancelled, which breaks into anyio's
        shields; work that has shielded ends hands in the `cancel` of a scope of its own.
        """
        task = self._loop.create_task(work)
        self._spawned[task] = end or task.cancel
        task.add_done_callback(self._spawn_ended)
        return task

    def keep(self, loop: Loop, name: str) -> Callable[[], object]:
        """Run `loop`, such as a poller, until it returns, the group is left, or what this returns is called.

        When it crashes, it is reported and begun again: after 0.1 s, then twice as long each time, at most 5 s.
        """
        task = self._loop.create_task(self._kept(loop, name), name=name)
        self._loops.add(task)
        task.add_done_callback(self._loops.discard)
        return task.cancel

    async def _kept(self, loop: Loop, name: str) -> None:
        delay_s = RESTART_AFTER_S
        while True:
            began = self._clock()
            try:
                return await loop()
            except Exception as error:  # noqa: BLE001 - whatever ended it, what it keeps up is needed again
                self._crashed_at[name] = ended = self._clock()
                self._on_crash(name, error)
            if ended - began >= STEADY_AFTER_S:
                delay_s = RESTART_AFTER_S
            await self._sleep(delay_s)
            delay_s = min(2 * delay_s, RESTART_AT_MOST_AFTER_S)

    def _spawn_ended(self, task: asyncio.Task[None]) -> None:
        del self._spawned[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_crash(task.get_name(), error)

    async def _gone(self, within_s: float) -> None:
        """Return when no task is left, or when the time is up."""
        with anyio.move_on_after(within_s, shield=True):
            while tasks := {*self._spawned, *self._loops}:
                await asyncio.wait(tasks)
