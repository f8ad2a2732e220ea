"""Wire to domain: an OpenAI request body becomes a `ChatRequest`, or an error that names the field."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from backends.chat import MEDIA_BYTES, ChatRequest, EncodingFormat, Message
from backends.embeddings import BadInput, Input, each_input
from gateway.errors import RequestError

TOKEN_ID_BYTES = 4
"""What a token that is given as its id counts as, whatever its digits: about the text it stands for."""


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True):
    type: str


class _Common(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that Forebay reads. Every other one is carried to the engine as it came."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=128)] | None = None
    seed: int | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    stop: str | list[str] | None = None


class ChatCompletionRequest(_Common, frozen=True, kw_only=True):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[tuple[Message, ...], msgspec.Meta(min_length=1)]
    max_completion_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
    tools: list[msgspec.Raw] | None = None
    functions: list[msgspec.Raw] | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None


class CompletionRequest(_Common, frozen=True, kw_only=True):
    """The body of `POST /v1/completions`."""

    prompt: str | list[Any]
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of `POST /v1/embeddings`, as far as Forebay reads it."""

    model: str
    input: Input
    encoding_format: EncodingFormat | None = None
    dimensions: Annotated[int, msgspec.Meta(ge=1)] | None = None
    stream: bool | None = None


_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_chat = msgspec.json.Decoder(ChatCompletionRequest)
_completion = msgspec.json.Decoder(CompletionRequest)
_embedding = msgspec.json.Decoder(EmbeddingRequest)


def read_chat(body: bytes) -> ChatRequest:
    """Read a chat completion request. Raises `RequestError` naming the field that is wrong."""
    fields, wire = _read(body, _chat)
    parts = [part for message in wire.messages if isinstance(message.content, list) for part in message.content]
    media_bytes = [part.media_bytes for part in parts if part.media_bytes]
    return ChatRequest(
        operation="chat",
        model=wire.model,
        fields=fields,
        messages=wire.messages,
        stream=bool(wire.stream),
        include_usage=bool(wire.stream_options and wire.stream_options.include_usage),
        n=wire.n or 1,
        seed=wire.seed,
        max_tokens=wire.max_tokens if wire.max_completion_tokens is None else wire.max_completion_tokens,
        temperature=wire.temperature,
        wants_tools=bool(wire.tools or wire.functions),
        wants_json_schema=wire.response_format is not None and wire.response_format.type == "json_schema",
        wants_logprobs=bool(wire.logprobs),
        has_images=any(part.type == "image_url" for part in parts),
        size_bytes=len(body) - sum(media_bytes) + len(media_bytes) * MEDIA_BYTES,
    )


def read_completion(body: bytes) -> ChatRequest:
    """Read a text completion request. Raises `RequestError` naming the field that is wrong."""
    fields, wire = _read(body, _completion)
    return ChatRequest(
        operation="text_completion",
        model=wire.model,
        fields=fields,
        prompt=wire.prompt if isinstance(wire.prompt, str) else None,
        prompts=_prompts(wire.prompt),
        stream=bool(wire.stream),
        include_usage=bool(wire.stream_options and wire.stream_options.include_usage),
        n=wire.n or 1,
        seed=wire.seed,
        max_tokens=wire.max_tokens,
        temperature=wire.temperature,
        wants_logprobs=bool(wire.logprobs),
        size_bytes=len(body),
    )


def read_embeddings(body: bytes) -> ChatRequest:
    """Read a request for embeddings. Raises `RequestError` naming the field that is wrong."""
    fields, wire = _read(body, _embedding)
    try:
        inputs = each_input(wire.input)
    except BadInput as bad:
        raise RequestError(f"'input': {bad}", param="input", code="invalid_value") from None
    if wire.stream:
        raise RequestError("'stream': embeddings are not streamed; leave it out", param="stream", code="invalid_value")
    return ChatRequest(
        operation="embeddings",
        model=wire.model,
        fields=fields,
        inputs=len(inputs),
        encoding_format=wire.encoding_format or "float",
        dimensions=wire.dimensions,
        temperature=0.0,  # nothing is sampled
        size_bytes=sum(len(ids) for ids in inputs if isinstance(ids, list)) * TOKEN_ID_BYTES or len(body),
    )


def _prompts(prompt: str | list[Any]) -> int:
    """A list of texts, or of lists of tokens, is as many prompts; one list of tokens is one."""
    return len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1


def _read(body: bytes, decoder: msgspec.json.Decoder[Any]) -> tuple[dict[str, msgspec.Raw], Any]:
    try:
        body.decode()  # msgspec skips over the strings of fields it was not asked for, whatever bytes they hold
        return _fields.decode(body), decoder.decode(body)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `$")
        param = ".".join(filter(None, [path.rstrip("`").lstrip("."), _missing_field(reason)])) or None
        where = f"'{param}': " if param else ""
        raise RequestError(f"{where}{reason[:1].lower()}{reason[1:]}", param=param, code="invalid_value") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    except RecursionError:
        raise RequestError("the body is nested too deeply", code="invalid_json") from None


def _missing_field(reason: str) -> str | None:
    """The field in msgspec's "Object missing required field `messages`"."""
    return reason.split("`")[1] if "missing required field" in reason and "`" in reason else None
