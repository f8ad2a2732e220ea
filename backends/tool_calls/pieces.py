"""What a model's answer is taken apart into: text for the reader, and tool calls."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import msgspec


class Text(msgspec.Struct, frozen=True):
    """Ordinary content, as the model wrote it."""

    text: str


class CallStart(msgspec.Struct, frozen=True):
    """A tool call begins. `index` counts an answer's calls from 0; `name` is one of the offered tools."""

    index: int
    id: str
    name: str


class CallArguments(msgspec.Struct, frozen=True):
    """The next piece of a call's arguments. None of another kind comes between a call's pieces."""

    index: int
    text: str


Piece = Text | CallStart | CallArguments


class Pieces:
    """Collects what a format finds until it is asked for.

    White space before the first call, between calls and after the last is kept back until what follows is known, and is
    content only where text follows, or where there was no call at all.
    """

    def __init__(self, fresh_id: Callable[[], str]) -> None:
        self._fresh_id = fresh_id
        self._found: list[Piece] = []
        self._calls = 0
        self._space: list[str] = []
        self._in_text = False

    @property
    def calls(self) -> int:
        """How many calls have begun."""
        return self._calls

    def text(self, text: str) -> None:
        if not self._in_text:
            begins = len(text) - len(text.lstrip())
            if begins == len(text):
                self._space.append(text)
                return
            text = "".join((*self._space, text))
            self._space.clear()
            self._in_text = True
        if text:
            self._found.append(Text(text))

    def start(self, name: str) -> None:
        self._space.clear()
        self._in_text = False
        self._found.append(CallStart(self._calls, self._fresh_id(), name))
        self._calls += 1

    def arguments(self, text: str) -> None:
        """More of the call that began last."""
        if text:
            self._found.append(CallArguments(self._calls - 1, text))

    def end(self) -> None:
        """The text is over."""
        space = "".join(self._space)
        self._space.clear()
        if space and not self._calls:
            self._found.append(Text(space))

    def taken(self) -> list[Piece]:
        """What was found since the last time."""
        found, self._found = self._found, []
        return found if len(found) < 2 else _joined(found)


def _joined(found: list[Piece]) -> list[Piece]:
    """Neighbours of one kind as one piece."""
    joined: list[Piece] = []
    for kind, group in itertools.groupby(found, type):
        pieces = list(group)
        if kind is CallStart:
            joined += pieces
        else:
            text = "".join(piece.text for piece in pieces if not isinstance(piece, CallStart))
            joined.append(msgspec.structs.replace(pieces[0], text=text))
    return joined
