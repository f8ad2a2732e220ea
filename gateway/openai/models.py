"""`GET /v1/models`: what the caller's key may name, routes first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from litestar import Request, get
from litestar.params import FromPath

from backends.catalog import Task
from gateway.auth import KeyRing
from gateway.snapshot import Snapshot, UnknownModel
from policies.tenant import Tenant

CREATED = 0
"""OpenAI's type demands a time of creation; a name in a policy has none."""


class Model(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "model"
    created: int = CREATED
    owned_by: str
    context_window: int | None = None
    """Tokens; None for a route, whose models may differ."""
    task: Task


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "list"
    data: list[Model]


class ModelsEndpoint:
    """The two ordinary routes of the OpenAI face."""

    def __init__(self, keys: KeyRing, current: Callable[[], Snapshot]) -> None:
        self._keys = keys
        self._current = current

    def handlers(self) -> tuple[Any, ...]:
        @get("/v1/models", summary="Models and routes this key may name")
        async def list_models(request: Request[Any, Any, Any]) -> ModelList:
            tenant = await self._tenant(request)
            return ModelList(data=self._visible(tenant))

        @get("/v1/models/{model_id:path}", summary="One model or route")
        async def get_model(request: Request[Any, Any, Any], model_id: FromPath[str]) -> Model:
            tenant = await self._tenant(request)
            wanted = str(model_id).lstrip("/")
            visible = self._visible(tenant)
            for model in visible:
                if model.id == wanted:
                    return model
            raise UnknownModel(wanted, tuple(model.id for model in visible))

        return list_models, get_model

    async def _tenant(self, request: Request[Any, Any, Any]) -> Tenant:
        authorization = request.headers.get("authorization")
        found = self._keys.lookup(authorization.encode("latin-1") if authorization is not None else None)
        return found if isinstance(found, Tenant) else await found

    def _visible(self, tenant: Tenant) -> list[Model]:
        snapshot = self._current()
        return [_model(snapshot, name) for name in snapshot.policy.names if tenant.may_use(name)]


def _model(snapshot: Snapshot, name: str) -> Model:
    card = snapshot.models.get(name)
    task = snapshot.tasks[name]
    if card is None:
        return Model(id=name, owned_by="forebay", task=task)
    return Model(id=name, owned_by=card.owned_by, context_window=card.context_window_tokens, task=task)
