"""Calls as the gateway makes them, and what came of one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import aclosing
from typing import Any

import msgspec

from backends.backend import Backend, Call, Timeouts
from backends.chat import ChatRequest, Event, Message, Operation
from backends.fold import fold

MODEL = "small"


def make_request(operation: Operation = "chat", **fields: Any) -> ChatRequest:
    """A `ChatRequest` whose view agrees with `fields`."""
    said: dict[str, Any] = {"model": MODEL}
    if operation == "chat":
        said["messages"] = [{"role": "user", "content": "Say hello."}]
    elif operation == "embeddings":
        said["input"] = "Say hello."
    else:
        said["prompt"] = "Say hello."
    said |= fields
    body = msgspec.json.encode(said)
    return ChatRequest(
        operation=operation,
        model=said["model"],
        fields=msgspec.json.decode(body, type=dict[str, msgspec.Raw]),
        messages=msgspec.json.decode(msgspec.json.encode(said.get("messages", ())), type=tuple[Message, ...]),
        prompt=said.get("prompt") if isinstance(said.get("prompt"), str) else None,
        prompts=len(said["prompt"]) if isinstance(said.get("prompt"), list) else 1,
        inputs=len(said["input"]) if isinstance(said.get("input"), list) else 1,
        encoding_format=said.get("encoding_format", "float"),
        dimensions=said.get("dimensions"),
        stream=said.get("stream", False),
        include_usage=said.get("stream_options", {}).get("include_usage", False),
        n=said.get("n", 1),
        seed=said.get("seed"),
        max_tokens=said.get("max_tokens"),
        temperature=said.get("temperature"),
        wants_tools="tools" in said,
        wants_json_schema="response_format" in said,
        wants_logprobs=bool(said.get("logprobs")),
        size_bytes=len(body),
    )


def make_call(
    operation: Operation = "chat", *, within_s: float = 5.0, timeouts: Timeouts | None = None, **fields: Any
) -> Call:
    return Call(
        request=make_request(operation, **fields),
        model=MODEL,
        request_id="req-1",
        deadline=asyncio.get_running_loop().time() + within_s,
        timeouts=timeouts or Timeouts(),
    )


async def collect(backend: Backend, call: Call) -> list[Event]:
    events: list[Event] = []
    await collect_into(events, backend, call)
    return events


async def collect_into(seen: list[Event], backend: Backend, call: Call) -> None:
    """`collect` for an answer that may fail: `seen` keeps what came before."""
    async with aclosing(backend.answer(call)) as events:
        async for event in events:
            seen.append(event)


def whole_of(events: Iterable[Event], operation: Operation = "chat") -> dict[str, Any]:
    """The completion that the events make, streamed or not."""
    events = list(events)
    raw = events[0].raw if events[0].whole else fold([event.raw for event in events], operation)
    return msgspec.json.decode(raw, type=dict[str, Any])


def texts_of(events: Iterable[Event], operation: Operation = "chat") -> list[str]:
    choices = whole_of(events, operation)["choices"]
    return [choice["message"]["content"] if operation == "chat" else choice["text"] for choice in choices]
