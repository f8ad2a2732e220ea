"""`GET /v1/models`: what the caller's key may name, routes first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from litestar import Request, Response, route
from litestar.enums import HttpMethod
from litestar.params import FromPath

from backends.catalog import Task
from gateway.auth import KeyRing
from gateway.openai.endpoint import may_be_echoed
from gateway.snapshot import Snapshot, UnknownModel
from policies.tenant import Tenant

READ = (HttpMethod.GET, HttpMethod.HEAD)
"""The server leaves the body of an answer to HEAD out, and its headers are what GET would have told."""

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
        @route("/v1/models", http_method=READ, summary="Models and routes this key may name")
        async def list_models(request: Request[Any, Any, Any]) -> Response[ModelList]:
            return Response(ModelList(data=await self._visible(request)), headers=echoed(request))

        @route("/v1/models/{model_id:path}", http_method=READ, summary="One model or route")
        async def get_model(request: Request[Any, Any, Any], model_id: FromPath[str]) -> Response[Model]:
            return Response(await self._one(request, model_id), headers=echoed(request))

        return list_models, get_model

    async def _one(self, request: Request[Any, Any, Any], model_id: str) -> Model:
        wanted = str(model_id).lstrip("/")
        visible = await self._visible(request)
        for model in visible:
            if model.id == wanted:
                return model
        raise UnknownModel(wanted, tuple(model.id for model in visible))

    async def _tenant(self, request: Request[Any, Any, Any]) -> Tenant:
        authorization = request.headers.get("authorization")
        found = self._keys.lookup(authorization.encode("latin-1") if authorization is not None else None)
        return found if isinstance(found, Tenant) else await found

    async def _visible(self, request: Request[Any, Any, Any]) -> list[Model]:
        tenant = await self._tenant(request)
        snapshot = self._current()
        return [_model(snapshot, name) for name in snapshot.policy.names if tenant.may_use(name)]


def echoed(request: Request[Any, Any, Any]) -> dict[str, str]:
    """The client's own id of its request, to send back."""
    client_id = request.headers.get("x-client-request-id", "").encode("latin-1")
    return {"x-client-request-id": client_id.decode()} if may_be_echoed(client_id) else {}


def _model(snapshot: Snapshot, name: str) -> Model:
    card = snapshot.models.get(name)
    task = snapshot.tasks[name]
    if card is None:
        return Model(id=name, owned_by="forebay", task=task)
    return Model(id=name, owned_by=card.owned_by, context_window=card.context_window_tokens, task=task)
