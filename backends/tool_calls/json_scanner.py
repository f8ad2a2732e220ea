"""Where a JSON value ends, found while it arrives: each character is looked at once, nothing is kept but the nesting.

RFC 8259, with one liberty: control characters may stand in a string as they are, because models write line breaks
so, and what they meant is plain.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

from backends.tool_calls.source import Broken, Source, Steps, end_of

_Expects = Literal["value", "value or ]", "key or }", "key", "colon", "next", "string", "atom", "nothing"]

_SPACE = re.compile(r"[ \t\n\r]*+")
STRING = re.compile(r'(?:[^"\\]++|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*+')
"""The inside of a string, up to its closing quote, what cannot stand in it, or an escape that is not whole."""
_ESCAPE_BEGUN = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")
_ATOM_PART = re.compile(r"[-+.0-9A-Za-z]*+")
_ATOM = re.compile(r"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][-+]?[0-9]++)?|true|false|null")
_ATOM_BEGINS = frozenset("-0123456789tfn")


class NotJson(ValueError):
    """The text at `at` cannot go on the value that came before it."""

    def __init__(self, at: int) -> None:
        super().__init__(f"not JSON at {at}")
        self.at = at


class JsonScanner:
    """Scans one value, from its first character (or white space before it); with `in_string` from after its quote."""

    def __init__(self, *, in_string: bool = False) -> None:
        self._expects: _Expects = "string" if in_string else "value"
        self._closing: list[str] = []
        self._in_key = False
        self._atom: list[str] = []

    @property
    def done(self) -> bool:
        return self._expects == "nothing"

    def scan(self, text: str, at: int) -> int:
        """The end of what belongs to the value in `text` from `at` on. Raises NotJson.

        What is left over though the value is not `done` is the beginning of an escape, cut in two by the text's end.
        """
        while at < len(text) and not self.done:
            if self._expects == "string":
                end = self._string(text, at)
                if end == at:
                    break
                at = end
            elif self._expects == "atom":
                at = self._rest_of_atom(text, at)
            else:
                at = end_of(_SPACE, text, at)
                if at < len(text):
                    at = self._structure(text[at], at)
        return at

    def _string(self, text: str, at: int) -> int:
        end = end_of(STRING, text, at)
        if end == len(text) or _ESCAPE_BEGUN.fullmatch(text, end):
            return end
        if text[end] != '"':
            raise NotJson(end)
        if self._in_key:
            self._in_key = False
            self._expects = "colon"
        else:
            self._value_ended()
        return end + 1

    def _rest_of_atom(self, text: str, at: int) -> int:
        end = end_of(_ATOM_PART, text, at)
        self._atom.append(text[at:end])
        if end < len(text):
            if not _ATOM.fullmatch("".join(self._atom)):
                raise NotJson(end)
            self._atom.clear()
            self._value_ended()
        return end

    def _structure(self, character: str, at: int) -> int:
        expects = self._expects
        if self._closing and character == self._closing[-1] and expects in ("next", "value or ]", "key or }"):
            self._closing.pop()
            self._value_ended()
        elif expects in ("value", "value or ]"):
            return self._value(character, at)
        elif expects in ("key", "key or }") and character == '"':
            self._in_key = True
            self._expects = "string"
        elif expects == "colon" and character == ":":
            self._expects = "value"
        elif expects == "next" and character == ",":
            self._expects = "key" if self._closing[-1] == "}" else "value"
        else:
            raise NotJson(at)
        return at + 1

    def _value(self, character: str, at: int) -> int:
        if character == '"':
            self._expects = "string"
        elif character == "{":
            self._closing.append("}")
            self._expects = "key or }"
        elif character == "[":
            self._closing.append("]")
            self._expects = "value or ]"
        elif character in _ATOM_BEGINS:
            self._expects = "atom"
            return at
        else:
            raise NotJson(at)
        return at + 1

    def _value_ended(self) -> None:
        self._expects = "next" if self._closing else "nothing"


def read_json(source: Source, to: Callable[[str], None], *, in_string: bool = False) -> Steps[None]:
    """Takes one JSON value and hands it to `to` as it arrives, no escape cut in two.

    Raises Broken where it is none, or not whole at the end of the text; what fitted has then been handed on.
    """
    scanner = JsonScanner(in_string=in_string)
    while True:
        try:
            end = scanner.scan(source.text, source.at)
        except NotJson as error:
            to(source.take(error.at))
            raise Broken from error
        if end > source.at:
            to(source.take(end))
        if scanner.done:
            return
        if not (yield from source.more()):
            raise Broken
