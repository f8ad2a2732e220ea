"""Who asks: an organisation has tenants, a tenant has keys. Everything that is kept apart is kept apart by `Tenant.id`.

`Tenant` and `Administrator` are callers, as the key they used makes them; `Organisation`, `TenantRecord`, `KeyRecord`
are rows of the record, as `policies.store` returns them. Times are Unix time in whole seconds, UTC. No `repr` here
shows a secret.
"""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

AdminRole = Literal["viewer", "operator", "owner"]
"""What an admin key may do, each role everything the one before it may."""

KeyRole = Literal["inference", "viewer", "operator", "owner"]
"""A key serves inference for one tenant, or it administers the gateway; never both."""


class Tenant(msgspec.Struct, frozen=True, kw_only=True):
    """The authenticated caller of one request, as the key it used makes it."""

    id: str
    organisation_id: str
    key_id: str
    name: str = ""
    allowed_models: frozenset[str] | None = None
    """Models and routes this key may name; None allows all."""
    may_debug: bool = False
    """Whether `x-forebay-debug: 1` is answered with details."""
    cache_secret: bytes = b""
    """32 bytes, derived per tenant: the HMAC key of every cache key, so that no two tenants can ever share one."""

    def may_use(self, model: str) -> bool:
        return self.allowed_models is None or model in self.allowed_models

    def __repr__(self) -> str:
        return f"Tenant(id={self.id!r}, organisation_id={self.organisation_id!r}, key_id={self.key_id!r})"


class Administrator(msgspec.Struct, frozen=True, kw_only=True):
    """The authenticated caller of one admin request."""

    key_id: str
    name: str
    role: AdminRole

    def has_role(self, role: AdminRole) -> bool:
        """Whether this caller may do what `role` may."""
        ranks = get_args(AdminRole)
        return ranks.index(self.role) >= ranks.index(role)


class Organisation(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    name: str
    created_at: int


class TenantRecord(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    organisation_id: str
    name: str
    created_at: int


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A key without the key: what may be listed and logged."""

    id: str
    role: KeyRole
    name: str
    prefix: str
    """The key's first 10 characters, by which people recognise it."""
    root_secret_id: str
    """The root secret its hash was made with, see `RootSecret.id`: that secret is needed as long as this key is."""
    tenant_id: str | None = None
    """None for an admin key, as the next two."""
    tenant_name: str | None = None
    organisation_id: str | None = None
    allowed_models: frozenset[str] | None = None
    may_debug: bool = False
    created_at: int
    expires_at: int | None = None
    """The first second in which the key no longer works; None: never."""
    revoked_at: int | None = None


class NewKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key at the one moment it is known. It is kept nowhere; show it, then forget it."""

    key: str
    record: KeyRecord

    def __repr__(self) -> str:
        return f"NewKey(record={self.record!r})"
