"""A record of its own for every test: a real SQLite file."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from policies.secrets import RootSecret
from policies.store import Store

ROOT = RootSecret(b"root secret of the tests, 32 bytes or more")


class Clock:
    """A clock that stands until it is set."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock(1_800_000_000.7)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "forebay.db"


@pytest.fixture
async def store(database: Path, clock: Clock) -> AsyncGenerator[Store]:
    store = Store(f"sqlite:///{database}", ROOT, clock=clock)
    await store.migrate()
    yield store
    await store.aclose()
