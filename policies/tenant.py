"""Who asks: an organisation has tenants, a tenant has keys. Everything that is kept apart is kept apart by `Tenant.id`."""

from __future__ import annotations

import msgspec


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
