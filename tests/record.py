"""The record as a test has it: a real database of its own, and a clock that stands until it is set."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from policies.secrets import RootSecret
from policies.store import Store

ROOT = RootSecret(b"root secret of the tests, 32 bytes or more")


class Clock:
    """Seconds, since whenever the reader takes them for. Starts within a second, to show what is rounded."""

    def __init__(self, now: float = 1_800_000_000.7) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def record(database: Path | str, clock: Clock) -> AsyncGenerator[Store]:
    """A migrated store in the SQLite file `database`, or at that URL."""
    store = Store(f"sqlite:///{database}" if isinstance(database, Path) else database, ROOT, clock=clock)
    try:
        await store.migrate()
        yield store
    finally:
        await store.aclose()
