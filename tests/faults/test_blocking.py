"""Nothing blocks the event loop: blockbuster raises where a call that may block is made on it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from blockbuster import BlockingError, blockbuster_ctx

from backends.scripted import Script
from policies.load import read_policy
from tests.valkey import Valkey
from tests.world import events_of, open_world


def nothing_may_block() -> AbstractContextManager[object]:
    """For calls that come from our packages. Starting up is left out: nobody waits for an answer then."""
    return blockbuster_ctx(["gateway", "routing", "cache", "backends", "policies"])


async def test_a_blocking_call_of_ours_on_the_loop_is_noticed() -> None:
    with nothing_may_block(), pytest.raises(BlockingError):
        read_policy(Path(__file__))


async def test_a_worker_serves_every_kind_of_request_without_blocking(valkey: Valkey) -> None:
    async with open_world(redis=valkey.url, small=Script(reports_usage=False)) as world:
        with nothing_may_block():
            miss, hit = await world.ask("a question"), await world.ask("a question")
            streamed = await world.ask("another", stream=True)
            wrong = await world.ask(key="fb-" + "0" * 27)
            facts = [
                await world.client.get(path) for path in ("/readyz", "/metrics", "/v1/models", "/openapi/openapi.json")
            ]
            await world.gateway.reload()

        assert [miss.headers["x-forebay-cache"], hit.headers["x-forebay-cache"]] == ["miss", "exact"]
        assert events_of(streamed)[-1] == "[DONE]"
        assert [wrong.status_code, *(fact.status_code for fact in facts)] == [401, 200, 200, 401, 200]
        assert world.log.about("crashed") == []
