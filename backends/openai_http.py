"""Any engine that speaks OpenAI's protocol over HTTP: vLLM, trtllm-serve, SGLang, llama.cpp, TGI, hosted APIs.

A frame is relayed as the bytes it came in, once it is complete and its JSON parses: the usual SDKs end a truncated
stream without an error, so a relay of raw bytes would turn a dead engine into a silently short answer.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from typing import TypeVar

import aiohttp
import msgspec
import yarl

from backends.backend import Call, Load
from backends.catalog import Capability
from backends.chat import ChatRequest, Event
from backends.embeddings import read_embeddings
from backends.errors import (
    BackendError,
    BackendOverloaded,
    BackendProtocolError,
    BackendTimeout,
    BackendUnreachable,
    RequestRejected,
)
from backends.load_signals import LoadSignals, MetricsPage
from backends.openai_errors import error_by_cause, read_error, read_retry_after_s
from backends.openai_quirks import AnswerReader
from backends.sse import Frame, FrameTooLarge, SseParser
from backends.tls import ClientTls, ConnectionSettings

MAX_ANSWER_BYTES = 32 * 1024 * 1024
"""The largest answer that is not streamed: 100k tokens with 20 log probabilities each stay below it."""

MAX_EMBEDDINGS_BYTES = 64 * 1024 * 1024
"""The largest answer of vectors: 2048 of 3072 dimensions take 34 MB in base64, and more than this as numbers."""

_MAX_ERROR_BYTES = 64 * 1024
_KEEP_ALIVE_S = 4.0
"""Below the 5 s after which uvicorn (vLLM) and llama.cpp close an idle connection, so that we never send into one."""
_ERROR_BODY_S = 2.0
_TRAILER_S = 1.0
"""How long an answer whose choices have all finished is waited on for its usage frame and `[DONE]`."""
_LINGER_S = 0.05
"""How long the end of the HTTP body is waited on after `[DONE]`, to give the connection back instead of closing it."""
_LARGE_BODY_BYTES = 512 * 1024
_LEAST_CONNECT_S = 0.001
"""aiohttp takes 0 for no limit."""
_BUSY_RETRY_AFTER_S = 1.0

_T = TypeVar("_T")


def new_session() -> aiohttp.ClientSession:
    """A session that all of a worker's backends can share. Call it inside the running loop; whoever calls it closes it.

    Connections are not limited in number here: how many calls may be in flight is decided before a call is made.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None),
        trust_env=False,
    )


class OpenAIBackend:
    """A `Backend` at `base_url` (up to and including `/v1`), on aiohttp.

    Without a `session` it opens its own at the first call and closes it in `aclose`. `upstream_model` is what the
    engine calls the model, where that is not the name it has here. `api_key` is sent as a bearer token, or bare in the
    header `api_key_header`; `headers` go with every request and `query` with every URL; nothing that a client sent as a
    header is ever forwarded. With `max_connections` a call that finds so many in use waits for one within its connect
    time, and is then `BackendOverloaded`; health checks come on top. `check` asks for `health_url`, by default the
    engine's list of models. `run` reads the engine's load from its Prometheus metrics at `metrics_url`, and
    `metrics_note` is told whether that works (see `LoadSignals`); credentials and `tls` go there only where it is the
    same host and port. `wall_clock` gives Unix time, for `retry-after` dates. Raises ValueError for a bad URL.
    """

    def __init__(
        self,
        name: str,
        base_url: str,
        *,
        session: aiohttp.ClientSession | None = None,
        upstream_model: str | None = None,
        api_key: str | None = None,
        api_key_header: str | None = None,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
        tls: ClientTls | None = None,
        max_connections: int | None = None,
        health_url: str | None = None,
        metrics_url: str | None = None,
        metrics_note: Callable[[bool, str], None] | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        base = base_url.rstrip("/")
        self._name = name
        self._urls = {
            "chat": yarl.URL(f"{base}/chat/completions").extend_query(query or {}),
            "text_completion": yarl.URL(f"{base}/completions").extend_query(query or {}),
            "embeddings": yarl.URL(f"{base}/embeddings").extend_query(query or {}),
        }
        self._health_url = yarl.URL(health_url or f"{base}/models").extend_query(query or {})
        if not self._health_url.is_absolute() or self._health_url.scheme not in ("http", "https"):
            raise ValueError(f"backend {name}: {base_url!r} is no http(s) URL")
        self._upstream_model = upstream_model
        # Decoding a compressed stream holds frames back until the compressor's block is full.
        self._headers = {"User-Agent": "forebay", "Accept-Encoding": "identity"}
        if api_key is not None and api_key_header is not None:
            self._headers[api_key_header] = api_key
        elif api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._headers |= headers or {}
        self._tls = tls
        self._connections = None if max_connections is None else asyncio.Semaphore(max_connections)
        self._session = session
        self._owns_session = session is None
        self._wall_clock = wall_clock
        self._exchanges: set[_Exchange] = set()
        self._closed = False
        self._signals = None if metrics_url is None else self._load_signals(metrics_url, metrics_note)

    @property
    def name(self) -> str:
        return self._name

    @property
    def load(self) -> Load:
        return Load(in_flight=len(self._exchanges)) if self._signals is None else self._signals.load()

    @property
    def capabilities(self) -> frozenset[Capability] | None:
        return None

    async def answer(self, call: Call) -> AsyncGenerator[Event, None]:
        """See `Backend.answer`. A JSON answer to a request for a stream comes as one `whole` event."""
        exchange = _Exchange(self._name, call, self._wall_clock)
        self._exchanges.add(exchange)
        try:
            if self._connections is not None:
                await exchange.take_connection(self._connections)
            await exchange.send(
                self._session_now(call.model),
                self._urls[call.request.operation],
                _body(call.request, self._upstream_model or call.model),
                {**self._headers, "Content-Type": "application/json", "X-Request-Id": call.request_id},
                await self._tls_settings(),
            )
            if not exchange.is_stream:
                yield await exchange.read_whole()
                return
            while (frames := await exchange.next_frames()) is not None:
                for frame in frames:
                    if (event := exchange.read_event(frame)) is not None:
                        yield event
            exchange.check_complete()
            if (event := exchange.closing_event()) is not None:
                yield event
        finally:
            self._exchanges.discard(exchange)
            exchange.hang_up()

    async def run(self) -> None:
        if self._signals is not None:
            await self._signals.run()

    async def check(self, *, within_s: float) -> None:
        """Return when the engine answers at its health address; an engine that has no such address is taken as well."""
        session = self._session_now("")
        try:
            async with (
                asyncio.timeout(within_s),
                session.get(
                    self._health_url, headers=self._headers, allow_redirects=False, **await self._tls_settings()
                ) as response,
            ):
                body = await response.content.read(_MAX_ERROR_BYTES)
        except TimeoutError as error:
            message = f"no answer to a health check within {within_s} s"
            raise BackendTimeout(message, phase="connect", backend=self._name) from error
        except (aiohttp.ClientError, OSError) as error:
            raise BackendUnreachable(_reason(error), backend=self._name) from error
        if response.status not in (200, 404, 405):
            retry_after_s = read_retry_after_s(response.headers, self._wall_clock())
            raise error_by_cause(
                read_error(body), response.status, backend=self._name, model="", retry_after_s=retry_after_s
            )

    async def aclose(self) -> None:
        self._closed = True
        for exchange in tuple(self._exchanges):
            exchange.cut()
        if self._owns_session and self._session is not None:
            await self._session.close()

    def _load_signals(self, url: str, note: Callable[[bool, str], None] | None) -> LoadSignals:
        is_ours = yarl.URL(url).origin() == self._health_url.origin()
        page = MetricsPage(
            url,
            lambda: self._session_now(""),
            headers=self._headers if is_ours else None,
            tls=self._tls if is_ours else None,
        )
        return LoadSignals(page, model=self._upstream_model, in_flight=lambda: len(self._exchanges), note=note)

    async def _tls_settings(self) -> ConnectionSettings:
        return {} if self._tls is None else await self._tls.settings()

    def _session_now(self, model: str) -> aiohttp.ClientSession:
        if self._session is None and not self._closed:
            self._session = new_session()
        if self._closed or self._session is None or self._session.closed:
            raise BackendUnreachable("the backend is closed", backend=self._name, model=model)
        return self._session


def _body(request: ChatRequest, model: str) -> bytes:
    if not request.stream:
        return msgspec.json.encode(request.with_fields(model=model))
    given = request.fields.get("stream_options")
    options = msgspec.json.decode(given) if given is not None else None
    options = {**(options if isinstance(options, dict) else {}), "include_usage": True}
    return msgspec.json.encode(request.with_fields(model=model, stream_options=options))


def _apart(frame: Frame) -> Sequence[Frame]:
    """A frame of several lines as one for each, where every line is whole and together they are nothing.

    SGLang has been seen to send an error and `[DONE]` without the blank line in between.
    """
    if b"\n" not in frame.data or _is_json(frame.data):
        return (frame,)
    lines = frame.data.split(b"\n")
    return [frame._replace(data=line) for line in lines] if all(map(_is_json, lines)) else (frame,)


def _is_json(data: bytes) -> bool:
    try:
        msgspec.json.decode(data, type=msgspec.Raw)
    except (msgspec.DecodeError, RecursionError):
        return data == b"[DONE]"
    return True


def _fault_of_a_whole(body: bytes) -> str | None:
    """Why a body can not be an answer in one piece; None where it may be one."""
    if body.startswith(b"<"):
        return "the engine answered with a page for people: is a proxy in front of it, or the URL not its API's?"
    if body.startswith((b"data:", b"event:", b":")):
        return "the engine answered with a stream, though none was asked for"
    if b"}\n{" in body.replace(b"\r", b""):
        return "the engine sends JSON line by line, as Ollama's own API does: the URL must be of the one under /v1"
    return None


def _reason(error: BaseException) -> str:
    """What went wrong in words, without what aiohttp says of itself around it."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        error = error.certificate_error
    elif isinstance(error, aiohttp.ClientConnectorError):
        error = error.os_error
    return str(error) or type(error).__name__


class _Exchange:
    """One request and its answer: every wait runs against the call's clocks, every failure has a cause."""

    def __init__(self, backend: str, call: Call, wall_clock: Callable[[], float]) -> None:
        self._backend = backend
        self._call = call
        self._wall_clock = wall_clock
        self._loop = asyncio.get_running_loop()
        now = self._loop.time()
        self._end = min(call.deadline, now + call.timeouts.total_s)
        self._connect_by = now + call.timeouts.connect_s
        self._first_token_by = now + call.timeouts.first_token_s
        self._connection: asyncio.Semaphore | None = None
        self._response: aiohttp.ClientResponse | None = None
        self._scope: asyncio.Timeout | None = None
        self._cut = False
        self._parser = SseParser()
        self._reader = AnswerReader(backend, call, now=wall_clock)
        self._begins_with = b""
        self._has_content = False
        self._said_done = False
        self._at_end = False
        self.is_stream = False

    async def take_connection(self, free: asyncio.Semaphore) -> None:
        """Wait for a connection to be free, to be given back by `hang_up`."""
        try:
            await self._wait(free.acquire(), "connect", self._connect_by)
        except BackendTimeout as error:
            if error.phase != "connect":
                raise
            message = "all connections to the engine are in use"
            raise BackendOverloaded(
                message, backend=self._backend, model=self._call.model, retry_after_s=_BUSY_RETRY_AFTER_S
            ) from error
        self._connection = free

    async def send(
        self,
        session: aiohttp.ClientSession,
        url: yarl.URL,
        body: bytes,
        headers: Mapping[str, str],
        tls: ConnectionSettings,
    ) -> None:
        """Send the request and read the head of the answer. Raises the cause of one that is not 200."""
        phase, until = ("first_token", self._first_token_by) if self._call.request.stream else ("total", self._end)
        pending = session.post(
            url,
            # aiohttp writes a bytes body in one piece, and warns when that holds up the loop.
            data=body if len(body) < _LARGE_BODY_BYTES else io.BytesIO(body),
            headers=headers,
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=None, connect=self._connect_s),
            **tls,
        )
        self._response = response = await self._wait(pending, phase, until)
        if response.status != 200:
            raise await self._refusal(response)
        self._reader.retry_after_s = read_retry_after_s(response.headers, self._wall_clock())
        if self._call.request.stream:
            self.is_stream = await self._begins_as_a_stream()

    async def read_whole(self) -> Event:
        """The answer that comes in one piece."""
        most = MAX_EMBEDDINGS_BYTES if self._call.request.operation == "embeddings" else MAX_ANSWER_BYTES
        body = (self._begins_with + await self._read_body(most, self._end)).strip()
        if (fault := _fault_of_a_whole(body)) is not None:
            raise self._protocol_error(fault)
        if self._call.request.operation != "embeddings":
            return self._reader.read_whole(body)
        if b'"embedding"' not in body:
            self._reader.check_no_error(body)
        return await read_embeddings(body, self._call, self._backend)

    async def next_frames(self) -> list[Frame] | None:
        """The frames that came next; None when the answer is over, by its own word or by the connection's end."""
        if self._said_done:
            await self._drain()
        if self._said_done or self._at_end:
            return None
        try:
            piece = self._begins_with or await self._wait(self._content.readany(), *self._clock())
            self._begins_with = b""
            if piece:
                return [part for frame in self._parser.feed(piece) for part in _apart(frame)]
        except FrameTooLarge as error:
            raise self._protocol_error(f"the engine sent {error}") from error
        except BackendError:
            # What can still come is a usage frame and `[DONE]`: an answer is not lost for want of them.
            if self._reader.is_complete:
                return None
            raise
        self._at_end = True
        return [part for frame in self._parser.close() for part in _apart(frame) if _is_json(part.data)]

    def read_event(self, frame: Frame) -> Event | None:
        """The event in a frame, None for one that carries none (`[DONE]`, an empty keep-alive)."""
        data = frame.data
        if not data.startswith(b"{"):
            data = data.strip()
            if data == b"[DONE]":
                self._said_done = True
        if self._said_done or not data:
            return None
        if frame.event == b"error":
            raise self._reader.error(data)
        event = self._reader.read_frame(data)
        if event is not None and not self._has_content:
            self._has_content = event.has_content
        return event

    def check_complete(self) -> None:
        """Raise unless every choice that began has finished, and all that were asked for or the engine said so."""
        reader = self._reader
        if not reader.begun or reader.begun - reader.finished or not (self._said_done or reader.is_complete):
            raise self._protocol_error("the answer broke off before its finish_reason")

    def closing_event(self) -> Event | None:
        """What is left to tell when all frames are read."""
        return self._reader.closing()

    def hang_up(self) -> None:
        """Close the connection at once, unless the answer was read to its end and the pool has it back."""
        if self._response is not None:
            self._response.close()
        if self._connection is not None:
            self._connection.release()

    def cut(self) -> None:
        """Make the call fail where it waits now, or where it waits next."""
        self._cut = True
        if self._scope is not None:
            self._scope.reschedule(self._loop.time())

    @property
    def _connect_s(self) -> float:
        """What is left of the time to connect, which waiting for a free connection is part of."""
        if self._connection is None:
            return self._call.timeouts.connect_s
        return max(self._connect_by - self._loop.time(), _LEAST_CONNECT_S)

    @property
    def _content(self) -> aiohttp.StreamReader:
        if self._response is None:
            raise AssertionError("an answer is read after its request is sent")
        return self._response.content

    def _clock(self) -> tuple[str, float]:
        """The phase that the next wait belongs to, and when it ends."""
        if not self._has_content:
            return "first_token", self._first_token_by
        idle_s = self._call.timeouts.idle_s
        return "idle", self._loop.time() + (min(idle_s, _TRAILER_S) if self._reader.is_complete else idle_s)

    async def _wait(self, pending: Coroutine[object, object, _T], phase: str, until: float) -> _T:
        """Await `pending` until then at most, and turn what goes wrong into its cause."""
        if until > self._end:
            phase, until = "total", self._end
        try:
            async with asyncio.timeout_at(until) as scope:
                self._scope = scope
                # An engine that never lets us wait would otherwise never meet a clock.
                if self._loop.time() >= until or self._cut:
                    raise TimeoutError
                return await pending
        except TimeoutError as error:
            if self._cut:
                raise self._unreachable("the backend was closed during the call") from error
            if isinstance(error, aiohttp.ClientError):
                phase = "connect"
            message = f"the engine's {phase} time ran out"
            raise BackendTimeout(message, phase=phase, backend=self._backend, model=self._call.model) from error
        except (aiohttp.ClientResponseError, aiohttp.http.HttpProcessingError) as error:
            raise self._protocol_error(f"the engine does not speak HTTP: {_reason(error)}") from error
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            # aiohttp reports a session that was closed under a call as a bare RuntimeError.
            if self._reader.begun:
                raise self._protocol_error(f"the answer broke off: {_reason(error)}") from error
            if isinstance(error.__cause__, aiohttp.http_exceptions.ContentEncodingError):
                raise self._protocol_error("the engine's answer does not unpack") from error
            raise self._unreachable(_reason(error)) from error
        finally:
            self._scope = None
            pending.close()

    async def _begins_as_a_stream(self) -> bool:
        """Whether events follow, by the first bytes: what an engine or a proxy says of its content type is no proof."""
        while not self._begins_with.lstrip():
            piece = await self._wait(self._content.readany(), *self._clock())
            self._begins_with += piece
            if not piece:
                return True
        return self._begins_with.lstrip()[:1] not in (b"{", b"[", b"<")

    async def _read_body(self, max_bytes: int, until: float) -> bytes:
        pieces = []
        size = 0
        while piece := await self._wait(self._content.readany(), "total", until):
            pieces.append(piece)
            size += len(piece)
            if size > max_bytes:
                raise self._too_much(max_bytes)
        return b"".join(pieces)

    async def _drain(self) -> None:
        """Read on to the end of the body, which is at hand as a rule: then the pool gets the connection back."""
        until = self._loop.time() + _LINGER_S
        try:
            await self._read_body(_MAX_ERROR_BYTES, until)
        except BackendError:
            return

    async def _refusal(self, response: aiohttp.ClientResponse) -> BackendError:
        if 300 <= response.status < 400:
            return self._protocol_error(f"the engine answered with a redirect, status {response.status}")
        try:
            body = await self._read_body(_MAX_ERROR_BYTES, self._loop.time() + _ERROR_BODY_S)
        except BackendError:
            body = b""
        return error_by_cause(
            read_error(body),
            response.status if response.status >= 400 else 500,
            backend=self._backend,
            model=self._call.model,
            retry_after_s=read_retry_after_s(response.headers, self._wall_clock()),
        )

    def _too_much(self, max_bytes: int) -> BackendError:
        if self._call.request.operation != "embeddings":
            return self._protocol_error(f"the engine answered more than {max_bytes} bytes")
        # How long this answer is, the request decides: no engine is at fault, and another would say as much.
        return RequestRejected(
            f"'input': the vectors take more than {max_bytes} bytes; send fewer texts at once, or ask for base64",
            code="answer_too_large",
            param="input",
            backend=self._backend,
            model=self._call.model,
        )

    def _protocol_error(self, message: str) -> BackendProtocolError:
        return BackendProtocolError(message, backend=self._backend, model=self._call.model)

    def _unreachable(self, message: str) -> BackendUnreachable:
        return BackendUnreachable(message, backend=self._backend, model=self._call.model)
