"""Clients that hang up, read slowly or half close: their engine is let go at once, what they took is settled."""

from __future__ import annotations

import anyio
import httpx
import msgspec
import pytest

from backends.scripted import Script
from policies.ledger import Amounts
from tests.gateway.wire import chunks_of, demo_tenant_id, metric, raw_client, streamed_text
from tests.held import Held
from tests.world import World, open_world

NEVER = Script(first_token_delay_s=60.0)
ENDLESS = Script(tokens=("word ",) * 10_000, token_delay_s=0.005)


async def reserved(world: World) -> Amounts:
    """What the one live reservation of the demo tenant holds."""
    (reservation,) = world.gateway.ledger.live(await demo_tenant_id(world))
    return reservation.amounts


async def nothing_is_left_of(world: World) -> Amounts:
    """Wait until no call and no reservation is left; what was settled then."""
    tenant_id = await demo_tenant_id(world)
    ledger = world.gateway.ledger
    await world.until(lambda: world.small.in_flight == 0 and not ledger.live(tenant_id))
    assert ledger.counter(tenant_id) == ledger.settled(tenant_id)
    return ledger.settled(tenant_id)


@pytest.mark.parametrize(
    ("script", "stream"),
    [(NEVER, True), (NEVER, False), (ENDLESS, False)],
    ids=["stream before its first token", "whole before its first token", "whole in the middle"],
)
async def test_a_client_that_leaves_while_it_waits_frees_the_engine_and_pays_for_its_prompt_at_most(
    script: Script, stream: bool
) -> None:
    async with open_world(small=script) as world:
        async with raw_client(world) as client:
            await client.ask(stream=stream)
            await world.until(lambda: world.small.in_flight == 1)
            claim = await reserved(world)
            client.hang_up()
            await world.until(lambda: world.small.cancelled == 1, within_s=1.0)
        assert (await nothing_is_left_of(world)).tokens <= claim.tokens
        assert await metric(world, "forebay_tokens_total", kind="completion") == 0
        assert await metric(world, "forebay_clients_gone_total") == 1
        assert await metric(world, "forebay_flights_total", outcome="abandoned") == 1
        assert world.large.calls == 0, "nobody is left for whom a fallback could answer"
        assert not [line for line in world.log if line["level"] in ("warning", "error")]


async def test_a_client_that_leaves_in_the_middle_of_a_stream_pays_for_what_it_took_and_no_more() -> None:
    async with open_world(small=ENDLESS) as world:
        async with raw_client(world) as client:
            await client.ask(stream=True, max_tokens=5000)
            for _ in range(5):
                await client.read_until(b"word ")
            claim = await reserved(world)
            client.hang_up()
            await world.until(lambda: world.small.cancelled == 1, within_s=1.0)
        settled = await nothing_is_left_of(world)
        estimated = await metric(world, "forebay_usage_estimated_total", model="small")

    assert 5 < settled.tokens <= claim.tokens
    assert 0 < settled.cost_nano_usd <= claim.cost_nano_usd
    assert estimated == 1


async def test_a_client_that_closes_its_half_is_taken_as_gone() -> None:
    """A half-closed connection looks like a closed one to the server, which then would write into the void."""
    async with open_world(small=NEVER) as world, raw_client(world) as client:
        await client.ask()
        await world.until(lambda: world.small.in_flight == 1)
        client.half_close()
        await world.until(lambda: world.small.cancelled == 1, within_s=1.0)
        await nothing_is_left_of(world)


async def test_a_client_that_leaves_while_it_sends_its_body_asks_for_nothing() -> None:
    async with open_world() as world:
        async with raw_client(world) as client:
            await client.send(b'{"model":', length=1000)
            client.hang_up()
        await world.until(lambda: True)
        assert (await world.ask()).status_code == 200
        assert world.small.calls == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_closes_after_its_answer_was_never_gone(stream: bool) -> None:
    async with open_world() as world:
        for number in range(100):
            async with raw_client(world) as client:
                await client.ask(f"answer {number % 10}", stream=stream)
                if stream:
                    await client.read_until(b"[DONE]\n\n")
                else:
                    await client.read_answer()
        gone = await metric(world, "forebay_clients_gone_total")
        answered = await metric(world, "forebay_requests_total", status="200")
        await nothing_is_left_of(world)
    assert (gone, answered) == (0, 100)


async def test_many_that_leave_at_once_leave_nothing_behind() -> None:
    async with open_world(small=ENDLESS) as world:

        async def leave(number: int) -> None:
            async with raw_client(world) as client:
                await client.ask(f"question {number}", stream=number % 2 == 0)
                if number % 4 == 0:
                    await client.read_until(b"word ")
                client.hang_up()

        async with anyio.create_task_group() as group:
            for number in range(40):
                group.start_soon(leave, number)
        await nothing_is_left_of(world)
        assert world.small.cancelled == world.small.calls
        world.small.script = Script()
        assert (await world.ask("afterwards")).status_code == 200


PIECE = "x" * 8192
PIECES = 4000


async def test_a_slow_reader_is_not_buffered_for_and_slows_nobody_else() -> None:
    async with open_world(small=Script(tokens=(PIECE,) * PIECES)) as world:
        async with raw_client(world, receive_buffer_bytes=4096) as slow:
            await slow.ask(stream=True)
            await slow.read_until(b"\r\n\r\n")
            await _stalled(world)
            # A MiB of ours, and what the system takes for the connection: its send buffer grows to some MiB.
            assert world.small.events * len(PIECE) < 6 * 1024 * 1024
            stalled_at = world.small.events

            for number in range(50):
                response = await world.ask(f"meanwhile {number}", model="large")
                assert response.status_code == 200
                assert response.elapsed.total_seconds() < 1.0

            assert world.small.events == stalled_at
            received, tail = 0, b""
            with anyio.fail_after(20):
                while b"[DONE]" not in tail:
                    part = await slow.reader.read(1 << 20)
                    received, tail = received + part.count(b"x"), (tail + part)[-100:]
            assert received >= PIECES * len(PIECE)
            assert world.small.events >= PIECES
        await nothing_is_left_of(world)


async def _stalled(world: World) -> None:
    """Return once the engine has not been read from for a tenth of a second."""
    with anyio.fail_after(5):
        before = -1
        while world.small.events != before:
            before = world.small.events
            await anyio.sleep(0.1)


async def test_a_slow_reader_that_leaves_is_noticed_while_it_is_waited_for() -> None:
    async with open_world(small=Script(tokens=(PIECE,) * PIECES)) as world:
        async with raw_client(world, receive_buffer_bytes=4096) as slow:
            await slow.ask(stream=True)
            await slow.read_until(b"\r\n\r\n")
            await _stalled(world)
            slow.hang_up()
            await world.until(lambda: world.small.cancelled == 1, within_s=1.0)
        await nothing_is_left_of(world)
        assert await metric(world, "forebay_clients_gone_total") == 1


@pytest.mark.parametrize(("opener_streams", "calls"), [(True, 1), (False, 2)])
async def test_twenty_identical_requests_share_one_call_unless_streams_would_have_to_wait(
    opener_streams: bool, calls: int
) -> None:
    """A stream is read to its end for who wants the whole; an answer that comes as a whole makes no stream wait."""
    small = Held("small-1")
    small.hold()
    async with open_world(small=small) as world:
        responses: list[httpx.Response] = []

        async def ask(stream: bool) -> None:
            responses.append(await world.ask(stream=stream, user=f"user {len(responses)}"))

        async with anyio.create_task_group() as group:
            group.start_soon(ask, opener_streams)
            await world.until(lambda: world.following == 1)
            for number in range(19):
                group.start_soon(ask, number % 2 == 0)
            await world.until(lambda: world.following == 20)
            small.release()

        assert world.small.calls == calls
        verdicts = [response.headers["x-forebay-cache"] for response in responses]
        assert sorted(verdicts) == ["coalesced"] * (20 - calls) + ["miss"] * calls
        for response in responses:
            if response.headers["content-type"].startswith("text/event-stream"):
                assert streamed_text(chunks_of(response)) == "This is a scripted answer."
                assert all("usage" not in chunk for chunk in chunks_of(response))
            else:
                assert response.json()["choices"][0]["message"]["content"] == "This is a scripted answer."
                assert response.json()["object"] == "chat.completion"
        costs = [float(response.headers.get("x-forebay-cost-usd", 0)) for response in responses]
        assert sum(cost > 0 for cost in costs) <= 1, "only the opener pays"
        tenant_id = await demo_tenant_id(world)
        usage = next(r.json()["usage"] for r in responses if not r.headers["content-type"].startswith("text/event"))
        assert world.gateway.ledger.settled(tenant_id).tokens == calls * usage["total_tokens"]


async def test_the_one_who_opened_may_leave_while_others_listen() -> None:
    async with open_world(small=Script(tokens=tuple(f"{n} " for n in range(60)), token_delay_s=0.01)) as world:
        async with raw_client(world) as opener, raw_client(world) as follower:
            await opener.ask(stream=True)
            await opener.read_until(b'"content":"0 "')
            await follower.ask(stream=True)
            head = await follower.read_until(b"\r\n\r\n")
            assert b"x-forebay-cache: coalesced" in head
            opener.hang_up()
            rest = await follower.read_until(b"[DONE]\n\n")

        assert world.small.calls == 1
        assert world.small.cancelled == 0
        contents = [msgspec.json.decode(line[6:]) for line in rest.split(b"\n") if line.startswith(b"data: {")]
        assert streamed_text(contents) == "".join(f"{n} " for n in range(60)), "a late one gets all of it"
        await nothing_is_left_of(world)


async def test_the_last_one_to_leave_takes_the_call_down() -> None:
    async with open_world(small=ENDLESS) as world:
        async with raw_client(world) as first, raw_client(world) as second:
            await first.ask(stream=True)
            await first.read_until(b"word ")
            await second.ask(stream=True)
            await second.read_until(b"word ")
            first.hang_up()
            await second.read_until(b"word ")
            assert world.small.cancelled == 0
            second.hang_up()
            await world.until(lambda: world.small.cancelled == 1, within_s=1.0)
        await nothing_is_left_of(world)


async def test_a_failure_before_the_first_token_reaches_everyone_who_waits() -> None:
    small = Held("small-1", Script(fault="error"))
    small.hold()
    async with open_world(small=small, large=Script(fault="error")) as world:
        statuses = []

        async def ask(stream: bool) -> None:
            statuses.append((await world.ask(stream=stream)).status_code)

        async with anyio.create_task_group() as group:
            for number in range(6):
                group.start_soon(ask, number % 2 == 0)
            await world.until(lambda: world.following == 6)
            small.release()
        assert statuses == [502] * 6
        await nothing_is_left_of(world)
