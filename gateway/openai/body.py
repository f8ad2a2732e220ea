"""A request's bytes: read within a time, unpacked within a bound."""

from __future__ import annotations

import asyncio
import io
import zlib

import anyio.to_thread
import zstandard
from litestar.types import Receive

from gateway.errors import BodyTimeout, BodyTooLarge, RequestError, UnsupportedEncoding

UNPACK_INLINE_BYTES = 64 * 1024
"""A packed body larger than this is unpacked in a thread: zlib and zstd let go of the interpreter while they work."""

ZSTD_WINDOW_BYTES = 8 * 1024 * 1024
"""What RFC 8878 recommends that every decoder takes; a frame that declares more would have us hand out the memory."""


class ClientGone(Exception):
    """The client hung up."""


async def read_body(
    receive: Receive, *, declared_bytes: int | None, encoding: str | None, max_bytes: int, within_s: float
) -> bytes:
    """The body, unpacked; `max_bytes` bounds both what it weighs on the wire and what it unpacks to.

    Raises `BodyTooLarge`, `BodyTimeout`, `UnsupportedEncoding`, `RequestError` (it does not unpack) or `ClientGone`.
    """
    if declared_bytes is not None and declared_bytes > max_bytes:
        raise _too_large(max_bytes)
    body = await _read(receive, max_bytes, within_s)
    if encoding is None or encoding == "identity":
        return body
    if len(body) <= UNPACK_INLINE_BYTES:
        return unpack(body, encoding, max_bytes)
    return await anyio.to_thread.run_sync(unpack, body, encoding, max_bytes)


async def _read(receive: Receive, max_bytes: int, within_s: float) -> bytes:
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(within_s):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise ClientGone
                part: bytes = message.get("body", b"")
                size += len(part)
                if size > max_bytes:
                    raise _too_large(max_bytes)
                parts.append(part)
                if not message.get("more_body", False):
                    return parts[0] if len(parts) == 1 else b"".join(parts)
    except TimeoutError:
        raise BodyTimeout(f"the body did not arrive within {within_s:g} s") from None


def unpack(packed: bytes, encoding: str, max_bytes: int) -> bytes:
    """Decompress, holding at most `max_bytes` and a little. Raises as `read_body` does."""
    try:
        if encoding in ("gzip", "x-gzip", "deflate"):
            window_bits = zlib.MAX_WBITS if encoding == "deflate" else 16 + zlib.MAX_WBITS
            body = zlib.decompressobj(window_bits).decompress(packed, max_bytes + 1)
        elif encoding == "zstd":
            decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
            body = decompressor.stream_reader(io.BytesIO(packed)).read(max_bytes + 1)
        else:
            raise UnsupportedEncoding(
                f"content-encoding '{encoding}' is not supported; use gzip, deflate, zstd or none"
            )
    except (zlib.error, zstandard.ZstdError):
        raise RequestError("the body does not unpack as its content-encoding says", code="invalid_body") from None
    if len(body) > max_bytes:
        raise _too_large(max_bytes)
    return body


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than {max_bytes} bytes; send less")
