"""The worker's background group: the one owner of every task that outlives the request that began it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self

OnCrash = Callable[[str, BaseException], None]

END_WITHIN_S = 5.0
"""How long cancelled tasks may take to clean up when the group is left."""


class Background:
    """Owns tasks. One that raises is reported to `on_crash` and harms no other; leaving the group cancels all.

    Not an `asyncio.TaskGroup`, which ends every task when one fails: a flight that crashes is one request's trouble.
    """

    def __init__(self, on_crash: OnCrash) -> None:
        self._on_crash = on_crash
        self._spawned: set[asyncio.Task[None]] = set()
        self._loops: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = {*self._spawned, *self._loops}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=END_WITHIN_S)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start work that ends by itself, such as a flight."""
        return self._start(work, self._spawned)

    def keep(self, loop: Coroutine[Any, Any, None], name: str) -> None:
        """Start a loop that runs until the worker stops, such as a poller."""
        self._start(loop, self._loops).set_name(name)

    def cancel_spawned_after(self, delay_s: float) -> None:
        """Cancel what was spawned and is still running when `delay_s` seconds are over."""

        async def cancel() -> None:
            await asyncio.sleep(delay_s)
            for task in tuple(self._spawned):
                task.cancel()

        self.keep(cancel(), "end of drain")

    def _start(self, work: Coroutine[Any, Any, None], owned: set[asyncio.Task[None]]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        owned.add(task)
        task.add_done_callback(lambda task: self._ended(task, owned))
        return task

    def _ended(self, task: asyncio.Task[None], owned: set[asyncio.Task[None]]) -> None:
        owned.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_crash(task.get_name(), error)
