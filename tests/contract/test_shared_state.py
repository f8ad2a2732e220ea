"""What `SharedState` promises over a real Valkey that is well: order, typed replies, scripts, pushes, addresses."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from random import Random
from typing import Any

import anyio
import pytest

from policies.redis_address import RedisAddress
from policies.shared_state import Limits, Script, SharedState, SharedStateRefused, SharedStateUnavailable
from tests.tls_relay import tls_relay
from tests.valkey import Transitions, Valkey, free_port, running

SOON_S = 5.0


@pytest.fixture
async def state(clean_valkey: Valkey) -> AsyncIterator[SharedState]:
    async with running(clean_valkey.url) as (shared, _):
        yield shared


async def test_a_thousand_concurrent_commands_each_get_their_own_reply(state: SharedState) -> None:
    echoed: dict[int, object] = {}

    async def echo(number: int) -> None:
        echoed[number] = await state.execute("ECHO", number, within_s=SOON_S)

    async with anyio.create_task_group() as group:
        for number in range(1000):
            group.start_soon(echo, number)

    assert echoed == {number: str(number).encode() for number in range(1000)}


async def test_commands_of_one_turn_run_in_the_order_they_were_sent(state: SharedState) -> None:
    replies = [state.send("RPUSH", "list", number, within_s=SOON_S) for number in range(100)]

    assert [await reply for reply in replies] == list(range(1, 101))
    assert await state.execute("LRANGE", "list", 0, -1, within_s=SOON_S) == [str(n).encode() for n in range(100)]


async def test_commands_of_one_turn_leave_in_one_write(state: SharedState, clean_valkey: Valkey) -> None:
    def reads() -> int:
        stats: bytes = clean_valkey.command("INFO", "stats")
        return next(
            int(line.split(b":")[1]) for line in stats.splitlines() if line.startswith(b"total_reads_processed")
        )

    before = reads()
    for reply in [state.send("PING", within_s=SOON_S) for _ in range(100)]:
        await reply

    assert reads() - before < 20  # one for ours, a few for asking


async def test_every_kind_of_reply_arrives_as_python_knows_it(state: SharedState) -> None:
    async def debug(what: str) -> object:
        return await state.execute("DEBUG", "PROTOCOL", what, within_s=SOON_S)

    assert await state.execute("SET", "key", "value", within_s=SOON_S) == b"OK"
    assert await state.execute("GET", "absent", within_s=SOON_S) is None
    assert await debug("double") == 3.141
    assert await debug("true") is True
    assert await debug("false") is False  # hiredis' own mark of an incomplete reply
    assert await debug("map") == {0: False, 1: True, 2: False}
    assert await debug("set") == [0, 1, 2]


async def test_a_server_error_is_refused_with_its_code_and_concerns_nobody_else(state: SharedState) -> None:
    await state.execute("SET", "text", "not a list", within_s=SOON_S)

    wrong, right = state.send("LPUSH", "text", 1, within_s=SOON_S), state.send("GET", "text", within_s=SOON_S)

    with pytest.raises(SharedStateRefused, match="wrong kind of value") as refused:
        await wrong
    assert refused.value.code == "WRONGTYPE"
    assert await right == b"not a list"


async def test_an_error_inside_an_array_is_a_value_among_the_others(state: SharedState) -> None:
    _ = state.send("SET", "text", "x", within_s=SOON_S)
    _ = state.send("MULTI", within_s=SOON_S)
    _ = state.send("INCR", "text", within_s=SOON_S)
    _ = state.send("GET", "text", within_s=SOON_S)

    replies = await state.execute("EXEC", within_s=SOON_S)

    assert isinstance(replies, list)
    assert isinstance(replies[0], SharedStateRefused)
    assert replies[1] == b"x"


async def test_an_error_that_is_not_text_is_refused_all_the_same(state: SharedState) -> None:
    with pytest.raises(SharedStateRefused):
        await state.execute("EVAL", "return redis.error_reply('BAD \\255\\254')", 0, within_s=SOON_S)


@pytest.mark.parametrize("argument", [None, True, ["list"]])
async def test_an_argument_that_is_no_text_or_number_is_a_type_error_and_breaks_nothing(
    state: SharedState, argument: Any
) -> None:
    with pytest.raises(TypeError):
        _ = state.send("SET", "key", argument, within_s=SOON_S)

    assert await state.execute("ECHO", "still in step", within_s=SOON_S) == b"still in step"


async def test_big_and_binary_values_come_back_whole_among_small_ones(state: SharedState) -> None:
    values = [Random(size).randbytes(size) for size in (0, 1, 65_536, 5_000_000, 20_000_000)]
    for number, value in enumerate(values):
        _ = state.send("SET", f"big{number}", value, within_s=SOON_S)
        _ = state.send("ECHO", "between", within_s=SOON_S)

    for number, value in enumerate(values):
        assert await state.execute("GET", f"big{number}", within_s=SOON_S) == value


async def test_a_script_is_taught_once_then_run_by_its_digest(state: SharedState, clean_valkey: Valkey) -> None:
    script = Script.of("count", "return redis.call('INCRBY', KEYS[1], ARGV[1])")

    assert await state.evaluate(script, keys=["counter"], args=[5], within_s=SOON_S) == 5
    assert clean_valkey.command("SCRIPT", "EXISTS", script.sha1) == [1]
    assert await state.evaluate(script, keys=["counter"], args=[5], within_s=SOON_S) == 10

    calls: bytes = clean_valkey.command("INFO", "commandstats")
    assert b"cmdstat_evalsha:calls=" in calls


async def test_a_script_that_the_server_forgot_is_taught_again_and_runs_exactly_once(
    state: SharedState, clean_valkey: Valkey
) -> None:
    script = Script.of("once", "return redis.call('INCR', KEYS[1])")
    await state.evaluate(script, keys=["counter"], within_s=SOON_S)

    clean_valkey.command("SCRIPT", "FLUSH")

    assert await state.evaluate(script, keys=["counter"], within_s=SOON_S) == 2


async def test_a_script_that_fails_is_refused_and_not_run_again(state: SharedState) -> None:
    script = Script.of("half", "redis.call('INCR', KEYS[1]) return redis.error_reply('DENIED no room')")

    for tries in (b"1", b"2"):  # not known to the server yet, and known
        with pytest.raises(SharedStateRefused) as refused:
            await state.evaluate(script, keys=["tries"], within_s=SOON_S)

        assert refused.value.code == "DENIED"
        assert await state.execute("GET", "tries", within_s=SOON_S) == tries


async def test_the_push_listener_hears_of_writes_by_others_on_every_new_connection(own_valkey: Valkey) -> None:
    pushes: list[Any] = []
    heard = anyio.Event()

    def listen(push: list[Any]) -> None:
        pushes.append(list(push))
        heard.set()

    async def write_elsewhere(value: str) -> None:
        nonlocal heard
        heard = anyio.Event()
        await shared.execute("GET", "key", within_s=SOON_S)
        own_valkey.command("SET", "key", value)
        with anyio.fail_after(SOON_S):
            await heard.wait()

    async with running(own_valkey.url, prelude=[("CLIENT", "TRACKING", "ON")], on_push=listen) as (shared, _):
        await write_elsewhere("new")
        assert pushes == [[b"invalidate", [b"key"]]]

        own_valkey.command("CLIENT", "KILL", "TYPE", "normal")
        await until_pushed(pushes, [b"invalidate", None])
        assert await shared.available(within_s=SOON_S)

        await write_elsewhere("newer")
        assert pushes[-1] == [b"invalidate", [b"key"]]


async def until_pushed(pushes: list[Any], last: object) -> None:
    with anyio.fail_after(SOON_S):
        while pushes[-1:] != [last]:
            await anyio.sleep(0.001)


async def test_the_connection_carries_its_name_speaks_resp3_and_is_the_only_one(own_valkey: Valkey) -> None:
    async with running(own_valkey.url, name="cache") as (shared, _):
        async with anyio.create_task_group() as group:
            for _ in range(50):
                group.start_soon(lambda: shared.execute("PING", within_s=SOON_S))
        clients = [
            line for line in own_valkey.command("CLIENT", "LIST").decode().splitlines() if "name=forebay" in line
        ]

    assert len(clients) == 1
    assert "name=forebay-cache " in clients[0]
    assert "resp=3" in clients[0]


async def test_tcp_a_password_and_a_database_number_are_used(start_valkey: Callable[..., Valkey]) -> None:
    port = free_port()
    server = start_valkey("--port", str(port), "--bind", "127.0.0.1", "--requirepass", "pa:ss/w@rd %")

    async with running(f"redis://:pa%3Ass%2Fw%40rd%20%25@127.0.0.1:{port}/3") as (shared, transitions):
        assert transitions.states == ["closed"]
        await shared.execute("SET", "key", "in three", within_s=SOON_S)
        client = await shared.execute("CLIENT", "INFO", within_s=SOON_S)
        assert isinstance(client, bytes)
        assert b" db=3 " in client
    async with running(server.url.replace("unix://", "unix://default:pa%3Ass%2Fw%40rd%20%25@") + "?db=3") as (
        shared,
        _,
    ):
        assert await shared.execute("GET", "key", within_s=SOON_S) == b"in three"


async def test_tls_is_spoken_and_the_server_is_verified(clean_valkey: Valkey, tmp_path: Path) -> None:
    async with tls_relay(clean_valkey.socket_path, tmp_path) as (port, ca_file):
        async with running(f"rediss://localhost:{port}?ssl_ca_certs={ca_file}") as (shared, _):
            assert await shared.execute("ECHO", "secret", within_s=SOON_S) == b"secret"

        async with running(f"rediss://localhost:{port}") as (shared, transitions):
            assert transitions.states == ["open"]
            assert "certificate verify failed" in shared.reason


def test_a_certificate_file_that_does_not_exist_is_an_error_at_start() -> None:
    with pytest.raises(OSError):
        SharedState("state", "rediss://h?ssl_ca_certs=/no/such", on_transition=Transitions(), jitter=lambda: 0.0)


URLS = {
    "redis://cache.internal": RedisAddress(host="cache.internal"),
    "redis://cache.internal:6380/2": RedisAddress(host="cache.internal", port=6380, db=2),
    "redis://u:p%40@[::1]:7000": RedisAddress(host="::1", port=7000, username="u", password="p@"),
    "redis://:p@h?db=1": RedisAddress(host="h", password="p", db=1),
    "rediss://h?ssl_ca_certs=/ca.pem": RedisAddress(host="h", tls=True, ca_file="/ca.pem"),
    "unix:///run/valkey%20one.sock?db=4": RedisAddress(path="/run/valkey one.sock", db=4),
}


@pytest.mark.parametrize("url", URLS)
def test_a_url_says_where(url: str) -> None:
    assert RedisAddress.parse(url) == URLS[url]


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("redis+cluster://h:7000", r"redis\+cluster://: Redis Cluster and Sentinel are not supported; supported are"),
        ("redis+sentinel://h:26379/mymaster", "Sentinel are not supported"),
        ("redis://h1:6379,h2:6379", "not a URL|several hosts"),
        ("redis://h1,h2", "several hosts"),
        ("http://h", "http://: not a Redis URL"),
        ("localhost:6379", "not a Redis URL"),
        ("redis://", "no host"),
        ("unix://", "no path"),
        ("redis://h/one", "the database is a number"),
        ("redis://h?timeout=3", "unknown parameter 'timeout'"),
        ("redis://h:70000", "not a URL"),
    ],
)
def test_a_url_that_is_not_supported_says_why_and_what_is(url: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as refused:
        RedisAddress.parse(url)
    assert "redis://host:port/db" in str(refused.value)


@pytest.mark.parametrize(
    "url", ["redis://:hunter2/x@h", "redis://:hunter2@h:port", "redis://:hunter2@[h", "x://:hunter2@h"]
)
def test_a_password_is_in_no_message(url: str) -> None:
    with pytest.raises(ValueError) as refused:
        RedisAddress.parse(url)
    assert "hunter2" not in str(refused.value)
    assert refused.value.__cause__ is None


def test_a_password_is_in_no_description_of_an_address() -> None:
    address = RedisAddress.parse("redis://user:hunter2@h/1")
    assert "hunter2" not in f"{address} {address!r}"


@pytest.mark.parametrize("jitter", [0.0, 0.5, 0.999])
def test_delays_between_probes_grow_to_a_bound_and_keep_at_least_half(jitter: float) -> None:
    limits = Limits(first_delay_s=0.05, longest_delay_s=2.0)
    delays = [limits.delay_s(attempt, jitter) for attempt in (0, 1, 2, 10, 100_000)]

    assert delays == sorted(delays)
    assert 0.025 <= delays[0] <= 0.05
    assert 1.0 <= delays[-1] <= 2.0


async def test_a_future_that_nobody_awaits_leaves_no_complaint(state: SharedState) -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, complaint: complaints.append(complaint))

    _ = state.send("LPUSH", within_s=SOON_S)
    await state.execute("PING", within_s=SOON_S)
    _ = state.send("BLPOP", "never", 0, within_s=SOON_S)
    await state.aclose()
    gc.collect()

    assert complaints == []


async def test_before_run_and_after_aclose_every_command_fails_at_once(clean_valkey: Valkey) -> None:
    shared = SharedState("cache", clean_valkey.url, on_transition=Transitions(), jitter=lambda: 0.0)
    with pytest.raises(SharedStateUnavailable, match="cache: not connected yet"):
        await shared.execute("PING", within_s=SOON_S)
    assert not await shared.available(within_s=0.0)

    async with running(clean_valkey.url) as (shared, transitions):
        hanging = shared.send("BLPOP", "never", 0, within_s=SOON_S)
        await shared.aclose()
        await shared.aclose()
        with pytest.raises(SharedStateUnavailable, match="shutting down"):
            await hanging
        with pytest.raises(SharedStateUnavailable, match="shutting down"):
            await shared.execute("PING", within_s=SOON_S)
    assert transitions.states == ["closed"]
