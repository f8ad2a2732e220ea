"""Whole answers that are compressed: small ones at once, large ones beside the event loop."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable

import pytest
import zstandard

from gateway.openai.compression import INLINE_BYTES, MIN_BYTES, compressed

UNPACK: dict[str | None, Callable[[bytes], bytes]] = {
    "gzip": gzip.decompress,
    "zstd": zstandard.decompress,
    None: bytes,
}


@pytest.mark.parametrize(
    ("accepts", "encoding"), [("gzip", "gzip"), ("gzip, zstd", "zstd"), ("br", None), (None, None)]
)
@pytest.mark.parametrize("size_bytes", [MIN_BYTES, INLINE_BYTES, INLINE_BYTES + 1, 4 * INLINE_BYTES])
async def test_an_answer_of_any_size_is_packed_as_the_client_asks(
    accepts: str | None, encoding: str | None, size_bytes: int
) -> None:
    body = b"a" * size_bytes
    packed, named = await compressed(body, accepts)
    assert named == encoding
    assert UNPACK[named](packed) == body


async def test_what_saves_nothing_is_left_as_it_is() -> None:
    assert await compressed(b"a" * (MIN_BYTES - 1), "gzip") == (b"a" * (MIN_BYTES - 1), None)


@pytest.mark.parametrize(("size_bytes", "beside"), [(INLINE_BYTES, False), (INLINE_BYTES + 1, True)])
async def test_a_large_answer_is_packed_beside_the_event_loop(
    monkeypatch: pytest.MonkeyPatch, size_bytes: int, beside: bool
) -> None:
    threads = []

    def noted(body: bytes, **options: int) -> bytes:
        threads.append(threading.current_thread())
        return gzip_compress(body, **options)

    gzip_compress = gzip.compress
    monkeypatch.setattr(gzip, "compress", noted)
    await compressed(b"a" * size_bytes, "gzip")
    assert [thread is not threading.main_thread() for thread in threads] == [beside]
