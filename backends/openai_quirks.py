"""What engines that speak OpenAI's protocol do otherwise than OpenAI, put right where a client would trip over it.

The rule: a strict reader of OpenAI's types can read whatever leaves here, and no answer is silently short. So a frame
is relayed as the bytes it came in where it is clean, repaired where its meaning is plain, and else it is an error.

Whether a frame is clean shows in the one decoding that every frame needs anyway: `_CleanChunk` and its like spell out
what a frame in the middle of an answer looks like. What does not fit (a frame that opens or ends a choice, calls a
tool, tells usage or has a quirk) is read with all of its fields, and encoded again only where something changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import msgspec

from backends.backend import Call
from backends.chat import Choice, Delta, Event, WireUsage, parse_event
from backends.errors import BackendError, BackendFailed, BackendOverloaded, BackendProtocolError
from backends.openai_errors import error_by_cause, read_error

Json = dict[str, Any]

_CHAT_REASONS = frozenset({"stop", "length", "tool_calls", "content_filter", "function_call"})
_TEXT_REASONS = frozenset({"stop", "length", "content_filter"})
_ROLES = frozenset({"assistant", "developer", "system", "tool", "user"})
_SERVICE_TIERS = frozenset({"auto", "default", "flex", "scale", "priority", "fast"})

_REASONS = {
    "eos": "stop",
    "eos_token": "stop",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "stop_token": "stop",
    "complete": "stop",
    "max_tokens": "length",
    "max_length": "length",
    "model_length": "length",
    "tool_use": "tool_calls",
    "tool_call": "tool_calls",
    "safety": "content_filter",
    "recitation": "content_filter",
    "refusal": "content_filter",
}
"""Words for the end of an answer, in lower case, and OpenAI's word for it. Seen at TGI and Together (eos), Anthropic's
and Cohere's dialects, Mistral (model_length) and Gemini. Any other word becomes `length`: the answer ended, and nobody
can say that it is whole; the engine's own word stays beside it as `native_finish_reason`."""

_BREAKS: dict[str, type[BackendError]] = {
    "error": BackendFailed,
    "abort": BackendFailed,
    "aborted": BackendFailed,
    "cancelled": BackendFailed,
    "not_finished": BackendFailed,
    "timeout": BackendFailed,
    "insufficient_system_resource": BackendOverloaded,
}
"""Words for an end that is none: Mistral and OpenRouter (error), vLLM and SGLang (abort), trtllm-serve (cancelled,
timeout, not_finished), DeepSeek (insufficient_system_resource)."""

_HEAD = frozenset({"id", "object", "created", "model", "choices", "usage", "system_fingerprint", "service_tier"})

_NoTools = Annotated[tuple[msgspec.Raw, ...], msgspec.Meta(max_length=0)]
_Tier = Literal["auto", "default", "flex", "scale", "priority", "fast"]


class _CleanDelta(Delta, frozen=True):
    """Text that goes on. A role is told once, by the frame that opens its choice; the SDKs add repeated ones up."""

    role: None = None
    thinking: None = None


class _CleanArguments(msgspec.Struct, frozen=True):
    name: None = None
    arguments: str | None = None


class _CleanToolPiece(msgspec.Struct, frozen=True):
    """Arguments of a tool call that go on."""

    index: int
    function: _CleanArguments
    id: None = None


class _CleanChoice(Choice, frozen=True, kw_only=True):
    index: int
    delta: _CleanDelta
    finish_reason: None = None


class _CleanText(Choice, frozen=True, kw_only=True):
    index: int
    text: str
    finish_reason: None = None


class _CleanFrame(msgspec.Struct, frozen=True, kw_only=True):
    """A field of type None is one whose presence needs care."""

    id: str
    created: int
    model: str
    usage: None = None
    service_tier: _Tier | None = None
    system_fingerprint: str | None = None
    error: None = None
    x_groq: None = None


class _CleanChunk(_CleanFrame, frozen=True, kw_only=True):
    object: Literal["chat.completion.chunk"]
    choices: tuple[_CleanChoice, ...]


class _CleanTextChunk(_CleanFrame, frozen=True, kw_only=True):
    object: Literal["text_completion"]
    choices: tuple[_CleanText, ...]


class _CleanMessage(Delta, frozen=True, kw_only=True):
    role: Literal["assistant"]
    tool_calls: _NoTools | None = None
    thinking: None = None


class _WholeChoice(Choice, frozen=True, kw_only=True):
    index: int
    message: _CleanMessage
    finish_reason: Literal["stop", "length", "content_filter"]


class _WholeText(Choice, frozen=True, kw_only=True):
    index: int
    text: str
    finish_reason: Literal["stop", "length", "content_filter"]


_Count = Annotated[int, msgspec.Meta(ge=0)]


class _ToldUsage(WireUsage, frozen=True, kw_only=True):
    prompt_tokens: _Count
    completion_tokens: _Count
    total_tokens: _Count


class _CleanWhole(_CleanFrame, frozen=True, kw_only=True):
    object: Literal["chat.completion"]
    choices: Annotated[tuple[_WholeChoice, ...], msgspec.Meta(min_length=1)]
    usage: _ToldUsage | None = None  # type: ignore[assignment]


class _CleanWholeText(_CleanFrame, frozen=True, kw_only=True):
    object: Literal["text_completion"]
    choices: Annotated[tuple[_WholeText, ...], msgspec.Meta(min_length=1)]
    usage: _ToldUsage | None = None  # type: ignore[assignment]


class _ToldFunction(msgspec.Struct, frozen=True):
    name: str | None = None
    arguments: str | None = None


class _ToldToolCall(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: _ToldFunction | None = None


class _WholeFunction(msgspec.Struct, frozen=True):
    name: str
    arguments: str


class _WholeToolCall(msgspec.Struct, frozen=True):
    """A call of a function; of other kinds only these fields are known here."""

    id: str
    type: str
    function: _WholeFunction | None = None


class _ToldDelta(msgspec.Struct, frozen=True):
    role: Literal["assistant", "developer", "system", "tool", "user"] | None = None
    content: str | None = None
    refusal: str | None = None
    tool_calls: tuple[_ToldToolCall, ...] | None = None


class _ToldMessage(msgspec.Struct, frozen=True, kw_only=True):
    role: Literal["assistant"]
    content: str | None = None
    refusal: str | None = None
    tool_calls: tuple[_WholeToolCall, ...] | None = None


_ChatReason = Literal["stop", "length", "tool_calls", "content_filter", "function_call"]
_TextReason = Literal["stop", "length", "content_filter"]


class _ToldChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    delta: _ToldDelta
    finish_reason: _ChatReason | None = None


class _ToldText(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    text: str
    finish_reason: _TextReason | None = None


class _ToldWholeChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    message: _ToldMessage
    finish_reason: _ChatReason


class _Told(msgspec.Struct, frozen=True, kw_only=True):
    """What a frame must be after it was put right: what has no place in OpenAI's types is an error."""

    id: str
    object: str
    created: int
    model: str
    usage: _ToldUsage | None = None
    service_tier: _Tier | None = None
    system_fingerprint: str | None = None


class _ToldChunk(_Told, frozen=True, kw_only=True):
    choices: tuple[_ToldChoice, ...]


class _ToldTextChunk(_Told, frozen=True, kw_only=True):
    choices: tuple[_ToldText, ...]


class _ToldWhole(_Told, frozen=True, kw_only=True):
    choices: tuple[_ToldWholeChoice, ...]


_clean_chunks = msgspec.json.Decoder(_CleanChunk)
_clean_text_chunks = msgspec.json.Decoder(_CleanTextChunk)
_clean_tool_pieces = msgspec.json.Decoder(_CleanToolPiece)
_clean_wholes = msgspec.json.Decoder(_CleanWhole)
_clean_whole_texts = msgspec.json.Decoder(_CleanWholeText)


class AnswerReader:
    """Reads the frames of one answer as events. What is no answer raises the `BackendError` that it means.

    `now` gives Unix time, for frames that do not say when they were made.
    """

    def __init__(self, backend: str, call: Call, *, now: Callable[[], float]) -> None:
        request = call.request
        self._backend = backend
        self._call = call
        self._now = now
        self._chat = request.operation == "chat"
        self._clean: Any = _clean_chunks if self._chat else _clean_text_chunks
        self._choices = request.n * request.prompts
        self._keeps_usage = _asks_for_usage_throughout(call)
        self._id = self._model = ""
        self._aside: Json = {}
        self._usage: Json | None = None
        self._ended: set[int] = set()
        self._tools: dict[int, _ToolCalls] = {}
        self.retry_after_s: float | None = None
        """What the head of the answer said of it; it holds for an error inside that says nothing itself."""
        self.begun: set[int] = set()
        """Choices that have opened, by index."""
        self.finished: set[int] = set()
        """Choices that have ended, and not gone on after it."""

    @property
    def is_complete(self) -> bool:
        """Whether every choice that was asked for has finished."""
        return len(self.finished) >= max(self._choices, len(self.begun))

    def read_frame(self, raw: bytes) -> Event | None:
        """The event in a frame; None for one that says nothing (yet)."""
        try:
            if not raw.isascii():
                raw.decode()  # msgspec does not look into the strings that it skips
            frame = self._clean.decode(raw)
        except msgspec.ValidationError:
            return self._read_with_care(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self._unreadable(error) from error
        if not frame.choices or frame.id != self._id or frame.model != self._model:
            return self._read_with_care(raw)
        for choice in frame.choices:
            if choice.index not in self.begun or choice.index in self.finished:
                return self._read_with_care(raw)
            if choice.delta is not None and choice.delta.tool_calls and not self._goes_on_calling(choice):
                return self._read_with_care(raw)
        return Event(raw=raw, choices=frame.choices)

    def read_whole(self, raw: bytes) -> Event:
        """The answer that came in one piece."""
        clean: Any = _clean_wholes if self._chat else _clean_whole_texts
        try:
            if not raw.isascii():
                raw.decode()
            answer = clean.decode(raw)
        except msgspec.ValidationError:
            return self._read_whole_with_care(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self._unreadable(error) from error
        return Event(
            raw=raw,
            whole=True,
            choices=answer.choices,
            usage=answer.usage.usage() if answer.usage is not None else None,
        )

    def check_no_error(self, raw: bytes) -> None:
        """Raise what the engine says went wrong, where it says so in the place of an answer."""
        self._frame(raw)

    def closing(self) -> Event | None:
        """The frame of usage that the engine did not send, having told it on frames of choices only."""
        if self._usage is None:
            return None
        return parse_event(msgspec.json.encode({**self._head({}), "choices": [], "usage": self._usage}))

    def error(self, raw: bytes) -> BackendError:
        """The error that a frame says it is."""
        return error_by_cause(
            read_error(raw), None, backend=self._backend, model=self._call.model, retry_after_s=self.retry_after_s
        )

    def _read_with_care(self, raw: bytes) -> Event | None:
        frame = self._frame(raw)
        choices = self._objects(frame.get("choices"), "choices")
        usage = self._usage_in(frame, choices)
        if not choices and usage is None:
            # Azure begins with what it found in the prompt: that is told on the frame that opens the first choice.
            if "choices" in frame and not self.begun:
                self._aside |= {name: value for name, value in frame.items() if name not in _HEAD}
            return None
        told = {
            **frame,
            **self._head(frame),
            "choices": [self._choice(position, choice) for position, choice in enumerate(choices)],
        }
        if choices:
            told |= self._aside
            self._aside = {}
        if usage is not None or "usage" in told:
            told["usage"] = usage
        if usage is not None:
            self._usage = usage if choices else None
            if choices and not self._keeps_usage:
                told["usage"] = None
        event = self._event(raw, frame, told)
        if usage is not None and event.usage is None:
            event = msgspec.structs.replace(event, usage=msgspec.convert(usage, WireUsage).usage())
        return event

    def _read_whole_with_care(self, raw: bytes) -> Event:
        answer = self._frame(raw)
        choices = self._objects(answer.get("choices"), "choices")
        if not choices:
            raise self._protocol_error("the engine answered without a choice")
        told = {
            **answer,
            **self._head(answer),
            "object": "chat.completion" if self._chat else "text_completion",
            "choices": [self._whole_choice(position, choice) for position, choice in enumerate(choices)],
        }
        usage = self._usage_in(answer, choices)
        if usage is not None or "usage" in told:
            told["usage"] = usage
        return self._event(raw, answer, told, whole=True)

    def _goes_on_calling(self, choice: Choice) -> bool:
        calls = self._tools.get(choice.index)
        return calls is not None and choice.delta is not None and calls.go_on(choice.delta.tool_calls or ())

    def _frame(self, raw: bytes) -> Json:
        try:
            frame = msgspec.json.decode(raw)
        except (msgspec.DecodeError, RecursionError) as error:
            raise self._unreadable(error) from error
        if _is_error(frame):
            raise self.error(raw)
        if not isinstance(frame, dict):
            raise self._protocol_error("the engine sent what is not OpenAI's JSON: not an object")
        return frame

    def _event(self, raw: bytes, frame: Json, told: Json, *, whole: bool = False) -> Event:
        kind = (_ToldWhole if whole else _ToldChunk) if self._chat else _ToldTextChunk
        try:
            msgspec.convert(told, kind)
            return parse_event(raw if told == frame else msgspec.json.encode(told), whole=whole)
        except msgspec.DecodeError as error:
            raise self._unreadable(error) from error

    def _head(self, frame: Json) -> Json:
        """The fields that say which answer this is: the same on all of its frames."""
        if not self._id:
            said = frame.get("id")
            prefix = "chatcmpl" if self._chat else "cmpl"
            self._id = said if isinstance(said, str) and said else f"{prefix}-{self._call.request_id}"
            said = frame.get("model")
            self._model = said if isinstance(said, str) and said else self._call.model
        created = frame.get("created")
        head: Json = {
            "id": self._id,
            "object": "chat.completion.chunk" if self._chat else "text_completion",
            "created": int(created) if isinstance(created, int | float) and created else int(self._now()),
            "model": self._model,
        }
        tier = frame.get("service_tier")
        if tier is not None and not (isinstance(tier, str) and tier in _SERVICE_TIERS):
            head["service_tier"] = None
        return head

    def _choice(self, position: int, choice: Json) -> Json:
        index = self._index(position, choice)
        told = {**choice, "index": index}
        if self._chat:
            told["delta"] = delta = self._delta(index, choice)
            goes_on = any(delta.get(name) for name in ("content", "reasoning_content", "reasoning", "tool_calls"))
        else:
            told["text"] = text = choice.get("text") or ""
            goes_on = bool(text)
        self.begun.add(index)
        reason = self._reason(choice)
        if reason is not None:
            self.finished.add(index)
        elif goes_on:
            self.finished.discard(index)
        return told | self._end(index, choice, reason)

    def _end(self, index: int, choice: Json, reason: str | None) -> Json:
        """How a choice's frame tells its end: once, and by a word that OpenAI has."""
        if reason is None or index in self._ended:
            return {"finish_reason": None} if "finish_reason" in choice else {}
        self._ended.add(index)
        if reason == "stop" and index in self._tools and not self._forces_a_tool:
            reason = "tool_calls"
        return _ending(choice, reason)

    def _delta(self, index: int, choice: Json) -> Json:
        delta = choice.get("delta", choice.get("message"))
        if delta is not None and not isinstance(delta, dict):
            raise self._protocol_error("the engine sent what is not OpenAI's JSON: a delta that is no object")
        told = _said(delta or {})
        role = told.get("role")
        if index not in self.begun:
            told["role"] = role if isinstance(role, str) and role in _ROLES else "assistant"
        elif role is not None:
            del told["role"]
        if told.get("tool_calls"):
            calls = self._tools.setdefault(index, _ToolCalls(f"call_{self._call.request_id}_{index}"))
            told["tool_calls"] = calls.told(self._objects(told["tool_calls"], "tool calls"))
        return told

    def _whole_choice(self, position: int, choice: Json) -> Json:
        index = self._index(position, choice)
        told = {**choice, "index": index}
        calls = False
        if self._chat:
            message = choice.get("message", choice.get("delta"))
            if not isinstance(message, dict):
                raise self._protocol_error("the engine answered with a choice without a message")
            told["message"] = message = {**_said(message), "role": "assistant"}
            if calls := bool(message.get("tool_calls")):
                pieces = self._objects(message["tool_calls"], "tool calls")
                prefix = f"call_{self._call.request_id}_{index}"
                message["tool_calls"] = [_whole_tool_call(prefix, n, call) for n, call in enumerate(pieces)]
        else:
            told["text"] = choice.get("text") or ""
        reason = self._reason(choice)
        if reason is None:
            raise self._protocol_error("the engine answered without a finish_reason")
        if reason == "stop" and calls and not self._forces_a_tool:
            reason = "tool_calls"
        return told | _ending(choice, reason)

    def _usage_in(self, frame: Json, choices: Sequence[Json]) -> Json | None:
        """What a frame says of usage, complete; None where it says nothing of it."""
        usage = _found_usage(frame, choices)
        if usage is None:
            return None
        prompt, completion = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
        try:
            total = usage.get("total_tokens")
            told = {**usage, "prompt_tokens": prompt, "completion_tokens": completion}
            told["total_tokens"] = prompt + completion if total is None else total
            msgspec.convert(told, _ToldUsage)
        except (TypeError, msgspec.ValidationError) as error:
            raise self._unreadable(error) from error
        return told

    def _index(self, position: int, choice: Json) -> int:
        """TGI once counted tokens where choices are counted."""
        index = choice.get("index")
        if self._choices == 1:
            return 0
        return index if isinstance(index, int) else position

    def _reason(self, choice: Json) -> str | None:
        """Why a choice ended, in OpenAI's words; None where it did not. Raises the error that some words stand for."""
        reason = choice.get("finish_reason")
        if isinstance(reason, dict):
            reason = reason.get("type")
        if not reason:
            return None
        word = str(reason).lower()
        if (cause := _BREAKS.get(word)) is not None:
            message = f"the engine ended the answer with finish_reason {word!r}"
            raise cause(message, backend=self._backend, model=self._call.model)
        known = _CHAT_REASONS if self._chat else _TEXT_REASONS
        word = _REASONS.get(word, word)
        return word if word in known else "length"

    @property
    def _forces_a_tool(self) -> bool:
        """OpenAI itself ends with `stop` where the client named the function to call."""
        raw = self._call.request.fields.get("tool_choice")
        return raw is not None and isinstance(msgspec.json.decode(raw), dict)

    def _objects(self, value: object, noun: str) -> list[Json]:
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self._protocol_error(f"the engine sent what is not OpenAI's JSON: {noun} that are no list of objects")
        return value

    def _unreadable(self, error: Exception) -> BackendProtocolError:
        return self._protocol_error(f"the engine sent what is not OpenAI's JSON: {error}")

    def _protocol_error(self, message: str) -> BackendProtocolError:
        return BackendProtocolError(message, backend=self._backend, model=self._call.model)


class _ToolCalls:
    """The tool calls of one choice, numbered as the SDKs put them together: from 0, each `id` and name told once.

    Ollama and Gemini give each of several calls the index 0, Mistral gave none, others begin at 1 or repeat the id.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._ids: list[str] = []
        self._said: list[object] = []
        """The ids by the engine's word, where two calls may have the same."""
        self._names: list[object] = []
        self._by_index: dict[int, int] = {}

    def go_on(self, pieces: Sequence[msgspec.Raw]) -> bool:
        """Whether all of the pieces are arguments of known calls, told as OpenAI tells them."""
        try:
            indices = [_clean_tool_pieces.decode(piece).index for piece in pieces]
        except msgspec.ValidationError:
            return False
        return all(self._by_index.get(index) == index for index in indices)

    def told(self, pieces: Sequence[Json]) -> list[Json]:
        return [self._piece(piece) for piece in pieces]

    def _piece(self, piece: Json) -> Json:
        number = self._number(piece)
        function = piece.get("function")
        if number is None:
            return self._opening(piece, function)
        told = {**piece, "index": number}
        if told.get("id"):
            del told["id"]
        if isinstance(function, dict):
            told["function"] = function = _with_text_arguments(function)
            if not function.get("name") or function["name"] == self._names[number]:
                function.pop("name", None)
        return told

    def _opening(self, piece: Json, function: object) -> Json:
        number = len(self._ids)
        told = {**piece, "index": number}
        if not told.get("id") or told["id"] in self._ids:
            told["id"] = f"{self._prefix}_{number}"
        if not told.get("type"):
            told["type"] = "function"
        if isinstance(function, dict):
            told["function"] = function = _with_text_arguments(function)
        self._ids.append(told["id"])
        self._said.append(piece.get("id"))
        self._names.append(function.get("name") if isinstance(function, dict) else None)
        if isinstance(index := piece.get("index"), int):
            self._by_index[index] = number
        return told

    def _number(self, piece: Json) -> int | None:
        """The call that a piece goes on with; None for one that opens a call."""
        index, said = piece.get("index"), piece.get("id")
        function = piece.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        number = self._by_index.get(index) if isinstance(index, int) else None
        if said and said in self._said:
            if number is not None and self._said[number] == said:
                return number
            opens = number is None and name and isinstance(index, int)
            return None if opens else self._said.index(said)
        if isinstance(index, int):
            if number is None or (name and (said or name != self._names[number] or _is_whole(function))):
                return None
            return number
        return None if said or name or not self._ids else len(self._ids) - 1


def _said(message: Json) -> Json:
    """A delta or message with its text where OpenAI and most engines have it."""
    told = {**message}
    if isinstance(told.get("thinking"), str):
        told["reasoning_content"] = told.pop("thinking")
    if isinstance(content := told.get("content"), list):
        # Mistral's reasoning models send parts: of text, and of thinking that has parts of text itself.
        parts = [part for part in content if isinstance(part, dict)]
        told["content"] = "".join(_text_of(part) for part in parts if part.get("type") != "thinking") or None
        if thoughts := "".join(_text_of(part) for part in parts if part.get("type") == "thinking"):
            told["reasoning_content"] = thoughts
    return told


def _text_of(part: Json) -> str:
    text = part.get("thinking", part.get("text"))
    if isinstance(text, list):
        return "".join(_text_of(inner) for inner in text if isinstance(inner, dict))
    return text if isinstance(text, str) else ""


def _with_text_arguments(function: Json) -> Json:
    """A function whose arguments are JSON in a text, as OpenAI has it; some engines send the object itself."""
    arguments = function.get("arguments")
    if arguments is None or isinstance(arguments, str):
        return {**function}
    return {**function, "arguments": msgspec.json.encode(arguments).decode()}


def _is_whole(function: Any) -> bool:
    """Whether a piece has all of a call's arguments, so that it goes on with no other."""
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return arguments is not None
    try:
        return isinstance(msgspec.json.decode(arguments), dict)
    except (msgspec.DecodeError, RecursionError):
        return False


def _whole_tool_call(prefix: str, number: int, call: Json) -> Json:
    told = {**call}
    if not told.get("id"):
        told["id"] = f"{prefix}_{number}"
    if not told.get("type"):
        told["type"] = "function"
    if isinstance(function := told.get("function"), dict):
        told["function"] = {"arguments": "", **_with_text_arguments(function)}
    return told


def _ending(choice: Json, reason: str) -> Json:
    said = choice["finish_reason"]
    if said == reason:
        return {}
    return {"finish_reason": reason, "native_finish_reason": choice.get("native_finish_reason", said)}


def _found_usage(frame: Json, choices: Sequence[Json]) -> Json | None:
    """What a frame says of usage, wherever the engine puts it: Groq in `x_groq`, Moonshot in the choice."""
    groq = frame.get("x_groq")
    places = (
        frame.get("usage"),
        groq.get("usage") if isinstance(groq, dict) else None,
        *(c.get("usage") for c in choices),
    )
    for usage in places:
        if isinstance(usage, dict) and not (usage.get("prompt_tokens") is usage.get("completion_tokens") is None):
            return usage
    return None


def _asks_for_usage_throughout(call: Call) -> bool:
    """vLLM and SGLang tell usage on every frame to a client that asks for it."""
    raw = call.request.fields.get("stream_options")
    options = msgspec.json.decode(raw) if raw is not None else None
    return isinstance(options, dict) and bool(options.get("continuous_usage_stats"))


def _is_error(frame: object) -> bool:
    """Whether what came in the place of an answer is an error, in any of the shapes that engines have for one."""
    if isinstance(frame, list):
        return bool(frame) and _is_error(frame[0])
    if not isinstance(frame, dict):
        return False
    if frame.get("error"):
        return True
    if frame.get("choices") is not None or frame.get("usage") is not None:
        return False
    says_so = frame.get("object") == "error" or frame.get("type") == "error" or frame.get("success") is False
    return says_so or bool(frame.get("errors") or frame.get("detail")) or ("message" in frame and "code" in frame)
