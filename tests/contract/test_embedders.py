"""The contract of `backends.embedder.Embedder` over the real model, and that it is the model it says it is."""

from __future__ import annotations

import functools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.embedder import MAX_BATCH_TEXTS, MAX_BATCH_TOKENS, Embedder, MiniLmEmbedder, Vectors, batches
from tests.engines import ROOT

TEXTS = (
    "",
    "   ",
    "x",
    "How do I reset my password?",
    "Ünïcödé, 漢字 and 🙂",
    "[SEP] [CLS] [MASK]",
    "a" * 500,
    "word " * 60,
    "word " * 250,
    "line\n\x00break\t",
)
PARAPHRASES = (
    ("How do I reset my password?", "I forgot my password, how can I set a new one?"),
    ("What is the capital of France?", "Which city is the capital of France?"),
    ("The cat sat on the mat.", "A cat was sitting on the mat."),
)
EXAMPLE = "This is an example sentence"
GOLDEN = {
    EXAMPLE: (0.06679, 0.06119, 0.05091, 0.07902),
    "How do I reset my password?": (0.00537, -0.06111, -0.07128, -0.03423),
}
"""The first numbers of two vectors, as these weights made them when this was written."""
PUBLISHED = (0.0676569, 0.0634959, 0.0487131, 0.0793050, 0.0374481)
"""The first numbers of `EXAMPLE`, by the float32 weights of sentence-transformers/all-MiniLM-L6-v2."""


@pytest.fixture(scope="module", params=["minilm"])
def embedder(request: pytest.FixtureRequest) -> Embedder:
    return {"minilm": _shared}[request.param]()


def vectors_of(embedder: Embedder, *texts: str) -> Vectors:
    return embedder.embed([embedder.tokenize(text) for text in texts])


def test_a_vector_per_text_in_order_finite_and_of_length_one(embedder: Embedder) -> None:
    vectors = vectors_of(embedder, *TEXTS)

    assert vectors.shape == (len(TEXTS), embedder.dimensions)
    assert vectors.dtype == np.float32
    assert np.isfinite(vectors).all()
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5
    assert vectors_of(embedder).shape == (0, embedder.dimensions)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(TEXTS) | st.text(max_size=80), min_size=1, max_size=10))
def test_a_text_has_one_vector_bit_for_bit_in_any_company(texts: list[str]) -> None:
    embedder = _shared()
    together = vectors_of(embedder, *texts)
    for text, vector in zip(texts, together, strict=True):
        assert (vectors_of(embedder, text)[0] == vector).all()


@functools.cache
def _shared() -> MiniLmEmbedder:
    """For laws, which get no fixtures."""
    return MiniLmEmbedder()


def test_another_process_makes_the_same_vector(embedder: Embedder) -> None:
    program = """
from backends.embedder import MiniLmEmbedder
embedder = MiniLmEmbedder()
print(embedder.embed([embedder.tokenize("x y z")]).tobytes().hex())
"""
    made = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert bytes.fromhex(made.stdout.strip()) == vectors_of(embedder, "x y z").tobytes()


def test_a_text_beyond_the_window_is_cut_and_says_so(embedder: Embedder) -> None:
    window = embedder.window_tokens
    fits, long = embedder.tokenize("word " * (window - 2)), embedder.tokenize("word " * (window - 1))

    assert (fits.tokens, fits.full_tokens, fits.truncated) == (window, window, False)
    assert (long.tokens, long.full_tokens, long.truncated) == (window, window + 1, True)
    assert fits.ids == long.ids
    assert (vectors_of(embedder, "word " * (window + 99)) == vectors_of(embedder, "word " * (window - 2))).all()


def test_a_text_cannot_frame_itself(embedder: Embedder) -> None:
    """Names of special tokens are words like others: `[SEP]` in a text does not end it."""
    first, *inside, last = embedder.tokenize("one [SEP] two [CLS]").ids
    assert first not in inside
    assert last not in inside


def test_what_means_the_same_is_nearer_than_what_does_not(embedder: Embedder) -> None:
    left = vectors_of(embedder, *(one for one, _ in PARAPHRASES))
    right = vectors_of(embedder, *(other for _, other in PARAPHRASES))
    similarity = left @ right.T

    same = np.diag(similarity)
    others = similarity[~np.eye(len(PARAPHRASES), dtype=bool)]
    assert same.min() > 0.8
    assert others.max() < 0.3


def test_the_numbers_are_the_models() -> None:
    vectors = vectors_of(_shared(), *GOLDEN)
    assert np.abs(vectors[:, :4] - np.array(list(GOLDEN.values()))).max() < 1e-3


def test_they_are_near_those_of_the_full_weights() -> None:
    assert np.abs(vectors_of(_shared(), EXAMPLE)[0, :5] - np.array(PUBLISHED)).max() < 5e-3


@given(st.lists(st.integers(2, 256), max_size=40))
def test_batches_hold_every_text_once_and_are_small_and_filled(tokens: list[int]) -> None:
    found = list(batches(tokens))

    assert sorted(index for batch in found for index in batch) == list(range(len(tokens)))
    for batch in found:
        sizes = [tokens[index] for index in batch]
        padded = len(sizes) * max(sizes)
        assert len(sizes) <= MAX_BATCH_TEXTS
        assert padded <= MAX_BATCH_TOKENS
        assert sum(sizes) >= 0.75 * padded


def test_similar_short_texts_share_a_batch() -> None:
    assert [len(batch) for batch in batches([10] * 20)] == [8, 8, 4]
