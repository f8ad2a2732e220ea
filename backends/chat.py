"""The domain's words: a request, the events of an answer, and what it used.

OpenAI's JSON is the shape that both sides of a gateway speak, so an event keeps the JSON it came in (`raw`) next to a
partial view of it that holds only what Forebay decides on. Nothing is re-encoded unless something changed it, and
fields that we do not know travel along unharmed. A backend that speaks another protocol encodes its events once, here.

Units: counts are tokens, times are seconds, `created` is Unix time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

Operation = Literal["chat", "text_completion", "embeddings"]
"""What is asked for, by OpenTelemetry's `gen_ai.operation.name`."""

EncodingFormat = Literal["float", "base64"]
"""How a vector is written: as numbers, or as float32, little endian, in base64."""

MEDIA_BYTES = 2_800
"""What an image or a sound counts as, whatever its size in the body: some 800 tokens, as a 512 px image takes."""


class Message(msgspec.Struct, frozen=True):
    """One message of a conversation, as far as Forebay reads it."""

    role: str
    content: str | list[ContentPart] | None = None
    tool_calls: tuple[msgspec.Raw, ...] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """The message's text, its parts joined by newlines; images and audio count as nothing."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "\n".join(part.text for part in self.content if part.text)


class ContentPart(msgspec.Struct, frozen=True):
    """One part of a message that has several."""

    type: str
    text: str | None = None
    image_url: Any = None
    input_audio: Any = None

    @property
    def media_bytes(self) -> int:
        """Size of what is not text."""
        return sum(
            len(value)
            for media in (self.image_url, self.input_audio)
            if isinstance(media, dict)
            for value in media.values()
            if isinstance(value, str)
        )


class ChatRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a client asked for. `fields` is the truth; the rest is a view of it.

    `fields` holds every top-level field of the body as the bytes it came in, duplicates resolved to the last one.
    Backends send `fields` on with only what `with_fields` changed, so an unknown field is carried and never guessed.
    """

    operation: Operation
    model: str
    """The *original model*: what the client wrote, a model or a route."""
    fields: Mapping[str, msgspec.Raw]
    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    """The prompt of a text completion, when it is one string."""
    prompts: int = 1
    """How many prompts a text completion has; each is answered `n` times."""
    inputs: int = 1
    """How many texts are to be embedded."""
    encoding_format: EncodingFormat = "float"
    dimensions: int | None = None
    """How long a vector is to be, where the client does not take the model's own."""
    stream: bool = False
    include_usage: bool = False
    n: int = 1
    seed: int | None = None
    max_tokens: int | None = None
    """The client's bound on completion tokens: `max_completion_tokens`, else `max_tokens`."""
    temperature: float | None = None
    wants_tools: bool = False
    wants_json_schema: bool = False
    wants_logprobs: bool = False
    has_images: bool = False
    size_bytes: int = 0
    """Size of the body after decompression, each image or sound in it counted as `MEDIA_BYTES`, token ids to be
    embedded as the text they stand for: what tokens are estimated from."""

    def with_fields(self, **changes: object) -> dict[str, msgspec.Raw]:
        """`fields` with `changes` encoded over them; a change to None removes the field."""
        fields = dict(self.fields)
        for name, value in changes.items():
            if value is None:
                fields.pop(name, None)
            else:
                fields[name] = msgspec.Raw(msgspec.json.encode(value))
        return fields


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens that one answer took. `cached_tokens` are part of the prompt, `reasoning_tokens` of the completion."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    estimated: bool = False
    """True where the backend reported nothing and Forebay counted or guessed."""

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class WireUsage(msgspec.Struct, frozen=True):
    """`usage` as OpenAI-compatible engines write it; any part may be missing or null."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens or 0,
            completion_tokens=self.completion_tokens or 0,
            cached_tokens=(self.prompt_tokens_details and self.prompt_tokens_details.cached_tokens) or 0,
            reasoning_tokens=(self.completion_tokens_details and self.completion_tokens_details.reasoning_tokens) or 0,
        )


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int | None = None


class Delta(msgspec.Struct, frozen=True):
    """What one frame adds to one choice (`delta`), or the whole of it (`message`)."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: tuple[msgspec.Raw, ...] | None = None

    @property
    def has_content(self) -> bool:
        """Whether a reader would notice: text, reasoning, a refusal or a tool call, but not a bare role."""
        return bool(self.content or self.reasoning_content or self.reasoning or self.refusal or self.tool_calls)


class Choice(msgspec.Struct, frozen=True):
    index: int = 0
    delta: Delta | None = None
    message: Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One frame of an answer: a chunk of a stream, or the one whole completion of an answer that was not streamed.

    Embeddings are one whole event without choices.

    `raw` is OpenAI JSON, complete and parsed once already; `choices` and `usage` are what was read from it.
    """

    raw: bytes
    whole: bool = False
    choices: tuple[Choice, ...] = ()
    usage: Usage | None = None

    @property
    def has_content(self) -> bool:
        """Whether this event commits a stream: content for the reader, or the end of a choice."""
        for choice in self.choices:
            if choice.finish_reason is not None or choice.text:
                return True
            piece = choice.delta or choice.message
            if piece is not None and piece.has_content:
                return True
        return self.whole

    @property
    def is_usage_only(self) -> bool:
        """The extra last frame of `stream_options.include_usage`: usage and no choices."""
        return self.usage is not None and not self.choices and not self.whole


class _Frame(msgspec.Struct, frozen=True):
    choices: tuple[Choice, ...] | None = None
    usage: WireUsage | None = None


_frames = msgspec.json.Decoder(_Frame)


def parse_event(raw: bytes, *, whole: bool = False) -> Event:
    """Read one OpenAI frame. Raises `msgspec.DecodeError` (or `UnicodeDecodeError`) when it is not one."""
    frame = _frames.decode(raw)
    return Event(
        raw=raw,
        whole=whole,
        choices=frame.choices or (),
        usage=frame.usage.usage() if frame.usage is not None else None,
    )
