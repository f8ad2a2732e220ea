"""One event loop for all tests of a module."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
import pytest

_GRPC_REPORTS_WITHIN_S = 0.2


@pytest.fixture(scope="module")
async def one_loop() -> AsyncIterator[None]:
    """gRPC tells a loop of the end of a cancelled call a moment later, and finds no loop there after its test."""
    yield
    await anyio.sleep(_GRPC_REPORTS_WITHIN_S)
