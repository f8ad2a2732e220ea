"""The contract of `ExactCache`, for every implementation."""

from __future__ import annotations

import gc
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio
import pytest

from cache.entry import Entry, dump_entry
from cache.exact import ExactCache, Hit, Lookup, MemoryExactCache, Miss, RedisExactCache
from policies.redis_keys import exact_entry_key
from policies.shared_state import Limits
from policies.tenant import Tenant
from tests.cache.entries import entry
from tests.valkey import Valkey, running

KEY = "0" * 64
AT_ONCE_S = 0.0


def tenant(name: str) -> Tenant:
    return Tenant(id=name, organisation_id="o", key_id=f"key of {name}", cache_secret=name.encode() * 16)


ANN, BOB = tenant("ann"), tenant("bob")


class Clock:
    def __init__(self) -> None:
        self.now = entry().created_at

    def __call__(self) -> float:
        return self.now


@dataclass
class Kept:
    """A cache to test, and how time goes by in it."""

    cache: ExactCache
    clock: Clock
    until_gone: Callable[[Callable[[], Awaitable[Lookup]]], Awaitable[None]]
    damage: Callable[[Tenant, str, bytes], object]

    async def find(self, who: Tenant = ANN, key: str = KEY) -> Lookup:
        return await self.cache.lookup(who, key, within_s=5.0)

    async def keep(self, what: Entry, who: Tenant = ANN, key: str = KEY, ttl_s: float = 60.0) -> str | None:
        return await self.cache.store(who, key, what, ttl_s=ttl_s)


@asynccontextmanager
async def in_memory() -> AsyncGenerator[Kept, None]:
    clock = Clock()
    cache = MemoryExactCache(now=clock)

    async def until_gone(find: Callable[[], Awaitable[Lookup]]) -> None:
        clock.now += 0.0499
        assert isinstance(await find(), Hit)
        clock.now += 0.0001
        assert isinstance(await find(), Miss)

    def damage(who: Tenant, key: str, stored: bytes) -> None:
        cache._entries[who.id, key] = (stored, clock.now + 60)

    yield Kept(cache, clock, until_gone, damage)


@asynccontextmanager
async def in_redis(valkey: Valkey) -> AsyncGenerator[Kept, None]:
    clock = Clock()

    async def until_gone(find: Callable[[], Awaitable[Lookup]]) -> None:
        with anyio.fail_after(5.0):
            while isinstance(await find(), Hit):
                await anyio.sleep(0.005)

    def damage(who: Tenant, key: str, stored: bytes) -> None:
        valkey.command("SET", exact_entry_key(who.id, key), stored)

    async with running(valkey.url, name="cache") as (redis, _):
        yield Kept(RedisExactCache(redis, now=clock), clock, until_gone, damage)


@pytest.fixture(params=["memory", "redis"])
async def kept(request: pytest.FixtureRequest) -> AsyncGenerator[Kept, None]:
    opened = in_memory() if request.param == "memory" else in_redis(request.getfixturevalue("clean_valkey"))
    async with opened as kept:
        yield kept


async def test_no_tenant_finds_what_another_keeps_under_the_same_key(kept: Kept) -> None:
    await kept.keep(entry("for Ann"), ANN)

    assert await kept.find(BOB) == Miss(reason="absent")

    await kept.keep(entry("for Bob"), BOB)
    assert await kept.find(ANN) == Hit(entry=entry("for Ann"), age_s=0.0)
    assert await kept.find(BOB) == Hit(entry=entry("for Bob"), age_s=0.0)


async def test_ids_that_look_like_parts_of_a_key_keep_tenants_apart(kept: Kept) -> None:
    await kept.keep(entry("a"), tenant("a:exact:b"), "c")

    assert await kept.find(tenant("a"), "b:exact:c") == Miss(reason="absent")
    assert isinstance(await kept.find(tenant("a:exact:b"), "c"), Hit)


async def test_what_is_kept_is_found_as_it_was_with_its_age(kept: Kept) -> None:
    assert await kept.find() == Miss(reason="absent")
    assert await kept.keep(entry()) is None

    kept.clock.now += 12.5
    assert await kept.find() == Hit(entry=entry(), age_s=12.5)
    assert await kept.find(key="1" * 64) == Miss(reason="absent")


async def test_an_entry_from_the_future_has_no_negative_age(kept: Kept) -> None:
    await kept.keep(entry(created_at=kept.clock.now + 3))

    assert await kept.find() == Hit(entry=entry(created_at=kept.clock.now + 3), age_s=0.0)


async def test_the_last_answer_kept_is_the_one_found(kept: Kept) -> None:
    await kept.keep(entry("first"))
    await kept.keep(entry("second"))

    assert await kept.find() == Hit(entry=entry("second"), age_s=0.0)


async def test_an_entry_is_gone_when_its_time_is_over(kept: Kept) -> None:
    await kept.keep(entry(), ttl_s=0.05)

    await kept.until_gone(kept.find)

    assert await kept.find() == Miss(reason="absent")


async def test_a_lookup_that_begins_after_a_store_finds_it_before_either_is_awaited(kept: Kept) -> None:
    stored = kept.cache.store(ANN, KEY, entry(), ttl_s=60)
    found = kept.cache.lookup(ANN, KEY, within_s=5.0)

    assert isinstance(await found, Hit)
    assert await stored is None


@pytest.mark.parametrize(
    "stored", [b"", b"\x00", b"nonsense", dump_entry(entry())[:-1], b"\0\0\0\0\x97" + b"\x91" * 99]
)
async def test_an_entry_that_cannot_be_read_is_a_miss(kept: Kept, stored: bytes) -> None:
    kept.damage(ANN, KEY, stored)

    assert await kept.find() == Miss(reason="corrupt")

    await kept.keep(entry())
    assert isinstance(await kept.find(), Hit)


async def test_what_is_begun_may_be_left_unawaited(kept: Kept) -> None:
    begun = [
        kept.cache.lookup(ANN, KEY, within_s=AT_ONCE_S),
        kept.cache.lookup(ANN, KEY, within_s=5.0),
        kept.cache.store(ANN, KEY, entry(), ttl_s=60),
    ]
    del begun
    gc.collect()

    assert isinstance(await kept.find(), Hit)
    gc.collect()  # a future that nobody read would complain here, and pytest with it


async def test_in_memory_the_entry_used_longest_ago_makes_room() -> None:
    size = len(dump_entry(entry()))
    cache = MemoryExactCache(now=Clock(), max_bytes=3 * size)
    for key in "abc":
        await cache.store(ANN, key, entry(), ttl_s=60)
    await cache.lookup(ANN, "a", within_s=1)
    await cache.store(BOB, "d", entry(), ttl_s=60)

    found = [
        (who.id, key)
        for who in (ANN, BOB)
        for key in "abcd"
        if isinstance(await cache.lookup(who, key, within_s=1), Hit)
    ]
    assert found == [("ann", "a"), ("ann", "c"), ("bob", "d")]


async def test_in_memory_an_entry_larger_than_everything_is_refused_and_costs_nobody_a_place() -> None:
    cache = MemoryExactCache(now=Clock(), max_bytes=len(dump_entry(entry())))
    assert await cache.store(ANN, "a", entry(), ttl_s=60) is None

    assert await cache.store(ANN, "b", entry("much longer than " * 3), ttl_s=60) == "too_large"
    assert isinstance(await cache.lookup(ANN, "a", within_s=1), Hit)


async def test_in_memory_room_that_was_freed_is_used_again() -> None:
    cache = MemoryExactCache(now=Clock(), max_bytes=2 * len(dump_entry(entry())))
    for _ in range(10):
        await cache.store(ANN, "a", entry(), ttl_s=60)
    await cache.store(ANN, "b", entry(), ttl_s=60)

    assert isinstance(await cache.lookup(ANN, "a", within_s=1), Hit)
    assert isinstance(await cache.lookup(ANN, "b", within_s=1), Hit)


async def test_a_redis_that_is_away_is_a_miss_and_a_reason(own_valkey: Valkey) -> None:
    async with running(own_valkey.url, name="cache") as (redis, transitions):
        cache = RedisExactCache(redis, now=Clock())
        own_valkey.kill()
        await transitions.reach("closed", "open")

        assert await cache.lookup(ANN, KEY, within_s=5.0) == Miss(reason="unavailable")
        assert await cache.store(ANN, KEY, entry(), ttl_s=60) == "unavailable"


async def test_a_redis_that_hangs_is_a_miss_within_the_lookups_time(own_valkey: Valkey) -> None:
    never = Limits(max_timeouts=1000)
    async with running(own_valkey.url, name="cache", limits=never) as (redis, _):
        cache = RedisExactCache(redis, now=Clock(), store_within_s=0.02)
        own_valkey.pause()
        try:
            with anyio.fail_after(2.0):
                assert await cache.lookup(ANN, KEY, within_s=0.02) == Miss(reason="unavailable")
                assert await cache.store(ANN, KEY, entry(), ttl_s=60) == "unavailable"
        finally:
            own_valkey.resume()


async def test_a_key_of_another_type_and_a_full_redis_are_no_errors(start_valkey: Callable[..., Valkey]) -> None:
    full = start_valkey("--maxmemory", "1mb", "--maxmemory-policy", "noeviction")
    async with running(full.url, name="cache") as (redis, _):
        cache = RedisExactCache(redis, now=Clock())

        assert await cache.store(ANN, KEY, entry("x" * 200_000), ttl_s=60) == "unavailable"
        assert await cache.lookup(ANN, KEY, within_s=5.0) == Miss(reason="absent")

        full.command("CONFIG", "SET", "maxmemory", "0")
        full.command("LPUSH", exact_entry_key(ANN.id, KEY), "not a string")
        assert await cache.lookup(ANN, KEY, within_s=5.0) == Miss(reason="unavailable")
