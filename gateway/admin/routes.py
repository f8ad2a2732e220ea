"""The first admin routes: who am I, the policy in force, keys. Every handler states the role it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
from litestar import Request, Router, get, post
from litestar.params import FromQuery

from gateway.auth import KeyRing
from gateway.errors import AdminForbidden
from gateway.snapshot import Snapshot
from policies.store import Store
from policies.tenant import Administrator, AdminRole, KeyRecord
from policies.watch import PolicyWatch, Reload


@dataclass(frozen=True, slots=True)
class AdminDependencies:
    keys: KeyRing
    watch: PolicyWatch[Snapshot]
    store: Store


class WhoAmI(msgspec.Struct, frozen=True, kw_only=True):
    key_id: str
    name: str
    role: AdminRole


class PolicyState(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    version: str
    source: str
    warnings: list[str]
    last_reload: Reload


def admin_router(parts: AdminDependencies) -> Router:
    """The routes under `/admin/v1`."""

    async def require(request: Request[Any, Any, Any], role: AdminRole) -> Administrator:
        authorization = request.headers.get("authorization")
        caller = await parts.keys.lookup_administrator(
            authorization.encode("latin-1") if authorization is not None else None
        )
        if not caller.has_role(role):
            raise AdminForbidden(f"this takes the role {role}; this key has {caller.role}")
        return caller

    def policy_state() -> PolicyState:
        policy = parts.watch.current.policy
        return PolicyState(
            name=policy.file.name,
            version=policy.version,
            source=policy.source,
            warnings=[str(warning) for warning in policy.warnings],
            last_reload=parts.watch.last_reload,
        )

    @get("/whoami", summary="The key that asks, and its role")
    async def whoami(request: Request[Any, Any, Any]) -> WhoAmI:
        caller = await require(request, "viewer")
        return WhoAmI(key_id=caller.key_id, name=caller.name, role=caller.role)

    @get("/policy", summary="The policy in force in this worker, and its last reload")
    async def policy(request: Request[Any, Any, Any]) -> PolicyState:
        await require(request, "viewer")
        return policy_state()

    @post("/policy/reload", summary="Read the policy file again, in this worker", status_code=200)
    async def reload_policy(request: Request[Any, Any, Any]) -> PolicyState:
        await require(request, "operator")
        await parts.watch.reload()
        return policy_state()

    @get("/keys", summary="Keys, without the keys")
    async def list_keys(request: Request[Any, Any, Any], tenant_id: FromQuery[str | None] = None) -> list[KeyRecord]:
        await require(request, "viewer")
        return await parts.store.list_keys(tenant_id)

    return Router("/admin/v1", route_handlers=[whoami, policy, reload_policy, list_keys], tags=["admin"])
