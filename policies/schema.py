"""The JSON Schema of a policy file, for editors: `python -m policies.schema > policies/policy.schema.json`.

It is made of the structs alone: kinds and limits from `msgspec.inspect`, explanations from the docstrings under their
fields. (`msgspec.json.schema` does not write a struct whose default is a `Duration`.)
"""

from __future__ import annotations

import ast
import inspect as source
import json
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import msgspec
from msgspec import inspect

from policies import cache_policy, duration, money, routing_policy
from policies.duration import Duration
from policies.money import UsdPer1M
from policies.routing_policy import PolicyFile

Schema = dict[str, Any]

_LEAVES: dict[type, Schema] = {
    Duration: {
        "description": "250ms, 30s, 5m, 1h, 7d, or a number of seconds",
        "anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": f"^{duration.PATTERN}$"}],
    },
    UsdPer1M: {
        "description": "USD per 1M tokens, at most 9 decimals",
        "anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": f"^{money.PATTERN}$"}],
    },
}
_REFERENCE: Schema = {"description": "a value from the environment", "type": "string", "pattern": r"\$\{[A-Za-z_]"}


def policy_schema() -> Schema:
    """JSON Schema (2020-12) of a policy file as an operator writes it: `${NAME}` may stand for any single value."""
    return _Writer(dict(_field_docstrings(routing_policy, cache_policy))).write()


def _field_docstrings(*modules: ModuleType) -> Iterator[tuple[tuple[str, str], str]]:
    """The text under each annotated field, by class and field; Python itself does not keep it."""
    for module in modules:
        for node in ast.parse(source.getsource(module)).body:
            if isinstance(node, ast.ClassDef):
                for field, text in zip(node.body, node.body[1:], strict=False):
                    match field, text:
                        case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                            yield (node.name, name), " ".join(words.split())


class _Writer:
    def __init__(self, docstrings: dict[tuple[str, str], str]) -> None:
        self._docstrings = docstrings
        self._parts: dict[str, Schema] = {"Environment": _REFERENCE}

    def write(self) -> Schema:
        self._kind(inspect.type_info(PolicyFile))
        root = self._parts.pop(PolicyFile.__name__)
        # A place for anchors that several parts share; `conform` passes over it.
        root["patternProperties"] = {"^x-": {}}
        dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Forebay policy"}
        return {**dialect, **root, "$defs": dict(sorted(self._parts.items()))}

    def _kind(self, kind: inspect.Type) -> Schema:
        match kind:
            case inspect.Metadata():
                return {**(kind.extra_json_schema or {}), **self._kind(kind.type)}
            case inspect.StructType():
                return self._struct(kind)
            case inspect.UnionType():
                return {"anyOf": [self._kind(member) for member in kind.types]}
            case inspect.DictType():
                keys = {"propertyNames": _text(kind.key_type)}
                limits = {"minProperties": kind.min_length} if kind.min_length else {}
                return {"type": "object", **keys, **limits, "additionalProperties": self._kind(kind.value_type)}
            case inspect.VarTupleType():
                limits = {"minItems": kind.min_length} if kind.min_length else {}
                return {"type": "array", **limits, "items": self._kind(kind.item_type)}
            case inspect.NoneType():
                return {"type": "null"}
            case inspect.StrType(pattern=None):
                return {"type": "string"}
        return {"anyOf": [_text(kind), {"$ref": "#/$defs/Environment"}]}

    def _struct(self, kind: inspect.StructType) -> Schema:
        name = kind.cls.__name__
        if name not in self._parts:
            self._parts[name] = {}
            properties = {kind.tag_field: {"const": kind.tag}} if kind.tag_field else {}
            properties |= {field.encode_name: self._field(name, field) for field in kind.fields}
            required = [field.encode_name for field in kind.fields if field.required]
            self._parts[name] = {
                "description": " ".join((kind.cls.__doc__ or name).split()),
                "type": "object",
                "properties": properties,
                "required": [*([kind.tag_field] if kind.tag_field else []), *required],
                "additionalProperties": False,
            }
        return {"$ref": f"#/$defs/{name}"}

    def _field(self, struct: str, field: inspect.Field) -> Schema:
        text = self._docstrings.get((struct, field.name))
        described = {"description": text} if text else {}
        default = {} if field.default in (msgspec.NODEFAULT, None) else {"default": _written(field.default)}
        return {**self._kind(field.type), **described, **default}


def _text(kind: inspect.Type) -> Schema:
    """A single value as it stands in a file."""
    match kind:
        case inspect.Metadata():
            return {**(kind.extra_json_schema or {}), **_text(kind.type)}
        case inspect.StrType():
            return {"type": "string", **({"pattern": kind.pattern} if kind.pattern else {})}
        case inspect.BoolType():
            return {"type": "boolean"}
        case inspect.IntType() | inspect.FloatType():
            limits = {"minimum": kind.ge, "maximum": kind.le}
            name = "integer" if isinstance(kind, inspect.IntType) else "number"
            return {"type": name, **{key: limit for key, limit in limits.items() if limit is not None}}
        case inspect.LiteralType():
            return {"enum": list(kind.values)}
        case inspect.CustomType():
            return _LEAVES[kind.cls]
    raise TypeError(f"a policy struct has a field of a kind without a schema: {kind}")


def _written(default: Any) -> Any:
    """A default as it would stand in a file; of a part with parts of its own, nothing."""
    match default:
        case Duration():
            return float(default)
        case UsdPer1M():
            return int(default) / 1_000_000_000
        case tuple():
            return list(default)
        case msgspec.Struct():
            return {}
    return default


if __name__ == "__main__":
    json.dump(policy_schema(), sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")
