"""Compresses a whole answer for a client that asks for it. Streams are never compressed: they would be held back."""

from __future__ import annotations

import gzip

import anyio.to_thread
import zstandard

MIN_BYTES = 2048
"""Below this a compressed answer saves less than a packet."""

INLINE_BYTES = 256 * 1024
"""Up to this a body is compressed on the event loop: measured 1.4 ms for zstd, 3.8 ms for gzip."""


async def compressed(body: bytes, accept_encoding: str | None) -> tuple[bytes, str | None]:
    """As `compress`, in a thread where the body is large."""
    if len(body) <= INLINE_BYTES or accept_encoding is None:
        return compress(body, accept_encoding)
    return await anyio.to_thread.run_sync(compress, body, accept_encoding, abandon_on_cancel=True)


def compress(body: bytes, accept_encoding: str | None) -> tuple[bytes, str | None]:
    """The body and its `content-encoding`: zstd where the client takes it, else gzip, else as it is."""
    if accept_encoding is None or len(body) < MIN_BYTES:
        return body, None
    accepted = _accepted(accept_encoding)
    if "zstd" in accepted:
        return zstandard.ZstdCompressor(level=1).compress(body), "zstd"
    if "gzip" in accepted:
        return gzip.compress(body, compresslevel=1, mtime=0), "gzip"
    return body, None


def _accepted(header: str) -> frozenset[str]:
    names = set()
    for item in header.lower().split(","):
        name, _, quality = item.partition(";")
        if quality.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000"):
            names.add(name.strip())
    return frozenset(names)
