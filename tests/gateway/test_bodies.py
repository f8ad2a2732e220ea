"""Bodies that are too large, too slow, packed, or not what they say, and answers packed on request."""

from __future__ import annotations

import base64
import gzip
import random
import resource
import sys
import zlib
from collections.abc import Callable

import httpx
import msgspec
import pytest
import zstandard

from backends.scripted import Script
from tests.gateway.wire import error_of, raw_client
from tests.world import World, open_world, text_of

MAX_BYTES = 16 * 1024 * 1024
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "zstd": zstandard.compress,
    "x-gzip": gzip.compress,
    "GZIP": gzip.compress,
    "identity": bytes,
}


async def post(world: World, body: bytes, encoding: str | None = None) -> httpx.Response:
    headers = world.headers()
    if encoding is not None:
        headers["content-encoding"] = encoding
    return await world.client.post("/v1/chat/completions", content=body, headers=headers)


@pytest.mark.parametrize("encoding", PACKERS)
@pytest.mark.parametrize("random_bytes", [75, 90_000])
async def test_a_packed_body_is_the_same_request(world: World, encoding: str, random_bytes: int) -> None:
    """The larger one stays large when packed, and is unpacked in a thread."""
    prompt = base64.b64encode(random.Random(random_bytes).randbytes(random_bytes)).decode()
    body = msgspec.json.encode(world.body(prompt, model="large"))
    plain = await post(world, body)
    packed = await post(world, PACKERS[encoding](body), encoding)

    assert packed.status_code == plain.status_code == 200
    assert text_of(packed) == text_of(plain)
    assert packed.headers["x-forebay-cache"] == "exact"


@pytest.mark.parametrize("encoding", ["br", "compress", "gzip, gzip", "gzip;q=1", "nonsense"])
async def test_a_packing_that_is_not_known_is_refused_with_the_known_ones(world: World, encoding: str) -> None:
    response = await post(world, b"x", encoding)
    assert response.status_code == 415
    assert error_of(response)["code"] == "unsupported_content_encoding"
    assert "zstd" in error_of(response)["message"]


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "zstd"])
@pytest.mark.parametrize("damage", ["plain", "cut", "empty", "flipped"])
async def test_a_body_that_does_not_unpack_is_the_clients_fault(world: World, encoding: str, damage: str) -> None:
    body = msgspec.json.encode(world.body("damaged" * 100))
    packed = PACKERS[encoding](body)
    damaged = {
        "plain": body,
        "cut": packed[: len(packed) // 2],
        "empty": b"",
        "flipped": packed[:12] + bytes([packed[12] ^ 0xFF]) + packed[13:],
    }[damage]
    response = await post(world, damaged, encoding)
    assert response.status_code == 400
    error_of(response)


@pytest.mark.parametrize("claims", [True, False])
async def test_a_body_over_the_limit_is_refused_whether_or_not_it_says_how_large_it_is(
    world: World, claims: bool
) -> None:
    async def pieces() -> object:  # without a length httpx sends chunks
        for _ in range(MAX_BYTES // 65536 + 1):
            yield b" " * 65536

    content = b" " * (MAX_BYTES + 1) if claims else pieces()
    response = await world.client.post("/v1/chat/completions", content=content, headers=world.headers())  # type: ignore[arg-type]

    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"
    assert str(MAX_BYTES) in error_of(response)["message"]
    assert (await world.ask("after 413")).status_code == 200


async def test_a_body_that_claims_too_much_is_refused_before_it_comes(world: World) -> None:
    async with raw_client(world) as client:
        await client.send(b"{", length=MAX_BYTES + 1)
        assert (await client.read_answer())[0] == 413


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "zstd"])
async def test_a_bomb_is_refused_without_being_unpacked(world: World, encoding: str) -> None:
    """A quarter of a gigabyte of zeros; only the limit of it and a little may ever be held."""
    bomb = _bomb(encoding, 1 << 28)
    assert len(bomb) < MAX_BYTES
    peak_before = _peak_memory_bytes()
    for _ in range(3):
        response = await post(world, bomb, encoding)
        assert response.status_code == 413
        error_of(response)
    assert _peak_memory_bytes() - peak_before < 6 * MAX_BYTES


def _peak_memory_bytes() -> int:
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes


def _bomb(encoding: str, size: int) -> bytes:
    """`size` zero bytes, packed piece by piece."""
    zeros = bytes(1 << 20)
    if encoding == "zstd":
        packer = zstandard.ZstdCompressor().compressobj()
        return b"".join([packer.compress(zeros) for _ in range(size >> 20)]) + packer.flush()
    window = zlib.MAX_WBITS + (16 if encoding == "gzip" else 0)
    deflate = zlib.compressobj(1, zlib.DEFLATED, window)
    return b"".join([deflate.compress(zeros) for _ in range(size >> 20)]) + deflate.flush()


async def test_a_zstd_frame_that_asks_for_a_huge_window_is_refused(world: World) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=27)
    packed = zstandard.ZstdCompressor(compression_params=parameters).compressobj().compress(b"x")
    frame = packed or zstandard.ZstdCompressor(compression_params=parameters).compress(bytes(9 << 20))
    response = await post(world, frame, "zstd")
    assert response.status_code == 400


async def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    async with open_world(settings={"body_within_s": 0.1}) as world, raw_client(world) as client:
        await client.send(b'{"model":', length=100)
        status, body = await client.read_answer()
    assert status == 408
    assert msgspec.json.decode(body)["error"]["code"] == "request_timeout"


async def test_a_small_limit_holds_for_what_a_body_unpacks_to() -> None:
    async with open_world(settings={"max_body_bytes": 1024}) as world:
        packed = gzip.compress(msgspec.json.encode(world.body("x" * 2000)))
        assert len(packed) < 1024
        assert (await post(world, packed, "gzip")).status_code == 413
        exactly = msgspec.json.encode(world.body("x" * (1024 - len(msgspec.json.encode(world.body(""))))))
        assert len(exactly) == 1024
        assert (await post(world, exactly)).status_code == 200
        assert (await post(world, exactly + b" ")).status_code == 413


LONG = Script(tokens=("A long answer. " * 20,) * 10)


@pytest.mark.parametrize(
    ("accepts", "encoding"),
    [
        ("zstd, gzip", "zstd"),
        ("gzip", "gzip"),
        ("gzip, deflate, br", "gzip"),
        ("GZIP", "gzip"),
        ("zstd;q=0, gzip", "gzip"),
        ("gzip;q=0", None),
        ("gzip; q=0.000, zstd;q=0.0", None),
        ("identity", None),
        ("br", None),
        ("", None),
    ],
)
async def test_an_answer_is_packed_as_the_client_takes_it(world: World, accepts: str, encoding: str | None) -> None:
    world.small.script = LONG
    async with world.client.stream(
        "POST",
        "/v1/chat/completions",
        content=msgspec.json.encode(world.body("long")),
        headers={**world.headers(), "accept-encoding": accepts},
    ) as response:
        raw = b"".join([part async for part in response.aiter_raw()])

    assert response.headers.get("content-encoding") == encoding
    assert response.headers["vary"] == "accept-encoding"
    assert int(response.headers["content-length"]) == len(raw)
    unpacked = {None: bytes, "gzip": gzip.decompress, "zstd": _unzstd}[encoding](raw)
    assert msgspec.json.decode(unpacked)["choices"][0]["message"]["content"] == "".join(LONG.tokens)


def _unzstd(packed: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompressobj().decompress(packed)


async def test_neither_streams_nor_short_answers_nor_errors_are_packed(world: World) -> None:
    accepts = {"accept-encoding": "zstd, gzip"}
    assert "content-encoding" not in (await world.ask("short", headers=accepts)).headers
    assert "content-encoding" not in (await world.ask("x", model="nope" * 2000, headers=accepts)).headers
    world.small.script = LONG
    assert "content-encoding" not in (await world.ask("a long stream", stream=True, headers=accepts)).headers
