from __future__ import annotations

import asyncio

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.tokens import BytesPerToken, Vocabulary, count_in, count_tokens, load_encoding


@pytest.mark.parametrize(
    ("vocabulary", "text", "ids"),
    [
        ("cl100k_base", "hello world", [15339, 1917]),
        ("cl100k_base", "tiktoken is great!", [83, 1609, 5963, 374, 2294, 0]),
    ],
)
def test_token_ids_are_the_published_ones(vocabulary: Vocabulary, text: str, ids: list[int]) -> None:
    assert load_encoding(vocabulary).encode_ordinary(text) == ids


@pytest.mark.parametrize(
    ("vocabulary", "text", "tokens"),
    [
        ("cl100k_base", "お誕生日おめでとう", 9),
        ("o200k_base", "お誕生日おめでとう", 8),
        ("cl100k_base", "2 + 2 = 4", 7),
        ("o200k_base", "", 0),
    ],
)
async def test_counts_are_the_published_ones(vocabulary: Vocabulary, text: str, tokens: int) -> None:
    assert await count_tokens(text, vocabulary) == tokens


def test_special_tokens_are_known_but_never_read_from_a_text() -> None:
    for vocabulary in ("cl100k_base", "o200k_base"):
        encoding = load_encoding(vocabulary)
        assert encoding.encode("<|endoftext|>", allowed_special="all") == [encoding.eot_token]
        assert count_in(encoding, "<|endoftext|>") > 1


async def test_a_long_text_holds_up_neither_the_loop_nor_a_caller_that_leaves() -> None:
    await count_tokens("warm")
    ticks = 0
    with anyio.move_on_after(5):
        async with asyncio.TaskGroup() as group:
            long = group.create_task(count_tokens("word " * 400_000))
            while not long.done():
                ticks += 1
                await asyncio.sleep(0.001)
    assert long.result() == pytest.approx(400_000, rel=0.01)
    assert ticks > 5

    with anyio.move_on_after(0.01) as scope:
        await count_tokens("word " * 400_000)
    assert scope.cancelled_caught


def test_a_text_longer_than_a_piece_counts_almost_the_same_as_in_one() -> None:
    encoding = load_encoding("o200k_base")
    text = "The quick brown fox. " * 10_000
    assert 0 <= count_in(encoding, text) - len(encoding.encode_ordinary(text)) <= len(text) // 100_000 + 1


def test_an_unknown_text_is_estimated_at_3_and_a_half_bytes_per_token_rounded_up() -> None:
    estimator = BytesPerToken()
    assert [estimator.estimate("k", size) for size in (0, 1, 7, 8)] == [0, 1, 2, 3]


@given(st.floats(1, 20), st.integers(100, 100_000))
def test_the_ratio_approaches_what_backends_report(ratio: float, tokens: int) -> None:
    estimator = BytesPerToken()
    size_bytes = round(ratio * tokens)
    for _ in range(100):
        estimator.learn("k", size_bytes, tokens)
    assert estimator.estimate("k", size_bytes) == pytest.approx(tokens, rel=0.02, abs=1)


@given(st.lists(st.tuples(st.integers(-5, 10**9), st.integers(-5, 10**9)), max_size=50))
def test_whatever_is_reported_an_estimate_stays_between_a_byte_and_20_bytes_per_token(
    reports: list[tuple[int, int]],
) -> None:
    estimator = BytesPerToken()
    for size_bytes, tokens in reports:
        estimator.learn("k", size_bytes, tokens)
    assert 50 <= estimator.estimate("k", 1000) <= 1000


def test_keys_learn_apart_and_only_the_last_used_are_remembered() -> None:
    estimator = BytesPerToken(max_keys=2, weight=1.0)
    for key, size_bytes in (("a", 20), ("b", 50), ("a", 20), ("c", 100)):
        estimator.learn(key, size_bytes, 10)
    assert [estimator.estimate(key, 70) for key in ("a", "b", "c")] == [35, 20, 7]
