"""An answer as a reader of the pieces sees it, and the pieces checked for what always holds."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from backends.tool_calls.parser import CallArguments, CallStart, Piece, Text, ToolFormat, tool_call_parser

NAMES = ("get_weather", "f", "brave_search")


class Call(NamedTuple):
    name: str
    arguments: str

    @property
    def value(self) -> Any:
        return json.loads(self.arguments, strict=False)


class Answer(NamedTuple):
    text: str
    calls: list[Call]
    """In the order of their indices, which is that of their beginning."""


def pieces_of(
    format_: ToolFormat,
    fed: Iterable[str],
    *,
    names: Iterable[str] = NAMES,
    forced: bool = False,
) -> list[Piece]:
    numbers = itertools.count()
    parser = tool_call_parser(format_, names=list(names), fresh_id=lambda: f"call_{next(numbers)}", forced=forced)
    pieces = [piece for text in fed for piece in parser.feed(text)] + parser.close()
    assert parser.close() == []
    assert parser.found == any(isinstance(piece, CallStart) for piece in pieces)
    return pieces


def put_together(pieces: Iterable[Piece]) -> Answer:
    """Checks that indices count from 0 and that every call's pieces come in one go, after its start."""
    text: list[str] = []
    calls: list[Call] = []
    current: int | None = None
    for piece in pieces:
        match piece:
            case Text():
                assert piece.text
                text.append(piece.text)
                current = None
            case CallStart():
                assert (piece.index, piece.id) == (len(calls), f"call_{len(calls)}")
                calls.append(Call(piece.name, ""))
                current = piece.index
            case CallArguments():
                assert piece.text
                assert piece.index == current
                calls[-1] = Call(calls[-1].name, calls[-1].arguments + piece.text)
    return Answer("".join(text), calls)


def read(
    format_: ToolFormat,
    text: str,
    *,
    names: Iterable[str] = NAMES,
    forced: bool = False,
) -> Answer:
    """The answer fed whole, which is the same as fed character by character."""
    whole = put_together(pieces_of(format_, [text], names=names, forced=forced))
    assert put_together(pieces_of(format_, text, names=names, forced=forced)) == whole
    return whole


def cut(text: str, cuts: Iterable[int]) -> list[str]:
    at = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(at)]
