"""Embeddings on the wire: what `input` may be, and an engine's answer brought to what was asked for.

Engines differ: some ignore `encoding_format`, some leave out usage, indices or the model, some give vectors in another
order or write `null` where a number was lost. A client sees none of it: it gets what OpenAI would have sent, or an
error.
"""

from __future__ import annotations

import base64
import binascii
import math
import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import anyio.to_thread
import msgspec

from backends.backend import Call
from backends.chat import ChatRequest, EncodingFormat, Event, Usage
from backends.errors import BackendProtocolError, RequestRejected
from backends.tokens import BytesPerToken

MAX_INPUTS = 2048
"""OpenAI's bound on the inputs of one request. How long one of them may be, its model says."""

INLINE_BYTES = 256 * 1024
"""A larger answer is read in a thread: 1 MB of numbers takes some 15 ms."""

Input = str | list[str | int | list[int]]
"""`input` as OpenAI has it: a text, a list of texts, a text as token ids, or a list of those."""

Inputs = Sequence[str] | Sequence[list[int]]


class BadInput(ValueError):
    """`input` is of the right type and still nothing that can be embedded; the message says why."""


def each_input(given: Input) -> Inputs:
    """What is to be embedded, one by one: all texts, or all token ids. Raises `BadInput`, where OpenAI refuses too."""
    if isinstance(given, str):
        inputs: list[Any] = [given]
    elif given and all(isinstance(item, int) for item in given):
        inputs = [given]
    else:
        inputs = given
    if not inputs:
        raise BadInput("is an empty list; give at least one text")
    if len(inputs) > MAX_INPUTS:
        raise BadInput(f"has {len(inputs)} entries; give at most {MAX_INPUTS} at once")
    kinds = {type(item) for item in inputs}
    if kinds != {str} and kinds != {list}:
        raise BadInput("mixes texts and tokens; give texts only, or lists of token ids only")
    for place, item in enumerate(inputs):
        if not item:
            raise BadInput(f"has an empty entry at {place}; leave it out" if len(inputs) > 1 else "is empty")
        if isinstance(item, list) and min(item) < 0:
            raise BadInput(f"has a token id below 0 in the entry at {place}")
    return inputs


def to_base64(vector: Sequence[float]) -> str:
    """The vector as float32, little endian, in base64."""
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()


def from_base64(text: str) -> Sequence[float]:
    """The numbers in `text`. Raises ValueError where it holds none, or not whole ones."""
    numbers = array("f")
    numbers.frombytes(base64.b64decode(text, validate=True))
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


async def read_embeddings(body: bytes, call: Call, backend: str) -> Event:
    """An engine's answer as what `call` asked for: one vector per input, in order, in the encoding, with usage.

    Numbers are as the engine gave them, to float32. Where it reported no usage, there is an estimate, marked as one.
    Raises `BackendProtocolError` where vectors are missing, not numbers or of different lengths, and `RequestRejected`
    where the model did not take the `dimensions` asked for.
    """
    try:
        if len(body) <= INLINE_BYTES:
            return _read(body, call, backend)
        return await anyio.to_thread.run_sync(_read, body, call, backend, abandon_on_cancel=True)
    except (msgspec.DecodeError, RecursionError, _Malformed) as error:
        message = f"the engine sent what are no embeddings: {error}"
        raise BackendProtocolError(message, backend=backend, model=call.model) from error


class _Malformed(Exception):
    pass


_Count = Annotated[int, msgspec.Meta(ge=0)]


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: _Count | None = None
    total_tokens: _Count | None = None


class _Embedding(msgspec.Struct, frozen=True):
    embedding: msgspec.Raw
    index: int | None = None
    object: str | None = None


class _Answer(msgspec.Struct, frozen=True):
    data: list[_Embedding]
    object: str | None = None
    model: str | None = None
    usage: _Usage | None = None


_answers = msgspec.json.Decoder(_Answer)
_vectors = msgspec.json.Decoder(list[float] | str)
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


def _read(body: bytes, call: Call, backend: str) -> Event:
    request = call.request
    answer = _answers.decode(body)
    usage = _usage(answer.usage, request)
    items = _in_order(answer.data, request.inputs)
    embeddings = [_Vector(item.embedding, request.encoding_format) for item in items]
    _check_dimensions(embeddings, call, backend)
    if not (
        answer.object == "list"
        and answer.model
        and all(item.index == place and item.object == "embedding" for place, item in enumerate(answer.data))
        and all(embedding.as_asked for embedding in embeddings)
        and not usage.estimated
        and answer.usage == _Usage(usage.prompt_tokens, usage.total_tokens)
    ):
        body = _rewritten(body, [embedding.encoded() for embedding in embeddings], answer.model or call.model, usage)
    return Event(raw=body, whole=True, usage=usage)


def _usage(told: _Usage | None, request: ChatRequest) -> Usage:
    tokens = (told.prompt_tokens or told.total_tokens) if told is not None else None
    if not tokens:
        return Usage(prompt_tokens=BytesPerToken().estimate((), request.size_bytes), estimated=True)
    return Usage(prompt_tokens=tokens)


def _in_order(data: list[_Embedding], inputs: int) -> list[_Embedding]:
    """The embeddings by their index, or as they came where they have none."""
    if len(data) != inputs:
        raise _Malformed(f"{len(data)} vectors for {inputs} inputs")
    indices = [item.index for item in data]
    if all(index is None for index in indices):
        return data
    by_index = {item.index: item for item in data}
    if set(by_index) != set(range(inputs)):
        raise _Malformed("their indices are not those of the inputs")
    return [by_index[index] for index in range(inputs)]


class _Vector:
    """One vector, read and checked, and how it goes on."""

    __slots__ = ("_format", "_raw", "as_asked", "dimensions", "numbers")

    def __init__(self, raw: msgspec.Raw, encoding_format: EncodingFormat) -> None:
        self._raw = raw
        self._format = encoding_format
        given = _vectors.decode(raw)
        try:
            self.numbers = from_base64(given) if isinstance(given, str) else array("f", given)
        except (ValueError, binascii.Error) as error:
            raise _Malformed(f"a vector that is not base64 of float32: {error}") from None
        self.as_asked = isinstance(given, str) == (encoding_format == "base64")
        self.dimensions = len(self.numbers)
        # One that is not finite makes the sum so; no sum of float32s is beyond a float64.
        if not math.isfinite(sum(self.numbers)):
            raise _Malformed("a vector with a number that is none")

    def encoded(self) -> msgspec.Raw:
        if self.as_asked:
            return self._raw
        if self._format == "base64":
            return msgspec.Raw(msgspec.json.encode(to_base64(self.numbers)))
        return msgspec.Raw(msgspec.json.encode(list(self.numbers)))


def _check_dimensions(vectors: Iterable[_Vector], call: Call, backend: str) -> None:
    lengths = {vector.dimensions for vector in vectors}
    if len(lengths) != 1 or 0 in lengths:
        raise _Malformed(f"vectors of {', '.join(map(str, sorted(lengths)))} dimensions")
    (dimensions,) = lengths
    if call.request.dimensions not in (None, dimensions):
        raise RequestRejected(
            f"'dimensions': the model's vectors have {dimensions} dimensions, and it does not shorten them to"
            f" {call.request.dimensions}; leave it out",
            code="unsupported_value",
            param="dimensions",
            backend=backend,
            model=call.model,
        )


def _rewritten(body: bytes, vectors: Sequence[msgspec.Raw], model: str, usage: Usage) -> bytes:
    """The answer with these vectors; what else it says on top is kept."""
    said: dict[str, Any] = dict(_fields.decode(body))
    said["object"] = "list"
    said["model"] = model
    said["data"] = [{"object": "embedding", "index": place, "embedding": raw} for place, raw in enumerate(vectors)]
    told = _fields.decode(said["usage"]) if bytes(said.get("usage", b"null")) != b"null" else {}
    said["usage"] = {**told, "prompt_tokens": usage.prompt_tokens, "total_tokens": usage.total_tokens}
    return msgspec.json.encode(said)
