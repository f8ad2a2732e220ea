"""How many tokens a text is: counted with tiktoken, off the event loop, or estimated from its size, for nothing.

tiktoken costs 0.1 to 0.2 ms per 1,000 tokens, more than the rest of a request; reserve on an estimate, settle on what
the backend reports. The vocabularies ship with the package (see `ranks/`): counting needs no network and no variable.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import math
from collections import OrderedDict
from collections.abc import Hashable
from importlib import resources
from typing import Literal

import anyio
import anyio.to_thread
import msgspec
import tiktoken
from anyio.lowlevel import RunVar

Vocabulary = Literal["cl100k_base", "o200k_base"]

_PIECE_CHARS = 100_000
"""tiktoken's time grows faster than the text within one word; a longer text is counted in pieces of this size."""


class _Ranks(msgspec.Struct, frozen=True):
    """What tiktoken's public definition of a vocabulary says, besides its ranks."""

    sha256: str
    """Of the file as OpenAI publishes it."""
    pattern: str
    special_tokens: dict[str, int]


_RANKS: dict[Vocabulary, _Ranks] = {
    "cl100k_base": _Ranks(
        sha256="223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        pattern=(
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
            r"|\s+(?!\S)|\s"
        ),
        special_tokens={
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": _Ranks(
        sha256="446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        pattern=(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
            r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        special_tokens={"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
    ),
}


@functools.cache
def load_encoding(vocabulary: Vocabulary) -> tiktoken.Encoding:
    """A vocabulary, built once from the ranks that ship with the package: up to 1 s of CPU, never on the event loop.

    Raises ValueError where the shipped file is not the published one.
    """
    ranks = _RANKS[vocabulary]
    packed = resources.files("backends").joinpath("ranks", f"{vocabulary}.tiktoken.gz").read_bytes()
    published = gzip.decompress(packed)
    if hashlib.sha256(published).hexdigest() != ranks.sha256:
        raise ValueError(f"the ranks of {vocabulary} are not the published ones")
    lines = (line.split() for line in published.splitlines())
    return tiktoken.Encoding(
        name=vocabulary,
        pat_str=ranks.pattern,
        mergeable_ranks={base64.b64decode(token): int(rank) for token, rank in lines},
        special_tokens=ranks.special_tokens,
    )


def count_in(encoding: tiktoken.Encoding, text: str) -> int:
    """Tokens of `text`, names of special tokens read as plain text; up to one more per 100,000 characters."""
    pieces = (text[start : start + _PIECE_CHARS] for start in range(0, len(text), _PIECE_CHARS))
    return sum(len(encoding.encode_ordinary(piece)) for piece in pieces)


async def count_tokens(text: str, vocabulary: Vocabulary = "o200k_base") -> int:
    """Tokens of `text`, counted in a worker thread, one text at a time, so that a long one holds up no request.

    The first count of a vocabulary loads it. A caller that is cancelled leaves at once; its count ends for nobody.
    """
    return await anyio.to_thread.run_sync(_count, text, vocabulary, limiter=_one_at_a_time(), abandon_on_cancel=True)


_limiter: RunVar[anyio.CapacityLimiter] = RunVar("token counting")


def _one_at_a_time() -> anyio.CapacityLimiter:
    """This event loop's limiter: it also keeps two first counts from loading the same vocabulary."""
    try:
        return _limiter.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(1)
        _limiter.set(limiter)
        return limiter


def _count(text: str, vocabulary: Vocabulary) -> int:
    return count_in(load_encoding(vocabulary), text)


class BytesPerToken:
    """Estimates prompt tokens from a text's size, by a ratio learned per key (tenant, model) from what backends report.

    The ratio is an exponentially weighted mean. Where nothing is learned it is 3.5 bytes per token: measured were 3.2
    (Chinese, cl100k_base) to 4.9 (English prose), and a low ratio reserves rather too much than too little.
    At most `max_keys` keys are remembered, those used last.
    """

    def __init__(self, *, start_ratio: float = 3.5, weight: float = 0.1, max_keys: int = 10_000) -> None:
        self._start_ratio = start_ratio
        self._weight = weight
        self._max_keys = max_keys
        self._ratios: OrderedDict[Hashable, float] = OrderedDict()

    def estimate(self, key: Hashable, size_bytes: int) -> int:
        """Tokens that `size_bytes` bytes of UTF-8 will be, rounded up."""
        return math.ceil(size_bytes / self._ratios.get(key, self._start_ratio))

    def learn(self, key: Hashable, size_bytes: int, tokens: int) -> None:
        """Take in what a backend reported; a ratio outside 1 to 20 bytes per token counts as the nearer of the two."""
        if size_bytes <= 0 or tokens <= 0:
            return
        seen = min(max(size_bytes / tokens, 1.0), 20.0)
        known = self._ratios.get(key, self._start_ratio)
        self._ratios[key] = known + self._weight * (seen - known)
        self._ratios.move_to_end(key)
        if len(self._ratios) > self._max_keys:
            self._ratios.popitem(last=False)
