"""`forebay serve` as a program of its own, and what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.abc
from anyio.streams.text import TextReceiveStream

from gateway.processes import read_status
from tests.processes.world import runs

ROOT = Path(__file__).parents[2]


class Served:
    """A running `forebay serve`. Its data directory is `data`."""

    def __init__(self, process: anyio.abc.Process, data: Path) -> None:
        self.process = process
        self.data = data
        self.said = ""
        self._news = anyio.Event()

    async def listen(self) -> None:
        assert self.process.stderr is not None
        async for text in TextReceiveStream(self.process.stderr, errors="replace"):
            self.said += text
            self._news.set()
            self._news = anyio.Event()

    async def until(self, pattern: str, within_s: float = 30.0) -> re.Match[str]:
        """What it said, once that matches."""
        with anyio.fail_after(within_s):
            while (found := re.search(pattern, self.said)) is None:
                await self._news.wait()
        return found

    async def url(self) -> str:
        """Where it serves, once it does."""
        return (await self.until(r"Serving \S+ on (http://\S+)\n"))[1]


def environment(**settings: object) -> dict[str, str]:
    """Ours without any setting of Forebay's, and `settings`."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("FOREBAY_")}
    return {**plain, **{f"FOREBAY_{name.upper()}": str(value) for name, value in settings.items()}}


@asynccontextmanager
async def served(data: Path, policy: Path, **settings: object) -> AsyncIterator[Served]:
    """A process tree of its own on a free port; what is left of it is killed, by id."""
    command = [sys.executable, "-m", "gateway", "serve", "--policy", str(policy), "--data-dir", str(data)]
    async with await anyio.open_process(
        command, cwd=ROOT, env=environment(**{"port": 0, **settings}), stdout=subprocess.DEVNULL
    ) as process:
        world = Served(process, data)
        async with anyio.create_task_group() as listening:
            listening.start_soon(world.listen)
            try:
                yield world
            finally:
                for pid in [*_children(data), process.pid]:
                    if runs(pid):
                        os.kill(pid, 9)
                listening.cancel_scope.cancel()


def _children(data: Path) -> list[int]:
    return [child.pid for child in read_status(data / "run") if child.pid is not None]
