"""What every test may ask for: the event loop the product runs on, and a real Valkey of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest

from tests.valkey import Valkey


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(scope="session")
def valkey() -> Iterator[Valkey]:
    """One Valkey for the whole run, shared: for tests that leave it running and mind only their own keys."""
    with closing(Valkey("--enable-debug-command", "yes")) as server:
        yield server.start()


@pytest.fixture
def clean_valkey(valkey: Valkey) -> Valkey:
    """The shared Valkey, holding no keys and no scripts."""
    valkey.command("FLUSHALL")
    valkey.command("SCRIPT", "FLUSH")
    return valkey


@pytest.fixture
def start_valkey() -> Iterator[Callable[..., Valkey]]:
    """Starts Valkeys that this test alone uses, with its own options: `start_valkey("--maxmemory", "2mb")`."""
    with ExitStack() as servers:
        yield lambda *options: servers.enter_context(closing(Valkey(*options))).start()


@pytest.fixture
def own_valkey(start_valkey: Callable[..., Valkey]) -> Valkey:
    """A Valkey that this test alone uses and may pause, kill and restart."""
    return start_valkey()
