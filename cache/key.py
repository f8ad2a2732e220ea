"""When two requests are the same request: the canonical form and the exact key.

The canonical form is sorted JSON of every field of the body that can change the answer. What cannot is excluded by
name (`EXCLUDED`); an unknown field is kept, so that a parameter nobody has heard of can cost a hit but never serve a
wrong one. The key is a BLAKE2b MAC of it under the tenant's own secret: the tenant is not a part of the text that
could be forgotten but the key without which there is no digest.
"""

from __future__ import annotations

import hashlib
import unicodedata
from typing import Any

import msgspec

from backends.chat import ChatRequest
from policies.tenant import Tenant

CANONICAL_VERSION = 1
"""Raise it when the canonical form changes: old entries then simply never match."""

EXCLUDED = frozenset(
    {
        "model",  # stands in the scope, as the model or the route that was resolved
        "stream",
        "stream_options",
        "user",
        "metadata",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    }
)


class UnreadableField(Exception):
    """A field holds JSON that no value of ours can stand for: a number beyond a float, or nesting beyond the stack.

    `field` names it.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"'{field}': {reason}")
        self.field = field


_TOO_DEEP = "it is nested too deeply"

_encoder = msgspec.json.Encoder(order="sorted")
_decode = msgspec.json.Decoder().decode


class AnswerScope(msgspec.Struct, frozen=True, kw_only=True):
    """Who answers, as far as it can change the answer: a model or a route, and the settings behind that name.

    `settings_digest` covers everything in the policy that affects an answer under this name, so that a reload that
    changes nothing relevant keeps the cache. `arm` keeps an experiment's answers to itself.
    """

    name: str
    settings_digest: str
    epoch: int = 0
    arm: str = ""


def canonical_request(request: ChatRequest) -> bytes:
    """The canonical form of a request: equal bytes if and only if the answer-relevant fields are equal.

    Strings are compared after Unicode NFC, names of fields as they are (two of them may differ in nothing else); a null
    field is an absent one, and 1.0 is 1 at the top level.
    Raises `UnreadableField`.
    """
    fields: dict[str, Any] = {}
    for name, raw in request.fields.items():
        if name in EXCLUDED:
            continue
        source = bytes(raw)
        try:
            value = _decode(source)
            if type(value) is float and value.is_integer():
                value = int(value)
            elif not source.isascii() or b"\\u" in source:
                value = _nfc(value)
        except msgspec.DecodeError as error:
            raise UnreadableField(name, str(error)) from None
        except RecursionError:
            raise UnreadableField(name, _TOO_DEEP) from None
        if value is not None:
            fields[name] = value
    try:
        return _encoder.encode([CANONICAL_VERSION, request.operation, fields])
    except RecursionError:
        # Together they stand two levels deeper than when each was read. The one with most brackets it will be.
        brackets = {
            name: bytes(request.fields[name]).count(b"[") + bytes(request.fields[name]).count(b"{") for name in fields
        }
        raise UnreadableField(max(brackets, key=brackets.__getitem__), _TOO_DEEP) from None


def exact_key(tenant: Tenant, canonical: bytes, scope: AnswerScope) -> str:
    """The exact cache's key: 64 hex digits that only this tenant's requests of this canonical form and scope have.

    Raises ValueError for a tenant without a cache secret: without one there is no isolation, so there is no key.
    """
    if len(tenant.cache_secret) < 16:
        raise ValueError(f"tenant {tenant.id!r} has no cache secret")
    mac = hashlib.blake2b(_encoder.encode(scope), key=tenant.cache_secret, digest_size=32)
    mac.update(b"\0")
    mac.update(canonical)
    return mac.hexdigest()


def _nfc(value: Any) -> Any:
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value)
    if isinstance(value, list):
        return [_nfc(item) for item in value]
    if isinstance(value, dict):
        return {key: _nfc(item) for key, item in value.items()}
    return value
