"""The supervisor: starts Forebay's processes in order, keeps them alive, and stops them in the opposite order.

Stages start one after the other (stores, engines, workers) and end last one first, so that workers drain while
everything they need still runs. What happens is told to `on_event`; how the children are is in `children.json` in the
runtime directory, for `/readyz` and the metrics of the workers.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import signal
import socket
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

import anyio
import msgspec
from anyio.abc import TaskGroup

from gateway.children import Backoff, Child, ChildEvent, ChildSpec, ChildStatus

LISTEN_BACKLOG = 2048
_HURRIED_GRACE_S = 1.0
_BACKOFF = Backoff()
_STATUS_FILE = "children.json"


class CannotListen(Exception):
    """The address to serve on cannot be had; the message says why and what to do."""


class AlreadyRunning(Exception):
    """Another supervisor runs in the same runtime directory."""


class Supervisor:
    """Keeps the children of `stages` running until it is told to stop.

    A stage starts when every `awaited` child of the one before is ready, or has failed: a child that will not start is
    reported and tried again for ever, and does not keep the others from working. Raises nothing on a child's account,
    nor on that of `on_event`. `on_stopping` is called when the last stage has been asked to stop: from then on the
    children there are need nothing more of what they inherited. The caller holds `runtime_directory`, see `claimed`.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[ChildSpec]],
        *,
        runtime_directory: Path,
        on_event: Callable[[ChildEvent], None],
        on_stopping: Callable[[], None] = lambda: None,
        backoff: Backoff = _BACKOFF,
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = random.random,
    ) -> None:
        self._stages = stages
        self._directory = runtime_directory
        self._on_event = on_event
        self._on_stopping = on_stopping
        self._backoff = backoff
        self._clock = clock
        self._random = random
        self._kept: list[list[Child]] = []
        self._stop_asked = anyio.Event()
        self._patience: anyio.CancelScope | None = None
        self._hurried = False
        self._report_failed = False

    async def run(self) -> int:
        """Run until SIGTERM, SIGINT or `stop`; the exit status: 0, or 1 when a child had to be killed.

        SIGHUP is passed on to the children that reload. A second SIGTERM or SIGINT leaves each stage one second.
        Runs in the main thread.
        """
        with (
            _lifeline() as lifeline_fd,
            anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals,
        ):
            try:
                async with anyio.create_task_group() as running:
                    running.start_soon(self._take, signals)
                    async with anyio.create_task_group() as keeping:
                        keeping.start_soon(self._start, keeping, lifeline_fd)
                        await self._stop_asked.wait()
                        await self._stop()
                    running.cancel_scope.cancel()
            finally:
                _status_path(self._directory).unlink(missing_ok=True)
        return 1 if any(child.was_killed for child in self._children) else 0

    def stop(self) -> None:
        """Begin to drain; called again, hurry."""
        if self._stop_asked.is_set() and not self._hurried:
            self._hurried = True
            if self._patience is not None:
                self._patience.deadline = anyio.current_time() + _HURRIED_GRACE_S
        self._stop_asked.set()

    def reload(self) -> None:
        """Pass SIGHUP on to the children that know what it means."""
        for child in self._children:
            if child.spec.reloads:
                child.signal(signal.SIGHUP)

    @property
    def _children(self) -> Iterator[Child]:
        return chain.from_iterable(self._kept)

    async def _take(self, signals: AsyncIterator[signal.Signals]) -> None:
        async for number in signals:
            if number == signal.SIGHUP:
                self.reload()
            else:
                self.stop()

    async def _start(self, keeping: TaskGroup, lifeline_fd: int) -> None:
        for stage in self._stages:
            if self._stop_asked.is_set():
                return
            children = [self._child(spec, lifeline_fd) for spec in stage]
            self._kept.append(children)
            for child in children:
                keeping.start_soon(child.keep)
            for child in children:
                if child.spec.awaited:
                    await child.settled.wait()

    def _child(self, spec: ChildSpec, lifeline_fd: int) -> Child:
        return Child(
            spec,
            lifeline_fd=lifeline_fd,
            on_event=self._tell,
            on_change=self._write_status,
            backoff=self._backoff,
            clock=self._clock,
            random=self._random,
        )

    def _tell(self, event: ChildEvent) -> None:
        try:
            self._on_event(event)
        except Exception:  # noqa: BLE001 - how a report fails is its maker's mistake, and no reason to end the children
            if not self._report_failed:
                self._report_failed = True
                with suppress(OSError):
                    traceback.print_exc()

    async def _stop(self) -> None:
        for child in self._kept[-1] if self._kept else ():
            child.ask_to_stop()
        self._on_stopping()
        for stage in reversed(self._kept):
            deadline = anyio.current_time() + _HURRIED_GRACE_S if self._hurried else float("inf")
            with anyio.CancelScope(deadline=deadline) as self._patience:
                async with anyio.create_task_group() as stopping:
                    for child in stage:
                        stopping.start_soon(child.stop)

    def _write_status(self) -> None:
        # Under a kilobyte, and nothing but children is served from this event loop.
        path = _status_path(self._directory)
        written = path.with_suffix(".new")
        written.write_bytes(msgspec.json.encode([child.status for child in self._children]))
        written.replace(path)


def read_status(runtime_directory: Path) -> tuple[ChildStatus, ...]:
    """How the supervisor's children are, as it last wrote it; empty where none runs."""
    try:
        return msgspec.json.decode(_status_path(runtime_directory).read_bytes(), type=tuple[ChildStatus, ...])
    except FileNotFoundError:
        return ()


def listen(host: str, port: int) -> socket.socket:
    """The one listening socket that every worker inherits. Raises `CannotListen`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=LISTEN_BACKLOG)  # sets SO_REUSEADDR
    except OSError as error:
        raise CannotListen(_why(host, port, error)) from error
    listener.setblocking(False)
    return listener


def _why(host: str, port: int, error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return f"Port {port} on {host} is taken by another program. Stop that program, or choose another port."
        case errno.EACCES:
            return f"Port {port} on {host} needs more rights than this user has. Choose a port from 1024 on."
        case _:
            return f"Cannot listen on {host}, port {port}: {error.strerror or error}. Check the address."


def _status_path(runtime_directory: Path) -> Path:
    return runtime_directory / _STATUS_FILE


@contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """Hold `directory`, made where it is not there, for one supervisor: two on the same stores would spoil them.

    Raises `AlreadyRunning` when another holds it, in this process or any other.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (directory / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AlreadyRunning(
                f"Forebay already runs in {directory}. Stop it, or choose another directory."
            ) from error
        yield


@contextmanager
def _lifeline() -> Iterator[int]:
    """The reading end of a pipe whose writing end only this process holds."""
    reading, writing = os.pipe()
    try:
        yield reading
    finally:
        os.close(reading)
        os.close(writing)
