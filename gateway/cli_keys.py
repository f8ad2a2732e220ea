"""`forebay keys`: create, list and revoke API keys, on the record itself. Who can read its files owns the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from datetime import UTC, date, datetime, time, timedelta
from typing import Annotated, Any, TypeVar

import msgspec
from cyclopts import App, Parameter
from rich.box import SIMPLE
from rich.table import Table

from gateway.app import load_root_secret, open_store
from gateway.settings import resolve_settings
from gateway.terminal import report, say, say_table
from policies.store import Store
from policies.tenant import AdminRole, KeyRecord, NewKey, TenantRecord

T = TypeVar("T")

DataDir = Annotated[str | None, Parameter(help="Where state that must survive is kept. Default: .forebay")]
AsJson = Annotated[bool, Parameter(help="Print JSON.", negative="")]

keys_app = App(name="keys", help="Create, list and revoke API keys.")


class UnclearRequest(Exception):
    """Options that contradict each other, or fit more than one thing. The message says which, and what to write."""


@keys_app.command(name="create")
def create_key(
    *,
    tenant: Annotated[str | None, Parameter(help="The tenant's name or id. A new name makes a new tenant.")] = None,
    organisation: Annotated[
        str | None,
        Parameter(
            help="Its organisation, by name or id. A new name makes a new one. Default for a new tenant: its name."
        ),
    ] = None,
    admin: Annotated[
        AdminRole | None, Parameter(help="Instead of a tenant's key, one that administers the gateway.")
    ] = None,
    name: Annotated[str, Parameter(help="What the key is for.")] = "",
    model: Annotated[list[str] | None, Parameter(help="Allow only this model or route; repeat for more.")] = None,
    debug: Annotated[bool, Parameter(help="Let it ask for x-forebay-debug.", negative="")] = False,
    expires: Annotated[date | None, Parameter(help="The last day it works (UTC), like 2027-01-31.")] = None,
    json: AsJson = False,
    data_dir: DataDir = None,
) -> int:
    """Create a key for a tenant's requests, or an admin key. It is shown once and cannot be read back."""
    if (tenant is None) == (admin is None):
        raise UnclearRequest("give exactly one of --tenant NAME and --admin ROLE")
    if admin is not None and (organisation is not None or model or debug):
        raise UnclearRequest("--organisation, --model and --debug are for tenants' keys; an admin key has none of them")
    expires_at = None if expires is None else _end_of(expires)

    async def create(store: Store) -> NewKey:
        if admin is not None:
            return await store.create_admin_key(admin, name=name, expires_at=expires_at)
        assert tenant is not None  # noqa: S101 - one of the two is given
        return await store.create_key(
            (await _tenant(store, tenant, organisation)).id,
            name=name,
            allowed_models=frozenset(model) if model else None,
            may_debug=debug,
            expires_at=expires_at,
        )

    new_key = _with_store(data_dir, create)
    record = new_key.record
    if json:
        shown = {"key": new_key.key, "id": record.id, "role": record.role, "tenant_id": record.tenant_id}
        print(msgspec.json.encode(shown).decode())
        return 0
    print(new_key.key)
    whose = f"of role {record.role}" if admin is not None else f"of tenant {record.tenant_name}"
    report(f"Key {record.id} {whose}. It is not shown again.")
    return 0


@keys_app.command(name="list")
def list_keys(*, json: AsJson = False, data_dir: DataDir = None) -> int:
    """List keys: what they are for and whether they work, never the keys themselves."""
    records = _with_store(data_dir, lambda store: store.list_keys())
    if json:
        print(msgspec.json.format(msgspec.json.encode(records)).decode())
        return 0
    table = Table(box=SIMPLE, pad_edge=False)
    for column in ("id", "key", "role", "tenant", "name", "models", "state"):
        table.add_column(column, no_wrap=column in ("id", "key"))
    now = datetime.now(UTC).timestamp()
    for record in records:
        models = "all" if record.allowed_models is None else ", ".join(sorted(record.allowed_models))
        tenant = record.tenant_name or ""
        table.add_row(record.id, f"{record.prefix}…", record.role, tenant, record.name, models, _state(record, now))
    say_table(table)
    return 0


@keys_app.command(name="revoke")
def revoke_key(
    key_id: Annotated[str, Parameter(help="The key's id, see `forebay keys list`.")], /, *, data_dir: DataDir = None
) -> int:
    """Revoke a key: running workers refuse it within a second."""
    record = _with_store(data_dir, lambda store: store.revoke_key(key_id))
    say(f"revoked {record.id} ({record.prefix}…)")
    return 0


async def _tenant(store: Store, tenant: str, organisation: str | None) -> TenantRecord:
    """The tenant of that id or name, made where there is none; of the organisation, where one is named."""
    organisations = await store.list_organisations()
    owner = next((known for known in organisations if organisation in (known.id, known.name)), None)
    if organisation is not None and owner is None:
        owner = await store.create_organisation(organisation)
    tenants = await store.list_tenants(owner.id if owner else None)
    found = [known for known in tenants if known.id == tenant] or [known for known in tenants if known.name == tenant]
    if len(found) > 1:
        names = {known.id: known.name for known in organisations}
        owners = ", ".join(sorted(names[known.organisation_id] for known in found))
        raise UnclearRequest(f"several organisations have a tenant {tenant!r}: give --organisation, one of {owners}")
    if found:
        return found[0]
    owner = owner or next((known for known in organisations if known.name == tenant), None)
    return await store.create_tenant((owner or await store.create_organisation(tenant)).id, tenant)


def _with_store(data_dir: str | None, work: Callable[[Store], Coroutine[Any, Any, T]]) -> T:
    settings = resolve_settings({"data_dir": data_dir}).settings

    async def run() -> T:
        async with open_store(settings, load_root_secret(settings)) as store:
            return await work(store)

    return asyncio.run(run())


def _end_of(last_day: date) -> int:
    """Unix time, in seconds, of the midnight that ends a day, UTC."""
    end = datetime.combine(last_day, time(), UTC) + timedelta(days=1)
    if end <= datetime.now(UTC):
        raise UnclearRequest(f"--expires {last_day.isoformat()} is over: name today or a later day, as UTC counts them")
    return int(end.timestamp())


def _state(record: KeyRecord, now: float) -> str:
    if record.revoked_at is not None:
        return f"revoked {_day(record.revoked_at)}"
    if record.expires_at is None:
        return "active"
    last_day = _day(record.expires_at - 1)
    return f"expired {last_day}" if record.expires_at <= now else f"until {last_day}"


def _day(unix_s: int) -> str:
    return datetime.fromtimestamp(unix_s, UTC).date().isoformat()
