"""The record in SQL: organisations, tenants and API keys. A SQLite file, or PostgreSQL by URL.

    StoreError
    ├── NotFound            no row of that id
    ├── AlreadyExists       the name is taken
    ├── AlreadyRevoked      the key was revoked before
    └── StoreUnreachable    the database did not answer, or not in a way that this release can use

Law: every change raises the tenancy version in its own transaction, so whoever has seen a version has seen every change
up to it. The raise comes first and takes the lock that orders all changes, on SQLite and on PostgreSQL alike: what a
change reads is still true when it commits, in however many processes.

This module and `policies/migrations` are the only ones that know SQL. Rows leave it as frozen structs.
"""

from __future__ import annotations

import hmac
import importlib.util
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import alembic.command
import anyio
import msgspec
import sqlalchemy as sa
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as NoConnectionFree
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from policies.secrets import KEY_PREFIX_CHARS, RootSecret, base62, new_key
from policies.sqlite_connection import BUSY_TIMEOUT_S, SQLiteConnection, connect
from policies.tenant import AdminRole, KeyRecord, KeyRole, NewKey, Organisation, TenantRecord

DEMO_ORGANISATION_ID = "org_demo"
DEMO_TENANT_ID = "ten_demo"

_DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg", "postgres": "postgresql+asyncpg"}
_SUPPORTED = "supported are sqlite:///path/to/file and postgresql://user:password@host:port/database"
_PARAMETERS = {
    "sqlite": frozenset[str](),
    "postgresql": frozenset({"host", "port", "ssl", "target_session_attrs", "prepared_statement_cache_size"}),
}
_CONNECTIONS = 4
_CLOSE_WITHIN_S = 1.0
_ID_BYTES = 16
_MIGRATION_LOCK = 0x466F7265626179  # "Forebay": the advisory lock's number, the same in every release

_metadata = sa.MetaData()

_organisations = sa.Table(
    "organisations",
    _metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("name", sa.String, nullable=False, unique=True),
    sa.Column("created_at", sa.BigInteger, nullable=False),
)

_tenants = sa.Table(
    "tenants",
    _metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("organisation_id", sa.ForeignKey("organisations.id"), nullable=False),
    sa.Column("name", sa.String, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.UniqueConstraint("organisation_id", "name"),
)

_keys = sa.Table(
    "api_keys",
    _metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=True, index=True),
    sa.Column("role", sa.String, nullable=False),
    sa.Column("name", sa.String, nullable=False),
    sa.Column("prefix", sa.String, nullable=False),
    sa.Column("key_hash", sa.LargeBinary, nullable=False, unique=True),
    sa.Column("root_secret_id", sa.String, nullable=False),
    sa.Column("allowed_models", sa.JSON(none_as_null=True), nullable=True),
    sa.Column("may_debug", sa.Boolean, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("expires_at", sa.BigInteger, nullable=True),
    sa.Column("revoked_at", sa.BigInteger, nullable=True),
)

_tenancy = sa.Table(
    "tenancy",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("version", sa.BigInteger, nullable=False),
)

_keys_with_tenants = sa.select(
    _keys, _tenants.c.name.label("tenant_name"), _tenants.c.organisation_id.label("organisation_id")
).select_from(_keys.outerjoin(_tenants))


class StoreError(Exception):
    """Something the record cannot do. Its message never holds a key, nor a statement's parameters."""


class NotFound(StoreError):
    """There is no such row. `kind` and `id` say which."""

    def __init__(self, kind: str, id: str) -> None:  # noqa: A002  the field's word
        super().__init__(f"there is no {kind} {id!r}")
        self.kind = kind
        self.id = id


class AlreadyExists(StoreError):
    """The name is taken. `kind` and `name` say which."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"there is already {kind} named {name!r}")
        self.kind = kind
        self.name = name


class AlreadyRevoked(StoreError):
    """The key was revoked before; that first revocation stands."""

    def __init__(self, key_id: str) -> None:
        super().__init__(f"the key {key_id!r} is already revoked")
        self.key_id = key_id


class StoreUnreachable(StoreError):
    """The database did not answer. A change that meets this may or may not have been made."""


def check_url(url: str) -> None:
    """Raises ValueError where `url` names no store that can be used here. Its message repeats no part of a password."""
    try:
        parsed = sa.make_url(url)
    except (ArgumentError, ValueError):
        # A port that is none raises ValueError, and can be the rest of a password with an unescaped character.
        reason = "not a URL (are special characters of the password %-escaped?)"
        raise ValueError(f"{reason}; {_SUPPORTED}") from None
    with_driver = parsed.set(drivername=_DRIVERS.get(parsed.drivername, parsed.drivername))
    if with_driver.drivername not in _DRIVERS.values():
        raise ValueError(f"{parsed.drivername}:// is no store; {_SUPPORTED}")
    kind = with_driver.get_backend_name()
    if unknown := parsed.query.keys() - _PARAMETERS[kind]:
        remedy = "its name here is ssl" if "sslmode" in unknown else f"known are {sorted(_PARAMETERS[kind])}"
        raise ValueError(f"{kind}:// has no parameter {min(unknown)!r}; {remedy}")
    if kind == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ValueError(f"names no file, and what is in memory no two processes share; {_SUPPORTED}")
    try:
        with_driver.get_dialect()().create_connect_args(with_driver)
    except (ArgumentError, ValueError):
        raise ValueError(f"a parameter of {kind}:// has a value that it cannot have; {_SUPPORTED}") from None
    if kind == "postgresql" and importlib.util.find_spec("asyncpg") is None:
        raise ValueError("PostgreSQL needs the package asyncpg: pip install 'forebay[postgres]'")


class Store:
    """The record, behind one pool of connections. Safe to share between tasks; never blocks the event loop.

    `url` is `sqlite:///path` or `postgresql://…`; `root` makes and recognises key hashes. Every method raises
    `StoreUnreachable` where the database does not answer, besides what it names itself. Call `migrate` before anything
    else and `aclose` at the end.
    """

    def __init__(
        self,
        url: str,
        root: RootSecret,
        *,
        clock: Callable[[], float] = time.time,
        random_bytes: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        self._root = root
        self._clock = clock
        self._random_bytes = random_bytes
        parsed = sa.make_url(url)
        self._url = parsed.set(drivername=_DRIVERS.get(parsed.drivername, parsed.drivername))
        self._engine = create_async_engine(
            self._url,
            async_creator=_sqlite_connector(self._url) if self._is_sqlite else None,
            hide_parameters=True,  # an error's text reaches logs
            pool_size=_CONNECTIONS,
            max_overflow=0,
            pool_timeout=BUSY_TIMEOUT_S,
        )

    @property
    def _is_sqlite(self) -> bool:
        return self._url.get_backend_name() == "sqlite"

    async def aclose(self) -> None:
        """Close every connection."""
        await self._engine.dispose()

    async def migrate(self) -> None:
        """Bring the schema up to this release, however many processes ask at once; data is kept.

        A schema that a newer release has already migrated is left alone: releases N and N-1 share one record. A new
        SQLite file is readable by its owner only. One call at a time per process, since Alembic keeps its context in
        the module.
        """
        with _store_failures():
            if self._is_sqlite and self._url.database:
                await anyio.Path(self._url.database).touch(mode=0o600)
        async with self._connection() as connection:
            await self._lock_schema(connection)
            await connection.run_sync(_upgrade)
            await connection.commit()

    async def _lock_schema(self, connection: AsyncConnection) -> None:
        """One migration at a time, until this connection's transaction ends."""
        if self._is_sqlite:
            await connection.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))

    async def create_organisation(self, name: str) -> Organisation:
        """Raises `AlreadyExists`."""
        async with self._change() as connection:
            return await self._add_organisation(connection, self._new_id("org"), name)

    async def create_tenant(self, organisation_id: str, name: str) -> TenantRecord:
        """Names are unique within an organisation. Raises `NotFound`, `AlreadyExists`."""
        async with self._change() as connection:
            await _require(connection, _organisations, "organisation", organisation_id)
            return await self._add_tenant(connection, self._new_id("ten"), organisation_id, name)

    async def create_key(
        self,
        tenant_id: str,
        *,
        name: str = "",
        allowed_models: frozenset[str] | None = None,
        may_debug: bool = False,
        expires_at: int | None = None,
    ) -> NewKey:
        """A key for inference in the name of a tenant. Raises `NotFound`."""
        async with self._change() as connection:
            await _require(connection, _tenants, "tenant", tenant_id)
            return await self._add_key(
                connection,
                role="inference",
                tenant_id=tenant_id,
                name=name,
                allowed_models=None if allowed_models is None else sorted(allowed_models),
                may_debug=may_debug,
                expires_at=expires_at,
            )

    async def create_admin_key(self, role: AdminRole, *, name: str = "", expires_at: int | None = None) -> NewKey:
        """A key that administers the gateway, and serves no inference."""
        async with self._change() as connection:
            return await self._add_key(connection, role=role, name=name, expires_at=expires_at)

    async def first_owner_key(self) -> NewKey | None:
        """An owner's key where there is no live one (none yet, or all revoked or expired), else None.

        Of any number of processes that ask at once, exactly one receives a key.
        """
        async with self._change() as connection:
            live_owner = sa.select(_keys.c.id).where(
                _keys.c.role == "owner",
                _keys.c.revoked_at.is_(None),
                sa.or_(_keys.c.expires_at.is_(None), _keys.c.expires_at > self._now()),
            )
            if (await connection.execute(live_owner)).first() is not None:
                await connection.rollback()
                return None
            return await self._add_key(connection, role="owner", name="first owner")

    async def ensure_demo_tenant(self) -> tuple[TenantRecord, NewKey | None]:
        """The demonstration tenant, and its key if this call made them: once per record, whoever asks.

        Raises `AlreadyExists` where an operator's organisation has the name `demo`.
        """
        async with self._change() as connection:
            found = await _find(connection, _tenants, DEMO_TENANT_ID)
            if found is not None:
                await connection.rollback()
                return msgspec.convert(found, TenantRecord), None
            await self._add_organisation(connection, DEMO_ORGANISATION_ID, "demo")
            tenant = await self._add_tenant(connection, DEMO_TENANT_ID, DEMO_ORGANISATION_ID, "demo")
            key = await self._add_key(connection, role="inference", tenant_id=tenant.id, name="demo", may_debug=True)
            return tenant, key

    async def revoke_key(self, key_id: str) -> KeyRecord:
        """The key as it is afterwards. Raises `NotFound`, `AlreadyRevoked`."""
        async with self._change() as connection:
            before = await _key_by_id(connection, key_id)
            if before.revoked_at is not None:
                raise AlreadyRevoked(key_id)
            await connection.execute(sa.update(_keys).where(_keys.c.id == key_id).values(revoked_at=self._now()))
            return await _key_by_id(connection, key_id)

    async def list_organisations(self) -> list[Organisation]:
        """All of them, by name."""
        return [
            msgspec.convert(row, Organisation)
            for row in await self._rows(sa.select(_organisations).order_by(_organisations.c.name))
        ]

    async def list_tenants(self, organisation_id: str | None = None) -> list[TenantRecord]:
        """By name; of one organisation, or of all. An organisation that does not exist has none."""
        query = sa.select(_tenants).order_by(_tenants.c.name, _tenants.c.id)
        if organisation_id is not None:
            query = query.where(_tenants.c.organisation_id == organisation_id)
        return [msgspec.convert(row, TenantRecord) for row in await self._rows(query)]

    async def list_keys(self, tenant_id: str | None = None) -> list[KeyRecord]:
        """Oldest first, revoked and expired ones too; of one tenant, or of all and the admin keys."""
        query = _keys_with_tenants.order_by(_keys.c.created_at, _keys.c.id)
        if tenant_id is not None:
            query = query.where(_keys.c.tenant_id == tenant_id)
        return [_key_record(row) for row in await self._rows(query)]

    async def find_key(self, key_hashes: Sequence[bytes]) -> KeyRecord | None:
        """The key stored under one of these hashes, revoked and expired ones too. One read."""
        for row in await self._rows(_keys_with_tenants.where(_keys.c.key_hash.in_(key_hashes))):
            if any(hmac.compare_digest(row["key_hash"], key_hash) for key_hash in key_hashes):
                return _key_record(row)
        return None

    async def tenancy_version(self) -> int:
        """A number that every change of organisations, tenants and keys raises."""
        rows = await self._rows(sa.select(_tenancy.c.version))
        return int(rows[0]["version"])

    @asynccontextmanager
    async def _change(self) -> AsyncGenerator[AsyncConnection]:
        """A transaction of its own, after every change before it and before every change after it."""
        async with self._connection() as connection:
            await connection.execute(sa.update(_tenancy).values(version=_tenancy.c.version + 1))
            yield connection
            await connection.commit()

    async def _rows(self, query: sa.Select[Any]) -> Sequence[Mapping[str, Any]]:
        async with self._connection() as connection:
            return [_plain(row) for row in (await connection.execute(query)).mappings()]

    @asynccontextmanager
    async def _connection(self) -> AsyncGenerator[AsyncConnection]:
        """One from the pool, given back in order also by a task that was cancelled; undoes what was not committed."""
        with _store_failures():
            connection = await self._engine.connect()
            try:
                yield connection
            finally:
                with anyio.move_on_after(_CLOSE_WITHIN_S, shield=True):
                    await connection.close()

    async def _add_organisation(self, connection: AsyncConnection, id_: str, name: str) -> Organisation:
        if (await connection.execute(sa.select(_organisations.c.id).where(_organisations.c.name == name))).first():
            raise AlreadyExists("an organisation", name)
        organisation = Organisation(id=id_, name=name, created_at=self._now())
        await connection.execute(sa.insert(_organisations).values(msgspec.structs.asdict(organisation)))
        return organisation

    async def _add_tenant(self, connection: AsyncConnection, id_: str, organisation_id: str, name: str) -> TenantRecord:
        same_name = sa.select(_tenants.c.id).where(
            _tenants.c.organisation_id == organisation_id, _tenants.c.name == name
        )
        if (await connection.execute(same_name)).first():
            raise AlreadyExists("a tenant", name)
        tenant = TenantRecord(id=id_, organisation_id=organisation_id, name=name, created_at=self._now())
        await connection.execute(sa.insert(_tenants).values(msgspec.structs.asdict(tenant)))
        return tenant

    async def _add_key(
        self, connection: AsyncConnection, *, role: KeyRole, may_debug: bool = False, **columns: object
    ) -> NewKey:
        key = new_key(admin=role != "inference", random_bytes=self._random_bytes)
        key_id = self._new_id("key")
        await connection.execute(
            sa.insert(_keys).values(
                id=key_id,
                role=role,
                prefix=key[:KEY_PREFIX_CHARS],
                key_hash=self._root.key_hash(key.encode()),
                root_secret_id=self._root.id,
                may_debug=may_debug,
                created_at=self._now(),
                **columns,
            )
        )
        return NewKey(key=key, record=await _key_by_id(connection, key_id))

    def _new_id(self, kind: str) -> str:
        return f"{kind}_{base62(self._random_bytes(_ID_BYTES))}"

    def _now(self) -> int:
        return int(self._clock())


async def _find(connection: AsyncConnection, table: sa.Table, id_: str) -> Mapping[str, Any] | None:
    row = (await connection.execute(sa.select(table).where(table.c.id == id_))).mappings().first()
    return None if row is None else _plain(row)


async def _require(connection: AsyncConnection, table: sa.Table, kind: str, id_: str) -> None:
    if await _find(connection, table, id_) is None:
        raise NotFound(kind, id_)


async def _key_by_id(connection: AsyncConnection, key_id: str) -> KeyRecord:
    row = (await connection.execute(_keys_with_tenants.where(_keys.c.id == key_id))).mappings().first()
    if row is None:
        raise NotFound("key", key_id)
    return _key_record(_plain(row))


def _plain(row: sa.RowMapping) -> Mapping[str, Any]:
    # SQLAlchemy names columns by a subclass of str, which msgspec does not take for one.
    return {str(name): value for name, value in row.items()}


def _key_record(row: Mapping[str, Any]) -> KeyRecord:
    return msgspec.convert({name: value for name, value in row.items() if name != "key_hash"}, KeyRecord)


@contextmanager
def _store_failures() -> Generator[None]:
    """Give the database's failures our name. A broken constraint is none of them: it would be a bug of ours."""
    try:
        yield
    except IntegrityError:
        raise
    except DBAPIError as error:
        raise StoreUnreachable(f"the store does not answer: {error.orig}") from error
    except (NoConnectionFree, OSError) as error:
        raise StoreUnreachable(f"the store does not answer: {error}") from error


def _sqlite_connector(url: sa.URL) -> Callable[[], Awaitable[SQLiteConnection]]:
    arguments, options = url.get_dialect()().create_connect_args(url)
    return lambda: connect(*arguments, **options)


def _upgrade(connection: sa.Connection) -> None:
    config = Config()
    config.set_main_option("script_location", "policies:migrations")
    config.attributes["connection"] = connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    current = set(MigrationContext.configure(connection).get_current_heads())
    if current <= known:
        alembic.command.upgrade(config, "head")
