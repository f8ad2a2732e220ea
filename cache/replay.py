"""How a kept answer is told again: as one body or as a stream, with a fresh id and everything else as it was."""

from __future__ import annotations

import msgspec

from backends.chat import ChatRequest, Event, parse_event
from backends.fold import unfold
from cache.entry import Entry

_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


class Replay:
    """The events of a kept answer, in the shape that was asked for. Read like a `Follower`."""

    __slots__ = ("_events",)

    def __init__(self, entry: Entry, request: ChatRequest, fresh_id: str) -> None:
        fields = _fields.decode(entry.completion)
        if entry.operation != "embeddings" or "id" in fields:  # OpenAI's have none, vLLM's do
            fields["id"] = msgspec.Raw(msgspec.json.encode(fresh_id))
        completion = msgspec.json.encode(fields)
        if request.stream:
            frames = unfold(completion, entry.operation, include_usage=request.include_usage)
            self._events = [parse_event(frame) for frame in frames]
        else:
            self._events = [parse_event(completion, whole=True)]

    async def take(self) -> list[Event]:
        """Every event the first time, none after that."""
        events, self._events = self._events, []
        return events

    def leave(self) -> None:
        self._events = []
