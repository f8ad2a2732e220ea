"""What a client says about caching: the request's `Cache-Control`."""

from __future__ import annotations

import msgspec


class CacheControl(msgspec.Struct, frozen=True, kw_only=True):
    """`no_cache`: do not answer from a cache. `no_store`: neither answer from one nor keep the answer."""

    no_cache: bool = False
    no_store: bool = False
    max_age_s: float | None = None
    """The oldest answer that is welcome, seconds."""

    @classmethod
    def parse(cls, header: str | None) -> CacheControl:
        """Read the header; directives that are unknown or malformed are ignored, as RFC 9111 asks."""
        if not header:
            return DEFAULT
        no_cache = no_store = False
        max_age_s: float | None = None
        for directive in header.lower().split(","):
            name, _, value = directive.strip().partition("=")
            if name == "no-cache":
                no_cache = True
            elif name == "no-store":
                no_store = True
            elif name == "max-age" and value.strip('"').isdecimal():
                max_age_s = float(value.strip('"'))
        return cls(no_cache=no_cache, no_store=no_store, max_age_s=max_age_s)


DEFAULT = CacheControl()
