"""A llama.cpp server, and what it does otherwise than other engines that speak OpenAI's protocol.

- It goes on to the end of an answer that is not streamed although its client has left (10 s of computing were seen; a
  stream stops within 2 ms). So every answer is asked for as a stream, and folded where the client wants it whole.
- It closes a connection after a stream without announcing it. So no connection is used twice.
- With a chat template of ours, chat is asked of its plain completions and told as chat again.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from typing import Any

import aiohttp
import msgspec

from backends.backend import Call, Load
from backends.catalog import Capability
from backends.chat import ChatRequest, Event, parse_event
from backends.errors import BackendProtocolError, RequestRejected
from backends.fold import Unfoldable, fold
from backends.openai_http import OpenAIBackend
from backends.templates import ChatTemplate, TemplateFailed, template_messages

Json = dict[str, Any]

_CHAT_ONLY = (
    "messages",
    "max_completion_tokens",
    "top_logprobs",
    "response_format",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "functions",
    "function_call",
)
"""Fields of a chat request that a plain completion does not have, each translated or refused."""


class LlamaCppBackend:
    """A `Backend` for the llama.cpp server at `url` (with or without `/v1`).

    Without `chat_template` the engine renders messages itself, by the template in its weights. With one, messages
    become a prompt here, `stop` is added to the client's stop sequences, and what a plain completion cannot do (tools,
    images) is rejected by name; a `response_format` becomes the engine's own `json_schema`. Its load is read from its
    own metrics, where it was started with `--metrics`.

    For `n` above 1 llama.cpp reports the tokens of one choice only: put a `FanOut` with `max_n=1` in front of it.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        session: aiohttp.ClientSession | None = None,
        chat_template: ChatTemplate | None = None,
        stop: Sequence[str] = (),
        metrics_note: Callable[[bool, str], None] | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        root = url.rstrip("/").removesuffix("/v1")
        self._engine = OpenAIBackend(
            name,
            f"{root}/v1",
            session=session,
            headers={"Connection": "close"},
            health_url=f"{root}/health",
            metrics_url=f"{root}/metrics",
            metrics_note=metrics_note,
            wall_clock=wall_clock,
        )
        self._template = chat_template
        self._stop = tuple(stop)

    @property
    def name(self) -> str:
        return self._engine.name

    @property
    def load(self) -> Load:
        return self._engine.load

    @property
    def capabilities(self) -> frozenset[Capability] | None:
        return self._engine.capabilities

    async def answer(self, call: Call) -> AsyncGenerator[Event, None]:
        """See `Backend.answer`."""
        request = call.request
        asked = call if request.stream or request.operation == "embeddings" else _as_stream(call)
        telling = None
        if self._template is not None and request.operation == "chat":
            telling = _ChatTelling(call, self.name)
            asked = msgspec.structs.replace(asked, request=self._as_completion(asked, self._template))
        frames = []
        async with aclosing(self._engine.answer(asked)) as events:
            async for event in events:
                for told in [event] if telling is None else telling.tell(event):
                    if request.stream or told.whole:
                        yield told
                    else:
                        frames.append(told.raw)
        if frames:
            yield parse_event(self._folded(frames, call), whole=True)

    def _folded(self, frames: list[bytes], call: Call) -> bytes:
        try:
            return fold(frames, call.request.operation)
        except Unfoldable as error:
            raise BackendProtocolError(str(error), backend=self.name, model=call.model) from error

    async def run(self) -> None:
        await self._engine.run()

    async def check(self, *, within_s: float) -> None:
        await self._engine.check(within_s=within_s)

    async def aclose(self) -> None:
        await self._engine.aclose()

    def _as_completion(self, call: Call, template: ChatTemplate) -> ChatRequest:
        request = call.request
        if request.wants_tools:
            raise self._rejected(call, "this model cannot call tools", "tools")
        if request.has_images:
            raise self._rejected(call, "this model takes text only", "messages")
        try:
            prompt = template.render(template_messages(request))
        except TemplateFailed as error:
            raise self._rejected(call, str(error), "messages") from error
        changes: Json = dict.fromkeys(_CHAT_ONLY)
        changes |= {
            "prompt": prompt,
            "max_tokens": request.max_tokens,
            "stop": [*_stop(request), *self._stop] or None,
            "json_schema": self._json_schema(call),
            "logprobs": max(_top_logprobs(request), 1) if request.wants_logprobs else None,
        }
        return msgspec.structs.replace(
            request, operation="text_completion", prompt=prompt, messages=(), fields=request.with_fields(**changes)
        )

    def _json_schema(self, call: Call) -> Json | None:
        wanted = _field(call.request, "response_format")
        match wanted:
            case None | {"type": "text"}:
                given = _field(call.request, "json_schema")
                return given if isinstance(given, dict) else None
            case {"type": "json_object"}:
                return {"type": "object"}
            case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
                return schema
        raise self._rejected(call, "this model cannot answer in that format", "response_format")

    def _rejected(self, call: Call, message: str, param: str) -> RequestRejected:
        return RequestRejected(
            message, param=param, error_type="invalid_request_error", backend=self.name, model=call.model
        )


def _as_stream(call: Call) -> Call:
    """The same call as a stream, on the clocks of an answer that is not one."""
    request = msgspec.structs.replace(call.request, stream=True, fields=call.request.with_fields(stream=True))
    timeouts = msgspec.structs.replace(call.timeouts, first_token_s=math.inf, idle_s=math.inf)
    return msgspec.structs.replace(call, request=request, timeouts=timeouts)


class _ChatTelling:
    """Tells the events of a text completion as those of a chat."""

    def __init__(self, call: Call, backend: str) -> None:
        self._model = call.model
        self._backend = backend
        self._top_logprobs = _top_logprobs(call.request)
        self._begun: set[int] = set()

    def tell(self, event: Event) -> Iterator[Event]:
        head = msgspec.json.decode(event.raw, type=Json)
        head |= {"object": "chat.completion.chunk", "model": self._model}
        choices = head.pop("choices", None) or ()
        new = [choice.index for choice in event.choices if choice.index not in self._begun]
        if new:
            self._begun.update(new)
            opening = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            yield self._event({**head, "choices": [{"index": index, **opening} for index in new], "usage": None})
        yield self._event({**head, "choices": [self._choice(choice) for choice in choices]})

    def _choice(self, choice: Json) -> Json:
        text = choice.pop("text", None)
        delta = {"content": text} if text else {}
        return {**choice, "delta": delta, "logprobs": self._logprobs(choice.get("logprobs"))}

    def _logprobs(self, logprobs: Json | None) -> Json | None:
        if not logprobs:
            return None
        entries = logprobs["content"] if "content" in logprobs else _as_chat_logprobs(logprobs)
        return {"content": [self._bounded(entry) for entry in entries or ()]}

    def _bounded(self, entry: Json) -> Json:
        """The entry with as many alternatives as were asked for: the engine is never asked for less than one."""
        return {**entry, "top_logprobs": (entry.get("top_logprobs") or [])[: self._top_logprobs]}

    def _event(self, frame: Json) -> Event:
        try:
            return parse_event(msgspec.json.encode(frame))
        except msgspec.DecodeError as error:
            message = f"the completion cannot be told as chat: {error}"
            raise BackendProtocolError(message, backend=self._backend, model=self._model) from error


def _as_chat_logprobs(logprobs: Json) -> list[Json]:
    """Log probabilities from the shape of text completions (parallel lists) in that of chat (a list of tokens)."""
    tops = logprobs.get("top_logprobs") or [{}] * len(logprobs["tokens"])
    return [
        {
            **_as_chat_logprob(token, logprob),
            "top_logprobs": [_as_chat_logprob(*alternative) for alternative in (top or {}).items()],
        }
        for token, logprob, top in zip(logprobs["tokens"], logprobs["token_logprobs"], tops, strict=False)
    ]


def _as_chat_logprob(token: str, logprob: float) -> Json:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def _field(request: ChatRequest, name: str) -> Any:
    raw = request.fields.get(name)
    return None if raw is None else msgspec.json.decode(raw)


def _stop(request: ChatRequest) -> list[str]:
    stop = _field(request, "stop")
    return [stop] if isinstance(stop, str) else list(stop or ())


def _top_logprobs(request: ChatRequest) -> int:
    return _field(request, "top_logprobs") or 0
