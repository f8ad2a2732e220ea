"""A scripted backend that takes turns of the loop, so that whoever asks it can be interrupted anywhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from backends.backend import Call
from backends.chat import Event
from backends.scripted import ScriptedBackend


class Stepping(ScriptedBackend):
    """Gives way to the loop before the first event and on both sides of every event."""

    async def answer(self, call: Call) -> AsyncGenerator[Event, None]:
        async with aclosing(super().answer(call)) as events:
            await asyncio.sleep(0)
            async for event in events:
                await asyncio.sleep(0)
                yield event
                await asyncio.sleep(0)
