"""What is kept of an answer, and which answers are never kept."""

from __future__ import annotations

import zlib

import msgspec

from backends.chat import Event, Operation, Usage, parse_event
from policies.cache_policy import ExactCachePolicy

ENTRY_VERSION = 1


class Entry(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One complete answer, as OpenAI JSON, with what its replay must say about it."""

    version: int = ENTRY_VERSION
    operation: Operation
    model: str
    completion: bytes
    usage: Usage
    cost_nano_usd: int
    """What the answer cost when it was made: what a hit saves."""
    created_at: float
    """Unix time, seconds."""


_CRC_BYTES = 4
_entries = msgspec.msgpack.Decoder(Entry)
_encode = msgspec.msgpack.Encoder().encode


def dump_entry(entry: Entry) -> bytes:
    """The entry as it is kept: a CRC-32 of 4 bytes, then MessagePack."""
    packed = _encode(entry)
    return zlib.crc32(packed).to_bytes(_CRC_BYTES, "big") + packed


def load_entry(stored: bytes) -> Entry | None:
    """The entry, or None for bytes that are not one of this version, whole and unchanged: to a reader both are a miss.

    A completion that was damaged would decode, so the checksum is what keeps it from being served.
    """
    packed = stored[_CRC_BYTES:]
    if stored[:_CRC_BYTES] != zlib.crc32(packed).to_bytes(_CRC_BYTES, "big"):
        return None
    try:
        entry = _entries.decode(packed)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return entry if entry.version == ENTRY_VERSION else None


def why_not_stored(completion: bytes, policy: ExactCachePolicy, operation: Operation = "chat") -> str | None:
    """The reason an answer must not be kept, or None where it may.

    Only a complete, ordinary answer may: every choice ended by itself, nothing was refused or cut. And only one whose
    every field can be read, since a replay takes it apart: relaying it did not look beyond what Forebay decides on.
    Embeddings have nothing of this to tell; their backend has seen to it that they are whole.
    """
    if len(completion) > policy.max_entry_bytes:
        return "too_large"
    try:
        msgspec.json.decode(completion)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return "unreadable"
    if operation == "embeddings":
        return None
    event = parse_event(completion, whole=True)
    if not event.choices:
        return "no_choices"
    for choice in event.choices:
        if choice.finish_reason == "tool_calls":
            if not policy.store_tool_calls:
                return "tool_calls"
        elif choice.finish_reason != "stop":
            return f"finish_reason_{choice.finish_reason or 'missing'}"
        if choice.message is not None and choice.message.refusal:
            return "refusal"
    return None if _says_something(event) else "empty"


def _says_something(event: Event) -> bool:
    return any(choice.text or (choice.message is not None and choice.message.has_content) for choice in event.choices)
