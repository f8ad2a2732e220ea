"""Llama 3.1 to 3.3: an answer that is tool calls, or text.

After Meta's prompt formats: `{"name": ..., "parameters": {...}}` (3.1, JSON), `[f(a='x'), g()]` (3.2 and 3.3,
zero-shot), each also after `<|python_tag|>`; after that tag also `brave_search.call(query="...")` (3.1's built-in
tools) and plain code, which is a call of `code_interpreter` with `{"code": ...}` where such a tool is offered. Several
JSON calls are separated by `;`, `,` or white space. What is no call of an offered tool is text, and so is all that
follows it, up to another tag.

Nothing but its first character marks a bare call. So `{` is held up to the first member that no call has or the name,
`[` up to the name, and a Python call to its end, because it is translated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection

from backends.tool_calls.call_object import CallObject, Outcome
from backends.tool_calls.pieces import Pieces
from backends.tool_calls.python_calls import read_python_call
from backends.tool_calls.source import Broken, Markers, Source, Steps, plain

_TAG = "<|python_tag|>"
_CODE = "code_interpreter"
_BUILT_IN = ".call"
_NAME = re.compile(r"[^\s()\[\]{}<>\"',=;]*+")


def read_llama3(source: Source, pieces: Pieces, names: Collection[str], forced: bool) -> Steps[None]:
    """`forced` changes nothing: a bare call is the format's own."""
    reader = _Llama3(source, pieces, names)
    at_tag = False
    first = yield from source.space(pieces.text)
    if first in ("{", "["):
        source.hold()
        at_tag = yield from reader.calls(first)
    while at_tag or (yield from plain(source, reader.markers, pieces.text)):
        if not at_tag:
            source.hold()
        at_tag = yield from reader.tagged()


class _Llama3:
    """Each method reads on from the cursor, with what must be given back with it held by its caller.

    One that returns a bool says whether it stopped at a tag, with what stands before the tag held.
    """

    def __init__(self, source: Source, pieces: Pieces, names: Collection[str]) -> None:
        self.markers = Markers(_TAG)
        self._source = source
        self._pieces = pieces
        self._names = names
        self._longest_name = max(map(len, names), default=0)

    def tagged(self) -> Steps[bool]:
        """What comes with a tag."""
        yield from self._source.take_if(_TAG)
        try:
            first = yield from self._source.space()
            if first in ("{", "["):
                return (yield from self.calls(first))
            if not first:
                raise Broken
            yield from self._built_in_or_code()
        except Broken:
            self._source.give_back(self._pieces.text)
        return False

    def calls(self, first: str) -> Steps[bool]:
        """Calls in JSON, or a list of them in Python."""
        if first == "[":
            yield from self._list()
            return False
        while True:
            outcome = yield from CallObject(self._source, self._pieces, self._names, only_calls=True).read()
            if outcome is Outcome.CUT:
                yield from plain(self._source, self.markers, self._pieces.arguments)
            if outcome is not Outcome.CALL:
                return False
            self._source.hold()
            try:
                following = yield from self._separated()
            except Broken:
                following = ""
            if following != "{":
                break
        if following == "<" and (yield from self._source.begins(_TAG)):
            return True
        self._source.give_back(self._pieces.text)
        return False

    def _separated(self) -> Steps[str]:
        """Takes what may separate two calls; the character after it. Raises Broken."""
        following = yield from self._source.space()
        if following in (";", ","):
            self._source.take(self._source.at + 1)
            following = yield from self._source.space()
        return following

    def _list(self) -> Steps[None]:
        """`[f(a='x'), g()]`, each call told when it is whole."""
        try:
            yield from self._source.symbol("[")
            while True:
                yield from self._source.space()
                name = yield from self._source.word(_NAME, self._longest_name)
                yield from self._python_call(name)
                self._source.hold()
                if (yield from self._source.symbol(",]")) == "]":
                    self._source.drop()
                    return
        except Broken:
            self._source.give_back(self._pieces.text)

    def _python_call(self, name: str) -> Steps[None]:
        """The call whose name has been read. Raises Broken where it is none of an offered tool."""
        if name not in self._names:
            raise Broken
        arguments = yield from read_python_call(self._source)
        self._source.drop()
        self._pieces.start(name)
        self._pieces.arguments(arguments)

    def _built_in_or_code(self) -> Steps[None]:
        """`brave_search.call(...)`, `f(...)`, or code. Raises Broken where it is text."""
        name = ""
        try:
            name = yield from self._source.word(_NAME, self._longest_name + len(_BUILT_IN))
            yield from self._python_call(name.removesuffix(_BUILT_IN))
        except Broken:
            if name.endswith(_BUILT_IN) or _CODE not in self._names:
                raise
            yield from self._code()

    def _code(self) -> Steps[None]:
        """Everything to the end of the text or another tag is code, what was held after the tag included."""
        held: list[str] = []
        self._source.give_back(held.append)
        self._pieces.start(_CODE)
        self._pieces.arguments('{"code": "')
        self._more_code("".join(held).partition(_TAG)[2])
        yield from plain(self._source, self.markers, self._more_code)
        self._pieces.arguments('"}')

    def _more_code(self, code: str) -> None:
        self._pieces.arguments(json.dumps(code, ensure_ascii=False)[1:-1])
