"""A supervisor under observation, children made of shell, and questions about processes by their id."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import psutil  # type: ignore[import-untyped]

from gateway.children import Backoff, ChildEvent, ChildSpec, EventKind, State
from gateway.processes import Supervisor, claimed, read_status

QUICK = Backoff(first_s=0.01, cap_s=0.05, failed_after=4)

STAYS = "echo ready; while :; do sleep 60 & wait $!; done"
STUBBORN = f"trap '' TERM; {STAYS}"


def shell(name: str, script: str, **changes: object) -> ChildSpec:
    """A child that runs a shell script, and is ready when that prints `ready`."""
    options: dict[str, object] = {"name": name, "command": ("/bin/sh", "-c", script), "ready": "ready"}
    return ChildSpec(**(options | changes))  # type: ignore[arg-type]


class Clock:
    """Time as the test says it is, in seconds."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class World:
    """A running supervisor, and everything it told."""

    def __init__(self, runtime: Path) -> None:
        self.events: list[ChildEvent] = []
        self.states_at: list[dict[str, State]] = []
        """How the children were at each event."""
        self.exit_status: int | None = None
        self.supervisor: Supervisor
        self._runtime = runtime
        self._news = anyio.Event()

    def hear(self, event: ChildEvent) -> None:
        self.events.append(event)
        self.states_at.append(self.states())
        self._news.set()
        self._news = anyio.Event()

    async def until(self, name: str, kind: EventKind, times: int = 1) -> ChildEvent:
        """The `times`-th event of this kind, waited for where it has not come yet."""
        with anyio.fail_after(30):
            while len(found := [event for event in self.events if (event.name, event.kind) == (name, kind)]) < times:
                await self._news.wait()
        return found[times - 1]

    def states(self) -> dict[str, State]:
        return {status.name: status.state for status in read_status(self._runtime)}

    def order(self) -> list[tuple[str, str]]:
        return [(event.name, event.kind) for event in self.events]


@asynccontextmanager
async def supervised(
    *stages: Sequence[ChildSpec],
    runtime: Path,
    backoff: Backoff = QUICK,
    clock: Callable[[], float] = time.monotonic,
    on_event: Callable[[ChildEvent], None] = lambda event: None,
    on_stopping: Callable[[], None] = lambda: None,
) -> AsyncIterator[World]:
    """A supervisor that runs `stages` while the body runs, and is stopped after it."""
    world = World(runtime)

    def hear(event: ChildEvent) -> None:
        world.hear(event)
        on_event(event)

    world.supervisor = Supervisor(
        stages,
        runtime_directory=runtime,
        on_event=hear,
        on_stopping=on_stopping,
        backoff=backoff,
        clock=clock,
        random=lambda: 0.0,
    )

    async def run() -> None:
        with claimed(runtime), anyio.fail_after(60):  # cancelled, it kills its children
            world.exit_status = await world.supervisor.run()

    async with anyio.create_task_group() as running:
        running.start_soon(run)
        try:
            yield world
        finally:
            world.supervisor.stop()


def runs(pid: int) -> bool:
    """Whether a process with this id runs; one that is dead and not collected yet does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


async def eventually(holds: Callable[[], bool]) -> bool:
    """Whether `holds` comes true within 10 s; for what other processes do, which tell us nothing."""
    with anyio.move_on_after(10):
        while not holds():
            await anyio.sleep(0.01)
        return True
    return False
