"""Redis paused, killed, absent, full, slow, demoted or misconfigured: what it costs callers, and how it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from policies.shared_state import Limits, SharedState, SharedStateRefused, SharedStateUnavailable
from tests.valkey import Transitions, Valkey, free_port, running

SOON_S = 5.0
QUICK = Limits(connect_within_s=0.5, probe_within_s=0.5, longest_delay_s=0.2)


async def fails_at_once(shared: SharedState) -> str:
    """Assert that a command fails without any wait; why it did."""
    future = shared.send("PING", within_s=SOON_S)
    assert future.done()
    with pytest.raises(SharedStateUnavailable) as unavailable:
        await future
    return str(unavailable.value)


async def test_a_paused_server_costs_a_few_requests_one_timeout_each_and_then_nothing(own_valkey: Valkey) -> None:
    async with running(own_valkey.url, limits=QUICK) as (shared, transitions):
        own_valkey.pause()
        began = time.perf_counter()
        in_flight = [shared.send("PING", within_s=0.05) for _ in range(20)]
        in_flight.append(shared.send("PING", within_s=SOON_S))
        for future in in_flight:
            with pytest.raises(SharedStateUnavailable, match="no reply within 50 ms"):
                await future
        cost_s = time.perf_counter() - began
        await transitions.reach("closed", "open")

        assert 0.05 <= cost_s < 2.0
        assert "3 times in a row" in await fails_at_once(shared)

        await anyio.sleep(0.5)  # several probes hang meanwhile
        own_valkey.resume()
        await transitions.reach("closed", "open", "closed")
        assert await shared.execute("ECHO", "back", within_s=SOON_S) == b"back"
        own = [line for line in own_valkey.command("CLIENT", "LIST").decode().splitlines() if "name=forebay" in line]
        assert len(own) == 1


async def test_a_paused_server_is_noticed_without_any_traffic(own_valkey: Valkey) -> None:
    limits = Limits(heartbeat_s=0.02, probe_within_s=0.05, connect_within_s=0.2, longest_delay_s=0.1)
    async with running(own_valkey.url, limits=limits) as (_, transitions):
        own_valkey.pause()
        await transitions.reach("closed", "open")
        own_valkey.resume()
        await transitions.reach("closed", "open", "closed")


async def test_a_healthy_idle_connection_outlives_its_heartbeats(own_valkey: Valkey) -> None:
    async with running(own_valkey.url, limits=Limits(heartbeat_s=0.005)) as (_, transitions):
        before = own_valkey.command("INFO", "commandstats")
        await anyio.sleep(0.1)
        assert own_valkey.command("INFO", "commandstats") != before
        assert transitions.states == ["closed"]


async def test_a_killed_server_fails_what_is_in_flight_at_once_and_a_new_one_is_found(own_valkey: Valkey) -> None:
    async with running(own_valkey.url, limits=QUICK) as (shared, transitions):
        hanging = shared.send("BLPOP", "never", 0, within_s=60.0)
        await asyncio.sleep(0)  # one turn of the loop: the command leaves
        own_valkey.kill()
        with anyio.fail_after(SOON_S), pytest.raises(SharedStateUnavailable):
            await hanging
        await transitions.reach("closed", "open")
        await fails_at_once(shared)

        own_valkey.start()
        await transitions.reach("closed", "open", "closed")
        assert await shared.execute("PING", within_s=SOON_S) == b"PONG"


async def test_a_dropped_connection_is_made_again_without_a_transition(own_valkey: Valkey) -> None:
    async with running(own_valkey.url) as (shared, transitions):
        own_valkey.command("CLIENT", "KILL", "TYPE", "normal")
        with anyio.fail_after(SOON_S):
            while True:
                try:
                    assert await shared.execute("ECHO", "again", within_s=SOON_S) == b"again"
                    break
                except SharedStateUnavailable:
                    await anyio.sleep(0.001)

        assert transitions.states == ["closed"]
        assert await shared.available(within_s=0.0)


async def test_a_server_that_keeps_dropping_us_opens_the_breaker_instead_of_a_storm(own_valkey: Valkey) -> None:
    one_probe_a_minute = Limits(first_delay_s=60.0, longest_delay_s=60.0)
    async with running(own_valkey.url, limits=one_probe_a_minute) as (shared, transitions):
        dropped = 0
        with anyio.fail_after(SOON_S):
            while len(transitions) < 2:
                dropped += own_valkey.command("CLIENT", "KILL", "TYPE", "normal")
                await anyio.sleep(0.005)

        assert transitions.states == ["closed", "open"]
        assert dropped == 2  # the first loss is made good at once, the second is not
        await fails_at_once(shared)


async def test_an_absent_server_is_no_obstacle_to_starting_and_is_found_when_it_comes(own_valkey: Valkey) -> None:
    own_valkey.stop()
    async with running(own_valkey.url, limits=QUICK) as (shared, transitions):
        assert transitions.states == ["open"]
        assert not await shared.available(within_s=0.0)
        assert "No such file" in await fails_at_once(shared)

        own_valkey.start()
        assert await shared.available(within_s=SOON_S)
        assert transitions.states == ["open", "closed"]


@pytest.mark.parametrize(
    "url", [f"redis://127.0.0.1:{free_port()}", f"redis://{'x' * 64}.invalid", "redis://h.invalid"]
)
async def test_a_server_that_cannot_be_found_is_open_with_a_reason(url: str) -> None:
    async with running(url) as (shared, transitions):
        assert transitions.states == ["open"]
        assert shared.reason.startswith(str(shared.address))


async def test_one_call_per_transition_however_many_commands_fail_and_probes_are_tried(own_valkey: Valkey) -> None:
    limits = Limits(first_delay_s=0.001, longest_delay_s=0.005)
    async with running(own_valkey.url, name="cache", limits=limits) as (shared, transitions):
        for _ in range(3):
            own_valkey.kill()
            await transitions.reach(*transitions.states, "open")
            for _ in range(200):
                await fails_at_once(shared)
                await asyncio.sleep(0)
            await anyio.sleep(0.05)  # a dozen probes
            own_valkey.start()
            await transitions.reach(*transitions.states, "closed")

        assert transitions.states == ["closed", "open"] * 3 + ["closed"]
        assert {name for name, _, _ in transitions} == {"cache"}


async def test_a_full_server_refuses_writes_and_reads_go_on(start_valkey: Callable[..., Valkey]) -> None:
    server = start_valkey("--maxmemory", "4mb", "--maxmemory-policy", "noeviction")
    async with running(server.url) as (shared, transitions):
        await shared.execute("SET", "first", "kept", within_s=SOON_S)
        refusals: list[str] = []
        for number in range(100):
            try:
                await shared.execute("SET", f"filler{number}", b"x" * 100_000, within_s=SOON_S)
            except SharedStateRefused as refused:
                refusals.append(refused.code)

        assert refusals == ["OOM"] * len(refusals)
        assert len(refusals) > 50
        assert await shared.execute("GET", "first", within_s=SOON_S) == b"kept"
        assert transitions.states == ["closed"]


async def test_flushall_is_an_empty_answer_and_no_failure(own_valkey: Valkey) -> None:
    async with running(own_valkey.url) as (shared, transitions):
        await shared.execute("SET", "key", "value", within_s=SOON_S)
        own_valkey.command("FLUSHALL")

        assert await shared.execute("GET", "key", within_s=SOON_S) is None
        assert transitions.states == ["closed"]


@pytest.mark.parametrize(
    ("credentials", "why"), [(":hunter2@", "WRONGPASS"), ("who:hunter2@", "WRONGPASS"), ("", "NOAUTH")]
)
async def test_wrong_credentials_are_open_with_the_servers_word_and_without_the_password(
    start_valkey: Callable[..., Valkey], credentials: str, why: str
) -> None:
    server = start_valkey("--requirepass", "another")
    async with running(server.url.replace("unix://", f"unix://{credentials}")) as (shared, transitions):
        assert transitions.states == ["open"]
        assert why in shared.reason
        assert "hunter2" not in await fails_at_once(shared)


async def test_a_password_that_is_put_right_on_the_server_is_enough(start_valkey: Callable[..., Valkey]) -> None:
    server = start_valkey("--requirepass", "old")
    old = server.url.replace("unix://", "unix://:old@")
    new = server.url.replace("unix://", "unix://:new@")
    async with running(old, limits=QUICK) as (admin, _), running(new, limits=QUICK) as (_, transitions):
        await admin.execute("CONFIG", "SET", "requirepass", "new", within_s=SOON_S)
        await transitions.reach("open", "closed")


async def test_a_server_demoted_to_a_replica_is_left_until_it_is_primary_again(own_valkey: Valkey) -> None:
    async with running(own_valkey.url, limits=QUICK) as (shared, transitions):
        own_valkey.command("REPLICAOF", "127.0.0.1", free_port())
        with pytest.raises(SharedStateRefused, match="READONLY"):
            await shared.execute("SET", "key", "value", within_s=SOON_S)
        await transitions.reach("closed", "open")
        assert "replica" in shared.reason

        own_valkey.command("REPLICAOF", "NO", "ONE")
        await transitions.reach("closed", "open", "closed")


async def test_a_cluster_node_is_refused_by_name_of_its_mode(start_valkey: Callable[..., Valkey]) -> None:
    server = start_valkey("--cluster-enabled", "yes", "--port", str(free_port()), "--cluster-port", str(free_port()))
    async with running(server.url) as (shared, transitions):
        assert transitions.states == ["open"]
        assert "cluster mode, which is not supported" in shared.reason


@pytest.mark.parametrize(
    "babble", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b":1\r\n", b":1\r\n:2\r\n:3\r\n:4\r\n", b"", b"%1\r\n", b"%0\r\n"]
)
async def test_a_server_that_speaks_something_else_is_open_with_a_reason(babble: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(babble)
        writer.close()

    port = free_port()
    async with (
        await asyncio.start_server(answer, "127.0.0.1", port),
        running(f"redis://127.0.0.1:{port}") as (shared, transitions),
    ):
        assert transitions.states == ["open"]
        assert shared.reason


async def test_a_slow_server_opens_the_breaker_and_probes_wait_until_it_is_quick(valkey: Valkey) -> None:
    async with running(valkey.url) as (other, _), running(valkey.url, limits=QUICK) as (shared, transitions):
        sleeping = other.send("DEBUG", "SLEEP", "0.5", within_s=SOON_S)
        await asyncio.sleep(0)
        for _ in range(3):
            with pytest.raises(SharedStateUnavailable):
                await shared.execute("PING", within_s=0.02)
        await transitions.reach("closed", "open")
        await sleeping
        await transitions.reach("closed", "open", "closed")


async def test_timeouts_that_are_not_in_a_row_leave_the_breaker_closed(valkey: Valkey) -> None:
    async with running(valkey.url) as (shared, transitions):
        for round_ in range(2):
            for _ in range(2):
                with pytest.raises(SharedStateUnavailable, match="no reply within 5 ms"):
                    await shared.execute("DEBUG", "SLEEP", "0.1", within_s=0.005)
            assert await shared.execute("ECHO", round_, within_s=SOON_S) == str(round_).encode()

        assert transitions.states == ["closed"]


async def test_replies_that_come_too_late_do_not_keep_the_breaker_closed(valkey: Valkey) -> None:
    async with running(valkey.url) as (other, _), running(valkey.url) as (shared, transitions):
        for _ in range(3):
            with pytest.raises(SharedStateUnavailable, match="no reply within 5 ms"):
                await shared.execute("DEBUG", "SLEEP", "0.1", within_s=0.005)
            await other.execute("PING", within_s=SOON_S)  # by now the late reply has arrived

        await transitions.reach("closed", "open", "closed")


async def test_a_reply_that_waited_out_a_stall_of_our_own_loop_is_no_timeout(valkey: Valkey) -> None:
    async with running(valkey.url) as (shared, transitions):
        for number in range(3):
            reply = shared.send("ECHO", number, within_s=0.01)
            await asyncio.sleep(0)
            time.sleep(0.2)  # the fault itself: something blocks the loop for longer than the time-out
            assert await reply == str(number).encode()

        assert transitions.states == ["closed"]


async def test_what_is_sent_to_a_stuck_server_is_bounded(own_valkey: Valkey) -> None:
    async with running(own_valkey.url) as (shared, _):
        own_valkey.pause()
        value = b"x" * 4_000_000
        accepted = 0
        for _ in range(50):
            if not shared.send("SET", "key", value, within_s=SOON_S).done():
                accepted += 1
            await asyncio.sleep(0)
        own_valkey.resume()

        assert 1 <= accepted < 15


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 20, 30, 50, 100])
async def test_run_cancelled_at_any_await_leaves_no_connection_behind(own_valkey: Valkey, turns: int) -> None:
    shared = SharedState("state", own_valkey.url, on_transition=Transitions(), jitter=lambda: 0.0)
    async with anyio.create_task_group() as group:
        group.start_soon(shared.run)
        for _ in range(turns):
            await asyncio.sleep(0)
        group.cancel_scope.cancel()

    assert await fails_at_once(shared) in ("state: not connected yet", "state: shutting down")
    with anyio.fail_after(SOON_S):
        while b"name=forebay" in own_valkey.command("CLIENT", "LIST"):
            await anyio.sleep(0.001)


async def test_hanging_probes_leave_no_file_descriptors_behind(own_valkey: Valkey) -> None:
    limits = Limits(connect_within_s=0.01, first_delay_s=0.001, longest_delay_s=0.001)
    own_valkey.pause()
    async with running(own_valkey.url, limits=limits):
        before = len(list(Path("/proc/self/fd").iterdir()))
        await anyio.sleep(0.3)
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


async def test_aclose_ends_run_while_connected_while_waiting_and_while_connecting(own_valkey: Valkey) -> None:
    limits = Limits(connect_within_s=0.2, first_delay_s=60.0, longest_delay_s=60.0)
    for prepare in (own_valkey.resume, own_valkey.pause, own_valkey.kill):
        prepare()
        shared = SharedState("state", own_valkey.url, on_transition=Transitions(), jitter=lambda: 0.0, limits=limits)
        with anyio.fail_after(SOON_S):
            async with anyio.create_task_group() as group:
                group.start_soon(shared.run)
                await anyio.sleep(0.02)
                await shared.aclose()
