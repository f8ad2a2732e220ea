from __future__ import annotations

import sqlite3
from collections.abc import AsyncGenerator, Sequence
from contextlib import closing, suppress
from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.auth import (
    POLL_INTERVAL_S,
    AuthError,
    InvalidKey,
    KeyExpired,
    KeyRing,
    Limits,
    MissingKey,
    StoreUnavailable,
)
from policies.secrets import RootSecret, new_key
from policies.store import Store
from policies.tenant import KeyRecord, NewKey, Tenant
from tests.record import ROOT, Clock, record


class Reads:
    """The record, and how often it was read; `gate` holds every answer back until it is set."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.found = 0
        self.asked = anyio.Event()
        self.gate = anyio.Event()
        self.gate.set()

    async def find_key(self, key_hashes: Sequence[bytes]) -> KeyRecord | None:
        self.found += 1
        answer = await self._store.find_key(key_hashes)
        self.asked.set()
        await self.gate.wait()
        return answer

    async def tenancy_version(self) -> int:
        return await self._store.tenancy_version()

    def hold(self) -> None:
        self.gate, self.asked = anyio.Event(), anyio.Event()


class World:
    """A record with one tenant and one key, and a key ring that has polled it once."""

    def __init__(self, store: Store, database: Path, clock: Clock, new: NewKey) -> None:
        self.store, self.database, self.clock, self.new = store, database, clock, new
        self.reads = Reads(store)
        self.monotonic = Clock(1000.0)
        self.ring = self.ring_with(Limits())

    def ring_with(self, limits: Limits) -> KeyRing:
        return KeyRing(self.reads, ROOT, limits=limits, clock=self.clock, monotonic=self.monotonic)

    async def ask(self, key: str) -> Tenant:
        answer = self.ring.lookup(b"Bearer " + key.encode())
        return answer if isinstance(answer, Tenant) else await answer

    def break_record(self) -> None:
        with closing(sqlite3.connect(self.database)) as connection:
            for table in ("api_keys", "tenancy"):
                connection.execute(f"ALTER TABLE {table} RENAME TO {table}_away")

    def mend_record(self) -> None:
        with closing(sqlite3.connect(self.database)) as connection:
            for table in ("api_keys", "tenancy"):
                connection.execute(f"ALTER TABLE {table}_away RENAME TO {table}")


@pytest.fixture
async def world(tmp_path: Path) -> AsyncGenerator[World]:
    clock = Clock()
    async with record(tmp_path / "forebay.db", clock) as store:
        _, new = await store.ensure_demo_tenant()
        assert new is not None
        world = World(store, tmp_path / "forebay.db", clock, new)
        assert await world.ring.poll_once()
        yield world


def wrong_key(number: int = 0) -> str:
    return new_key(admin=False, random_bytes=lambda count: number.to_bytes(count, "big"))


async def test_a_key_names_its_tenant_with_what_the_key_may_do(world: World) -> None:
    new = await world.store.create_key("ten_demo", allowed_models=frozenset({"small"}))

    assert await world.ask(new.key) == Tenant(
        id="ten_demo",
        organisation_id="org_demo",
        key_id=new.record.id,
        name="demo",
        allowed_models=frozenset({"small"}),
        may_debug=False,
        cache_secret=ROOT.tenant_cache_secret("ten_demo"),
    )


async def test_a_known_key_is_answered_at_once_without_reading(world: World) -> None:
    first = await world.ask(world.new.key)

    assert world.ring.lookup(b"Bearer " + world.new.key.encode()) is first
    assert world.reads.found == 1


@pytest.mark.parametrize("scheme", [b"Bearer ", b"bearer ", b"BEARER ", b"Bearer   "])
async def test_the_scheme_is_read_in_any_case(world: World, scheme: bytes) -> None:
    await world.ask(world.new.key)

    assert isinstance(world.ring.lookup(scheme + world.new.key.encode() + b" "), Tenant)


@pytest.mark.parametrize("header", [None, b"", b"Bearer", b"Bearer ", b"Basic dXNlcjpwYXNz", b"fb-naked"])
async def test_without_a_bearer_key_the_key_is_missing(world: World, header: bytes | None) -> None:
    with pytest.raises(MissingKey):
        world.ring.lookup(header)


async def test_what_cannot_be_a_key_is_invalid_without_reading(world: World) -> None:
    for presented in ("sk-proj-0123456789", "fb-short", world.new.key + "x", world.new.key[:-1], "fb-\xff"):
        with pytest.raises(InvalidKey):
            await world.ask(presented)

    assert world.reads.found == 0


@given(st.binary(max_size=80))
def test_no_header_does_anything_but_let_in_or_refuse(header: bytes) -> None:
    ring = KeyRing(NoRecord(), ROOT)

    with pytest.raises(AuthError):
        ring.lookup(header)


class NoRecord:
    """Nothing that is not a well-formed key may get as far as this."""

    async def find_key(self, key_hashes: Sequence[bytes]) -> KeyRecord | None:
        raise AssertionError

    async def tenancy_version(self) -> int:
        raise AssertionError


async def test_a_key_that_nobody_made_is_invalid_and_is_read_once_in_five_seconds(world: World) -> None:
    for _ in range(3):
        with pytest.raises(InvalidKey, match="not known"):
            await world.ask(wrong_key())
    assert world.reads.found == 1

    world.monotonic.now += 4.9
    with pytest.raises(InvalidKey):
        await world.ask(wrong_key())
    assert world.reads.found == 1

    world.monotonic.now += 0.1
    with pytest.raises(InvalidKey):
        await world.ask(wrong_key())
    assert world.reads.found == 2


async def test_wrong_keys_are_remembered_up_to_a_bound_and_never_push_out_a_known_one(world: World) -> None:
    world.ring = world.ring_with(Limits(wrong_keys=10, known_keys=10))
    await world.ring.poll_once()
    await world.ask(world.new.key)

    for number in range(50):
        with pytest.raises(InvalidKey):
            await world.ask(wrong_key(number))

    assert len(world.ring._wrong) == 10
    assert isinstance(world.ring.lookup(b"Bearer " + world.new.key.encode()), Tenant)


async def test_known_keys_are_remembered_up_to_a_bound_and_the_least_recently_used_goes_first(world: World) -> None:
    keys = [(await world.store.create_key("ten_demo")).key for _ in range(3)]
    world.ring = world.ring_with(Limits(known_keys=2))
    await world.ring.poll_once()
    await world.ask(keys[0])
    await world.ask(keys[1])
    await world.ask(keys[0])

    await world.ask(keys[2])

    assert len(world.ring._known) == 2
    read = world.reads.found
    await world.ask(keys[0])
    assert world.reads.found == read
    await world.ask(keys[1])
    assert world.reads.found == read + 1


async def test_no_key_is_kept_in_memory_in_the_clear(world: World) -> None:
    await world.ask(world.new.key)
    with suppress(InvalidKey):
        await world.ask(wrong_key())

    kept = repr([vars(world.ring), *world.ring._known.items(), *world.ring._wrong.items()])

    assert world.new.key[10:] not in kept
    assert wrong_key()[10:] not in kept
    assert ROOT.tenant_cache_secret("ten_demo").hex() not in kept
    assert repr(ROOT.tenant_cache_secret("ten_demo")) not in kept


async def test_a_revoked_key_is_refused_after_the_next_poll(world: World) -> None:
    await world.ask(world.new.key)
    await world.store.revoke_key(world.new.record.id)

    await world.ring.poll_once()

    for _ in range(2):
        with pytest.raises(InvalidKey, match="revoked"):
            await world.ask(world.new.key)


async def test_a_poll_that_sees_no_change_forgets_nothing(world: World) -> None:
    await world.ask(world.new.key)

    await world.ring.poll_once()

    assert isinstance(world.ring.lookup(b"Bearer " + world.new.key.encode()), Tenant)


async def test_a_change_seen_by_a_poll_makes_a_refused_key_worth_another_look(world: World) -> None:
    with closing(sqlite3.connect(world.database)) as connection, connection:
        connection.execute("UPDATE api_keys SET revoked_at = 1")
    with pytest.raises(InvalidKey):
        await world.ask(world.new.key)

    with closing(sqlite3.connect(world.database)) as connection, connection:
        connection.execute("UPDATE api_keys SET revoked_at = NULL")
        connection.execute("UPDATE tenancy SET version = version + 1")
    await world.ring.poll_once()

    assert (await world.ask(world.new.key)).key_id == world.new.record.id


async def test_a_key_revoked_while_it_is_being_read_is_not_remembered_as_good(world: World) -> None:
    world.reads.hold()
    outcomes: list[object] = []

    async with anyio.create_task_group() as group:
        group.start_soon(outcome_of, world, world.new.key, outcomes)
        await world.reads.asked.wait()
        await world.store.revoke_key(world.new.record.id)
        await world.ring.poll_once()
        world.reads.gate.set()

    assert outcomes == [InvalidKey]
    with pytest.raises(InvalidKey):
        await world.ask(world.new.key)


async def outcome_of(world: World, key: str, outcomes: list[object]) -> None:
    try:
        outcomes.append((await world.ask(key)).key_id)
    except AuthError as error:
        outcomes.append(type(error))


async def test_the_poll_runs_twice_a_second_and_outlives_an_unreachable_record(world: World) -> None:
    slept: list[float] = []
    woken = anyio.Event()

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 1:
            world.break_record()
        elif len(slept) == 2:
            world.mend_record()
            await world.store.revoke_key(world.new.record.id)
        else:
            woken.set()
            await anyio.sleep_forever()

    world.ring = KeyRing(world.reads, ROOT, clock=world.clock, monotonic=world.monotonic, sleep=sleep)
    await world.ask(world.new.key)
    async with anyio.create_task_group() as group:
        group.start_soon(world.ring.run)
        await woken.wait()
        group.cancel_scope.cancel()

    assert slept == [POLL_INTERVAL_S] * 3
    assert POLL_INTERVAL_S == 0.5
    with pytest.raises(InvalidKey, match="revoked"):
        await world.ask(world.new.key)


async def test_a_key_works_until_the_second_in_which_it_expires(world: World) -> None:
    new = await world.store.create_key("ten_demo", expires_at=1_800_000_010)
    await world.ask(new.key)

    world.clock.now = 1_800_000_009.9
    await world.ask(new.key)
    world.clock.now = 1_800_000_010.0

    with pytest.raises(KeyExpired):
        world.ring.lookup(b"Bearer " + new.key.encode())


async def test_a_key_that_has_expired_before_it_was_ever_used_says_so(world: World) -> None:
    new = await world.store.create_key("ten_demo", expires_at=1)

    with pytest.raises(KeyExpired):
        await world.ask(new.key)


async def test_an_admin_key_serves_no_inference_and_a_tenants_key_no_administration(world: World) -> None:
    owner = await world.store.create_admin_key("operator", name="deploy")

    with pytest.raises(InvalidKey, match="admin key"):
        await world.ask(owner.key)
    with pytest.raises(InvalidKey, match="for inference"):
        await world.ring.lookup_administrator(b"Bearer " + world.new.key.encode())

    administrator = await world.ring.lookup_administrator(b"Bearer " + owner.key.encode())
    assert administrator.key_id == owner.record.id
    assert [administrator.has_role(role) for role in ("viewer", "operator", "owner")] == [True, True, False]


async def test_a_key_made_before_a_rotation_still_lets_in(world: World) -> None:
    rotated = RootSecret(b"a root secret that came after the first", (b"root secret of the tests, 32 bytes or more",))
    world.ring = KeyRing(world.reads, rotated, clock=world.clock, monotonic=world.monotonic)

    tenant = await world.ask(world.new.key)

    assert tenant.key_id == world.new.record.id
    assert world.reads.found == 1


async def test_requests_that_bring_the_same_unknown_key_at_once_share_one_read(world: World) -> None:
    world.reads.hold()
    outcomes: list[object] = []

    async with anyio.create_task_group() as group:
        for key in (world.new.key, wrong_key()):
            for _ in range(20):
                group.start_soon(outcome_of, world, key, outcomes)
        await world.reads.asked.wait()
        await anyio.wait_all_tasks_blocked()
        world.reads.gate.set()

    assert world.reads.found == 2
    assert sorted(outcomes, key=str) == [InvalidKey] * 20 + [world.new.record.id] * 20


async def test_when_the_reading_request_is_cancelled_the_next_one_reads(world: World) -> None:
    world.reads.hold()
    outcomes: list[object] = []

    async with anyio.create_task_group() as group:
        async with anyio.create_task_group() as first:
            first.start_soon(outcome_of, world, world.new.key, [])
            await world.reads.asked.wait()
            for _ in range(3):
                group.start_soon(outcome_of, world, world.new.key, outcomes)
            await anyio.wait_all_tasks_blocked()
            first.cancel_scope.cancel()
        world.reads.gate.set()

    assert outcomes == [world.new.record.id] * 3
    assert world.reads.found == 2
    assert not world.ring._flights


async def test_different_unknown_keys_are_read_at_most_four_at_once(world: World) -> None:
    world.reads.hold()

    async with anyio.create_task_group() as group:
        for number in range(12):
            group.start_soon(outcome_of, world, wrong_key(number), [])
        await world.reads.asked.wait()
        await anyio.wait_all_tasks_blocked()
        at_once = world.reads.found
        world.reads.gate.set()

    assert at_once == 4
    assert world.reads.found == 12


async def test_without_the_record_known_keys_work_for_sixty_seconds_and_are_then_unavailable_not_wrong(
    world: World,
) -> None:
    await world.ask(world.new.key)
    world.break_record()

    world.monotonic.now += 60
    assert not await world.ring.poll_once()
    assert world.ring.unseen_s == 60
    await world.ask(world.new.key)

    world.monotonic.now += 0.1
    with pytest.raises(StoreUnavailable):
        await world.ask(world.new.key)

    world.mend_record()
    assert await world.ring.poll_once()
    assert isinstance(world.ring.lookup(b"Bearer " + world.new.key.encode()), Tenant)


async def test_without_the_record_an_unknown_key_is_unavailable_not_wrong_and_is_tried_again(world: World) -> None:
    world.break_record()
    with pytest.raises(StoreUnavailable) as caught:
        await world.ask(world.new.key)
    assert caught.value.__cause__ is not None

    world.mend_record()

    assert (await world.ask(world.new.key)).key_id == world.new.record.id


async def test_a_record_that_hangs_is_given_up_after_its_time(world: World) -> None:
    world.ring = world.ring_with(Limits(read_within_s=0.05))
    world.reads.hold()

    with anyio.fail_after(2), pytest.raises(StoreUnavailable):
        await world.ask(world.new.key)


async def test_a_poll_that_hangs_is_given_up_after_its_time_and_nothing_is_forgotten(world: World) -> None:
    class Hanging(Reads):
        async def tenancy_version(self) -> int:
            await self.gate.wait()
            return await super().tenancy_version()

    world.reads = Hanging(world.store)
    world.ring = world.ring_with(Limits(read_within_s=0.05))
    await world.ring.poll_once()
    await world.ask(world.new.key)
    world.reads.hold()

    with anyio.fail_after(2):
        assert not await world.ring.poll_once()

    assert isinstance(world.ring.lookup(b"Bearer " + world.new.key.encode()), Tenant)


async def test_a_ring_that_has_never_polled_reads_every_time(world: World) -> None:
    world.ring = world.ring_with(Limits())

    await world.ask(world.new.key)
    await world.ask(world.new.key)

    assert world.reads.found == 2


@pytest.mark.parametrize("refused", [wrong_key(), "fb-canary-not-a-key"])
async def test_no_error_tells_the_key_back(world: World, refused: str) -> None:
    errors: list[BaseException | None] = []
    for broken in (False, True):
        if broken:
            world.break_record()
        world.monotonic.now += 10
        with pytest.raises(AuthError) as caught:
            await world.ask(refused)
        errors += [caught.value, caught.value.__cause__]

    assert refused[4:] not in " ".join(f"{error} {error!r}" for error in errors)
