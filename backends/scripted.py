"""A backend that plays a script instead of a model: for tests, demonstrations and load measurements.

It keeps the contract of `Backend` to the letter, its clocks and its failures included, and counts what happened to it.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Literal

import anyio
import msgspec

from backends.backend import Call, Load
from backends.catalog import Capability
from backends.chat import Event, Usage, parse_event
from backends.embeddings import Input, each_input, to_base64
from backends.errors import (
    BackendError,
    BackendFailed,
    BackendOverloaded,
    BackendProtocolError,
    BackendRefusedCredentials,
    BackendTimeout,
    BackendUnreachable,
    RequestRejected,
)
from backends.fold import fold

Fault = Literal[
    "none",
    "unreachable",
    "overloaded",
    "error",
    "refused",
    "reject",
    "hang",
    "truncate",
    "garbage",
    "midstream_error",
    "reset",
]

CREATED = 1_700_000_000
"""`created` of every scripted answer: a script gives the same bytes each time it is played."""

_DIMENSIONS = 8
"""Of an embedding whose length the client does not choose."""

_WORDS = re.compile(r"\S+\s*|\s+")
_BYTES_PER_TOKEN = 4


class Script(msgspec.Struct, frozen=True, kw_only=True):
    """What is answered, how fast, and what goes wrong. Delays are seconds of real time."""

    tokens: tuple[str, ...] = ("This ", "is ", "a ", "scripted ", "answer.")
    first_token_delay_s: float = 0.0
    token_delay_s: float = 0.0
    fault: Fault = "none"
    fault_after_tokens: int = 0
    """How many tokens come before the fault. An answer that is not streamed fails as late, and shows none of them."""
    retry_after_s: float | None = None
    """With `overloaded`: the engine's own word."""
    finish_reason: str = "stop"
    reasoning: tuple[str, ...] = ()
    tool_calls: tuple[dict[str, object], ...] = ()
    """Whole tool calls as OpenAI writes them (`id`, `type`, `function`)."""
    logprobs: bool = False
    echo: bool = False
    """Answer with the JSON of the request's fields, as one token, instead of `tokens`."""
    prompt_tokens: int | None = None
    """Default: one token per 4 bytes of the request's body."""
    cached_tokens: int = 0
    reports_usage: bool = True


def tokens_of(answer: str) -> tuple[str, ...]:
    """The words of `answer`, each with the space behind it, as a script's tokens."""
    return tuple(_WORDS.findall(answer))


class ScriptedBackend:
    """A `Backend` that plays `script`, or what `script` makes of each call.

    `script` may be replaced between calls. `calls` counts answers begun, `cancelled` those given up by their consumer,
    `events` what was yielded; `last` is the last call.
    """

    def __init__(self, name: str, script: Script | Callable[[Call], Script] | None = None) -> None:
        self._name = name
        self.script = Script() if script is None else script
        self.calls = 0
        self.cancelled = 0
        self.events = 0
        self.in_flight = 0
        self.last: Call | None = None
        self.closed = False

    @property
    def name(self) -> str:
        return self._name

    @property
    def load(self) -> Load:
        return Load(in_flight=self.in_flight)

    @property
    def capabilities(self) -> frozenset[Capability] | None:
        return None

    async def answer(self, call: Call) -> AsyncGenerator[Event, None]:
        """See `Backend.answer`."""
        script = self.script(call) if callable(self.script) else self.script
        self.calls += 1
        self.in_flight += 1
        self.last = call
        clock = _Clock(self._name, call, asyncio.get_running_loop())
        try:
            if self.closed:
                raise BackendUnreachable("the backend is closed", backend=self._name, model=call.model)
            frames = []
            for step in _steps(call, script, self._name):
                if not isinstance(step, bytes):
                    await clock.pass_time(step)
                elif call.request.stream:
                    event = parse_event(step)
                    self.events += 1
                    yield event
                    clock.saw(event)
                else:
                    frames.append(step)
            if not call.request.stream:
                self.events += 1
                yield parse_event(_whole(call, script, frames), whole=True)
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            self.in_flight -= 1

    async def run(self) -> None:
        return None

    async def check(self, *, within_s: float) -> None:
        if self.closed or (not callable(self.script) and self.script.fault == "unreachable"):
            raise BackendUnreachable("scripted to be unreachable", backend=self._name)

    async def aclose(self) -> None:
        self.closed = True


class _Clock:
    """Real time, with the call's phases in it."""

    def __init__(self, backend: str, call: Call, loop: asyncio.AbstractEventLoop) -> None:
        self._backend = backend
        self._call = call
        self._loop = loop
        now = loop.time()
        self._end = min(call.deadline, now + call.timeouts.total_s)
        self._first_token_by: float | None = now + call.timeouts.first_token_s if call.request.stream else None

    def saw(self, event: Event) -> None:
        if event.has_content:
            self._first_token_by = None

    async def pass_time(self, delay_s: float) -> None:
        """Let `delay_s` go by, or raise the `BackendTimeout` that comes first."""
        now = self._loop.time()
        phase, until = "total", self._end
        if self._first_token_by is not None:
            phase, until = min((phase, until), ("first_token", self._first_token_by), key=lambda clock: clock[1])
        elif self._call.request.stream:
            idle = now + self._call.timeouts.idle_s
            phase, until = min((phase, until), ("idle", idle), key=lambda clock: clock[1])
        if now + delay_s < until:
            if delay_s > 0:
                await anyio.sleep(delay_s)
            return
        await anyio.sleep(max(until - now, 0))
        message = f"the scripted engine's {phase} time ran out"
        raise BackendTimeout(message, phase=phase, backend=self._backend, model=self._call.model)


def _steps(call: Call, script: Script, backend: str) -> Iterator[float | bytes]:
    """The performance: seconds to wait, or a frame of the stream. Raises the script's fault in its place."""
    request = call.request
    tokens = (msgspec.json.encode(request.fields).decode(),) if script.echo else script.tokens
    finish_reason = "tool_calls" if script.tool_calls and script.finish_reason == "stop" else script.finish_reason
    if request.max_tokens is not None and request.max_tokens < len(tokens):
        tokens, finish_reason = tokens[: request.max_tokens], "length"
    fault_at = None if script.fault == "none" else min(script.fault_after_tokens, len(tokens))
    writer = _Writer(call, script)

    yield script.first_token_delay_s
    if fault_at != 0:
        yield from writer.opening()
    for position, token in enumerate(tokens):
        if position == fault_at:
            break
        if position:
            yield script.token_delay_s
        yield from writer.token(token)
    if fault_at is not None:
        if script.fault == "hang":
            yield float("inf")
        raise _failure(script, backend, call.model)
    yield from writer.closing(finish_reason, len(tokens))


def _failure(script: Script, backend: str, model: str) -> BackendError:
    message = f"scripted fault: {script.fault}"
    match script.fault:
        case "unreachable":
            return BackendUnreachable(message, backend=backend, model=model)
        case "reset" if script.fault_after_tokens == 0:
            return BackendUnreachable(message, backend=backend, model=model)
        case "overloaded":
            return BackendOverloaded(message, backend=backend, model=model, retry_after_s=script.retry_after_s)
        case "error" | "midstream_error":
            return BackendFailed(message, backend=backend, model=model)
        case "refused":
            return BackendRefusedCredentials(message, backend=backend, model=model)
        case "reject":
            return RequestRejected(message, code="scripted", backend=backend, model=model)
        case _:
            return BackendProtocolError(message, backend=backend, model=model)


def _whole(call: Call, script: Script, frames: list[bytes]) -> bytes:
    if call.request.operation != "embeddings":
        return fold(frames, call.request.operation)
    inputs = each_input(msgspec.json.decode(call.request.fields["input"], type=Input))
    vectors = [_vector(each, call.request.dimensions or _DIMENSIONS) for each in inputs]
    usage = _Writer(call, script).usage(0)
    return msgspec.json.encode(
        {
            "object": "list",
            "data": [
                {
                    "object": "embedding",
                    "index": index,
                    "embedding": to_base64(vector) if call.request.encoding_format == "base64" else vector,
                }
                for index, vector in enumerate(vectors)
            ],
            "model": call.model,
            "usage": {name: usage[name] for name in ("prompt_tokens", "total_tokens")},
        }
    )


def _vector(text: str | list[int], dimensions: int) -> list[float]:
    """Numbers that depend on nothing but the text, in a vector of length 1."""
    numbers = [byte - 127.5 for byte in hashlib.shake_128(msgspec.json.encode(text)).digest(dimensions)]
    length = math.hypot(*numbers)
    return [number / length for number in numbers]


class _Writer:
    """Writes the frames of one scripted stream."""

    def __init__(self, call: Call, script: Script) -> None:
        self._call = call
        self._script = script
        self._is_chat = call.request.operation == "chat"

    def opening(self) -> Iterator[bytes]:
        if self._is_chat:
            yield from self._each({"delta": {"role": "assistant", "content": ""}})
            for token in self._script.reasoning:
                yield from self._each({"delta": {"reasoning_content": token}})

    def token(self, token: str) -> Iterator[bytes]:
        if not self._is_chat:
            yield from self._each({"text": token})
        elif self._script.logprobs:
            entry = {"token": token, "logprob": -0.5, "bytes": list(token.encode()), "top_logprobs": []}
            yield from self._each({"delta": {"content": token}, "logprobs": {"content": [entry]}})
        else:
            yield from self._each({"delta": {"content": token}})

    def closing(self, finish_reason: str, completion_tokens: int) -> Iterator[bytes]:
        if self._is_chat:
            for index, tool_call in enumerate(self._script.tool_calls):
                yield from self._each({"delta": {"tool_calls": [{"index": index, **tool_call}]}})
        ending: dict[str, object] = {"delta": {}} if self._is_chat else {"text": ""}
        yield from self._each({**ending, "finish_reason": finish_reason})
        if self._script.reports_usage:
            yield self._frame([], usage=self.usage(completion_tokens + len(self._script.reasoning)))

    def usage(self, tokens_per_choice: int) -> dict[str, object]:
        request, script = self._call.request, self._script
        prompt_tokens = script.prompt_tokens
        if prompt_tokens is None:
            prompt_tokens = -(-request.size_bytes // _BYTES_PER_TOKEN)
        usage = Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=tokens_per_choice * request.n,
            cached_tokens=script.cached_tokens,
            reasoning_tokens=len(script.reasoning) * request.n,
        )
        return {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        }

    def _each(self, choice: dict[str, object]) -> Iterator[bytes]:
        for index in range(self._call.request.n):
            yield self._frame([{"index": index, "logprobs": None, "finish_reason": None, **choice}])

    def _frame(self, choices: list[dict[str, object]], **more: object) -> bytes:
        return msgspec.json.encode(
            {
                "id": f"chatcmpl-{self._call.request_id}" if self._is_chat else f"cmpl-{self._call.request_id}",
                "object": "chat.completion.chunk" if self._is_chat else "text_completion",
                "created": CREATED,
                "model": self._call.model,
                "choices": choices,
                **more,
            }
        )
