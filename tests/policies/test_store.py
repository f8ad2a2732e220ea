"""The record on SQLite and on PostgreSQL: one promise, kept by both."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import stat
import sys
from collections.abc import AsyncGenerator, Awaitable, Iterator
from contextlib import closing
from pathlib import Path

import anyio
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from policies import store as store_module
from policies.secrets import RootSecret, looks_like_key
from policies.store import AlreadyExists, AlreadyRevoked, NotFound, Store, StoreUnreachable, check_url
from policies.tenant import NewKey
from tests.policies.race import race
from tests.postgresql import PostgreSQL, postgresql
from tests.record import ROOT, Clock, record

ON_SQLITE = pytest.mark.parametrize("url", ["sqlite"], indirect=True)
"""For what is about the file, its locks or its pragmas."""


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "forebay.db"


@pytest.fixture(scope="session")
def server() -> Iterator[PostgreSQL]:
    with postgresql() as server:
        yield server


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
async def url(request: pytest.FixtureRequest, database: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{database}"
    server: PostgreSQL = request.getfixturevalue("server")
    return await server.new_database()


@pytest.fixture
async def store(url: str, clock: Clock) -> AsyncGenerator[Store]:
    async with record(url, clock) as store:
        yield store


async def key_of_new_tenant(store: Store) -> NewKey:
    organisation = await store.create_organisation("acme")
    tenant = await store.create_tenant(organisation.id, "search")
    return await store.create_key(tenant.id, name="ci")


async def found(store: Store, key: str, root: RootSecret = ROOT) -> object:
    return await store.find_key(root.key_hashes(key.encode()))


async def test_a_new_key_is_found_by_its_hash_with_everything_it_was_made_with(store: Store) -> None:
    organisation = await store.create_organisation("acme")
    tenant = await store.create_tenant(organisation.id, "search")

    new = await store.create_key(
        tenant.id, name="ci", allowed_models=frozenset({"small", "auto"}), may_debug=True, expires_at=1_900_000_000
    )

    assert await found(store, new.key) == new.record
    assert new.record.tenant_id == tenant.id
    assert new.record.tenant_name == "search"
    assert new.record.organisation_id == organisation.id
    assert new.record.role == "inference"
    assert new.record.name == "ci"
    assert new.record.prefix == new.key[:10]
    assert new.record.allowed_models == frozenset({"small", "auto"})
    assert new.record.may_debug
    assert new.record.created_at == 1_800_000_000
    assert new.record.expires_at == 1_900_000_000
    assert new.record.revoked_at is None
    assert new.record.root_secret_id == ROOT.id
    assert looks_like_key(new.key.encode())


async def test_a_key_without_a_list_of_models_may_use_all_and_one_with_an_empty_list_none(store: Store) -> None:
    tenant, _ = await store.ensure_demo_tenant()

    unlimited = await store.create_key(tenant.id)
    shut = await store.create_key(tenant.id, allowed_models=frozenset())

    assert unlimited.record.allowed_models is None
    assert shut.record.allowed_models == frozenset()


async def test_a_key_that_was_never_made_is_not_found(store: Store) -> None:
    new = await key_of_new_tenant(store)

    assert await found(store, new.key[:-1] + "_") is None


async def test_an_admin_key_has_a_role_and_no_tenant(store: Store) -> None:
    new = await store.create_admin_key("operator", name="deploy")

    assert new.key.startswith("fb-admin-")
    assert new.record.role == "operator"
    assert new.record.tenant_id is None
    assert await found(store, new.key) == new.record


async def test_a_key_outlives_a_rotation_of_the_root_secret_and_not_the_end_of_the_overlap(
    store: Store,
) -> None:
    new = await key_of_new_tenant(store)
    fresh = b"the root secret that comes after it, long enough"
    rotated = RootSecret(fresh, previous=(b"root secret of the tests, 32 bytes or more",))

    assert await found(store, new.key, rotated) == new.record
    assert await found(store, new.key, RootSecret(fresh)) is None


async def test_a_revoked_key_stays_on_record_with_the_time_of_its_revocation(store: Store, clock: Clock) -> None:
    new = await key_of_new_tenant(store)
    clock.now += 60

    revoked = await store.revoke_key(new.record.id)

    assert revoked.revoked_at == 1_800_000_060
    assert await found(store, new.key) == revoked
    assert await store.list_keys() == [revoked]


async def test_a_key_is_revoked_once_and_the_first_time_stands(store: Store, clock: Clock) -> None:
    new = await key_of_new_tenant(store)
    revoked = await store.revoke_key(new.record.id)
    clock.now += 60

    with pytest.raises(AlreadyRevoked) as caught:
        await store.revoke_key(new.record.id)

    assert caught.value.key_id == new.record.id
    assert await store.list_keys() == [revoked]


async def test_what_is_not_there_is_named(store: Store) -> None:
    with pytest.raises(NotFound) as organisation:
        await store.create_tenant("org_none", "search")
    with pytest.raises(NotFound) as tenant:
        await store.create_key("ten_none")
    with pytest.raises(NotFound) as key:
        await store.revoke_key("key_none")

    assert [(error.value.kind, error.value.id) for error in (organisation, tenant, key)] == [
        ("organisation", "org_none"),
        ("tenant", "ten_none"),
        ("key", "key_none"),
    ]


async def test_names_are_unique_among_organisations_and_within_one(store: Store) -> None:
    acme, other = await store.create_organisation("acme"), await store.create_organisation("other")
    await store.create_tenant(acme.id, "search")

    await store.create_tenant(other.id, "search")

    with pytest.raises(AlreadyExists):
        await store.create_organisation("acme")
    with pytest.raises(AlreadyExists):
        await store.create_tenant(acme.id, "search")


async def test_lists_hold_what_belongs_to_the_organisation_or_tenant_asked_for(store: Store) -> None:
    acme, other = await store.create_organisation("acme"), await store.create_organisation("other")
    search, chat = await store.create_tenant(acme.id, "search"), await store.create_tenant(other.id, "chat")
    searching, chatting = await store.create_key(search.id), await store.create_key(chat.id)
    owner = await store.create_admin_key("owner")

    assert await store.list_organisations() == [acme, other]
    assert await store.list_tenants() == [chat, search]
    assert await store.list_tenants(acme.id) == [search]
    assert await store.list_keys(search.id) == [searching.record]
    assert {record.id for record in await store.list_keys()} == {
        searching.record.id,
        chatting.record.id,
        owner.record.id,
    }


async def test_every_change_raises_the_tenancy_version_and_nothing_else_does(store: Store) -> None:
    versions = [await store.tenancy_version()]

    async def after(change: Awaitable[object]) -> None:
        await change
        versions.append(await store.tenancy_version())

    new = await key_of_new_tenant(store)
    versions.append(await store.tenancy_version())
    await after(store.create_admin_key("viewer"))
    await after(store.first_owner_key())
    await after(store.ensure_demo_tenant())
    await after(store.revoke_key(new.record.id))

    assert versions == [0, 3, 4, 5, 6, 7]

    with pytest.raises(AlreadyRevoked):
        await store.revoke_key(new.record.id)
    await after(store.first_owner_key())
    await after(store.ensure_demo_tenant())
    await after(store.list_keys())
    await after(store.migrate())

    assert set(versions[6:]) == {7}


async def test_the_first_owner_key_is_given_once(store: Store) -> None:
    first, second = await store.first_owner_key(), await store.first_owner_key()

    assert first is not None
    assert first.record.role == "owner"
    assert second is None


async def test_a_new_owner_key_is_given_when_the_last_one_is_revoked_or_expired(store: Store, clock: Clock) -> None:
    first = await store.first_owner_key()
    assert first is not None
    await store.create_admin_key("owner", expires_at=int(clock.now) + 10)
    await store.create_admin_key("operator")
    await store.revoke_key(first.record.id)

    assert await store.first_owner_key() is None
    clock.now += 10
    assert await store.first_owner_key() is not None


async def test_the_demonstration_tenant_and_its_key_are_made_once(store: Store) -> None:
    tenant, new = await store.ensure_demo_tenant()
    again, nothing = await store.ensure_demo_tenant()

    assert new is not None
    assert new.record.tenant_id == tenant.id
    assert again == tenant
    assert nothing is None


@ON_SQLITE
async def test_the_key_itself_is_in_no_file_no_repr_and_no_error(
    store: Store, database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        inference, admin = await key_of_new_tenant(store), await store.create_admin_key("owner")
        secrets = [new.key[10:] for new in (inference, admin)]
        errors: list[Exception] = []
        with pytest.raises(AlreadyRevoked) as caught:
            await store.revoke_key((await store.revoke_key(inference.record.id)).id)
        errors.append(caught.value)
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("ALTER TABLE api_keys RENAME TO elsewhere")
        for failing in (store.create_admin_key("owner"), found(store, inference.key)):
            with pytest.raises(StoreUnreachable) as failed:
                await failing
            errors.append(failed.value)
    written = b"".join(path.read_bytes() for path in database.parent.iterdir())
    said = caplog.text + repr([inference, admin, *errors, *[error.__cause__ for error in errors]])

    assert inference.record.prefix.encode() in written
    assert "fb-admin-" in said
    for secret in secrets:
        assert secret.encode() not in written
        assert secret not in said
    assert ROOT.id not in "".join(str(error.__cause__) for error in errors)


@ON_SQLITE
async def test_a_new_database_file_is_its_owners_alone(store: Store, database: Path) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in database.parent.iterdir()}

    assert set(modes.values()) == {0o600}


@ON_SQLITE
async def test_every_connection_keeps_foreign_keys_waits_for_locks_and_logs_ahead(store: Store) -> None:
    async with store._engine.connect() as first, store._engine.connect() as second:
        for connection in (first, second):
            told = [
                (await connection.exec_driver_sql(f"PRAGMA {name}")).scalar()
                for name in ("foreign_keys", "busy_timeout", "journal_mode")
            ]
            assert told == [1, 5000, "wal"]


async def test_the_migrations_make_exactly_the_tables_that_the_store_speaks_of(store: Store) -> None:
    def differences(connection: sa.Connection) -> object:
        return compare_metadata(MigrationContext.configure(connection), store_module._metadata)

    async with store._engine.connect() as connection:
        assert await connection.run_sync(differences) == []


@pytest.mark.parametrize(
    "row",
    [
        {"role": "inference", "tenant_id": None},
        {"role": "owner", "tenant_id": "ten_demo"},
        {"role": "root", "tenant_id": None},
        {"role": "inference", "tenant_id": "ten_none"},
    ],
)
async def test_the_schema_refuses_a_key_that_makes_no_sense(store: Store, row: dict[str, object]) -> None:
    await store.ensure_demo_tenant()
    rest = {"id": "k", "name": "", "prefix": "", "key_hash": b"", "root_secret_id": "", "may_debug": False}

    with pytest.raises(sa.exc.IntegrityError):
        async with store._engine.begin() as connection:
            await connection.execute(sa.insert(store_module._keys).values(**rest, created_at=0, **row))


async def test_migrating_leaves_the_logging_configuration_alone(url: str) -> None:
    root = logging.getLogger()
    before = (root.level, list(root.handlers), logging.getLogger("sqlalchemy").level, root.manager.disable)
    store = Store(url, ROOT)

    await store.migrate()
    await store.aclose()

    assert (root.level, list(root.handlers), logging.getLogger("sqlalchemy").level, root.manager.disable) == before
    assert not logging.getLogger("policies").disabled


async def test_migrating_again_keeps_every_row(store: Store) -> None:
    new = await key_of_new_tenant(store)

    await store.migrate()

    assert await found(store, new.key) == new.record


@ON_SQLITE
async def test_a_record_that_a_newer_release_has_migrated_is_left_alone_and_usable(
    store: Store, database: Path
) -> None:
    new = await key_of_new_tenant(store)
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")

    await store.migrate()

    assert await found(store, new.key) == new.record
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("9999",)]


async def test_a_migration_that_is_cut_short_leaves_nothing_behind(url: str) -> None:
    store = Store(url, ROOT)

    with anyio.CancelScope() as scope:
        async with store._connection() as connection:
            await store._lock_schema(connection)
            await connection.run_sync(store_module._upgrade)
            scope.cancel()
            await anyio.lowlevel.checkpoint()

    await store.migrate()
    assert await store.tenancy_version() == 0
    await store.aclose()


START = """
import asyncio, sys
from policies.secrets import RootSecret
from policies.store import Store

async def start():
    store = Store(sys.argv[1], RootSecret(b"x" * 32))
    await store.migrate()
    owner, (tenant, demo) = await store.first_owner_key(), await store.ensure_demo_tenant()
    for _ in range(3):
        await store.create_key(tenant.id)
    print(owner is not None, demo is not None)
    await store.aclose()

input()
asyncio.run(start())
"""


async def test_processes_that_start_at_once_make_one_schema_one_owner_and_one_demonstration(url: str) -> None:
    answers = [said.split() for said in race(START, url, racers=3)]

    assert sorted(owner for owner, _ in answers) == ["False", "False", "True"]
    assert sorted(demo for _, demo in answers) == ["False", "False", "True"]
    store = Store(url, ROOT)
    assert await store.tenancy_version() == 1 + 1 + 3 * 3
    assert len(await store.list_keys()) == 1 + 1 + 3 * 3
    await store.aclose()


async def test_changes_made_at_once_in_one_process_all_arrive(store: Store) -> None:
    tenant, _ = await store.ensure_demo_tenant()

    async with anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(store.create_key, tenant.id)

    assert len(await store.list_keys(tenant.id)) == 1 + 20
    assert await store.tenancy_version() == 1 + 20


async def test_a_change_that_is_cancelled_is_not_made_and_its_connection_goes_back_to_the_pool(store: Store) -> None:
    await store.ensure_demo_tenant()
    thrown_away: list[object] = []
    sa.event.listen(store._engine.sync_engine, "invalidate", lambda *arguments: thrown_away.append(arguments))

    with anyio.CancelScope() as scope:
        async with store._change() as connection:
            await store._add_key(connection, role="owner", name="")
            scope.cancel()
            await anyio.lowlevel.checkpoint()

    assert thrown_away == []
    assert await store.first_owner_key() is not None
    assert len(await store.list_keys()) == 2


@ON_SQLITE
async def test_a_change_that_is_cancelled_while_it_waits_for_a_lock_is_not_made_later_and_leaves_no_task(
    store: Store, database: Path
) -> None:
    tasks_before = asyncio.all_tasks()
    with closing(sqlite3.connect(database, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        with anyio.move_on_after(0.05) as scope:
            await store.create_organisation("acme")
        writer.execute("ROLLBACK")

    assert scope.cancelled_caught
    _, unfinished = await asyncio.wait(asyncio.all_tasks() - tasks_before, timeout=5)
    assert not unfinished
    await store.create_organisation("other")
    assert [organisation.name for organisation in await store.list_organisations()] == ["other"]


@ON_SQLITE
async def test_reading_goes_on_while_another_process_holds_the_write_lock(store: Store, database: Path) -> None:
    new = await key_of_new_tenant(store)
    with closing(sqlite3.connect(database, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")

        with anyio.fail_after(1):
            assert await found(store, new.key) == new.record


@ON_SQLITE
async def test_waiting_for_a_lock_does_not_stop_the_event_loop(store: Store, database: Path) -> None:
    with closing(sqlite3.connect(database, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        async with anyio.create_task_group() as group:
            group.start_soon(store.create_organisation, "acme")
            with anyio.fail_after(1):
                for _ in range(50):
                    await anyio.sleep(0.001)
            writer.execute("ROLLBACK")

    assert [organisation.name for organisation in await store.list_organisations()] == ["acme"]


async def test_a_database_that_cannot_be_opened_is_unreachable_and_says_why(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/no/such/folder/forebay.db", ROOT)

    with pytest.raises(StoreUnreachable, match="No such file"):
        await store.migrate()
    with pytest.raises(StoreUnreachable, match="unable to open"):
        await store.tenancy_version()
    await store.aclose()


async def test_a_file_that_is_no_database_is_unreachable_and_kept(database: Path) -> None:
    database.write_text("no database, " * 100)
    store = Store(f"sqlite:///{database}", ROOT)

    with pytest.raises(StoreUnreachable, match="not a database"):
        await store.migrate()
    assert database.read_text() == "no database, " * 100
    await store.aclose()


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:///forebay.sqlite3",
        "sqlite+aiosqlite:////var/lib/forebay.sqlite3",
        "postgresql://u:p%40w@h:5432/d",
        "postgres://u@h/d?ssl=require&prepared_statement_cache_size=0",
        "postgresql+asyncpg:///d?host=/run/postgresql",
    ],
)
def test_a_url_of_a_store_is_taken(url: str) -> None:
    check_url(url)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense", "not a URL"),
        ("postgresql://u:hunter/2@h:x/d", "not a URL"),
        ("mysql://u:hunter2@h/d", "mysql:// is no store; supported are sqlite:///"),
        ("postgresql+psycopg://u:hunter2@h/d", "postgresql+psycopg:// is no store"),
        ("sqlite+pysqlite:///x", "sqlite+pysqlite:// is no store"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:///x?mode=ro", "no parameter 'mode'"),
        ("postgresql://u:hunter2@h/d?sslmode=require", "'sslmode'; its name here is ssl"),
        ("postgresql://u:hunter2@h/d?prepared_statement_cache_size=hunter2", "a value that it cannot have"),
    ],
)
def test_a_url_that_is_none_of_a_store_is_refused_with_what_is_wrong_and_no_password(url: str, said: str) -> None:
    with pytest.raises(ValueError) as refused:
        check_url(url)

    assert said in str(refused.value)
    assert "hunter" not in str(refused.value)


def test_postgresql_without_its_driver_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "asyncpg", None)

    check_url("sqlite:///x")
    with pytest.raises(ValueError, match=r"pip install 'forebay\[postgres\]'"):
        check_url("postgresql://h/d")


@pytest.mark.slow
async def test_a_postgresql_that_does_not_let_us_in_is_unreachable_and_says_why(server: PostgreSQL) -> None:
    there = sa.make_url(await server.new_database())
    for url, said in (
        (there.set(database="none"), 'database "none" does not exist'),
        (there.set(username="nobody"), 'role "nobody" does not exist'),
        (there.set(query={"host": "/nowhere"}), "No such file"),
    ):
        store = Store(url.render_as_string(hide_password=False), ROOT)
        with pytest.raises(StoreUnreachable, match=said):
            await store.migrate()
        await store.aclose()
