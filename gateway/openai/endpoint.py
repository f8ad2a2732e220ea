"""The hot path between ASGI and the pipeline: read, authenticate, ask, write, and every way that this can end.

Litestar hands the request over before it parses anything (`@asgi(copy_scope=False)`: 4 µs against 27 for a `@post`
handler), so what a framework would do happens here, once, in the order in which a reader sees it.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeGuard

import anyio
from litestar.types import HTTPScope, Receive, Send

from backends.chat import ChatRequest, Event
from backends.fold import fold
from cache.control import CacheControl
from gateway.answer import Answer
from gateway.auth import KeyRing
from gateway.background import Background
from gateway.context import RequestContext
from gateway.errors import DeadlinePassed, MethodNotAllowed, Rendered, render
from gateway.openai.body import ClientGone, read_body
from gateway.openai.compression import compressed
from gateway.openai.hangup import HangUp
from gateway.openai.sse import DONE, error_frame, frames
from gateway.pipeline import Pipeline
from gateway.settings import Settings
from gateway.snapshot import Snapshot
from gateway.telemetry.record import Exchange, Record
from policies.admission import Admitted
from policies.tenant import Tenant

Headers = list[tuple[bytes, bytes]]

ERROR_WITHIN_S = 5.0

_ALLOW = "OPTIONS, POST"
_CLIENT_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class InferenceEndpoint:
    """One hot route: `POST` of a body that `read` turns into a `ChatRequest`."""

    def __init__(
        self,
        *,
        read: Callable[[bytes], ChatRequest],
        keys: KeyRing,
        current: Callable[[], Snapshot],
        pipeline: Pipeline,
        background: Background,
        record: Record,
        settings: Settings,
        fresh_request_id: Callable[[], str],
    ) -> None:
        self._read = read
        self._keys = keys
        self._current = current
        self._pipeline = pipeline
        self._background = background
        self._record = record
        self._settings = settings
        self._fresh_request_id = fresh_request_id

    async def __call__(self, scope: HTTPScope, receive: Receive, send: Send) -> None:
        clock = time.monotonic
        headers = dict(scope["headers"])
        exchange = Exchange(
            request_id=self._fresh_request_id(),
            path=scope["path"],
            started_at=clock(),
            is_retry=_is_retry(headers),
        )
        common = _common_headers(exchange.request_id, headers)
        writer = _Writer(send, common, exchange, clock)
        try:
            if scope["method"] == "OPTIONS":
                await writer.allow(_ALLOW)
                return
            if scope["method"] != "POST":
                raise MethodNotAllowed(f"{scope['method']} is not allowed here; use POST", allow=_ALLOW)
            tenant = await self._authenticate(headers)
            request = self._read(
                await read_body(
                    receive,
                    declared_bytes=_declared_bytes(headers),
                    encoding=_text(headers, b"content-encoding"),
                    max_bytes=self._settings.max_body_bytes,
                    within_s=self._settings.body_within_s,
                )
            )
            snapshot = self._current()
            context = RequestContext(
                request_id=exchange.request_id,
                tenant=tenant,
                snapshot=snapshot,
                started_at=exchange.started_at,
                deadline=exchange.started_at + snapshot.policy.file.timeouts.total,
                cache_control=CacheControl.parse(_text(headers, b"cache-control")),
            )
            async with HangUp(receive, self._background.spawn) as hangup:
                answer = await self._pipeline.run(context, request)
                try:
                    exchange.answered(answer)
                    writer.describe(context, answer, debug=headers.get(b"x-forebay-debug") == b"1")
                    if request.stream:
                        await self._stream(writer, hangup, context, request, answer)
                    else:
                        await self._whole(writer, hangup, context, request, answer, headers)
                finally:
                    answer.source.leave()
        except ClientGone:
            exchange.client_gone()
        except Exception as error:  # noqa: BLE001 - the face is where every error becomes an answer
            rendered = render(error)
            exchange.failed(error, rendered)
            with anyio.move_on_after(ERROR_WITHIN_S):  # whoever reads nothing any more will not read this either
                await writer.error(rendered)
        finally:
            self._record.exchange_ended(exchange, clock())

    async def _authenticate(self, headers: Mapping[bytes, bytes]) -> Tenant:
        found = self._keys.lookup(headers.get(b"authorization"))
        return found if isinstance(found, Tenant) else await found

    async def _stream(
        self, writer: _Writer, hangup: HangUp, context: RequestContext, request: ChatRequest, answer: Answer
    ) -> None:
        await writer.begin_stream()
        async with _until(context.deadline):
            while events := await answer.source.take():
                part = frames(events, request.operation, include_usage=request.include_usage)
                if part:
                    await writer.part(part)
            hangup.disarm()
            await writer.end_stream(DONE)

    async def _whole(
        self,
        writer: _Writer,
        hangup: HangUp,
        context: RequestContext,
        request: ChatRequest,
        answer: Answer,
        headers: Mapping[bytes, bytes],
    ) -> None:
        events: list[Event] = []
        async with _until(context.deadline):
            while more := await answer.source.take():
                events.extend(more)
            body = events[0].raw if events[0].whole else fold([event.raw for event in events], request.operation)
            hangup.disarm()
            await writer.whole(body, _text(headers, b"accept-encoding"))


class _until:  # noqa: N801 - reads as a clause
    """`asyncio.timeout_at` whose time-out is a `DeadlinePassed`."""

    __slots__ = ("_timeout",)

    def __init__(self, deadline: float) -> None:
        self._timeout = asyncio.timeout_at(deadline)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *raised: object) -> None:
        try:
            await self._timeout.__aexit__(*raised)  # type: ignore[arg-type]
        except TimeoutError:
            raise DeadlinePassed from None


class _Writer:
    """Sends one response, and knows how far it got: an error before the start is a status, after it an event."""

    def __init__(self, send: Send, headers: Headers, exchange: Exchange, clock: Callable[[], float]) -> None:
        self._send = send
        self._headers = headers
        self._exchange = exchange
        self._clock = clock
        self._streaming = False

    def describe(self, context: RequestContext, answer: Answer, *, debug: bool) -> None:
        """Say with headers how the answer came about."""
        add = self._headers.append
        add((b"x-forebay-cache", answer.cache.encode()))
        add((b"x-forebay-model", answer.model.encode()))
        if answer.route is not None:
            add((b"x-forebay-route", answer.route.encode()))
        add((b"x-forebay-policy", context.snapshot.policy.label.encode()))
        add((b"x-forebay-overhead-ms", f"{answer.overhead_s * 1000:.3f}".encode()))
        if answer.cost_nano_usd is not None:
            add((b"x-forebay-cost-usd", usd(answer.cost_nano_usd)))
        if answer.saved_nano_usd:
            add((b"x-forebay-saved-usd", usd(answer.saved_nano_usd)))
        for name, value in _rate_headers(answer.admitted):
            add((name, value.encode()))
        if answer.age_s is not None:
            add((b"age", str(int(answer.age_s)).encode()))
        if debug and context.tenant.may_debug:
            self._headers.extend(_debug_headers(answer))

    async def begin_stream(self) -> None:
        self._streaming = True
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"x-accel-buffering", b"no"),  # nginx in front would otherwise hold events back
            *self._headers,
            self._processing_ms(),
        ]
        self._exchange.status = 200
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def part(self, part: bytes) -> None:
        await self._send({"type": "http.response.body", "body": part, "more_body": True})

    async def end_stream(self, last: bytes) -> None:
        await self._send({"type": "http.response.body", "body": last, "more_body": False})

    async def whole(self, body: bytes, accept_encoding: str | None) -> None:
        body, encoding = await compressed(body, accept_encoding)
        headers = [(b"content-type", b"application/json"), (b"vary", b"accept-encoding"), *self._headers]
        if encoding is not None:
            headers.append((b"content-encoding", encoding.encode()))
        await self._respond(200, headers, body)

    async def error(self, error: Rendered) -> None:
        if self._streaming:
            await self.end_stream(error_frame(error))
            return
        headers = [(b"content-type", b"application/json"), *self._headers, *error.headers()]
        await self._respond(error.status, headers, error.body())

    async def allow(self, methods: str) -> None:
        """Say what may be asked here, as OPTIONS wants to know."""
        self._exchange.status = 204
        headers = [(b"allow", methods.encode()), *self._headers]
        await self._send({"type": "http.response.start", "status": 204, "headers": headers})
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _respond(self, status: int, headers: Headers, body: bytes) -> None:
        self._exchange.status = status
        headers.append(self._processing_ms())
        headers.append((b"content-length", str(len(body)).encode()))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    def _processing_ms(self) -> tuple[bytes, bytes]:
        """Milliseconds from a request's head to its answer's, as OpenAI's clients log them."""
        return b"openai-processing-ms", str(int((self._clock() - self._exchange.started_at) * 1000)).encode()


def usd(nano_usd: int) -> bytes:
    """Nano-dollars as a decimal number of dollars, exact."""
    return f"{nano_usd // 10**9}.{nano_usd % 10**9:09d}".encode()


def _rate_headers(admitted: Admitted) -> Iterator[tuple[bytes, str]]:
    """What is left of the request rate, in OpenAI's names and formats; nothing where there is no limit."""
    if admitted.limit_requests is not None:
        yield b"x-ratelimit-limit-requests", str(admitted.limit_requests)
    if admitted.remaining_requests is not None:
        yield b"x-ratelimit-remaining-requests", str(admitted.remaining_requests)
    if admitted.reset_s is not None:
        yield b"x-ratelimit-reset-requests", f"{math.ceil(admitted.reset_s * 1000)}ms"


def _debug_headers(answer: Answer) -> Headers:
    if answer.head is None:
        return []
    decision = answer.head.decision
    headers: Headers = [
        (b"x-forebay-reason", decision.reason.encode()),
        (b"x-forebay-backend", answer.head.backend.encode()),
        (b"x-forebay-attempts", str(len(answer.head.failed) + 1).encode()),
    ]
    if decision.score is not None:
        headers.append((b"x-forebay-difficulty", f"{decision.score.value:.4f}".encode()))
        headers.append((b"x-forebay-scorer", decision.score.scorer.encode()))
    if answer.miss_reason is not None:
        headers.append((b"x-forebay-miss", answer.miss_reason.encode()))
    return headers


def _common_headers(request_id: str, headers: Mapping[bytes, bytes]) -> Headers:
    """On every response: who it is, and that nobody in between may keep it (another tenant's answer is not theirs)."""
    common: Headers = [
        (b"x-request-id", request_id.encode()),
        (b"cache-control", b"private, no-store"),
    ]
    client_id = headers.get(b"x-client-request-id")
    if may_be_echoed(client_id):
        common.append((b"x-client-request-id", client_id))
    return common


def may_be_echoed(client_request_id: bytes | None) -> TypeGuard[bytes]:
    """Whether a client's own id of its request is one that can do no harm in a header or a log."""
    return client_request_id is not None and _CLIENT_REQUEST_ID.fullmatch(client_request_id) is not None


def _is_retry(headers: Mapping[bytes, bytes]) -> bool:
    """Whether OpenAI's SDKs say that they have asked this before."""
    count = headers.get(b"x-stainless-retry-count", b"0")
    return count.isdigit() and count.strip(b"0") != b""


def _declared_bytes(headers: Mapping[bytes, bytes]) -> int | None:
    declared = headers.get(b"content-length")
    return int(declared) if declared is not None and declared.isdigit() else None


def _text(headers: Mapping[bytes, bytes], name: bytes) -> str | None:
    value = headers.get(name)
    return value.decode("latin-1").strip().lower() if value is not None else None
