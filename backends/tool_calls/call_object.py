"""One call written as a JSON object, `{"name": ..., "arguments": ...}`, read while it arrives.

Its name is told once the first character of its arguments is seen, the arguments while they come. Arguments that come
before the name are held until it. Of a member written twice the first counts; members that mean nothing here are left
out (an `id` of the model's own).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from enum import Enum, auto

from backends.tool_calls.json_scanner import STRING, read_json
from backends.tool_calls.pieces import Pieces
from backends.tool_calls.source import Broken, Source, Steps, end_of

_ARGUMENTS = ("arguments", "parameters")
_SURROGATE = re.compile("[\ud800-\udfff]")


class Outcome(Enum):
    CALL = auto()
    """A call; what comes next is none of it. It may have broken after its arguments were whole."""
    CUT = auto()
    """A call whose arguments broke at the cursor: what comes next is more of them, as far as the format can tell."""
    TEXT = auto()
    """No call of an offered tool. What had been held is given back; so is the rest of the object, where it is one."""


class CallObject:
    """Reads one object at the cursor. What may have to be given back with it is held by the caller beforehand.

    `only_calls`: an object with a member that no call has is not one, as where nothing else marks a call.
    """

    def __init__(self, source: Source, pieces: Pieces, names: Collection[str], *, only_calls: bool = False) -> None:
        self._source = source
        self._pieces = pieces
        self._names = names
        self._only_calls = only_calls
        self._name: str | None = None
        self._early: list[str] = []
        self._met_arguments = False
        self._in_arguments = False
        self._started = False
        self._refused = False

    def read(self) -> Steps[Outcome]:
        try:
            yield from self._members()
            if self._name is None:
                raise Broken
        except Broken:
            return self._broken()
        if not self._started:
            self._start(self._name)
            self._pieces.arguments("{}")
        return Outcome.CALL

    def _broken(self) -> Outcome:
        if self._started:
            return Outcome.CUT if self._in_arguments else Outcome.CALL
        if self._refused:
            self._source.drop()
        else:
            self._source.give_back(self._pieces.text)
        return Outcome.TEXT

    def _members(self) -> Steps[None]:
        yield from self._source.symbol("{")
        if (yield from self._source.space()) == "}":
            raise Broken
        while True:
            key = yield from self._string()
            yield from self._source.symbol(":")
            yield from self._member(key)
            if (yield from self._source.symbol(",}")) == "}":
                return

    def _member(self, key: str) -> Steps[None]:
        first = yield from self._source.space()
        names_tool = key == "name" or (key == "function" and first == '"')
        if names_tool and self._name is None and not self._refused:
            self._named((yield from self._string()))
        elif key in _ARGUMENTS and not self._met_arguments and not self._refused:
            self._met_arguments = True
            yield from self._arguments(first)
        else:
            if self._only_calls and not (self._started or names_tool or key in (*_ARGUMENTS, "type", "id")):
                self._refuse()
            yield from read_json(self._source, _nowhere)

    def _named(self, name: str) -> None:
        if name not in self._names:
            self._refuse()
            return
        self._name = name
        if self._early:
            self._start(name)
            self._pieces.arguments("".join(self._early))
            self._early.clear()

    def _refuse(self) -> None:
        """It is no call: the rest is read on as JSON, so that nothing within its strings is taken for markers."""
        if not self._refused:
            self._refused = True
            self._name = None
            self._source.give_back(self._pieces.text)
            self._source.follow(self._pieces.text)

    def _start(self, name: str) -> None:
        self._started = True
        self._source.drop()
        self._pieces.start(name)

    def _arguments(self, first: str) -> Steps[None]:
        if first == "{":
            self._in_arguments = True
            yield from read_json(self._source, self._sink())
            self._in_arguments = False
        elif first == '"':
            yield from self._quoted_arguments()
        else:
            written: list[str] = []
            yield from read_json(self._source, written.append)
            if "".join(written) != "null":
                raise Broken

    def _sink(self) -> Callable[[str], None]:
        if self._name is None:
            return self._early.append
        self._start(self._name)
        return self._pieces.arguments

    def _quoted_arguments(self) -> Steps[None]:
        """A JSON string that holds the arguments' JSON: handed on unescaped."""
        self._source.take(self._source.at + 1)
        unquoted = _Unquoted(self._sink)
        if (yield from self._source.character()) == "{":
            unquoted.begin()
        try:
            yield from read_json(self._source, unquoted.feed, in_string=True)
        except Broken:
            self._in_arguments = self._started
            raise
        unquoted.end()

    def _string(self) -> Steps[str]:
        if (yield from self._source.space()) != '"':
            raise Broken
        written: list[str] = []
        yield from read_json(self._source, written.append)
        text: str = json.loads("".join(written), strict=False)
        return text


class _Unquoted:
    """The JSON within a JSON string, unescaped while it arrives.

    `where` is asked where to hand it once its first `{` is seen; for an empty string and `null` it is not.
    """

    def __init__(self, where: Callable[[], Callable[[str], None]]) -> None:
        self._where = where
        self._to: Callable[[str], None] | None = None
        self._before = ""
        self._half_pair = ""

    def begin(self) -> None:
        """It does hold an object."""
        self._to = self._where()

    def feed(self, escaped: str) -> None:
        """More of the string, no escape cut in two, at last its closing quote.

        Raises Broken where it holds no object.
        """
        end = end_of(STRING, escaped, 0)
        self._unescaped(self._unescape(self._half_pair + escaped[:end]))
        if escaped[end:] != '"':
            self._unescaped(escaped[end:])

    def end(self) -> None:
        """Raises Broken as `feed` does."""
        self._unescaped(self._half_pair)
        if self._to is None and self._before not in ("", "null"):
            raise Broken

    def _unescaped(self, text: str) -> None:
        if self._to is None:
            text = (self._before + text).lstrip()
            self._before = text.rstrip()
            if text.startswith("{"):
                self.begin()
            elif not "null".startswith(self._before):
                raise Broken
        if self._to is not None:
            self._to(text)

    def _unescape(self, escaped: str) -> str:
        """A surrogate pair may be cut in two: its first half waits. Half a pair alone stays the escape it was."""
        text: str = json.loads(f'"{escaped}"', strict=False)
        self._half_pair = ""
        if text and "\ud800" <= text[-1] <= "\udbff" and escaped[-6:-4] == "\\u":
            self._half_pair = escaped[-6:]
            text = text[:-1]
        return _SURROGATE.sub(lambda half: f"\\u{ord(half.group()):04x}", text)


def _nowhere(_: str) -> None:
    """Where JSON goes that nobody asked for."""
