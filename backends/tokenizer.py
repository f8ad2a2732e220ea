"""A model's own tokenizer, from the `tokenizer.json` in its folder.

`backends.tokens` counts with vocabularies that ship with us; this one counts as the model itself does. Loading took
0.1 s for SmolLM2's 49,000 tokens and 1.3 s for Llama 3's 128,000, counting 0.4 ms per 1,000 characters of English, on
two busy cores: `load` and `count_tokens` keep both off the event loop.
"""

from __future__ import annotations

from pathlib import Path

import anyio.to_thread
import tokenizers

_ON_THE_LOOP_CHARS = 1_000
"""Texts up to this length are counted where they are asked for, in 0.4 ms: a thread costs as much as it would save."""

_IDS = 2**32
"""How many token ids the library can tell apart."""


class Tokenizer:
    """Reads a text into tokens as its model would.

    The special tokens that it adds to a prompt by itself are left out. Names of special tokens in a text are those
    tokens, as in a prompt from a chat template. A text has no lone surrogates, as no JSON has.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.post_processor = None  # adds special tokens, and takes the white space out of what a token covers
        self._tokenizer = tokenizer

    @classmethod
    def from_json(cls, content: bytes) -> Tokenizer:
        """The tokenizer that a `tokenizer.json` holds. Blocks for the time of loading. Raises ValueError otherwise."""
        try:
            return cls(tokenizers.Tokenizer.from_buffer(content))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"not a tokenizer: {error}") from error

    @classmethod
    def from_file(cls, path: Path) -> Tokenizer:
        """As `from_json`, of a file. Blocks. Raises OSError and ValueError."""
        return cls.from_json(path.read_bytes())

    @classmethod
    async def load(cls, path: Path) -> Tokenizer:
        """As `from_file`, in a worker thread."""
        return await anyio.to_thread.run_sync(cls.from_file, path)

    def count(self, text: str) -> int:
        """Tokens of `text`. Long texts hold up the event loop: see `count_tokens`."""
        # encode() keeps the GIL for its whole time, encode_batch_fast() lets it go: 700 ms against 5 ms for 1 MB
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return len(encoding)

    async def count_tokens(self, text: str) -> int:
        """Tokens of `text`; from 1,000 characters in a worker thread, so that a long one holds up no request.

        A caller that is cancelled leaves at once; its count ends for nobody.
        """
        if len(text) <= _ON_THE_LOOP_CHARS:
            return self.count(text)
        return await anyio.to_thread.run_sync(self.count, text, abandon_on_cancel=True)

    def split(self, text: str) -> list[str]:
        """The text of each token of `text`, in order; joined they are `text`.

        A character that several tokens share (byte fallback, byte-level merges) belongs to the first of them, and the
        others get "". Text that no token covers (the tokenizer normalised it away) belongs to the token after it, at
        the end to the last one, and is one piece where there is no token at all.
        """
        [encoding] = self._tokenizer.encode_batch([text], add_special_tokens=False)
        pieces = []
        told = 0
        for _, end in encoding.offsets:
            pieces.append(text[told:end])
            told += len(pieces[-1])
        if told < len(text):
            pieces.append((pieces.pop() if pieces else "") + text[told:])
        return pieces

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name in the vocabulary, which for a special token is its text."""
        return self._tokenizer.token_to_id(token)

    def token_of(self, token_id: int) -> str | None:
        """The name in the vocabulary of the token with this id; None where there is none."""
        return self._tokenizer.id_to_token(token_id) if 0 <= token_id < _IDS else None
