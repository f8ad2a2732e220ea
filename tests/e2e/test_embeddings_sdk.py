"""The official Python SDK's embeddings, answered by our own embedder: a real process with the real model."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from tests.engines import embedder_server
from tests.world import POLICY, World, open_world

PARAPHRASES = ("How do I reset my password?", "I forgot my password, how can I set a new one?")
UNRELATED = "Bananas are yellow."


@pytest.fixture(scope="module")
async def world() -> AsyncGenerator[World, None]:
    with embedder_server() as url:
        policy = POLICY.replace("models:", f"  engine: {{kind: openai, url: '{url}'}}\nmodels:").replace(
            "routes:",
            "  minilm: {backends: [engine], task: embeddings, context_window: 256, price: {input: 0.002}}\nroutes:",
        )
        async with open_world(policy=policy) as world:
            yield world


def sdk(world: World, *, strict: bool = False) -> AsyncOpenAI:
    """Strict, the SDK checks a vector before it unpacks it, and so refuses the base64 that it asked for itself."""
    return AsyncOpenAI(
        base_url=f"{world.url}/v1", api_key=world.key.key, max_retries=0, _strict_response_validation=strict
    )


@pytest.fixture(scope="module")
async def client(world: World) -> AsyncGenerator[AsyncOpenAI, None]:
    async with sdk(world) as client:
        yield client


async def embed(client: AsyncOpenAI, input_: Any, **options: Any) -> list[list[float]]:
    answer = await client.embeddings.create(model="minilm", input=input_, **options)
    assert answer.object == "list"
    assert [item.index for item in answer.data] == list(range(len(answer.data)))
    return [item.embedding for item in answer.data]


def cosine(one: list[float], other: list[float]) -> float:
    return math.sumprod(one, other) if hasattr(math, "sumprod") else sum(a * b for a, b in zip(one, other, strict=True))


async def test_base64_which_the_sdk_asks_for_by_itself_and_numbers_are_the_same_vector(
    world: World, client: AsyncOpenAI
) -> None:
    [packed] = await embed(client, PARAPHRASES[0])
    async with sdk(world, strict=True) as strict:
        [numbers] = await embed(strict, PARAPHRASES[0], encoding_format="float")
    assert len(packed) == 384
    assert packed == pytest.approx(numbers, abs=1e-7)
    assert cosine(packed, packed) == pytest.approx(1.0, abs=1e-5)


async def test_a_list_is_answered_in_order_and_meaning_is_kept(client: AsyncOpenAI) -> None:
    one, other, unrelated = await embed(client, [*PARAPHRASES, UNRELATED])
    assert cosine(one, other) > 0.8 > 0.2 > cosine(one, unrelated)
    assert [one] == await embed(client, PARAPHRASES[0])
    assert len(await embed(client, [f"text {n}" for n in range(300)])) == 300


async def test_usage_and_headers_are_to_be_had_and_a_repetition_comes_from_the_cache(client: AsyncOpenAI) -> None:
    first, again = [
        await client.embeddings.with_raw_response.create(model="minilm", input="once and again") for _ in range(2)
    ]
    assert [raw.headers["x-forebay-cache"] for raw in (first, again)] == ["miss", "exact"]
    assert first.parse() == again.parse()
    assert first.parse().usage.prompt_tokens == 5
    assert first.headers["x-forebay-cost-usd"] == "0.000000010"
    assert again.headers["x-forebay-cost-usd"] == "0.000000000"


@pytest.mark.parametrize(
    ("options", "param", "code"),
    [
        ({"input": [1, 2, 3]}, "input", "unsupported_value"),
        ({"input": [[1, 2], [3]]}, "input", "unsupported_value"),
        ({"input": ""}, "input", "invalid_value"),
        ({"input": "word " * 300}, "input", "context_length_exceeded"),
        ({"input": ["short", "word " * 300]}, "input", "context_length_exceeded"),
        ({"input": "a", "dimensions": 256}, "dimensions", "unsupported_value"),
        ({"input": "a", "extra_body": {"stream": True}}, "stream", "invalid_value"),
        ({"input": "a", "model": "small"}, "model", "unsupported_by_model"),
    ],
)
async def test_what_it_cannot_do_is_a_bad_request_that_names_the_field(
    client: AsyncOpenAI, options: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.embeddings.create(**{"model": "minilm", **options})
    assert (refused.value.param, refused.value.code) == (param, code)
    assert refused.value.request_id


async def test_its_own_dimensions_may_be_asked_for(client: AsyncOpenAI) -> None:
    assert len((await embed(client, "sized", dimensions=384))[0]) == 384
