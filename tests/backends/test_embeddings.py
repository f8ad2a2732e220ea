"""What `input` may be, and that every engine's answer comes out as OpenAI would have written it."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.backend import Timeouts
from backends.chat import Event, Usage
from backends.embeddings import INLINE_BYTES, BadInput, each_input, from_base64, to_base64
from backends.errors import BackendFailed, BackendProtocolError, BackendTimeout, RequestRejected
from backends.openai_http import OpenAIBackend
from tests.calls import collect, make_call
from tests.upstream import Hang, Head, Send, Upstream, answers

ONE, TWO = [1.0, 0.5], [-0.25, 2.0]
USAGE = {"prompt_tokens": 4, "total_tokens": 4}


def packed(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def item(vector: Any, index: int) -> dict[str, Any]:
    return {"object": "embedding", "index": index, "embedding": vector}


def answer(*data: Any, **fields: Any) -> dict[str, Any]:
    said = {"object": "list", "data": list(data), "model": "engine's", "usage": USAGE, **fields}
    return {name: value for name, value in said.items() if value is not ...}


GOOD = answer(item(ONE, 0), item(TWO, 1))


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with Upstream() as upstream:
        yield upstream


@pytest.fixture
async def backend(upstream: Upstream) -> AsyncIterator[OpenAIBackend]:
    backend = OpenAIBackend("a", upstream.url, upstream_model="theirs")
    yield backend
    await backend.aclose()


async def embed(backend: OpenAIBackend, **fields: Any) -> Event:
    [event] = await collect(backend, make_call("embeddings", **{"input": ["a", "b"], **fields}))
    assert event.whole
    assert event.has_content
    return event


async def test_the_request_is_passed_on_with_only_the_model_changed(backend: OpenAIBackend, upstream: Upstream) -> None:
    upstream.plays(*answers(answer(item(ONE, 0))))
    await embed(backend, input=[[1, 2, 3]], user="u", x_extra=1)

    [request] = upstream.requests
    assert (request.method, request.path) == ("POST", "/v1/embeddings")
    assert request.json == {"model": "theirs", "input": [[1, 2, 3]], "user": "u", "x_extra": 1}


async def test_an_answer_that_is_as_asked_passes_as_the_bytes_it_came_in(
    backend: OpenAIBackend, upstream: Upstream
) -> None:
    for encoding, one, two in (("float", ONE, TWO), ("base64", packed(ONE), packed(TWO))):
        raw = json.dumps(answer(item(one, 0), item(two, 1), x_vendor={"k": 1}), indent=1).encode()
        upstream.plays(*answers(raw))
        event = await embed(backend, encoding_format=encoding)
        assert event.raw == raw
        assert event.usage == Usage(prompt_tokens=4)


@pytest.mark.parametrize(
    "odd",
    [
        GOOD,
        answer(item(packed(ONE), 0), item(packed(TWO), 1)),
        answer(item(TWO, 1), item(ONE, 0)),
        answer({"embedding": ONE}, {"embedding": TWO}),
        answer({"index": 1, "embedding": packed(TWO)}, {"index": 0, "embedding": ONE}),
        answer(item(ONE, 0), item(TWO, 1), object="embeddings"),
        answer(item(ONE, 0), item(TWO, 1), object=...),
        answer(item(ONE, 0), item(TWO, 1), usage={"total_tokens": 4}),
        answer(item(ONE, 0), item(TWO, 1), usage={"prompt_tokens": 4}),
    ],
)
@pytest.mark.parametrize("encoding", ["float", "base64"])
async def test_what_an_engine_does_otherwise_is_evened_out(
    backend: OpenAIBackend, upstream: Upstream, odd: dict[str, Any], encoding: str
) -> None:
    upstream.plays(*answers({**odd, "x_vendor": 1}))
    event = await embed(backend, encoding_format=encoding)

    one, two = (ONE, TWO) if encoding == "float" else (packed(ONE), packed(TWO))
    assert json.loads(event.raw) == {**answer(item(one, 0), item(two, 1)), "x_vendor": 1}
    assert event.usage == Usage(prompt_tokens=4)


@pytest.mark.parametrize("usage", [..., None, {}, {"prompt_tokens": 0, "total_tokens": 0}, {"prompt_tokens": None}])
async def test_missing_usage_is_estimated_and_marked(backend: OpenAIBackend, upstream: Upstream, usage: Any) -> None:
    upstream.plays(*answers(answer(item(ONE, 0), item(TWO, 1), usage=usage)))
    event = await embed(backend)

    assert event.usage is not None
    assert event.usage.estimated
    tokens = event.usage.prompt_tokens
    assert tokens > 0
    told = json.loads(event.raw)["usage"]
    assert (told["prompt_tokens"], told["total_tokens"]) == (tokens, tokens)


@pytest.mark.parametrize(
    "broken",
    [
        answer(item(ONE, 0)),
        answer(item(ONE, 0), item(TWO, 1), item(TWO, 2)),
        answer(item(ONE, 0), item(TWO, 0)),
        answer(item(ONE, 1), item(TWO, 2)),
        answer(item(ONE, 0), {"embedding": TWO}),
        answer(item(ONE, 0), item([0.5, None], 1)),
        answer(item(ONE, 0), item([], 1)),
        answer(item([], 0), item([], 1)),
        answer(item(ONE, 0), item([0.5], 1)),
        answer(item(ONE, 0), item([[0.5, 0.5]], 1)),
        answer(item(ONE, 0), item("oops", 1)),
        answer(item(ONE, 0), item("AAA=", 1)),
        answer(item(ONE, 0), item(packed([0.5, float("nan")]), 1)),
        answer(item(ONE, 0), item(packed([float("inf"), 0.5]), 1)),
        answer(item(packed([float("inf"), float("-inf")]), 0), item(ONE, 1)),
        answer(item(ONE, 0), item([1e300, 0.5], 1)),
        answer(item(ONE, 0), {"index": 1}),
        answer(),
        {"choices": []},
        [ONE, TWO],
        answer(item(ONE, 0), item(TWO, 1), usage={"prompt_tokens": -4, "total_tokens": -4}),
        b'{"object":"list","data":[{"index":0,"embedding":[NaN]}]}',
        b'{"data":[],"embedding":' + b"[" * 5000 + b"]" * 5000 + b"}",
        b"",
    ],
)
@pytest.mark.parametrize("encoding", ["float", "base64"])
async def test_an_answer_that_lacks_vectors_or_numbers_is_the_engines_fault(
    backend: OpenAIBackend, upstream: Upstream, broken: Any, encoding: str
) -> None:
    upstream.plays(*answers(broken))
    with pytest.raises(BackendProtocolError) as failure:
        await embed(backend, encoding_format=encoding)
    assert (failure.value.backend, failure.value.model) == ("a", "small")


async def test_a_model_that_the_engine_does_not_name_is_named(backend: OpenAIBackend, upstream: Upstream) -> None:
    for model in (..., None, ""):
        upstream.plays(*answers(answer(item(ONE, 0), item(TWO, 1), model=model)))
        assert json.loads((await embed(backend)).raw) == {**GOOD, "model": "small"}


async def test_dimensions_that_an_engine_ignored_are_refused_by_name(
    backend: OpenAIBackend, upstream: Upstream
) -> None:
    upstream.plays(*answers(GOOD))
    assert (await embed(backend, dimensions=2)).usage == Usage(prompt_tokens=4)
    with pytest.raises(RequestRejected, match="2 dimensions") as refused:
        await embed(backend, dimensions=1)
    assert (refused.value.status, refused.value.param) == (400, "dimensions")


async def test_an_error_inside_a_200_is_an_error(backend: OpenAIBackend, upstream: Upstream) -> None:
    upstream.plays(*answers({"error": {"message": "boom", "code": 500}}))
    with pytest.raises(BackendFailed, match="boom"):
        await embed(backend)


async def test_an_engine_that_hangs_meets_the_deadline_and_is_hung_up_on(
    backend: OpenAIBackend, upstream: Upstream
) -> None:
    upstream.plays(Hang())
    call = make_call("embeddings", input="a", timeouts=Timeouts(total_s=0.1))
    with anyio.fail_after(2), pytest.raises(BackendTimeout):
        await collect(backend, call)
    await upstream.until_hung_up()


@pytest.mark.parametrize("encoding", ["float", "base64"])
async def test_a_large_answer_is_read_the_same(backend: OpenAIBackend, upstream: Upstream, encoding: str) -> None:
    numbers = [n / 4096 for n in range(2048)]
    raw = json.dumps(answer(*(item(numbers, n) for n in range(64)))).encode()
    assert len(raw) > INLINE_BYTES
    upstream.plays(*answers(raw))
    event = await embed(backend, input=["a"] * 64, encoding_format=encoding)

    last = json.loads(event.raw)["data"][-1]["embedding"]
    assert (last if encoding == "float" else list(from_base64(last))) == numbers


async def test_more_vectors_than_can_be_read_are_the_requests_fault(backend: OpenAIBackend, upstream: Upstream) -> None:
    upstream.plays(Head(headers={"Content-Type": "application/json"}), *[Send(b"1.0," * 2**18)] * 65)
    with pytest.raises(RequestRejected, match="fewer texts") as refused:
        await embed(backend)
    assert (refused.value.status, refused.value.param) == (400, "input")


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_base64_is_float32_little_endian_and_loses_nothing(vector: list[float]) -> None:
    assert to_base64(vector) == packed(vector)
    assert list(from_base64(to_base64(vector))) == vector


@pytest.mark.parametrize(
    ("given_", "count"),
    [
        ("a", 1),
        (["a"], 1),
        (["a", "b"], 2),
        ([1, 2, 3], 1),
        ([[1], [2, 3]], 2),
        (["a"] * 2048, 2048),
        ([[0] * 8191], 1),
    ],
)
def test_every_form_of_input_is_that_many_inputs(given_: Any, count: int) -> None:
    assert len(each_input(given_)) == count


EMPTY: list[Any] = ["", [], [""], ["a", ""], [[]], [[1], []]]
MIXED: list[Any] = [["a", 1], [1, "a"], ["a", [1]], [1, [1]]]
TOO_MUCH: list[Any] = [["a"] * 2049, [[1]] * 2049, [-1], [[1], [-2]]]


@pytest.mark.parametrize("given_", [*EMPTY, *MIXED, *TOO_MUCH])
def test_what_is_no_input_is_refused(given_: Any) -> None:
    with pytest.raises(BadInput):
        each_input(given_)
