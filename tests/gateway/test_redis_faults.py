"""The exact cache in a real Valkey that freezes, dies and comes back while requests run: nobody gets an error."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
import pytest

from tests.valkey import Valkey
from tests.world import World, open_world

PER_SECOND = 20
SLOWEST_S = 0.5
"""A lookup may take 20 ms; the rest is for a machine that is busy with other tests."""


@dataclass
class Traffic:
    statuses: list[int] = field(default_factory=list)
    verdicts: list[str] = field(default_factory=list)
    slowest_s: float = 0.0

    async def ask(self, world: World, prompt: str) -> None:
        began_at = time.monotonic()
        response = await world.ask(prompt)
        self.slowest_s = max(self.slowest_s, time.monotonic() - began_at)
        self.statuses.append(response.status_code)
        self.verdicts.append(response.headers.get("x-forebay-cache", "none"))

    def since(self, count: int) -> set[str]:
        return set(self.verdicts[count:])


@asynccontextmanager
async def traffic_on(world: World) -> AsyncGenerator[Traffic, None]:
    """Twenty requests a second over five prompts, all through the body."""
    traffic = Traffic()

    async def keep_asking(group: anyio.abc.TaskGroup) -> None:
        number = 0
        while True:
            group.start_soon(traffic.ask, world, f"question {number % 5}")
            number += 1
            await anyio.sleep(1 / PER_SECOND)

    async with anyio.create_task_group() as asking, anyio.create_task_group() as beat:
        beat.start_soon(keep_asking, asking)
        yield traffic
        beat.cancel_scope.cancel()


async def more(world: World, traffic: Traffic, count: int) -> None:
    wanted = len(traffic.statuses) + count
    await world.until(lambda: len(traffic.statuses) >= wanted, within_s=20)


def changes(world: World) -> list[str]:
    return [str(line["event"]) for line in world.log if str(line["event"]).startswith("redis")]


@pytest.mark.parametrize("how", ["frozen", "killed"])
async def test_requests_go_on_while_the_cache_is_away_and_it_serves_again_when_it_is_back(
    own_valkey: Valkey, how: str
) -> None:
    async with open_world(redis=own_valkey.url) as world, traffic_on(world) as traffic:
        await more(world, traffic, 15)
        assert traffic.since(10) == {"exact"}
        assert changes(world) == ["redis reachable"]

        own_valkey.pause() if how == "frozen" else own_valkey.kill()
        await world.until(lambda: world.log.about("redis away"))
        await more(world, traffic, 20)
        asked = len(traffic.statuses)
        await more(world, traffic, 10)
        assert traffic.since(asked) == {"miss"}
        assert changes(world) == ["redis reachable", "redis away"]

        own_valkey.resume() if how == "frozen" else own_valkey.start()
        await world.until(lambda: len(world.log.about("redis reachable")) == 2, within_s=10)
        await more(world, traffic, 10)
        asked = len(traffic.statuses)
        await more(world, traffic, 10)
        assert traffic.since(asked) == {"exact"}

    assert set(traffic.statuses) == {200}
    assert traffic.slowest_s < SLOWEST_S
    assert changes(world) == ["redis reachable", "redis away", "redis reachable"]


async def test_a_cache_that_is_away_at_the_start_is_used_once_it_is_there(own_valkey: Valkey) -> None:
    own_valkey.kill()
    async with open_world(redis=own_valkey.url) as world:
        assert (await world.ask()).headers["x-forebay-cache"] == "miss"
        own_valkey.start()
        await world.until(lambda: world.log.about("redis reachable"), within_s=10)
        await world.ask("kept")
        assert (await world.ask("kept")).headers["x-forebay-cache"] == "exact"


async def test_a_cache_that_is_full_of_rubbish_is_a_miss(own_valkey: Valkey) -> None:
    async with open_world(redis=own_valkey.url) as world:
        await world.ask("kept")
        for key in own_valkey.command("KEYS", "*"):
            own_valkey.command("SET", key, b"\xff rubbish")
        response = await world.ask("kept")
        assert (response.status_code, response.headers["x-forebay-cache"]) == (200, "miss")
        assert (await world.ask("kept")).headers["x-forebay-cache"] == "exact"


async def test_a_cache_that_takes_nothing_more_costs_hits_and_nothing_else(
    start_valkey: Callable[..., Valkey],
) -> None:
    valkey = start_valkey("--maxmemory", "1", "--maxmemory-policy", "noeviction")
    async with open_world(redis=valkey.url) as world:
        responses = [await world.ask("kept") for _ in range(3)]
    assert [response.status_code for response in responses] == [200] * 3
    assert {response.headers["x-forebay-cache"] for response in responses} == {"miss"}
