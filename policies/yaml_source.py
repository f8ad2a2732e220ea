"""YAML text as a tree that knows where each word stands, with the few rules a policy file needs and no surprises.

- Plain scalars mean what YAML 1.2's core schema says: `no`, `on` and `2024-01-01` are text, only `true` is true.
- A key stands once in a mapping. `<<: *anchor` merges; what a mapping says itself wins.
- Nothing is built from tags, one document is one file, and neither depth nor aliases can grow without bound.

PyYAML reads the events; the tree is made here without recursion, so that no file exhausts the stack.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import yaml

from policies.mistakes import START, Findings, Path, Place, PolicyError, in_print, quoted

MAX_DEPTH = 32
MAX_MERGED_KEYS = 100_000
"""Keys copied by `<<` in one file: a policy of 1 MiB needs fewer, an alias bomb more."""

_CORE = "tag:yaml.org,2002:"
_NOT_YAML = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_INT = re.compile(r"[-+]?[0-9]{1,18}")
_OCTAL = re.compile(r"0o[0-7]{1,20}")
_HEX = re.compile(r"0x[0-9a-fA-F]{1,15}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, bool | float | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **{sign + word: float(sign + "inf") for sign in ("", "+", "-") for word in (".inf", ".Inf", ".INF")},
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}
# libyaml is ten times as fast; both parsers give the same events and marks.
_Loader = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader


@dataclass(frozen=True, slots=True)
class Scalar:
    """`plain` scalars may be a number, a bool or null (see `core_value`); the others are text."""

    text: str
    plain: bool
    place: Place


@dataclass(frozen=True, slots=True)
class Sequence:
    items: tuple[Node, ...]
    place: Place


@dataclass(frozen=True, slots=True)
class Mapping:
    """Each key once, merged ones last."""

    entries: tuple[tuple[Scalar, Node], ...]
    place: Place


Node = Scalar | Sequence | Mapping


def core_value(text: str) -> bool | int | float | str | None:
    """What a plain scalar means in YAML 1.2's core schema. An integer beyond 18 digits is a float."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _OCTAL.fullmatch(text) or _HEX.fullmatch(text):
        return int(text, 0)
    return float(text) if _FLOAT.fullmatch(text) else text


def parse_yaml(text: str, findings: Findings) -> Node:
    """The one document of `text`. Notes duplicate keys and unknown tags in `findings`; raises `PolicyError` for what
    leaves no tree: a syntax error, an empty file, a second document, aliases or depth without bound."""
    if (character := _NOT_YAML.search(text)) is not None:
        place = _place_at(text, character.start())
        raise findings.fatal(place, (), f"character {in_print(character[0])} is not allowed in YAML")
    try:
        return _Composer(findings).compose(yaml.parse(text, Loader=_Loader))
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, text, findings) from error
    except yaml.YAMLError as error:
        raise findings.fatal(START, (), f"not YAML: {in_print(str(error), 200)}") from error


@dataclass(slots=True)
class _Open:
    """A collection whose end has not been read yet."""

    place: Place
    anchor: str | None
    is_mapping: bool
    items: list[Node] = field(default_factory=list)
    entries: list[tuple[Scalar, Node]] = field(default_factory=list)
    key: Scalar | None = None

    @property
    def step(self) -> str | int:
        return (self.key.text if self.key else "") if self.is_mapping else len(self.items)


class _Composer:
    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self._open: list[_Open] = []
        self._anchors: dict[str, Node] = {}
        self._merged_keys = 0

    def compose(self, events: Iterator[yaml.Event]) -> Node:
        root: Node | None = None
        for event in events:
            place = _place(event.start_mark)
            if isinstance(event, yaml.DocumentStartEvent) and root is not None:
                raise self._findings.fatal(place, (), "a second document begins here", "one file is one policy")
            node = self._node(event, place)
            if node is not None and self._open:
                self._attach(node)
            elif node is not None:
                root = node
        if root is None or (isinstance(root, Scalar) and root.plain and core_value(root.text) is None):
            raise self._findings.fatal(START, (), "the file is empty", "a policy has name, backends and models")
        return root

    def _node(self, event: yaml.Event, place: Place) -> Node | None:
        """The node that `event` completes, if it does."""
        match event:
            case yaml.ScalarEvent():
                scalar = Scalar(event.value, self._is_plain(event, place), place)
                return self._remember(event.anchor, scalar)
            case yaml.AliasEvent():
                return self._resolve(event.anchor or "", place)
            case yaml.SequenceStartEvent() | yaml.MappingStartEvent():
                self._begin(event, place)
            case yaml.SequenceEndEvent():
                done = self._open.pop()
                return self._remember(done.anchor, Sequence(tuple(done.items), done.place))
            case yaml.MappingEndEvent():
                done = self._open.pop()
                return self._remember(done.anchor, Mapping(self._entries(done), done.place))
        return None

    def _begin(self, event: yaml.SequenceStartEvent | yaml.MappingStartEvent, place: Place) -> None:
        if event.tag not in (None, "!", f"{_CORE}seq", f"{_CORE}map"):
            self._refuse_tag(event.tag, place)
        if len(self._open) >= MAX_DEPTH:
            raise self._findings.fatal(place, (), f"nested deeper than {MAX_DEPTH} levels")
        parent = self._open[-1] if self._open else None
        if parent is not None and parent.is_mapping and parent.key is None:
            raise self._findings.fatal(place, self._path(), "a key must be text, not a list or a mapping")
        self._open.append(_Open(place, event.anchor, isinstance(event, yaml.MappingStartEvent)))

    def _attach(self, node: Node) -> None:
        parent = self._open[-1]
        if not parent.is_mapping:
            parent.items.append(node)
        elif parent.key is not None:
            parent.entries.append((parent.key, node))
            parent.key = None
        elif isinstance(node, Scalar):
            parent.key = node
        else:
            raise self._findings.fatal(node.place, self._path(), "a key must be text, not a list or a mapping")

    def _entries(self, mapping: _Open) -> tuple[tuple[Scalar, Node], ...]:
        """The mapping's own entries, duplicates noted, then what it merges and does not say itself."""
        own: dict[str, tuple[Scalar, Node]] = {}
        merges: list[tuple[Scalar, Node]] = []
        for key, node in mapping.entries:
            is_merge = key.plain and key.text == "<<"
            if first := merges[0][0] if is_merge and merges else own[key.text][0] if key.text in own else None:
                remedy = "merge several as <<: [*a, *b]" if is_merge else "keep one of them"
                message = f"duplicate key, first on line {first.place.line}"
                self._findings.mistake(key.place, (*self._path(), key.text), message, remedy)
            elif is_merge:
                merges.append((key, node))
            else:
                own[key.text] = (key, node)
        for key, node in merges:
            for merged in self._merged(key, node):
                own.setdefault(merged[0].text, merged)
        return tuple(own.values())

    def _merged(self, key: Scalar, node: Node) -> Iterator[tuple[Scalar, Node]]:
        for source in node.items if isinstance(node, Sequence) else (node,):
            if not isinstance(source, Mapping):
                message = "<< takes a mapping or a list of mappings"
                raise self._findings.fatal(key.place, self._path(), message, "write <<: *anchor")
            self._merged_keys += len(source.entries)
            if self._merged_keys > MAX_MERGED_KEYS:
                raise self._findings.fatal(key.place, self._path(), f"<< merges more than {MAX_MERGED_KEYS} keys")
            yield from source.entries

    def _remember(self, anchor: str | None, node: Node) -> Node:
        if anchor is not None:
            self._anchors[anchor] = node
        return node

    def _resolve(self, anchor: str, place: Place) -> Node:
        if any(collection.anchor == anchor for collection in self._open):
            raise self._findings.fatal(place, self._path(), f"alias *{in_print(anchor)} stands inside what it names")
        if anchor not in self._anchors:
            raise self._findings.fatal(place, self._path(), f"alias *{in_print(anchor)} names no anchor above it")
        return self._anchors[anchor]

    def _is_plain(self, event: yaml.ScalarEvent, place: Place) -> bool:
        if event.tag is None:
            return bool(event.implicit[0])
        if event.tag not in {"!", *(_CORE + name for name in ("str", "int", "float", "bool", "null"))}:
            self._refuse_tag(event.tag, place)
        return event.tag not in {"!", f"{_CORE}str"}

    def _refuse_tag(self, tag: str | None, place: Place) -> None:
        message = f"tag {quoted((tag or '').replace(_CORE, '!!'))} is not read here"
        self._findings.mistake(place, self._path(), message, "remove it")

    def _path(self) -> Path:
        return tuple(collection.step for collection in self._open)


class _Mark(Protocol):
    """A position of either of PyYAML's parsers, from 0."""

    line: int
    column: int


def _place(mark: _Mark | None) -> Place:
    return Place(mark.line + 1, mark.column + 1) if mark is not None else START


def _place_at(text: str, index: int) -> Place:
    return Place(text.count("\n", 0, index) + 1, index - text.rfind("\n", 0, index))


def _syntax_error(error: yaml.MarkedYAMLError, text: str, findings: Findings) -> PolicyError:
    place = _place(error.problem_mark or error.context_mark)
    lines = text.splitlines() or [""]
    if place.line > len(lines):
        # The parser noticed at the end of the text, which is no line that an editor can show.
        place = Place(len(lines), len(lines[-1]) + 1)
    message = f"not YAML: {error.problem or 'syntax error'}"
    if error.context and error.context_mark is not None:
        message += f" ({error.context} from line {error.context_mark.line + 1})"
    # The one surprise of variables in YAML: a brace ends a mapping that is written in braces.
    remedy = "inside { } and [ ] a ${NAME} needs quotes" if "${" in lines[place.line - 1] else ""
    return findings.fatal(place, (), in_print(message, 200), remedy)
