"""Notices a client that leaves, while something else is being awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self

from litestar.types import Receive

from gateway.openai.body import ClientGone


class HangUp:
    """While this is entered, a client that hangs up cancels what runs inside, which ends as `ClientGone`.

    Entered after the body was read. Call `disarm` before the last part of an answer is sent: from then on a closed
    connection is the normal end. It works as `asyncio.timeout` does: by one cancellation that it takes back itself.
    """

    __slots__ = ("_armed", "_gone", "_receive", "_spawn", "_task", "_watch")

    def __init__(self, receive: Receive, spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]) -> None:
        self._receive = receive
        self._spawn = spawn
        self._armed = True
        self._gone = False

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - an ASGI application always runs in one
        self._task = task
        self._watch = self._spawn(self._listen())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._armed = False
        self._watch.cancel()
        if self._gone and self._task.uncancel() == 0 and kind is asyncio.CancelledError:
            raise ClientGone from None

    def disarm(self) -> None:
        self._armed = False

    async def _listen(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if self._armed:
            self._gone = True
            self._task.cancel()
