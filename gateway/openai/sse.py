"""Writes an answer as server-sent events, and owns how it ends.

An answer ends with `[DONE]`, or with an error event and without it. It never just stops: the OpenAI SDKs take a stream
that breaks off for a finished one.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from backends.chat import Event, Operation
from backends.fold import unfold
from gateway.errors import Rendered

DONE = b"data: [DONE]\n\n"

_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


def frames(events: Sequence[Event], operation: Operation, *, include_usage: bool) -> bytes:
    """The bytes of these events on the wire: as they came in, but for usage that the client did not ask for."""
    return b"".join([_frame(event, operation, include_usage) for event in events])


def error_frame(error: Rendered) -> bytes:
    """The event that ends a stream which failed after it had begun."""
    return b"data: " + error.body() + b"\n\n"


def _frame(event: Event, operation: Operation, include_usage: bool) -> bytes:
    if event.whole:
        return b"".join(
            [b"data: " + frame + b"\n\n" for frame in unfold(event.raw, operation, include_usage=include_usage)]
        )
    raw = event.raw
    if event.usage is not None and not include_usage:
        if event.is_usage_only:
            return b""
        raw = _without_usage(raw)
    if b"\n" in raw or b"\r" in raw:
        raw = msgspec.json.encode(msgspec.json.decode(raw))
    return b"data: " + raw + b"\n\n"


def _without_usage(raw: bytes) -> bytes:
    fields = _fields.decode(raw)
    fields.pop("usage", None)
    return msgspec.json.encode(fields)
