"""Entries as the cache tests need them."""

from __future__ import annotations

from typing import Any

import msgspec

from backends.chat import Operation, Usage
from cache.entry import Entry

TEXT = "This is a kept answer."


def completion(operation: Operation = "chat", **choice: Any) -> bytes:
    """A completion of one choice, complete and ordinary but for what `choice` says."""
    said: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
    if operation == "chat":
        said["message"] = {"role": "assistant", "content": TEXT}
    else:
        said["text"] = TEXT
    return msgspec.json.encode({"id": "chatcmpl-original", "created": 1, "model": "small", "choices": [said | choice]})


def entry(text: str = TEXT, **changes: Any) -> Entry:
    kept = Entry(
        operation="chat",
        model="small",
        completion=completion(message={"role": "assistant", "content": text}),
        usage=Usage(prompt_tokens=7, completion_tokens=5, cached_tokens=2, reasoning_tokens=1),
        cost_nano_usd=1234,
        created_at=1_800_000_000.25,
    )
    return msgspec.structs.replace(kept, **changes)
