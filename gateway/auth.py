"""Bearer key -> who asks. `KeyRing` knows recent keys by heart and reads the record only for the others.

    AuthError
    ├── MissingKey          no `Authorization: Bearer …` at all
    ├── InvalidKey          no such key, a revoked one, or one for the other side (inference, administration)
    ├── KeyExpired          its time is over
    └── StoreUnavailable    the record does not answer, so nobody can say: never a reason to call a key wrong

The hot path is one hash and one dictionary: no SQL, no await.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from math import inf
from typing import Protocol, TypeVar

import anyio

from policies.secrets import RootSecret, looks_like_key
from policies.store import StoreUnreachable
from policies.tenant import Administrator, KeyRecord, Tenant

POLL_INTERVAL_S = 0.5
"""How often `run` asks for the tenancy version: with the read itself, a revoked key is refused within a second."""

_READS_AT_ONCE = 4
_BEARER = b"bearer "
_UNKNOWN = "This API key is not known."

Caller = Tenant | Administrator
_Value = TypeVar("_Value")


class AuthError(Exception):
    """Why a caller is not let in. The message is for the caller and never holds the key."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class MissingKey(AuthError):
    pass


class InvalidKey(AuthError):
    pass


class KeyExpired(AuthError):
    pass


class StoreUnavailable(AuthError):
    pass


class KeyStore(Protocol):
    """What a key ring needs of the record; `policies.store.Store` is one. Both raise `StoreUnreachable`."""

    async def find_key(self, key_hashes: Sequence[bytes]) -> KeyRecord | None: ...

    async def tenancy_version(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a key ring remembers, and for how long. Times in seconds."""

    known_keys: int = 10_000
    wrong_keys: int = 10_000
    wrong_for_s: float = 5.0
    """How long a key stays wrong without another look. A new key works at once all the same: no one tried it before."""
    unseen_for_s: float = 60.0
    """How long known keys keep working while the record does not answer, counted from its last answer."""
    read_within_s: float = 2.0


@dataclass(frozen=True, slots=True)
class _Known:
    caller: Caller
    expires_at: float


@dataclass(frozen=True, slots=True)
class _Refused:
    error: type[AuthError]
    message: str
    cause: Exception | None = None


@dataclass(slots=True)
class _Flight:
    """One read that several requests wait for. `found` stays None if the reader was cancelled."""

    landed: anyio.Event = field(default_factory=anyio.Event)
    found: _Known | _Refused | None = None


class KeyRing:
    """Recognises keys, for one worker and on one event loop. `run` must be running, else every lookup reads the record.

    Keys are remembered by a BLAKE2b hash under a key of this process, so none is kept in memory in the clear.
    """

    def __init__(
        self,
        store: KeyStore,
        root: RootSecret,
        *,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        random_bytes: Callable[[int], bytes] = secrets.token_bytes,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
    ) -> None:
        self._store = store
        self._root = root
        self._limits = limits or Limits()
        self._clock = clock
        self._monotonic = monotonic
        self._sleep = sleep
        self._hash_key = random_bytes(32)
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._wrong: OrderedDict[bytes, tuple[float, _Refused]] = OrderedDict()
        self._flights: dict[bytes, _Flight] = {}
        self._reads = anyio.CapacityLimiter(_READS_AT_ONCE)
        self._version: int | None = None
        self._generation = 0
        self._seen_at = -inf

    @property
    def unseen_s(self) -> float:
        """Seconds since the record last answered the poll; infinite before the first time."""
        return self._monotonic() - self._seen_at

    def lookup(self, authorization: bytes | None) -> Tenant | Awaitable[Tenant]:
        """The tenant of an `Authorization` header: at once for a known key, else an awaitable that reads the record.

        Either way raises an `AuthError`; what needs no read to be wrong is raised here already.
        """
        key = _bearer_key(authorization)
        digest = blake2b(key, key=self._hash_key, digest_size=16).digest()
        known = self._remembered(key, digest)
        return self._look_up_tenant(key, digest) if known is None else self._tenant(known)

    async def lookup_administrator(self, authorization: bytes | None) -> Administrator:
        """The administrator of an `Authorization` header, or an `AuthError`."""
        key = _bearer_key(authorization)
        digest = blake2b(key, key=self._hash_key, digest_size=16).digest()
        known = self._remembered(key, digest) or await self._identify(key, digest)
        caller = self._unexpired(known)
        if isinstance(caller, Administrator):
            return caller
        raise InvalidKey("This key is for inference; administration takes an admin key.")

    async def run(self) -> None:
        """Follow the record until cancelled."""
        while True:
            await self.poll_once()
            await self._sleep(POLL_INTERVAL_S)

    async def poll_once(self) -> bool:
        """Ask for the tenancy version, and forget every key if it changed. False if the record did not answer."""
        asked_at = self._monotonic()
        try:
            with anyio.fail_after(self._limits.read_within_s):
                version = await self._store.tenancy_version()
        except (StoreUnreachable, TimeoutError):
            return False
        if version != self._version:
            self._version = version
            self._generation += 1
            self._known.clear()
            self._wrong.clear()
        self._seen_at = asked_at
        return True

    def _remembered(self, key: bytes, digest: bytes) -> _Known | None:
        """What is known of a key without reading; raises if that is that it is wrong."""
        known = self._known.get(digest)
        if known is not None and self.unseen_s <= self._limits.unseen_for_s:
            self._known.move_to_end(digest)
            return known
        if (wrong := self._wrong.get(digest)) is not None:
            until, refused = wrong
            if self._monotonic() < until:
                raise refused.error(refused.message)
            del self._wrong[digest]
        if not looks_like_key(key):
            raise InvalidKey(_UNKNOWN)
        return None

    def _tenant(self, known: _Known) -> Tenant:
        caller = self._unexpired(known)
        if isinstance(caller, Tenant):
            return caller
        raise InvalidKey("This is an admin key; inference takes a tenant's key.")

    def _unexpired(self, known: _Known) -> Caller:
        if self._clock() >= known.expires_at:
            raise KeyExpired("This API key has expired.")
        return known.caller

    async def _look_up_tenant(self, key: bytes, digest: bytes) -> Tenant:
        return self._tenant(await self._identify(key, digest))

    async def _identify(self, key: bytes, digest: bytes) -> _Known:
        """Who a key belongs to, by one read for everybody who asks at the same time."""
        while (flight := self._flights.get(digest)) is not None:
            await flight.landed.wait()
            if flight.found is not None:
                return _known_or_raise(flight.found)
        flight = self._flights[digest] = _Flight()
        try:
            flight.found = await self._read(key, digest)
        finally:
            del self._flights[digest]
            flight.landed.set()
        return _known_or_raise(flight.found)

    async def _read(self, key: bytes, digest: bytes) -> _Known | _Refused:
        try:
            with anyio.fail_after(self._limits.read_within_s):
                record = await self._current_record(key)
        except (StoreUnreachable, TimeoutError) as error:
            return _Refused(StoreUnavailable, "API keys cannot be checked at the moment.", error)
        found = self._judge(record)
        if isinstance(found, _Known):
            _remember(self._known, digest, found, self._limits.known_keys)
        else:
            until = self._monotonic() + self._limits.wrong_for_s
            _remember(self._wrong, digest, (until, found), self._limits.wrong_keys)
        return found

    async def _current_record(self, key: bytes) -> KeyRecord | None:
        """The record of a key, no older than the tenancy version that the ring has seen."""
        key_hashes = self._root.key_hashes(key)
        async with self._reads:
            while True:
                generation = self._generation
                record = await self._store.find_key(key_hashes)
                # A change seen meanwhile may be this key's revocation: what was read before it must not be remembered.
                if generation == self._generation:
                    return record

    def _judge(self, record: KeyRecord | None) -> _Known | _Refused:
        if record is None:
            return _Refused(InvalidKey, _UNKNOWN)
        if record.revoked_at is not None:
            return _Refused(InvalidKey, "This API key has been revoked.")
        return _Known(self._caller(record), inf if record.expires_at is None else record.expires_at)

    def _caller(self, record: KeyRecord) -> Caller:
        if record.role != "inference":
            return Administrator(key_id=record.id, name=record.name, role=record.role)
        if record.tenant_id is None or record.organisation_id is None:
            raise ValueError(f"the inference key {record.id} has no tenant")  # the schema forbids it
        return Tenant(
            id=record.tenant_id,
            organisation_id=record.organisation_id,
            key_id=record.id,
            name=record.tenant_name or "",
            allowed_models=record.allowed_models,
            may_debug=record.may_debug,
            cache_secret=self._root.tenant_cache_secret(record.tenant_id),
        )


def _known_or_raise(found: _Known | _Refused) -> _Known:
    if isinstance(found, _Refused):
        raise found.error(found.message) from found.cause
    return found


def _remember(cache: OrderedDict[bytes, _Value], digest: bytes, value: _Value, capacity: int) -> None:
    cache[digest] = value
    cache.move_to_end(digest)
    if len(cache) > capacity:
        cache.popitem(last=False)


def _bearer_key(authorization: bytes | None) -> bytes:
    if authorization is None or authorization[: len(_BEARER)].lower() != _BEARER:
        raise MissingKey("An API key is needed: send it as 'Authorization: Bearer <key>'.")
    if not (key := authorization[len(_BEARER) :].strip()):
        raise MissingKey("The Authorization header holds no API key.")
    return key
