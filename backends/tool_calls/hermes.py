"""Hermes 2 and 3, Qwen 2.5 and 3: text, and in it `<tool_call>` + a JSON object + `</tool_call>`, any number of times.

After what those models' chat templates ask for: `{"name": <function-name>, "arguments": <args-json-object>}` within
the tags. A thought (`<think>`, which Qwen 3 begins with) is text to its end: what it says about calls is not one. A
closing tag that is missing is not missed, be it at the end of the text or before the next call. What stands between a
call's JSON and its closing tag is text, unless it is white space.
"""

from __future__ import annotations

from collections.abc import Collection

from backends.tool_calls.call_object import CallObject, Outcome
from backends.tool_calls.pieces import Pieces
from backends.tool_calls.source import Markers, Source, Steps, plain

_OPEN = "<tool_call>"
_CLOSE = "</tool_call>"
_THOUGHT = "<think>"
_THOUGHT_END = "</think>"


def read_hermes(source: Source, pieces: Pieces, names: Collection[str], forced: bool) -> Steps[None]:
    in_thought = Markers(_THOUGHT_END)
    in_text = Markers(_OPEN)
    in_call = Markers(_OPEN, _CLOSE)
    if (yield from source.space(pieces.text)) == "{" and forced:
        source.hold()
        yield from _object(source, pieces, names, in_call)
    if (yield from source.take_if(_THOUGHT)):
        pieces.text(_THOUGHT)
        yield from plain(source, in_thought, pieces.text)
    while (yield from plain(source, in_text, pieces.text)):
        yield from _call(source, pieces, names, in_call)


def _call(source: Source, pieces: Pieces, names: Collection[str], in_call: Markers) -> Steps[None]:
    source.hold()
    yield from source.take_if(_OPEN)
    if (yield from _object(source, pieces, names, in_call)) is Outcome.TEXT:
        return
    space: list[str] = []
    yield from source.space(space.append)
    if not (yield from source.take_if(_CLOSE)):
        pieces.text("".join(space))
        if (yield from plain(source, in_call, pieces.text)) == _CLOSE:
            yield from source.take_if(_CLOSE)


def _object(source: Source, pieces: Pieces, names: Collection[str], in_call: Markers) -> Steps[Outcome]:
    outcome = yield from CallObject(source, pieces, names).read()
    if outcome is Outcome.CUT:
        yield from plain(source, in_call, pieces.arguments)
    return outcome
