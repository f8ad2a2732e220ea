"""A scripted backend that can be held back: what must happen before its answer has all the time that it needs."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import anyio

from backends.backend import Call
from backends.chat import Event
from backends.scripted import ScriptedBackend


class Held(ScriptedBackend):
    """Takes calls, and answers them once it is released. Released to begin with."""

    _gate: anyio.Event | None = None

    def hold(self) -> None:
        self._gate = anyio.Event()

    def release(self) -> None:
        if self._gate is not None:
            self._gate.set()

    async def answer(self, call: Call) -> AsyncGenerator[Event, None]:
        """See `Backend.answer`."""
        if self._gate is not None:
            await self._gate.wait()
        async with aclosing(super().answer(call)) as events:
            async for event in events:
                yield event
