"""The supervisor as a process of its own: what a terminal, an init system and `kill -9` do to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.abc
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream

from gateway.processes import read_status
from tests.processes.world import eventually, runs

LOOPS = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])


@asynccontextmanager
async def supervisor_process(runtime: Path, loop: str) -> AsyncIterator[anyio.abc.Process]:
    """The program of `supervised.py` with every child ready; whatever is left of it is killed, by id."""
    command = [sys.executable, "-W", "error", "-m", "tests.processes.supervised", str(runtime), loop]
    async with await anyio.open_process(command, stderr=subprocess.STDOUT) as process:
        try:
            assert await eventually(
                lambda: [child.state for child in read_status(runtime)] == ["ready", "ready", "ready"]
            )
            yield process
        finally:
            for pid in [*pids(runtime), process.pid]:
                if runs(pid):
                    os.kill(pid, signal.SIGKILL)


def pids(runtime: Path) -> list[int]:
    return [child.pid for child in read_status(runtime) if child.pid is not None]


async def output(process: anyio.abc.Process) -> str:
    assert process.stdout is not None
    return b"".join([chunk async for chunk in BufferedByteReceiveStream(process.stdout)]).decode()


@LOOPS
async def test_no_child_outlives_a_supervisor_that_is_killed(runtime: Path, loop: str) -> None:
    async with supervisor_process(runtime, loop) as process:
        children = pids(runtime)
        assert len(children) == 3
        assert all(runs(pid) for pid in children)

        process.kill()
        await process.wait()

        assert await eventually(lambda: not any(runs(pid) for pid in children))


@LOOPS
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_and_leaves_nothing_behind(runtime: Path, loop: str, number: signal.Signals) -> None:
    async with supervisor_process(runtime, loop) as process:
        children = pids(runtime)
        process.send_signal(number)
        said = await output(process)
        status = await process.wait()

    assert (runtime / "drained").exists()
    assert [line for line in said.splitlines() if line.endswith("stopped")] == [
        "worker-0 stopped",
        "stubborn stopped",
        "state stopped",
    ]
    assert status == 1, "the stubborn one had to be killed"
    assert not any(runs(pid) for pid in children)
    assert "Error" not in said


async def test_ctrl_c_in_a_terminal_reaches_no_child(runtime: Path) -> None:
    """A terminal signals the foreground process group of its session."""
    async with supervisor_process(runtime, "asyncio") as process:
        groups = {os.getpgid(pid) for pid in pids(runtime)} | {os.getsid(pid) for pid in pids(runtime)}
        assert os.getpgid(process.pid) not in groups
        assert os.getsid(process.pid) not in groups


async def test_a_program_of_ours_ends_when_its_standard_input_does(runtime: Path) -> None:
    """Where no kernel kills a child with its parent, this is what does."""
    program = "import anyio, gateway.children as c; print('ready', flush=True); anyio.run(c.parent_gone)"
    with anyio.fail_after(20):
        async with await anyio.open_process([sys.executable, "-c", program]) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert (await process.stdout.receive()).startswith(b"ready")
            await process.stdin.aclose()
            assert await process.wait() == 0
