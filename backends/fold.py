"""A stream and the completion it adds up to are one answer in two shapes; `fold` and `unfold` turn one into the other.

Both are generic over fields they do not know: strings of a delta concatenate, lists extend, objects merge, of anything
else the last word counts. `fold(unfold(completion)) == completion`, and a stream cut into pieces in any other place
folds to the same completion.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from backends.chat import Operation

Json = dict[str, Any]

_SAID_ONCE = frozenset({"role", "id", "type", "name", "index"})
"""Fields inside a delta that engines repeat rather than continue."""
_ON_EVERY_FRAME = frozenset({"id", "object", "created", "model", "service_tier", "system_fingerprint"})
_OBJECTS: Mapping[Operation, tuple[str, str]] = {
    "chat": ("chat.completion", "chat.completion.chunk"),
    "text_completion": ("text_completion", "text_completion"),
}


def fold(frames: Iterable[bytes], operation: Operation) -> bytes:
    """The completion that the frames of one stream add up to, as JSON; `[DONE]` is not among the frames.

    Usage comes from the last frame that has one, other top-level fields from the first. A choice without a
    finish_reason stays without: whether an answer is complete is the backend's to say. Raises `msgspec.DecodeError`.
    """
    heads = []
    usage = None
    pieces: dict[int, list[Json]] = {}
    for frame in frames:
        head = msgspec.json.decode(frame, type=Json)
        for choice in head.pop("choices", None) or ():
            pieces.setdefault(choice.get("index") or 0, []).append(choice)
        usage = head.pop("usage", None) or usage
        heads.append(head)
    completion = {name: _first(values) for name, values in _columns(heads).items()}
    completion["object"] = _OBJECTS[operation][0]
    completion["choices"] = [_fold_choice(pieces[index], operation) for index in sorted(pieces)]
    if usage is not None:
        completion["usage"] = usage
    return msgspec.json.encode(completion)


def unfold(completion: bytes, operation: Operation, include_usage: bool) -> list[bytes]:
    """The frames of a stream that replays `completion`, without `[DONE]`; each kind of content comes in one piece.

    With `include_usage` the usage comes in a last frame without choices and is null in the others, as OpenAI has it.
    Raises `msgspec.DecodeError`.
    """
    head = msgspec.json.decode(completion, type=Json)
    choices = head.pop("choices", None) or []
    usage = head.pop("usage", None)
    head["object"] = _OBJECTS[operation][1]
    shared = {name: value for name, value in head.items() if name in _ON_EVERY_FRAME}
    no_usage = {"usage": None} if include_usage and usage is not None else {}
    frames: list[Json] = []
    for choice in choices:
        for piece in _unfold_choice(choice, operation):
            frames.append({**(shared if frames else head), "choices": [piece], **no_usage})
    if include_usage and usage is not None:
        frames.append({**shared, "choices": [], "usage": usage})
    return [msgspec.json.encode(frame) for frame in frames]


def _fold_choice(pieces: Sequence[Json], operation: Operation) -> Json:
    columns = _columns(pieces)
    deltas = [delta for delta in columns.pop("delta", ()) if delta is not None]
    choice: Json = {}
    for name, values in columns.items():
        choice[name] = _continued(values) if name in ("text", "logprobs") else _last(values)
    choice.setdefault("index", 0)
    if operation == "chat":
        choice["message"] = {"role": "assistant", "content": None, **_merged(deltas)}
    return choice


def _unfold_choice(choice: Json, operation: Operation) -> Iterable[Json]:
    index = choice.get("index", 0)
    ending = {name: value for name, value in choice.items() if name not in ("message", "text", "logprobs")}
    logprobs = {"logprobs": choice["logprobs"]} if "logprobs" in choice else {}
    silent = dict.fromkeys(logprobs)
    if operation == "text_completion":
        yield {"index": index, "text": choice.get("text", ""), **logprobs, "finish_reason": None}
        yield {**ending, "text": "", **silent}
        return
    said, content, tool_calls = _parts(choice.get("message") or {})
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


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _first(values: Sequence[Any]) -> Any:
    return next((value for value in values if value is not None), None)


def _last(values: Sequence[Any]) -> Any:
    return _first(values[::-1])
