"""A YAML tree against the structs of a policy: every unknown key, every bad value, each with its line and column.

msgspec stops at the first error and knows no lines, so the walk is done here, over msgspec's own description of the
structs (`msgspec.inspect`): a field added to a struct is read, checked and suggested without a word in this module.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass, field
from typing import Any, Final

from msgspec import inspect

from policies.duration import Duration
from policies.interpolation import BadReference, has_reference, interpolate
from policies.mistakes import START, Findings, Path, Place, in_print, listed, nearest, quoted, suggestion
from policies.money import UsdPer1M
from policies.yaml_source import Mapping, Node, Scalar, Sequence, core_value

MAX_NODES = 100_000
"""Values read from one file, each alias counted as often as it is used."""

_PARSERS: dict[type, Callable[[str], object]] = {Duration: Duration.parse, UsdPer1M: UsdPer1M.parse}

BROKEN: Final = object()
"""Stands for a value that has a mistake: noted already, and no ground for another one."""


@dataclass(frozen=True, slots=True)
class Conformed:
    """What a tree says, as far as it could be read.

    `data` is built of dicts, lists and scalars that msgspec converts; mistaken parts are left out of it. `values` and
    `keys` are the places of what the file wrote, by path. `broken` holds the paths of mistakes. `written` is the text
    in the file of values that the environment went into: messages show that instead of the value.
    """

    data: Any
    values: MappingABC[Path, Place]
    keys: MappingABC[Path, Place]
    broken: frozenset[Path]
    written: MappingABC[Path, str]

    def is_sound(self, path: Path) -> bool:
        """Whether `path` was written and nothing in it is mistaken."""
        return path in self.values and not any(bad[: len(path)] == path for bad in self.broken)

    def place(self, path: Path) -> Place:
        """Where `path` stands, or the nearest thing around it that was written."""
        while path:
            if (place := self.values.get(path)) is not None:
                return place
            path = path[:-1]
        return START

    def key_place(self, path: Path) -> Place:
        return self.keys.get(path) or self.place(path)

    def shown(self, path: Path, value: str) -> str:
        """`value` in quotes, or what the file says where the environment gave it."""
        return quoted(self.written.get(path, value))


def conform(tree: Node, kind: type, env: MappingABC[str, str], findings: Findings) -> Conformed:
    """Read `tree` as `kind`, a struct. Mistakes are noted in `findings`; raises `PolicyError` only when a file has more
    values than `MAX_NODES`."""
    walk = _Walk(env, findings)
    data = walk.read(tree, inspect.type_info(kind), (), START)
    return Conformed(data, walk.values, walk.keys, frozenset(walk.broken), walk.written)


@dataclass(slots=True)
class _Walk:
    env: MappingABC[str, str]
    findings: Findings
    values: dict[Path, Place] = field(default_factory=dict)
    keys: dict[Path, Place] = field(default_factory=dict)
    broken: set[Path] = field(default_factory=set)
    written: dict[Path, str] = field(default_factory=dict)

    def read(self, node: Node, kind: inspect.Type, path: Path, key: Place) -> Any:
        """What `node` says as `kind`, or BROKEN. `key` is where its key stands: the place of what it lacks."""
        self.values[path] = node.place
        if len(self.values) > MAX_NODES:
            raise self.findings.fatal(node.place, path, f"aliases expand to more than {MAX_NODES} values")
        core, expected = _unwrapped(kind)
        match core:
            case inspect.UnionType():
                return self._union(node, core, path, key)
            case inspect.StructType():
                return self._struct(node, core, path, key)
            case inspect.DictType():
                return self._dict(node, core, path)
            case inspect.VarTupleType():
                return self._list(node, core, path)
        if not isinstance(node, Scalar):
            return self._unexpected(node, expected, path)
        return self._scalar(node, core, expected, path)

    def _union(self, node: Node, kind: inspect.UnionType, path: Path, key: Place) -> Any:
        kinds = [member for member in kind.types if not isinstance(member, inspect.NoneType)]
        if len(kinds) < len(kind.types) and isinstance(node, Scalar) and self._is_null(node):
            return None
        if len(kinds) == 1:
            return self.read(node, kinds[0], path, key)
        return self._tagged(node, [member for member in kinds if isinstance(member, inspect.StructType)], path, key)

    def _tagged(self, node: Node, kinds: list[inspect.StructType], path: Path, key: Place) -> Any:
        if not isinstance(node, Mapping):
            return self._unexpected(node, "a mapping", path)
        tag_field = str(kinds[0].tag_field)
        known = {str(kind.tag): kind for kind in kinds}
        tag = next((value for name, value in node.entries if name.text == tag_field), None)
        if tag is None:
            misspelt = next((name for name, _ in node.entries if nearest(name.text, [tag_field])), None)
            if misspelt is not None:
                remedy = f"did you mean {quoted(tag_field)}?"
                return self._mistake(misspelt.place, (*path, misspelt.text), "unknown key", remedy)
            return self._mistake(key, path, f"missing {quoted(tag_field)}", f"it is one of {listed(known)}")
        text = self._text(tag, (*path, tag_field)) if isinstance(tag, Scalar) else None
        if text in known:
            return self._struct(node, known[text], path, key)
        if text is not None or not isinstance(tag, Scalar):
            remedy = suggestion(text or "", known)
            self._mistake(tag.place, (*path, tag_field), f"unknown {tag_field} {self._given(tag)}", remedy)
        return BROKEN

    def _struct(self, node: Node, kind: inspect.StructType, path: Path, key: Place) -> Any:
        if not isinstance(node, Mapping):
            return self._unexpected(node, "a mapping", path)
        fields = {each.encode_name: each for each in kind.fields}
        known = [*([kind.tag_field] if kind.tag_field else []), *fields]
        written = {name.text for name, _ in node.entries}
        missing = {each.encode_name for each in kind.fields if each.required} - written
        result: dict[str, Any] = {kind.tag_field: kind.tag} if kind.tag_field else {}
        for name, value in node.entries:
            here = (*path, name.text)
            self.keys[here] = name.place
            if name.text in fields:
                _put(result, name.text, self.read(value, fields[name.text].type, here, name.place))
            elif name.text != kind.tag_field and not (path == () and name.text.startswith("x-")):
                near = nearest(name.text, (each for each in known if each not in written))
                remedy = f"did you mean {quoted(near)}?" if near else f"known: {listed(known)}"
                self._mistake(name.place, here, "unknown key", remedy)
                # A misspelt key is one mistake, not an unknown and a missing one.
                missing.discard(near or "")
        for lacking in sorted(missing, key=known.index):
            self._mistake(key, path, f"missing {quoted(lacking)}")
        return result

    def _dict(self, node: Node, kind: inspect.DictType, path: Path) -> Any:
        if not isinstance(node, Mapping):
            return self._unexpected(node, "a mapping", path)
        if len(node.entries) < (kind.min_length or 0):
            return self._mistake(node.place, path, "needs at least one entry")
        key_kind, expected = _unwrapped(kind.key_type)
        result: dict[str, Any] = {}
        for key, value in node.entries:
            here = (*path, key.text)
            self.keys[here] = key.place
            if "${" in key.text:
                self._mistake(key.place, here, "environment variables are read in values, not in keys")
            elif not _is_text(key.text, key_kind):
                self._mistake(key.place, here, f"expected {expected} as the key, got {quoted(key.text)}")
            else:
                _put(result, key.text, self.read(value, kind.value_type, here, key.place))
        return result

    def _list(self, node: Node, kind: inspect.VarTupleType, path: Path) -> Any:
        if not isinstance(node, Sequence):
            word = node.text if isinstance(node, Scalar) else ""
            remedy = f"write [{in_print(word)}]" if word and "\n" not in word else ""
            return self._unexpected(node, "a list", path, remedy)
        if len(node.items) < (kind.min_length or 0):
            return self._mistake(node.place, path, "needs at least one item")
        items = [self.read(item, kind.item_type, (*path, i), item.place) for i, item in enumerate(node.items)]
        return [item for item in items if item is not BROKEN]

    def _scalar(self, node: Scalar, kind: inspect.Type, expected: str, path: Path) -> Any:
        text = self._text(node, path)
        if text is None:
            return BROKEN
        value = core_value(text) if node.plain else text
        match kind:
            case inspect.StrType():
                # What is written is the text: a model may be called 1e3, and true without quotes is no bool here.
                if value is not None and _is_text(text, kind):
                    return text
            case inspect.BoolType():
                if isinstance(value, bool):
                    return value
                if text.lower() in {"yes", "no", "on", "off", "true", "false"}:
                    return self._unexpected(node, expected, path, "write true or false, without quotes")
            case inspect.IntType():
                if isinstance(value, int) and not isinstance(value, bool) and _in_range(value, kind):
                    return value
            case inspect.FloatType():
                if isinstance(value, int | float) and not isinstance(value, bool) and _in_range(value, kind):
                    return float(value)
            case inspect.LiteralType():
                if text in kind.values:
                    return text
                return self._unexpected(node, expected, path, suggestion(text, map(str, kind.values)))
            case inspect.CustomType():
                try:
                    return _PARSERS[kind.cls](text)
                except ValueError as error:
                    return self._unexpected(node, str(error).removeprefix("expected "), path)
            case _:
                raise TypeError(f"a policy struct has a field of a kind that is not read: {kind}")
        return self._unexpected(node, expected, path)

    def _text(self, node: Scalar, path: Path) -> str | None:
        """The scalar's text with the environment in it; None when that is a mistake."""
        if has_reference(node.text):
            self.written[path] = node.text
        try:
            text = interpolate(node.text, self.env)
        except BadReference as error:
            self._mistake(node.place, path, error.message, error.remedy)
            return None
        return text

    def _is_null(self, node: Scalar) -> bool:
        """Whether a scalar is null, also one that is null once the environment is in it."""
        if not node.plain:
            return False
        try:
            return core_value(interpolate(node.text, self.env)) is None
        except BadReference:
            return False

    def _unexpected(self, node: Node, expected: str, path: Path, remedy: str = "") -> Any:
        return self._mistake(node.place, path, f"expected {expected}, got {self._given(node)}", remedy)

    def _mistake(self, place: Place, path: Path, message: str, remedy: str = "") -> Any:
        self.findings.mistake(place, path, message, remedy)
        self.broken.add(path)
        return BROKEN

    @staticmethod
    def _given(node: Node) -> str:
        """What stands there, in words; never what came from the environment."""
        if isinstance(node, Mapping):
            return "a mapping"
        if isinstance(node, Sequence):
            return "a list"
        if has_reference(node.text):
            return f"what {quoted(node.text)} stands for"
        return "nothing" if node.plain and core_value(node.text) is None else quoted(node.text)


def _put(result: dict[str, Any], name: str, value: Any) -> None:
    if value is not BROKEN:
        result[name] = value


def _unwrapped(kind: inspect.Type) -> tuple[inspect.Type, str]:
    """A type without its metadata, and what to call a value of it: its description, else what its limits say."""
    if isinstance(kind, inspect.Metadata):
        described = (kind.extra_json_schema or {}).get("description")
        inner, expected = _unwrapped(kind.type)
        return inner, str(described or expected)
    match kind:
        case inspect.StrType():
            return kind, "text"
        case inspect.BoolType():
            return kind, "true or false"
        case inspect.IntType():
            return kind, f"a whole number{_limits(kind)}"
        case inspect.FloatType():
            return kind, f"a number{_limits(kind)}"
        case inspect.LiteralType():
            return kind, f"one of {listed(map(str, kind.values))}"
    return kind, "a value"


def _limits(kind: inspect.IntType | inspect.FloatType) -> str:
    if kind.ge is not None and kind.le is not None:
        return f" from {kind.ge:g} to {kind.le:g}"
    return f" of {kind.ge:g} or more" if kind.ge is not None else ""


def _in_range(value: float, kind: inspect.IntType | inspect.FloatType) -> bool:
    lowest = -math.inf if kind.ge is None else kind.ge
    highest = math.inf if kind.le is None else kind.le
    return math.isfinite(value) and lowest <= value <= highest


def _is_text(text: str, kind: inspect.Type) -> bool:
    """Whether `text` is one that the outside world can take (paths and headers know no NUL) and fits the pattern."""
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        return False
    pattern = kind.pattern if isinstance(kind, inspect.StrType) else None
    return pattern is None or re.search(pattern, text) is not None
