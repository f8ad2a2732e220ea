"""Any engine that speaks OpenAI's protocol over HTTP: vLLM, trtllm-serve, SGLang, llama.cpp, TGI, hosted APIs.

A frame is relayed as the bytes it came in, once it is complete and its JSON parses: the usual SDKs end a truncated
stream without an error, so a relay of raw bytes would turn a dead engine into a silently short answer.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import TypeVar

import aiohttp
import msgspec
import yarl

from backends.backend import Call, Load
from backends.catalog import Capability
from backends.chat import ChatRequest, Event, parse_event
from backends.embeddings import read_embeddings
from backends.errors import BackendError, BackendProtocolError, BackendTimeout, BackendUnreachable
from backends.openai_errors import error_by_cause, read_error, read_retry_after_s
from backends.sse import Frame, FrameTooLarge, SseParser

MAX_ANSWER_BYTES = 32 * 1024 * 1024
"""The largest answer that is not streamed: 100k tokens with 20 log probabilities each stay below it."""

_MAX_ERROR_BYTES = 64 * 1024
_KEEP_ALIVE_S = 4.0
"""Below the 5 s after which uvicorn (vLLM) and llama.cpp close an idle connection, so that we never send into one."""
_ERROR_BODY_S = 2.0
_TRAILER_S = 1.0
"""How long an answer whose choices have all finished is waited on for its usage frame and `[DONE]`."""
_LINGER_S = 0.05
"""How long the end of the HTTP body is waited on after `[DONE]`, to give the connection back instead of closing it."""
_LARGE_BODY_BYTES = 512 * 1024

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
    engine calls the model, where that is not the name it has here. `api_key` is sent as a bearer token, `headers` with
    every request; nothing that a client sent as a header is ever forwarded. `check` asks for `health_url`, by default
    the engine's list of models. `wall_clock` gives Unix time, for `retry-after` dates. Raises ValueError for a bad URL.
    """

    def __init__(
        self,
        name: str,
        base_url: str,
        *,
        session: aiohttp.ClientSession | None = None,
        upstream_model: str | None = None,
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        health_url: str | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        base = base_url.rstrip("/")
        self._name = name
        self._urls = {
            "chat": yarl.URL(f"{base}/chat/completions"),
            "text_completion": yarl.URL(f"{base}/completions"),
            "embeddings": yarl.URL(f"{base}/embeddings"),
        }
        self._health_url = yarl.URL(health_url or f"{base}/models")
        if not self._health_url.is_absolute() or self._health_url.scheme not in ("http", "https"):
            raise ValueError(f"backend {name}: {base_url!r} is no http(s) URL")
        self._upstream_model = upstream_model
        # Decoding a compressed stream holds frames back until the compressor's block is full.
        self._headers = {"User-Agent": "forebay", "Accept-Encoding": "identity"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._headers |= headers or {}
        self._session = session
        self._owns_session = session is None
        self._wall_clock = wall_clock
        self._exchanges: set[_Exchange] = set()
        self._closed = False

    @property
    def name(self) -> str:
        return self._name

    @property
    def load(self) -> Load:
        return Load(in_flight=len(self._exchanges))

    @property
    def capabilities(self) -> frozenset[Capability] | None:
        return None

    async def answer(self, call: Call) -> AsyncGenerator[Event, None]:
        """See `Backend.answer`. A JSON answer to a request for a stream comes as one `whole` event."""
        exchange = _Exchange(self._name, call, self._wall_clock)
        self._exchanges.add(exchange)
        try:
            await exchange.send(
                self._session_now(call.model),
                self._urls[call.request.operation],
                _body(call.request, self._upstream_model or call.model),
                {**self._headers, "Content-Type": "application/json", "X-Request-Id": call.request_id},
            )
            if not exchange.is_stream:
                yield await exchange.read_whole()
                return
            while (frames := await exchange.next_frames()) is not None:
                for frame in frames:
                    if (event := exchange.read_event(frame)) is not None:
                        yield event
            exchange.check_complete()
        finally:
            self._exchanges.discard(exchange)
            exchange.hang_up()

    async def run(self) -> None:
        return None

    async def check(self, *, within_s: float) -> None:
        """Return when the engine answers at its health address; an engine that has no such address is taken as well."""
        session = self._session_now("")
        try:
            async with (
                asyncio.timeout(within_s),
                session.get(self._health_url, headers=self._headers, allow_redirects=False) as response,
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


def _is_json(data: bytes) -> bool:
    try:
        msgspec.json.decode(data, type=msgspec.Raw)
    except msgspec.DecodeError:
        return data == b"[DONE]"
    return True


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__


class _ErrorFrame(msgspec.Struct, frozen=True):
    error: object = None


class _Exchange:
    """One request and its answer: every wait runs against the call's clocks, every failure has a cause."""

    def __init__(self, backend: str, call: Call, wall_clock: Callable[[], float]) -> None:
        self._backend = backend
        self._call = call
        self._wall_clock = wall_clock
        self._loop = asyncio.get_running_loop()
        now = self._loop.time()
        self._end = min(call.deadline, now + call.timeouts.total_s)
        self._first_token_by = now + call.timeouts.first_token_s
        self._response: aiohttp.ClientResponse | None = None
        self._scope: asyncio.Timeout | None = None
        self._cut = False
        self._parser = SseParser()
        self._begun: set[int] = set()
        self._finished: set[int] = set()
        self._has_content = False
        self._said_done = False
        self._at_end = False
        self.is_stream = False

    async def send(
        self, session: aiohttp.ClientSession, url: yarl.URL, body: bytes, headers: Mapping[str, str]
    ) -> None:
        """Send the request and read the head of the answer. Raises the cause of one that is not 200."""
        phase, until = ("first_token", self._first_token_by) if self._call.request.stream else ("total", self._end)
        pending = session.post(
            url,
            # aiohttp writes a bytes body in one piece, and warns when that holds up the loop.
            data=body if len(body) < _LARGE_BODY_BYTES else io.BytesIO(body),
            headers=headers,
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=None, connect=self._call.timeouts.connect_s),
        )
        self._response = response = await self._wait(pending, phase, until)
        if response.status != 200:
            raise await self._refusal(response)
        self.is_stream = self._call.request.stream and "json" not in response.headers.get("Content-Type", "")

    async def read_whole(self) -> Event:
        """The answer that comes in one piece."""
        body = await self._read_body(MAX_ANSWER_BYTES, self._end)
        event = self._parse(body, whole=True)
        if self._call.request.operation == "embeddings":
            return await read_embeddings(body, self._call, self._backend)
        if not event.choices:
            raise self._protocol_error("the engine answered without a choice")
        return event

    async def next_frames(self) -> list[Frame] | None:
        """The frames that came next; None when the answer is over, by its own word or by the connection's end."""
        if self._said_done:
            await self._drain()
        if self._said_done or self._at_end:
            return None
        try:
            piece = await self._wait(self._content.readany(), *self._clock())
            if piece:
                return self._parser.feed(piece)
        except FrameTooLarge as error:
            raise self._protocol_error(f"the engine sent {error}") from error
        except BackendError:
            # What can still come is a usage frame and `[DONE]`: an answer is not lost for want of them.
            if self._is_complete:
                return None
            raise
        self._at_end = True
        return [frame for frame in self._parser.close() if _is_json(frame.data)]

    def read_event(self, frame: Frame) -> Event | None:
        """The event in a frame, None for one that carries none (`[DONE]`, an empty keep-alive)."""
        if frame.data == b"[DONE]":
            self._said_done = True
        if self._said_done or not frame.data:
            return None
        event = self._parse(frame.data, is_error=frame.event == b"error")
        for choice in event.choices:
            self._begun.add(choice.index)
            if choice.finish_reason is not None:
                self._finished.add(choice.index)
        if not self._has_content:
            self._has_content = event.has_content
        return event

    def check_complete(self) -> None:
        """Raise unless every choice that began has finished, and one did."""
        if not self._begun or self._begun - self._finished:
            raise self._protocol_error("the answer broke off before its finish_reason")

    def hang_up(self) -> None:
        """Close the connection at once, unless the answer was read to its end and the pool has it back."""
        if self._response is not None:
            self._response.close()

    def cut(self) -> None:
        """Make the call fail where it waits now, or where it waits next."""
        self._cut = True
        if self._scope is not None:
            self._scope.reschedule(self._loop.time())

    @property
    def _content(self) -> aiohttp.StreamReader:
        if self._response is None:
            raise AssertionError("an answer is read after its request is sent")
        return self._response.content

    @property
    def _is_complete(self) -> bool:
        """Whether every choice that was asked for has finished."""
        return len(self._finished) >= max(self._call.request.n, len(self._begun))

    def _clock(self) -> tuple[str, float]:
        """The phase that the next wait belongs to, and when it ends."""
        if not self._has_content:
            return "first_token", self._first_token_by
        idle_s = self._call.timeouts.idle_s
        return "idle", self._loop.time() + (min(idle_s, _TRAILER_S) if self._is_complete else idle_s)

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
            if self._begun:
                raise self._protocol_error(f"the answer broke off: {_reason(error)}") from error
            raise self._unreachable(_reason(error)) from error
        finally:
            self._scope = None
            pending.close()

    async def _read_body(self, max_bytes: int, until: float) -> bytes:
        pieces = []
        size = 0
        while piece := await self._wait(self._content.readany(), "total", until):
            pieces.append(piece)
            size += len(piece)
            if size > max_bytes:
                raise self._protocol_error(f"the engine answered more than {max_bytes} bytes")
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

    def _parse(self, raw: bytes, *, whole: bool = False, is_error: bool = False) -> Event:
        try:
            if is_error or (b'"error"' in raw and msgspec.json.decode(raw, type=_ErrorFrame).error is not None):
                raise error_by_cause(read_error(raw), None, backend=self._backend, model=self._call.model)
            if not raw.isascii():
                raw.decode()  # msgspec does not look into the strings that it skips
            return parse_event(raw, whole=whole)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._protocol_error(f"the engine sent what is not OpenAI's JSON: {error}") from error

    def _protocol_error(self, message: str) -> BackendProtocolError:
        return BackendProtocolError(message, backend=self._backend, model=self._call.model)

    def _unreachable(self, message: str) -> BackendUnreachable:
        return BackendUnreachable(message, backend=self._backend, model=self._call.model)
