"""Shutting down: what runs may finish for a while, what does not is told so, and nobody is left waiting."""

from __future__ import annotations

import anyio

from backends.scripted import Script
from tests.gateway.wire import chunks_of, demo_tenant_id, error_of, raw_client, streamed_text
from tests.world import World, events_of, open_world

TEN = Script(tokens=tuple(f"{number} " for number in range(10)), token_delay_s=0.03)
ENDLESS = Script(tokens=("word ",) * 10_000, token_delay_s=0.01)


async def test_a_draining_gateway_says_it_is_not_ready_and_finishes_what_runs() -> None:
    async with open_world(small=TEN) as world:
        responses = []

        async def ask(stream: bool) -> None:
            responses.append(await world.ask(stream=stream, seed=int(stream)))

        async with anyio.create_task_group() as group:
            group.start_soon(ask, True)
            group.start_soon(ask, False)
            await world.until(lambda: world.small.in_flight == 2)
            world.gateway.begin_drain(5.0)
            ready = await world.client.get("/readyz")
            alive = await world.client.get("/healthz")

    assert (ready.status_code, alive.status_code) == (503, 200)
    assert any("draining" in problem for problem in ready.json()["problems"])
    streamed, whole = sorted(responses, key=lambda r: r.headers["content-type"], reverse=True)
    assert streamed_text(chunks_of(streamed)) == "".join(TEN.tokens)
    assert whole.json()["choices"][0]["message"]["content"] == "".join(TEN.tokens)


async def test_what_does_not_finish_in_time_is_ended_with_an_error_and_settled() -> None:
    async with open_world(small=ENDLESS) as world:
        responses = []

        async def ask(stream: bool) -> None:
            responses.append(await world.ask(stream=stream, seed=int(stream)))

        with anyio.fail_after(5):
            async with anyio.create_task_group() as group:
                group.start_soon(ask, True)
                group.start_soon(ask, False)
                await world.until(lambda: world.small.events > 5)
                world.gateway.begin_drain(0.1)
        await _nothing_is_left(world)

    streamed, whole = sorted(responses, key=lambda r: r.headers["content-type"], reverse=True)
    *chunks, last = events_of(streamed)
    assert streamed_text(chunks).startswith("word word ")
    assert last["error"]["code"] == "shutting_down"
    assert whole.status_code == 503
    assert error_of(whole)["code"] == "shutting_down"
    assert whole.headers["retry-after"] == "1"
    assert world.small.cancelled == 2


async def _nothing_is_left(world: World) -> None:
    tenant_id = await demo_tenant_id(world)
    ledger = world.gateway.ledger
    await world.until(lambda: world.small.in_flight == 0 and not ledger.live(tenant_id))
    assert ledger.counter(tenant_id) == ledger.settled(tenant_id)


async def test_leaving_the_gateway_ends_what_still_runs() -> None:
    async with open_world(small=ENDLESS) as world, raw_client(world) as client:
        await client.ask(stream=True)
        await client.read_until(b"word ")
    assert world.small.in_flight == 0
    assert world.small.cancelled == 1
    assert not world.log.about("crashed")
