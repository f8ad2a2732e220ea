"""The text as far as it has come: a cursor that waits where the text runs out.

A format is a generator over a `Source`: it takes what it can decide on and calls `more` where it cannot. What it leaves
untaken at that point is put before the next piece of text, so it must be short (a marker cut in two, at most): then
all work is linear in the text, whatever its pieces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from typing import TypeVar

_T = TypeVar("_T")
Steps = Generator[None, None, _T]
"""Reads on, pausing where the text runs out, to a result."""

MAX_HELD_CHARS = 4 * 1024 * 1024
"""How much can be held of what may yet be a call. Engines end an answer far below it: 128k tokens are some 500 kB."""

_SPACE = re.compile(r"\s*+")


class Broken(Exception):
    """What was being read is not what it looked like. The cursor stands at the first character that does not fit."""


class Source:
    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self._ended = False
        self._held: list[str] = []
        self._held_chars = 0
        self._tap: Callable[[str], None] | None = None

    def add(self, piece: str) -> None:
        self.text = self.text[self.at :] + piece
        self.at = 0

    def end(self) -> None:
        self._ended = True

    def more(self) -> Steps[bool]:
        """Waits for more text; False where there will be none."""
        if self._ended:
            return False
        yield
        return not self._ended

    def take(self, end: int) -> str:
        """The text from the cursor to `end`, where the cursor then stands. Raises Broken where too much is held."""
        taken = self.text[self.at : end]
        self.at = end
        if self._tap is not None and taken:
            self._tap(taken)
        return taken

    # What may be a call, or may have to be given back as it was written.

    def hold(self) -> None:
        """Remember what is taken from here on."""
        self._held = []
        self._held_chars = 0
        self._tap = self._hold

    def drop(self) -> None:
        """Forget it, as where it was a call."""
        self._held = []
        self._tap = None

    def give_back(self, to: Callable[[str], None]) -> None:
        """It was none: hand what was held to `to`."""
        held = "".join(self._held)
        self.drop()
        to(held)

    def follow(self, to: Callable[[str], None]) -> None:
        """Hand what is taken from here on to `to`, until `drop`."""
        self._tap = to

    def _hold(self, taken: str) -> None:
        self._held.append(taken)
        self._held_chars += len(taken)
        if self._held_chars > MAX_HELD_CHARS:
            raise Broken

    # What to read.

    def character(self) -> Steps[str]:
        """The next character, not yet taken; empty at the end."""
        while self.at == len(self.text):
            if not (yield from self.more()):
                return ""
        return self.text[self.at]

    def space(self, to: Callable[[str], None] | None = None) -> Steps[str]:
        """Takes white space, handed to `to`; the first character after it, not yet taken, or empty at the end."""
        while (first := (yield from self.character())).isspace():
            taken = self.take(end_of(_SPACE, self.text, self.at))
            if to is not None:
                to(taken)
        return first

    def symbol(self, allowed: str) -> Steps[str]:
        """Takes white space and one character of `allowed`. Raises Broken."""
        found = yield from self.space()
        if not found or found not in allowed:
            raise Broken
        self.take(self.at + 1)
        return found

    def begins(self, marker: str) -> Steps[bool]:
        """Whether `marker` is next, not yet taken; waits only while it still may be."""
        while not self.text.startswith(marker, self.at):
            if not marker.startswith(self.text[self.at : self.at + len(marker)]) or not (yield from self.more()):
                return False
        return True

    def take_if(self, marker: str) -> Steps[bool]:
        """Takes `marker` where it is next."""
        found = yield from self.begins(marker)
        if found:
            self.take(self.at + len(marker))
        return found

    def word(self, pattern: re.Pattern[str], longest: int) -> Steps[str]:
        """Takes characters of `pattern` (possessive, of single characters). Raises Broken past `longest` of them."""
        taken: list[str] = []
        size = 0
        while (yield from self.character()):
            end = end_of(pattern, self.text, self.at)
            if end == self.at:
                break
            size += end - self.at
            if size > longest:
                raise Broken
            taken.append(self.take(end))
        return "".join(taken)


def end_of(pattern: re.Pattern[str], text: str, at: int) -> int:
    """The end of what `pattern` matches in `text` at `at`; `at` where it matches nothing."""
    found = pattern.match(text, at)
    return found.end() if found else at


class Markers:
    """Strings that end plain text."""

    def __init__(self, *markers: str) -> None:
        self._whole = re.compile("|".join(map(re.escape, markers)))
        self._first = re.compile("[" + re.escape("".join({marker[0] for marker in markers})) + "]")
        self._begun = frozenset(marker[:size] for marker in markers for size in range(1, len(marker)))
        self._longest_begun = max(map(len, markers)) - 1

    def find(self, text: str, at: int) -> tuple[int, str]:
        """Where the next marker begins, and it. An empty one where none does: the text up to there is plain."""
        if self._first.search(text, at) is None:
            return len(text), ""
        if found := self._whole.search(text, at):
            return found.start(), found.group()
        start = max(at, len(text) - self._longest_begun)
        while begun := self._first.search(text, start):
            if text[begun.start() :] in self._begun:
                return begun.start(), ""
            start = begun.end()
        return len(text), ""


def plain(source: Source, markers: Markers, to: Callable[[str], None]) -> Steps[str]:
    """Hands text to `to` up to a marker, which it returns untaken; empty at the end of the text.

    Held back is at most what may be the beginning of a marker.
    """
    while True:
        start, marker = markers.find(source.text, source.at)
        if start > source.at:
            to(source.take(start))
        if marker:
            return marker
        if not (yield from source.more()):
            to(source.take(len(source.text)))
            return ""
