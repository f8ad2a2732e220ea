"""What may be answered from a cache, and for how long: the `cache:` part of a policy file."""

from __future__ import annotations

from typing import Annotated

import msgspec

from policies.duration import Duration


class ExactCachePolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The exact-match cache. A hit needs every answer-relevant field of the request to be equal."""

    enabled: bool = True
    ttl: Duration = Duration(3600.0)
    """How long an answer may be served."""
    ttl_jitter: Annotated[float, msgspec.Meta(ge=0.0, le=0.5)] = 0.1
    """Each entry's TTL is shortened by up to this share, so that entries stored together do not expire together."""
    max_temperature: Annotated[float, msgspec.Meta(ge=0.0, le=2.0)] = 2.0
    """Requests above this temperature are neither looked up nor stored."""
    max_entry_bytes: Annotated[int, msgspec.Meta(ge=1)] = 1_048_576
    lookup_timeout: Duration = Duration(0.020)
    """A lookup that takes longer is a miss."""
    store_tool_calls: bool = False
    """Whether an answer that calls tools may be stored."""


class CachePolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    exact: ExactCachePolicy = ExactCachePolicy()
    epoch: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Raise it to forget every answer of this policy at once."""
