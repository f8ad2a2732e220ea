"""One gateway per test module, for tests that leave it as they found it; a test that breaks things opens its own."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest

from backends.scripted import Script
from tests.world import World, open_world


@pytest.fixture(scope="module")
async def one_world() -> AsyncGenerator[World, None]:
    async with open_world() as world:
        yield world


@pytest.fixture
def world(one_world: World) -> World:
    """The module's gateway, its engines back on their usual script. Its cache remembers: use a prompt of your own."""
    one_world.small.script = one_world.large.script = Script()
    return one_world
