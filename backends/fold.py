"""A stream and the completion it adds up to are one answer in two shapes; `fold` and `unfold` turn one into the other.

Both are generic over fields they do not know: strings of a delta concatenate, lists extend, objects merge, of anything
else the last word counts. `fold(unfold(completion)) == completion`, and a stream cut into pieces in any other place
folds to the same completion.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from backends.chat import Operation

Json = dict[str, Any]

_SAID_ONCE = frozenset({"role", "id", "type", "name", "index"})
"""Fields inside a delta that engines repeat rather than continue."""
_ON_EVERY_FRAME = frozenset({"id", "object", "created", "model", "service_tier", "system_fingerprint"})
_OBJECTS: Mapping[Operation, tuple[str, str]] = {
    "chat": ("chat.completion", "chat.completion.chunk"),
    "text_completion": ("text_completion", "text_completion"),
    "embeddings": ("list", "list"),  # never streamed, so never folded
}


_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Unfoldable(ValueError):
    """What was to be folded or unfolded is not JSON that a value can stand for, or not of OpenAI's shape."""


def fold(frames: Iterable[bytes], operation: Operation) -> bytes:
    """The completion that the frames of one stream add up to, as JSON; `[DONE]` is not among the frames.

    Usage comes from the last frame that has one, other top-level fields from the first. A choice without a
    finish_reason stays without: whether an answer is complete is the backend's to say. Raises `Unfoldable`.
    """
    answer = _Answer()
    try:
        for frame in frames:
            answer.add(frame)
        return msgspec.json.encode(answer.completion(operation))
    except _UNREADABLE as error:
        raise Unfoldable(str(error)) from error


def unfold(completion: bytes, operation: Operation, include_usage: bool) -> list[bytes]:
    """The frames of a stream that replays `completion`, without `[DONE]`; each kind of content comes in one piece.

    With `include_usage` the usage comes in a last frame without choices and is null in the others, as OpenAI has it.
    Raises `Unfoldable`.
    """
    try:
        return [msgspec.json.encode(frame) for frame in _unfolded(_any.decode(completion), operation, include_usage)]
    except _UNREADABLE as error:
        raise Unfoldable(str(error)) from error


class _Piece(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """What a frame tells of one choice, before the choice's end."""

    index: int = 0
    delta: Json | UnsetType = UNSET
    text: str | UnsetType = UNSET
    logprobs: Json | UnsetType | None = UNSET
    finish_reason: UnsetType | None = UNSET


class _PlainFrame(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """A frame of the kind that a long stream is made of: beside its piece it repeats what the others said."""

    choices: tuple[_Piece]
    id: str | UnsetType = UNSET
    kind: str | UnsetType = msgspec.field(default=UNSET, name="object")
    created: int | UnsetType = UNSET
    model: str | UnsetType = UNSET
    system_fingerprint: str | UnsetType | None = UNSET
    service_tier: str | UnsetType | None = UNSET
    obfuscation: str | UnsetType = UNSET
    usage: UnsetType | None = UNSET

    def shape(self) -> tuple[object, ...]:
        """Equal for two frames of which the second tells nothing new, unless by its delta, text or logprobs.

        Of all other fields the first word counts, so it matters whether they were there, and not what they say.
        """
        [piece] = self.choices
        return (
            piece.index,
            type(self.id),
            type(self.kind),
            type(self.created),
            type(self.model),
            type(self.system_fingerprint),
            type(self.service_tier),
            type(self.obfuscation),
            type(piece.logprobs),
            type(piece.finish_reason),
        )


_plain = msgspec.json.Decoder(_PlainFrame)
_any = msgspec.json.Decoder(Json)


class _Answer:
    """What the frames so far add up to.

    Nearly all frames of a long stream are plain and repeat an earlier one but for their pieces. Those are read with
    a third of the work, and nothing of them is kept but the pieces.
    """

    def __init__(self) -> None:
        self._heads: list[Json] = []
        self._usage: Any = None
        self._choices: dict[int, _Choice] = {}
        self._by_shape: dict[tuple[object, ...], _Choice] = {}

    def add(self, raw: bytes) -> None:
        try:
            plain = _plain.decode(raw)
        except msgspec.ValidationError:
            self._take(raw)
            return
        shape = plain.shape()
        if (choice := self._by_shape.get(shape)) is not None:
            choice.go_on(plain.choices[0])
        else:
            self._take(raw)
            self._by_shape[shape] = self._choices[plain.choices[0].index]

    def _take(self, raw: bytes) -> None:
        """Take a frame with all of its fields, whatever they are."""
        head = _any.decode(raw)
        for piece in _objects(head.pop("choices", None), "choices"):
            index = piece.get("index") or 0
            if not isinstance(index, int):
                raise Unfoldable("a choice whose index is no integer")
            self._choices.setdefault(index, _Choice()).take(piece)
        self._usage = head.pop("usage", None) or self._usage
        self._heads.append(head)

    def completion(self, operation: Operation) -> Json:
        completion = {name: _first(values) for name, values in _columns(self._heads).items()}
        completion["object"] = _OBJECTS[operation][0]
        completion["choices"] = [self._choices[index].whole(index, operation) for index in sorted(self._choices)]
        if self._usage is not None:
            completion["usage"] = self._usage
        return completion


class _Choice:
    """What one choice said, in pieces."""

    __slots__ = ("_deltas", "_fields", "_logprobs", "_texts")

    def __init__(self) -> None:
        self._deltas: list[Any] = []
        self._texts: list[Any] = []
        self._logprobs: list[Any] = []
        self._fields: list[Json] = []

    def take(self, piece: Json) -> None:
        """Take a piece with all of its fields, whatever they are."""
        for name, values in (("delta", self._deltas), ("text", self._texts), ("logprobs", self._logprobs)):
            if name in piece:
                values.append(piece.pop(name))
        self._fields.append(piece)

    def go_on(self, piece: _Piece) -> None:
        """Take a piece that says nothing new but these."""
        if piece.delta is not UNSET:
            self._deltas.append(piece.delta)
        if piece.text is not UNSET:
            self._texts.append(piece.text)
        if piece.logprobs is not UNSET and piece.logprobs is not None:
            self._logprobs.append(piece.logprobs)

    def whole(self, index: int, operation: Operation) -> Json:
        choice: Json = {"index": index}
        if operation == "chat":
            said = _objects([delta for delta in self._deltas if delta is not None], "deltas")
            choice["message"] = {"role": "assistant", "content": None, **_merged(said)}
        for name, values in (("text", self._texts), ("logprobs", self._logprobs)):
            if values:
                choice[name] = _continued(values)
        return choice | {name: _last(values) for name, values in _columns(self._fields).items() if name != "index"}


def _unfolded(completion: Json, operation: Operation, include_usage: bool) -> Iterator[Json]:
    head = completion
    choices = _objects(head.pop("choices", None), "choices")
    usage = head.pop("usage", None)
    head["object"] = _OBJECTS[operation][1]
    shared = {name: value for name, value in head.items() if name in _ON_EVERY_FRAME}
    no_usage = {"usage": None} if include_usage and usage is not None else {}
    first = True
    for choice in choices:
        for piece in _unfold_choice(choice, operation):
            yield {**(head if first else shared), "choices": [piece], **no_usage}
            first = False
    if include_usage and usage is not None:
        yield {**shared, "choices": [], "usage": usage}


def _unfold_choice(choice: Json, operation: Operation) -> Iterator[Json]:
    index = choice.get("index", 0)
    ending = {name: value for name, value in choice.items() if name not in ("message", "text", "logprobs")}
    logprobs = {"logprobs": choice["logprobs"]} if "logprobs" in choice else {}
    silent = dict.fromkeys(logprobs)
    if operation == "text_completion":
        yield {"index": index, "text": choice.get("text", ""), **logprobs, "finish_reason": None}
        yield {**ending, "text": "", **silent}
        return
    message = choice.get("message") or {}
    if not isinstance(message, dict):
        raise Unfoldable("a message that is no object")
    said, content, tool_calls = _parts(message)
    yield {"index": index, "delta": said, **silent, "finish_reason": None}
    if content or logprobs.get("logprobs") is not None:
        yield {"index": index, "delta": content, **logprobs, "finish_reason": None}
    for tool_call in tool_calls:
        yield {"index": index, "delta": {"tool_calls": [tool_call]}, **silent, "finish_reason": None}
    yield {**ending, "delta": {}, **silent}


def _parts(message: Json) -> tuple[Json, Json, list[Json]]:
    """A message as what its first frame says, what the content frame says, and its tool calls in pieces."""
    said, content, tool_calls = {}, {}, []
    for name, value in message.items():
        if name == "tool_calls" and value and _is_list_of_objects(value):
            for position, tool_call in enumerate(value):
                tool_calls += _tool_call_pieces(position, tool_call)
        elif isinstance(value, str) and value and name not in _SAID_ONCE:
            content[name] = value
        else:
            said[name] = value
    return said, content, tool_calls


def _tool_call_pieces(index: int, tool_call: Json) -> list[Json]:
    """The call's name first and its arguments after it, the way clients expect them."""
    function = tool_call.get("function")
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(arguments, str) or not arguments:
        return [{"index": index, **tool_call}]
    return [
        {"index": index, **tool_call, "function": {**function, "arguments": ""}},
        {"index": index, "function": {"arguments": arguments}},
    ]


def _merged(objects: Sequence[Json]) -> Json:
    return {name: _merged_field(name, values) for name, values in _columns(objects).items()}


def _merged_field(name: str, values: Sequence[Any]) -> Any:
    if name in _SAID_ONCE:
        return _first(values)
    if name == "tool_calls" and all(_is_list_of_objects(value) for value in values if value is not None):
        return _fold_tool_calls(values)
    return _continued(values)


def _fold_tool_calls(values: Sequence[Any]) -> list[Json] | None:
    """Tool calls by their `index`; a piece without one continues the call of its `id`, else the last call."""
    calls: dict[int | str, list[Json]] = {}
    last: int | str = ""
    for piece in (piece for value in values if value is not None for piece in value):
        if piece.get("index") is not None:
            last = piece["index"]
        elif piece.get("id"):
            last = piece["id"]
        if not isinstance(last, int | str):
            raise Unfoldable("a tool call whose index or id is neither a number nor a text")
        calls.setdefault(last, []).append({name: value for name, value in piece.items() if name != "index"})
    if not calls and all(value is None for value in values):
        return None
    in_order = sorted(calls, key=lambda index: index if isinstance(index, int) else 0)
    return [_merged(calls[index]) for index in in_order]


def _continued(values: Sequence[Any]) -> Any:
    """What pieces of one field make together."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    if all(isinstance(value, str) for value in present):
        return "".join(present)
    if all(isinstance(value, list) for value in present):
        return [item for value in present for item in value]
    if all(isinstance(value, dict) for value in present):
        return _merged(present)
    return present[-1]


def _columns(objects: Iterable[Json]) -> dict[str, list[Any]]:
    """The values of each field, in order; a field stands where it first came."""
    columns: dict[str, list[Any]] = {}
    for fields in objects:
        for name, value in fields.items():
            columns.setdefault(name, []).append(value)
    return columns


def _objects(value: Any, noun: str) -> list[Json]:
    if value is None:
        return []
    if not _is_list_of_objects(value):
        raise Unfoldable(f"{noun} that are no list of objects")
    objects: list[Json] = value
    return objects


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _first(values: Sequence[Any]) -> Any:
    return next((value for value in values if value is not None), None)


def _last(values: Sequence[Any]) -> Any:
    return _first(values[::-1])
