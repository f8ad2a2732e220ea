"""Mistral: `[TOOL_CALLS]`, then a JSON array of calls, or one call as its name and its arguments.

The array, `[TOOL_CALLS] [{"name": ..., "arguments": ...}, ...]`, is what tokenizers up to v7 write; v11 writes
`[TOOL_CALLS]name[CALL_ID]id[ARGS]{...}`, v13 `[TOOL_CALLS]name[ARGS]{...}`, and an engine that leaves out the last
marker `[TOOL_CALLS]name{...}`. An id of the model's own is left out. Brackets and commas of an array belong to the call
that follows them: they are given back with it where it is none.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from backends.tool_calls.call_object import CallObject, Outcome
from backends.tool_calls.json_scanner import read_json
from backends.tool_calls.pieces import Pieces
from backends.tool_calls.source import Broken, Markers, Source, Steps, plain

_CALLS = "[TOOL_CALLS]"
_CALL_ID = "[CALL_ID]"
_ARGUMENTS = "[ARGS]"
_NAME = re.compile(r"[^\s()\[\]{}<>\"',=]*+")
_LONGEST_ID = 64
"""Characters. Mistral's own have 9."""


def read_mistral(source: Source, pieces: Pieces, names: Collection[str], forced: bool) -> Steps[None]:
    markers = Markers(_CALLS)
    first = yield from source.space(pieces.text)
    if forced and first in ("[", "{") and not (yield from source.begins(_CALLS)):
        source.hold()
        yield from _objects(source, pieces, names, markers)
    while (yield from plain(source, markers, pieces.text)):
        source.hold()
        yield from source.take_if(_CALLS)
        try:
            if (yield from source.space()) in ("[", "{"):
                yield from _objects(source, pieces, names, markers)
            else:
                yield from _named(source, pieces, names, markers)
        except Broken:
            source.give_back(pieces.text)


def _objects(source: Source, pieces: Pieces, names: Collection[str], markers: Markers) -> Steps[None]:
    """An array of calls, or one alone. With what comes before it held."""
    in_array = yield from source.take_if("[")
    while True:
        outcome = yield from CallObject(source, pieces, names).read()
        if outcome is Outcome.CUT:
            yield from plain(source, markers, pieces.arguments)
        if not in_array:
            return
        source.hold()
        try:
            more = (yield from source.symbol(",]")) == ","
        except Broken:
            source.give_back(pieces.text)
            return
        if not more:
            source.give_back(_nowhere if outcome is Outcome.CALL else pieces.text)
            return


def _named(source: Source, pieces: Pieces, names: Collection[str], markers: Markers) -> Steps[None]:
    """A call as its name and its arguments. With what comes before it held; raises Broken where it is none."""
    name = yield from source.word(_NAME, max(map(len, names), default=0))
    if (yield from source.take_if(_CALL_ID)):
        yield from source.word(_NAME, _LONGEST_ID)
    yield from source.take_if(_ARGUMENTS)
    if (yield from source.space()) != "{":
        raise Broken
    to = pieces.text
    if name in names:
        source.drop()
        pieces.start(name)
        to = pieces.arguments
    else:
        source.give_back(pieces.text)
    try:
        yield from read_json(source, to)
    except Broken:
        yield from plain(source, markers, to)


def _nowhere(_: str) -> None:
    """Where the brackets of an array of calls go."""
