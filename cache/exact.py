"""Where exact answers are kept: the `ExactCache` protocol, in Redis or in this process's memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from cache.entry import Entry, dump_entry, load_entry
from policies.redis_keys import exact_entry_key
from policies.shared_state import Reply, SharedState, SharedStateError
from policies.tenant import Tenant

T = TypeVar("T")


class Hit(msgspec.Struct, frozen=True, kw_only=True):
    entry: Entry
    age_s: float


class Miss(msgspec.Struct, frozen=True, kw_only=True):
    """`reason`: absent, stale (older than the client allows), corrupt, unavailable."""

    reason: str


Lookup = Hit | Miss


class ExactCache(Protocol):
    """Answers by exact key, one tenant's never another's. `tests/contract/test_exact_caches.py` is the proof."""

    def lookup(self, tenant: Tenant, key: str, *, within_s: float) -> Awaitable[Lookup]:
        """Begin a lookup: it is on its way when this returns, and the result may be left unawaited.

        Never raises: trouble, and an answer that takes longer than `within_s`, is a Miss.
        """

    def store(self, tenant: Tenant, key: str, entry: Entry, *, ttl_s: float) -> Awaitable[str | None]:
        """Begin to keep an entry for `ttl_s` seconds: a lookup in this worker that begins later will find it.

        Awaiting it tells the reason it was not kept, or None. Never raises.
        """


class RedisExactCache:
    """Entries in the cache Redis, where losing one costs a model call and nothing else."""

    def __init__(self, redis: SharedState, *, now: Callable[[], float], store_within_s: float = 0.5) -> None:
        self._redis = redis
        self._now = now
        self._store_within_s = store_within_s

    def lookup(self, tenant: Tenant, key: str, *, within_s: float) -> Awaitable[Lookup]:
        return _Pending(self._redis.send("GET", exact_entry_key(tenant.id, key), within_s=within_s), self._read)

    async def _read(self, reply: Awaitable[Reply]) -> Lookup:
        try:
            stored = await reply
        except SharedStateError:
            return Miss(reason="unavailable")
        if stored is None:
            return Miss(reason="absent")
        entry = load_entry(stored) if isinstance(stored, bytes) else None
        if entry is None:
            return Miss(reason="corrupt")
        return Hit(entry=entry, age_s=max(0.0, self._now() - entry.created_at))

    def store(self, tenant: Tenant, key: str, entry: Entry, *, ttl_s: float) -> Awaitable[str | None]:
        command = ("SET", exact_entry_key(tenant.id, key), dump_entry(entry), "PX", max(1, int(ttl_s * 1000)))
        return _Pending(self._redis.send(*command, within_s=self._store_within_s), _kept)


async def _kept(reply: Awaitable[Reply]) -> str | None:
    try:
        await reply
    except SharedStateError:
        return "unavailable"
    return None


class _Pending(Generic[T]):
    """A reply on its way, and how to read it. Unlike a coroutine it may be dropped."""

    __slots__ = ("_read", "_reply")

    def __init__(self, reply: Awaitable[Reply], read: Callable[[Awaitable[Reply]], Coroutine[Any, Any, T]]) -> None:
        self._reply = reply
        self._read = read

    def __await__(self) -> Generator[Any, Any, T]:
        return self._read(self._reply).__await__()


class MemoryExactCache:
    """Entries of this process: for a worker without a Redis, and for tests. Bounded by bytes; the oldest use leaves."""

    def __init__(self, *, now: Callable[[], float], max_bytes: int = 64 * 1024 * 1024) -> None:
        self._now = now
        self._max_bytes = max_bytes
        self._bytes = 0
        self._entries: OrderedDict[tuple[str, str], tuple[bytes, float]] = OrderedDict()

    def lookup(self, tenant: Tenant, key: str, *, within_s: float) -> Awaitable[Lookup]:
        return _Known(self._lookup(tenant, key))

    def _lookup(self, tenant: Tenant, key: str) -> Lookup:
        place = (tenant.id, key)
        found = self._entries.get(place)
        if found is None:
            return Miss(reason="absent")
        stored, expires_at = found
        now = self._now()
        if now >= expires_at:
            self._drop(place)
            return Miss(reason="absent")
        self._entries.move_to_end(place)
        entry = load_entry(stored)
        return Miss(reason="corrupt") if entry is None else Hit(entry=entry, age_s=max(0.0, now - entry.created_at))

    def store(self, tenant: Tenant, key: str, entry: Entry, *, ttl_s: float) -> Awaitable[str | None]:
        stored = dump_entry(entry)
        if len(stored) > self._max_bytes:
            return _Known("too_large")
        place = (tenant.id, key)
        self._drop(place)
        self._entries[place] = (stored, self._now() + ttl_s)
        self._bytes += len(stored)
        while self._bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))
        return _Known(None)

    def _drop(self, place: tuple[str, str]) -> None:
        found = self._entries.pop(place, None)
        if found is not None:
            self._bytes -= len(found[0])


class _Known(Generic[T]):
    """An awaitable whose result is known already."""

    __slots__ = ("_result",)

    def __init__(self, result: T) -> None:
        self._result = result

    def __await__(self) -> Generator[None, None, T]:
        yield from ()
        return self._result
