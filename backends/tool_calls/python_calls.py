"""One call written as Python, `get_weather(city='Paris', n=2)`: its end found while it arrives, its arguments as JSON.

Arguments are keywords with literal values: strings, numbers, `True`, `False`, `None` (and JSON's own three words, which
models mix in), lists, tuples, dictionaries with string keys. Nothing is evaluated.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from backends.tool_calls.source import Broken, Source, Steps

_PLAIN = re.compile(r"[^'\"()\[\]{}]++")
_IN_STRING = {quote: re.compile(rf"(?:[^{quote}\\]++|\\[\s\S])*+") for quote in "'\""}
_CLOSING = {"(": ")", "[": "]", "{": "}"}

_TOKEN = re.compile(
    r"""\s*+(?:
      (?P<string>'(?:[^'\\]|\\[\s\S])*+'|"(?:[^"\\]|\\[\s\S])*+")
    | (?P<number>-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][-+]?[0-9]++)?)(?![\w.])
    | (?P<word>[^\W\d]\w*+)
    | (?P<symbol>[()\[\]{},:=])
    )\s*+""",
    re.VERBOSE,
)
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_ESCAPE = re.compile(r"\\(?:([0-7]{1,3})|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([\s\S]))")
_ESCAPED = {
    "n": "\n",
    "t": "\t",
    "r": "\r",
    "a": "\a",
    "b": "\b",
    "f": "\f",
    "v": "\v",
    "\n": "",
    **{c: c for c in "\\'\""},
}


def read_python_call(source: Source) -> Steps[str]:
    """Takes a call from its opening parenthesis to the closing one; its arguments as a JSON object. Raises Broken."""
    if (yield from source.character()) != "(":
        raise Broken
    taken: list[str] = []
    end = _CallEnd()
    while not end.found:
        if not (yield from source.character()):
            raise Broken
        taken.append(source.take(end.scan(source.text, source.at)))
        if end.broken:
            raise Broken
    return arguments_json("".join(taken))


class _CallEnd:
    """Where the parenthesis that comes first is closed; everything up to there is consumed as it comes."""

    def __init__(self) -> None:
        self._closing: list[str] = []
        self._quote = ""
        self._after_backslash = False
        self.found = False
        self.broken = False

    def scan(self, text: str, at: int) -> int:
        while at < len(text) and not self.found and not self.broken:
            if self._after_backslash:
                self._after_backslash = False
                at += 1
            elif self._quote:
                at = self._string(text, at)
            elif plain := _PLAIN.match(text, at):
                at = plain.end()
            else:
                self._symbol(text[at])
                at += 1
        return at

    def _string(self, text: str, at: int) -> int:
        inside = _IN_STRING[self._quote].match(text, at)
        end = inside.end() if inside else at
        if end == len(text):
            return end
        if text[end] == self._quote:
            self._quote = ""
        else:
            self._after_backslash = True
        return end + 1

    def _symbol(self, symbol: str) -> None:
        if symbol in "'\"":
            self._quote = symbol
        elif symbol in _CLOSING:
            self._closing.append(_CLOSING[symbol])
        elif self._closing.pop() != symbol:
            self.broken = True
        self.found = not self._closing


def arguments_json(call: str) -> str:
    """`(city='Paris', n=2)` as `{"city": "Paris", "n": 2}`, in the order and the numbers as written. Raises Broken.

    Token by token, with no recursion; that the outcome is JSON is checked at the end, which refuses the rest.
    """
    tokens = _tokens(call)
    writing = _Writing()
    for at, (kind, token) in enumerate(tokens):
        if kind == "symbol":
            writing.symbol(token)
        elif kind == "word" and writing.at_keywords and tokens[at + 1][1] == "=":
            writing.written.append(json.dumps(token))
        else:
            writing.written.append(_literal(kind, token))
    text = "".join(writing.written)
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Broken from error
    return text


class _Opened(NamedTuple):
    symbol: str
    closes_as: str
    at: int


class _Writing:
    """Python's brackets and commas as JSON's."""

    def __init__(self) -> None:
        self.written: list[str] = []
        self._opened: list[_Opened] = []
        self._commas: list[int] = []

    @property
    def at_keywords(self) -> bool:
        return len(self._opened) == 1

    def symbol(self, symbol: str) -> None:
        if symbol in _CLOSING:
            opens_as, closes_as = ("{", "}") if not self._opened or symbol == "{" else ("[", "]")
            self._opened.append(_Opened(symbol, closes_as, len(self.written)))
            self._commas.append(0)
            self.written.append(opens_as)
        elif symbol in ")]}":
            self._close()
        else:
            self._commas[-1] += symbol == ","
            self.written.append({",": ", ", ":": ": ", "=": ": "}[symbol])

    def _close(self) -> None:
        opened, commas = self._opened.pop(), self._commas.pop()
        if opened.symbol == "(" and self._opened and not commas and len(self.written) > opened.at + 1:
            self.written[opened.at] = ""  # parentheses round one value are no tuple
            return
        if self.written[-1] == ", ":  # Python allows a comma after the last
            self.written.pop()
        self.written.append(opened.closes_as)


def _tokens(call: str) -> list[tuple[str, str]]:
    tokens = []
    at = 0
    while at < len(call):
        token = _TOKEN.match(call, at)
        if token is None:
            raise Broken
        tokens.append((token.lastgroup or "", token[token.lastgroup or 0]))
        at = token.end()
    return tokens


def _literal(kind: str, token: str) -> str:
    if kind == "string":
        return json.dumps(_ESCAPE.sub(_unescape, token[1:-1]), ensure_ascii=False)
    if kind == "number":
        return token
    if token not in _WORDS:
        raise Broken
    return _WORDS[token]


def _unescape(escape: re.Match[str]) -> str:
    octal, *hexadecimal, other = escape.groups()
    if other is not None:
        return _ESCAPED.get(other, escape.group())
    code = int(octal, 8) if octal else int(next(filter(None, hexadecimal)), 16)
    if code > 0x10FFFF or 0xD800 <= code < 0xE000:
        raise Broken
    return chr(code)
