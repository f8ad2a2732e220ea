"""Reads tool calls out of the text that a model writes: which format, what comes out and when, how to force a call.

What every parser promises, at whatever points the text is cut into pieces:

- Text is handed on as it comes; held back is only what may be the beginning of a marker (at most 13 characters), an
  ending marker of the model's (`<|eot_id|>`, not content at the end of the text), and white space around calls.
- A call begins as soon as its name and the first `{` of its arguments are there. Its arguments are the model's own
  JSON, piece by piece, from that brace to the one that closes it. Translated are only: arguments in a JSON string (what
  the string holds), none or `null` (`{}`), Python and code (see `llama3`).
- What looks like a call but names no offered tool, or is malformed before the call began, comes out as text as it was
  written, its marker included. It is held until that is known, and at most `MAX_HELD_CHARS`; past that it is text.
- Where JSON breaks within the arguments of a call that has begun, what the model wrote up to the next marker follows as
  arguments, so the client sees the model's broken JSON. Where it breaks after they were whole, the rest is text.
- All work is linear in the text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, Protocol

from backends.tool_calls.ending import Ending
from backends.tool_calls.hermes import read_hermes
from backends.tool_calls.llama3 import read_llama3
from backends.tool_calls.mistral import read_mistral
from backends.tool_calls.pieces import CallArguments, CallStart, Piece, Pieces, Text
from backends.tool_calls.source import MAX_HELD_CHARS, Source, Steps

__all__ = [
    "MAX_HELD_CHARS",
    "CallArguments",
    "CallStart",
    "Piece",
    "Text",
    "ToolCallParser",
    "ToolFormat",
    "forced_call_schema",
    "tool_call_parser",
    "tool_format_of",
]

ToolFormat = Literal["hermes", "llama3", "mistral"]

_Read = Callable[[Source, Pieces, Collection[str], bool], Steps[None]]
_READ: Mapping[ToolFormat, _Read] = {"hermes": read_hermes, "llama3": read_llama3, "mistral": read_mistral}
_ENDING: Mapping[ToolFormat, tuple[str, ...]] = {
    "hermes": ("<|im_end|>",),
    "llama3": ("<|eom_id|>", "<|eot_id|>"),
    "mistral": ("</s>",),
}

_OTHER_TOOL_CALLS = ("<function=", "<arg_key>", "<tool_sep>")
"""What models write within `<tool_call>` that is no JSON: Qwen3-Coder, GLM 4.5, Hunyuan."""

_LLAMA_TOOL_CALLS = ('"parameters"', "func_name1(")
"""What templates of Llama models say where they ask for a call: in JSON, in Python."""


class ToolCallParser(Protocol):
    """One answer's parser. Fed the text as it arrives, at any split; returns pieces as early as they are certain."""

    def feed(self, text: str) -> list[Piece]: ...

    def close(self) -> list[Piece]:
        """The text is over: what was held back, resolved. Nothing is fed after it."""
        ...

    @property
    def found(self) -> bool:
        """Whether any call was found."""
        ...


def tool_call_parser(
    format: ToolFormat,  # noqa: A002  # the field's word
    *,
    names: Collection[str],
    fresh_id: Callable[[], str],
    forced: bool = False,
) -> ToolCallParser:
    """The parser of one answer. `names` are the offered tools; `fresh_id` is called once for each call that begins.

    `forced`: the answer was decoded under `forced_call_schema`, so a call's bare JSON may stand at its beginning.
    """
    pieces = Pieces(fresh_id)
    source = Source()
    return _Parser(Ending(_ENDING[format]), source, pieces, _READ[format](source, pieces, frozenset(names), forced))


class _Parser:
    def __init__(self, ending: Ending, source: Source, pieces: Pieces, steps: Steps[None]) -> None:
        self._ending = ending
        self._source = source
        self._pieces = pieces
        self._steps = steps
        next(self._steps)

    def feed(self, text: str) -> list[Piece]:
        text = self._ending.feed(text)
        if not text:
            return []
        self._source.add(text)
        next(self._steps)
        return self._pieces.taken()

    def close(self) -> list[Piece]:
        self._source.add(self._ending.close())
        self._source.end()
        for _ in self._steps:
            raise AssertionError("waits for more text after its end")
        self._pieces.end()
        return self._pieces.taken()

    @property
    def found(self) -> bool:
        return self._pieces.calls > 0


def tool_format_of(template_source: str) -> ToolFormat | None:
    """The format that a chat template's text teaches its model; None where it is none of these or teaches no calls."""
    if "<tool_call>" in template_source:
        return None if any(other in template_source for other in _OTHER_TOOL_CALLS) else "hermes"
    if "[TOOL_CALLS]" in template_source:
        return "mistral"
    if "<|python_tag|>" in template_source:
        return "llama3"
    llama = "<|start_header_id|>" in template_source
    return "llama3" if llama and any(taught in template_source for taught in _LLAMA_TOOL_CALLS) else None


def forced_call_schema(
    tools: Sequence[Mapping[str, Any]],
    *,
    name: str | None,
    format: ToolFormat,  # noqa: A002
) -> dict[str, Any]:
    """The JSON schema of exactly one call, its name written first: of the tool `name`, or of any one.

    `tools` are OpenAI's (`{"type": "function", "function": {...}}`). A tool's own `$ref`s lead where they led. Raises
    ValueError where there is no such tool, or a tool's schema is nested too deep to follow.
    """
    functions = [tool["function"] for tool in tools if name is None or tool["function"]["name"] == name]
    if not functions:
        raise ValueError("no such tool" if tools else "no tools")
    key = "parameters" if format == "llama3" else "arguments"
    definitions: dict[str, Any] = {}
    calls = [_call_schema(function, key, definitions) for function in functions]
    schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return {**schema, "$defs": definitions} if definitions else schema


def _call_schema(function: Mapping[str, Any], key: str, definitions: dict[str, Any]) -> dict[str, Any]:
    name = function["name"]
    parameters = function.get("parameters") or {"type": "object"}
    pointer = "#/$defs/" + name.replace("~", "~0").replace("/", "~1")
    try:
        moved = _with_moved_references(parameters, pointer)
    except RecursionError as error:
        raise ValueError(f"the parameters of {name} are nested too deep") from error
    if moved != parameters:
        definitions[name] = moved
        moved = {"$ref": pointer}
    return {
        "type": "object",
        "properties": {"name": {"type": "string", "enum": [name]}, key: moved},
        "required": ["name", key],
        "additionalProperties": False,
    }


def _with_moved_references(schema: Any, pointer: str) -> Any:
    """`schema` for a place at `pointer`: its references to its own root (`#`, `#/$defs/x`) start from there."""
    if isinstance(schema, Mapping):
        return {
            key: pointer + value[1:]
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _with_moved_references(value, pointer)
            for key, value in schema.items()
        }
    if isinstance(schema, list):
        return [_with_moved_references(item, pointer) for item in schema]
    return schema
