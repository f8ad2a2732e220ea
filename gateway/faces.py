"""The outside: every route, which handler stands behind it, and how an error looks on it."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

from litestar import Litestar, MediaType, Request, Response, asgi, get, route
from litestar.exceptions import HTTPException
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin, SwaggerRenderPlugin
from litestar.types import Receive, Scope, Send

from backends.chat import ChatRequest
from gateway.admin.routes import AdminDependencies, admin_router
from gateway.auth import AuthError, KeyRing
from gateway.background import Background
from gateway.errors import MethodNotAllowed, RequestError, RouteNotFound, render
from gateway.health import Health
from gateway.openai.endpoint import InferenceEndpoint
from gateway.openai.models import READ, ModelsEndpoint, echoed
from gateway.openai.schema import add_hot_routes
from gateway.openai.translate import read_chat, read_completion, read_embeddings
from gateway.pipeline import Pipeline
from gateway.settings import Settings
from gateway.snapshot import Snapshot
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.record import Record
from policies.store import Store
from policies.watch import PolicyWatch

PROMETHEUS_TEXT = "text/plain; version=0.0.4"
"""The framework adds the charset; said twice, Prometheus refuses to read the scrape."""


def build_app(
    *,
    settings: Settings,
    keys: KeyRing,
    current: Callable[[], Snapshot],
    pipeline: Pipeline,
    background: Background,
    record: Record,
    metrics: Metrics,
    health: Health,
    watch: PolicyWatch[Snapshot],
    store: Store,
) -> Litestar:
    """The ASGI application of one worker."""

    def inference(path: str, read: Callable[[bytes], ChatRequest]) -> Any:
        endpoint = InferenceEndpoint(
            read=read,
            keys=keys,
            current=current,
            pipeline=pipeline,
            background=background,
            record=record,
            settings=settings,
            fresh_request_id=fresh_request_id,
        )

        @asgi(path, copy_scope=False)
        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            await endpoint(scope, receive, send)  # type: ignore[arg-type]

        return answer

    models = ModelsEndpoint(keys, current)

    @route("/healthz", http_method=READ, media_type=MediaType.TEXT, sync_to_thread=False, summary="Alive")
    def healthz() -> str:
        return "ok\n"

    @route(
        "/readyz",
        http_method=READ,
        summary="Ready to serve, and what is wrong where not; an admin key sees the details",
    )
    async def readyz(request: Request[Any, Any, Any]) -> Response[Any]:
        report = await health.report()
        shown = report if await _is_administrator(keys, request) else report.for_anybody()
        return Response(shown, status_code=200 if report.ready else 503, media_type=MediaType.JSON)

    @get("/metrics", sync_to_thread=True, summary="Prometheus metrics of all workers")
    def prometheus() -> Response[bytes]:
        return Response(metrics.exposition(), media_type=PROMETHEUS_TEXT)

    def on_error(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
        request_id = fresh_request_id()
        rendered = render(_domain_error(request, error))
        if rendered.status == 500:
            record.unexpected(request_id, error)
        headers = {name.decode(): value.decode() for name, value in rendered.headers()} | echoed(request)
        return Response(
            rendered.body(),
            status_code=rendered.status,
            media_type=MediaType.JSON,
            headers={"x-request-id": request_id, "cache-control": "private, no-store", **headers},
        )

    app = Litestar(
        [
            inference("/v1/chat/completions", read_chat),
            inference("/v1/completions", read_completion),
            inference("/v1/embeddings", read_embeddings),
            *models.handlers(),
            healthz,
            readyz,
            prometheus,
            admin_router(AdminDependencies(keys=keys, watch=watch, store=store)),
        ],
        exception_handlers={Exception: on_error},
        after_request=_named,
        openapi_config=OpenAPIConfig(
            title="Forebay",
            version="1",
            description="An LLM gateway: OpenAI-compatible inference and its administration.",
            path="/openapi",
            render_plugins=[JsonRenderPlugin(), SwaggerRenderPlugin()],
        ),
        logging_config=None,
    )
    add_hot_routes(app.openapi_schema)
    return app


async def _is_administrator(keys: KeyRing, request: Request[Any, Any, Any]) -> bool:
    authorization = request.headers.get("authorization")
    if authorization is None:
        return False
    try:
        await keys.lookup_administrator(authorization.encode("latin-1"))
    except AuthError:
        return False
    return True


def fresh_request_id() -> str:
    """Ours alone: money is settled by it, so a client never picks it."""
    return f"req_{secrets.token_hex(12)}"


def _named(response: Response[Any]) -> Response[Any]:
    """Every answer has a request id, and none is for a cache in between to keep."""
    response.headers["x-request-id"] = fresh_request_id()
    response.headers["cache-control"] = "private, no-store"
    return response


def _domain_error(request: Request[Any, Any, Any], error: Exception) -> Exception:
    """The framework's errors in our own words."""
    if not isinstance(error, HTTPException) or isinstance(error, AuthError):
        return error
    if error.status_code == 404:
        return RouteNotFound(f"there is nothing at {request.scope['path']}; see /openapi for what there is")
    if error.status_code == 405:
        allow = (error.headers or {}).get("allow", "GET")
        return MethodNotAllowed(f"{request.method} is not allowed on {request.url.path}; use {allow}", allow=allow)
    if error.status_code < 500:
        return RequestError(error.detail)
    return error
