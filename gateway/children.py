"""One child process kept alive: started, watched until it is ready, restarted when it dies, stopped when asked.

A child leads a session of its own, so that a terminal's Ctrl-C reaches only its parent, and its standard input is a
pipe that its parent holds open. Neither outlives the parent, however that ends: Linux kills it (PR_SET_PDEATHSIG), and
elsewhere our own programs end when that pipe does (`parent_gone`).
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

import anyio
import msgspec

State = Literal["starting", "ready", "restarting", "failed", "stopping", "stopped"]
"""`restarting` waits for its next try. `failed` died too often in a row; it is tried still, and is so until ready."""

Probe = Callable[[], Awaitable[bool]]
"""Whether a child can do its work now. Asked again and again while it starts; bounded in time by its caller."""

_PROBE_EVERY_S = 0.05
_PROBE_WITHIN_S = 1.0
_KILLED_WITHIN_S = 5.0
_HEARD_WITHIN_S = 1.0
_LOG_BYTES = 8 << 20
_LAST_WORDS_BYTES = 2048
_LINE_BYTES = 1 << 16

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class ChildSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What to run, and how to treat it."""

    name: str
    command: tuple[str, ...]
    ready: Probe | str
    """A probe, or the line by which the child says so on its standard output."""
    ready_within_s: float = 60.0
    """A child that is not ready by then is killed, which counts as a death."""
    awaited: bool = True
    """Whether the stages after this one wait until it is ready."""
    restart: bool = True
    stop_grace_s: float = 5.0
    """From SIGTERM to SIGKILL."""
    reloads: bool = False
    """Whether SIGHUP means something to it."""
    pass_fds: tuple[int, ...] = ()
    env: Mapping[str, str] | None = None
    """Its whole environment; None: ours."""
    log_path: Path | None = None
    """Where its standard error goes, and its output where that is not read for the ready line; None: to ours."""


class ChildStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What is known about one child now."""

    name: str
    state: State
    pid: int | None
    restarts: int


EventKind = Literal["starting", "ready", "said", "died", "failed", "killed", "stopped"]
"""Every death that was not asked for is `died`; `failed` follows the one too many. `said` is a line that it wrote."""


class ChildEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to a child; `str()` is the line for the log."""

    name: str
    kind: EventKind
    pid: int | None
    """The process it happened to, if it could be started."""
    detail: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in (self.name, self.kind, self.detail) if part)


class Backoff(msgspec.Struct, frozen=True, kw_only=True):
    """How long to wait before a restart, by how many deaths there were in a row."""

    first_s: float = 0.1
    cap_s: float = 30.0
    jitter_ratio: float = 0.2
    settled_after_s: float = 10.0
    """A child that was ready and ran for this long ends the row: its death is the first of a new one."""
    failed_after: int = 5
    """Deaths in a row after which the child is reported as failed, and tried every `cap_s`."""

    def delay_s(self, deaths: int, random: float) -> float:
        """Seconds to wait after the `deaths`-th death in a row. `random` in [0, 1) takes off up to the jitter."""
        base_s = self.cap_s if deaths >= self.failed_after else min(self.cap_s, self.first_s * 2.0 ** (deaths - 1))
        return base_s * (1.0 - self.jitter_ratio * random)


class Child:
    """One process and its successors. `keep` runs it until `stop`; each is called once, from two tasks."""

    def __init__(
        self,
        spec: ChildSpec,
        *,
        lifeline_fd: int,
        on_event: Callable[[ChildEvent], None],
        on_change: Callable[[], None],
        backoff: Backoff,
        clock: Callable[[], float],
        random: Callable[[], float],
    ) -> None:
        self.spec = spec
        self.settled = anyio.Event()
        """Set once the child is ready for the first time, has failed or is stopped: nobody need wait any longer."""
        self.was_killed = False
        """Whether it had to be killed because it did not end in its grace."""
        self._lifeline_fd = lifeline_fd
        self._on_event = on_event
        self._on_change = on_change
        self._backoff = backoff
        self._clock = clock
        self._random = random
        self._state: State = "starting"
        self._starts = 0
        self._process: asyncio.subprocess.Process | None = None
        self._last_pid: int | None = None
        self._stop_asked = anyio.Event()
        self._gone = anyio.Event()

    @property
    def status(self) -> ChildStatus:
        return ChildStatus(
            name=self.spec.name,
            state=self._state,
            pid=self._process.pid if self._process is not None else None,
            restarts=max(0, self._starts - 1),
        )

    async def keep(self) -> None:
        """Run the child, again and again where its spec says so, until `stop` is asked and it is gone."""
        deaths = 0
        try:
            while not self._stop_asked.is_set():
                self._starts += 1
                started = self._clock()
                was_ready, how = await self._run_once()
                if not self._stop_asked.is_set():
                    ran_s = self._clock() - started
                    deaths = 1 if was_ready and ran_s >= self._backoff.settled_after_s else deaths + 1
                    await self._after_death(f"after {ran_s:.1f} s: {how}", deaths)
        finally:
            self._set("stopped")
            self.settled.set()
            self._gone.set()
        self._tell("stopped")

    def ask_to_stop(self) -> None:
        """Send SIGTERM, once; from here on the child is not started again."""
        if self._stop_asked.is_set():
            return
        self._stop_asked.set()
        if not self._gone.is_set():
            self._set("stopping")
            self.signal(signal.SIGTERM)

    async def stop(self) -> None:
        """End the child for good: SIGTERM, then SIGKILL when its grace is over or the caller is cancelled."""
        self.ask_to_stop()
        if self._gone.is_set():
            return
        try:
            with anyio.move_on_after(self.spec.stop_grace_s):
                await self._gone.wait()
        finally:
            if not self._gone.is_set():
                self.was_killed = True
                self._tell("killed", "it did not end in time")
                self.signal(signal.SIGKILL)
        await self._gone.wait()

    def signal(self, number: signal.Signals) -> None:
        """Send `number` to the process, if there is one."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _after_death(self, how: str, deaths: int) -> None:
        """Say what happened, and return when it is time to try again or to stop."""
        if not self.spec.restart:
            self._tell("died", f"{how}; it is not restarted")
            self._fail("it is not restarted")
            await self._stop_asked.wait()
            return
        delay_s = self._backoff.delay_s(deaths, self._random())
        self._tell("died", f"{how}; next try in {delay_s:.1f} s")
        if deaths < self._backoff.failed_after:
            self._set("restarting")
        else:
            self._fail(f"it died {deaths} times in a row; tried again every {self._backoff.cap_s:g} s")
        with anyio.move_on_after(delay_s):
            await self._stop_asked.wait()

    def _fail(self, detail: str) -> None:
        if self._state != "failed":
            self._set("failed")
            self._tell("failed", detail)
            self.settled.set()

    async def _run_once(self) -> tuple[bool, str]:
        """Start the process and wait for its end: whether it ever was ready, and how it ended."""
        self._last_pid = None
        # A pipe of our own: asyncio's would keep `wait` waiting for whoever else still holds its other end.
        reading, writing = os.pipe()
        try:
            try:
                self._process = process = await self._spawn(writing)
            except OSError as error:
                return False, f"{self.spec.command[0]} could not be started: {error.strerror}"
            finally:
                os.close(writing)
            self._last_pid = process.pid
            self._set("failed" if self._state == "failed" else "starting")
            self._tell("starting")
            if self._stop_asked.is_set():  # asked while it was being started
                self.signal(signal.SIGTERM)
            return await self._watch(process, reading)
        finally:
            os.close(reading)
            await self._clear_away()

    async def _clear_away(self) -> None:
        """Leave nothing of the process: not itself, where the caller was cancelled, nor what it had started."""
        if self._process is not None:
            with anyio.move_on_after(_KILLED_WITHIN_S, shield=True):
                _kill_group(self._process.pid)
                await self._process.wait()
            self._process = None

    async def _watch(self, process: asyncio.subprocess.Process, output_fd: int) -> tuple[bool, str]:
        ready, heard_all = anyio.Event(), anyio.Event()
        async with anyio.create_task_group() as watching:
            watching.start_soon(self._see_ready, output_fd, ready, heard_all)
            watching.start_soon(self._kill_if_late, process, ready)
            status = await process.wait()
            _kill_group(process.pid)  # what it had started may hold its output open
            with anyio.move_on_after(_HEARD_WITHIN_S):
                await heard_all.wait()
            watching.cancel_scope.cancel()
        return ready.is_set(), _how_it_ended(status, self.spec.log_path)

    async def _see_ready(self, output_fd: int, ready: anyio.Event, heard_all: anyio.Event) -> None:
        if isinstance(self.spec.ready, str):
            # Read for as long as the child lives: nobody writes to a full pipe.
            async for line in _lines(output_fd):
                if line == self.spec.ready:
                    self._now_ready(ready)
                else:
                    self._tell("said", line)
            heard_all.set()
        else:
            heard_all.set()
            await _until(self.spec.ready)
            self._now_ready(ready)

    def _now_ready(self, ready: anyio.Event) -> None:
        ready.set()
        if not self._stop_asked.is_set():
            self._set("ready")
            self._tell("ready")
            self.settled.set()

    async def _kill_if_late(self, process: asyncio.subprocess.Process, ready: anyio.Event) -> None:
        with anyio.move_on_after(self.spec.ready_within_s):
            await ready.wait()
            return
        self._tell("killed", f"it was not ready within {self.spec.ready_within_s:g} s")
        process.kill()

    async def _spawn(self, output_fd: int) -> asyncio.subprocess.Process:
        spec = self.spec
        log = _open_log(spec.log_path) if spec.log_path is not None else None
        try:
            # anyio.open_process has no preexec_fn.
            return await asyncio.create_subprocess_exec(
                *spec.command,
                stdin=self._lifeline_fd,
                stdout=output_fd if isinstance(spec.ready, str) else log,
                stderr=log,
                env=spec.env,
                pass_fds=spec.pass_fds,
                start_new_session=True,
                preexec_fn=_dies_with(os.getpid()),
            )
        finally:
            if log is not None:
                os.close(log)

    def _set(self, state: State) -> None:
        self._state = state
        self._on_change()

    def _tell(self, kind: EventKind, detail: str = "") -> None:
        self._on_event(ChildEvent(name=self.spec.name, kind=kind, pid=self._last_pid, detail=detail))


async def parent_gone() -> None:
    """Return when the parent of this process is gone. For a program run by a `Child`: it reads the standard input."""
    while True:
        await anyio.wait_readable(sys.stdin.fileno())
        if not os.read(sys.stdin.fileno(), 4096):
            return


async def _lines(fd: int) -> AsyncIterator[str]:
    """The lines that come through a pipe; of one without an end, the last piece."""
    rest = b""
    while True:
        await anyio.wait_readable(fd)
        if not (chunk := os.read(fd, _LINE_BYTES)):
            return
        *lines, rest = (rest + chunk).split(b"\n")
        rest = rest[-_LINE_BYTES:]
        for line in lines:
            yield line.decode(errors="replace").rstrip()


async def _until(probe: Probe) -> None:
    while True:
        with anyio.move_on_after(_PROBE_WITHIN_S):
            if await probe():
                return
        await anyio.sleep(_PROBE_EVERY_S)


def _dies_with(parent_pid: int) -> Callable[[], None] | None:
    """What a child runs between fork and exec so that Linux kills it when its parent is gone.

    The signal comes at the end of the *thread* that forked, which here is the event loop's. Everything is bound before
    the fork, and nothing is imported after it.
    """
    if _libc is None:
        return None
    prctl, getppid, end, kill = _libc.prctl, os.getppid, os._exit, int(signal.SIGKILL)

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, kill)
        if getppid() != parent_pid:  # it went before we could ask
            end(1)

    return ask


def _kill_group(pid: int) -> None:
    """Kill what is left of a child's session: whatever it started itself, and the child if it still runs."""
    with suppress(ProcessLookupError, PermissionError):  # macOS refuses a group that holds only the dead
        os.killpg(pid, signal.SIGKILL)


def _open_log(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        if path.stat().st_size > _LOG_BYTES:
            path.replace(path.with_name(f"{path.name}.1"))
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _how_it_ended(status: int, log_path: Path | None) -> str:
    how = f"exit status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"
    words = _last_words(log_path) if log_path is not None and status > 0 else ""
    return f"{how}: {words}" if words else how


def _last_words(log_path: Path) -> str:
    """The last line of a log that is not empty, or nothing."""
    try:
        with log_path.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _LAST_WORDS_BYTES))
            lines = log.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
