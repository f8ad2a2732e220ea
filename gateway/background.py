"""The worker's background group: the one owner of every task that outlives the request that began it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any

OnCrash = Callable[[str, BaseException], None]


class Background:
    """Owns tasks. A task that raises is reported to `on_crash` and harms no other.

    `drain` waits for the ones that were spawned to finish by themselves; leaving the group cancels what is left.
    """

    def __init__(self, on_crash: OnCrash) -> None:
        self._on_crash = on_crash
        self._group = asyncio.TaskGroup()
        self._spawned: set[asyncio.Task[None]] = set()
        self._loops: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    async def __aenter__(self) -> Background:
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in (*self._spawned, *self._loops):
            task.cancel()
        await self._group.__aexit__(kind, error, trace)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start work that ends by itself, such as a flight."""
        task = self._group.create_task(self._guard(work, work.__qualname__))
        self._spawned.add(task)
        self._idle.clear()
        task.add_done_callback(self._ended)
        return task

    def keep(self, loop: Coroutine[Any, Any, None], name: str) -> None:
        """Start a loop that runs until the worker stops, such as a poller."""
        task = self._group.create_task(self._guard(loop, name), name=name)
        self._loops.add(task)
        task.add_done_callback(self._loops.discard)

    async def drain(self, within_s: float) -> int:
        """Wait for spawned work to end. How many tasks were still running when the time was up."""
        try:
            async with asyncio.timeout(within_s):
                await self._idle.wait()
        except TimeoutError:
            pass
        return len(self._spawned)

    async def _guard(self, work: Coroutine[Any, Any, None], name: str) -> None:
        try:
            await work
        except Exception as error:  # noqa: BLE001 - one task's crash must not cancel its siblings
            self._on_crash(name, error)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._spawned.discard(task)
        if not self._spawned:
            self._idle.set()
