"""Tells the responses of a model as the events of an OpenAI answer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from backends.backend import Call
from backends.chat import Choice, Delta, Event, Usage, parse_event
from backends.tokenizer import Tokenizer
from backends.tool_calls.parser import CallArguments, CallStart, Piece, Text, ToolCallParser
from backends.triton.reading import Deltas, PromptEcho, StopScanner, TokenCount, Told

Json = dict[str, Any]

_LEAST_LOG_PROB = -9_999.0

_encode = msgspec.json.encode


class Frames:
    """Writes the frames of one answer: one choice, one id, OpenAI's JSON."""

    def __init__(self, call: Call, created: int) -> None:
        self._is_chat = call.request.operation == "chat"
        kind = "chatcmpl" if self._is_chat else "cmpl"
        head = {
            "id": f"{kind}-{call.request_id}",
            "object": "chat.completion.chunk" if self._is_chat else "text_completion",
            "created": created,
            "model": call.model,
        }
        self._head = _encode(head)[:-1] + b',"choices":['

    def opening(self) -> Iterator[Event]:
        """Who speaks; a text completion begins with its text."""
        if self._is_chat:
            yield self._event(Choice(delta=Delta(role="assistant", content="")), {"role": "assistant", "content": ""})

    def text(self, text: str, log_probs: Sequence[Json]) -> Event:
        told = self._log_probs(log_probs) if log_probs else None
        if self._is_chat:
            return self._event(Choice(delta=Delta(content=text)), {"content": text}, told)
        return self._event(Choice(text=text), text, told)

    def tool_call(self, call: Json) -> Event:
        """A part of a tool call, as OpenAI's delta has it."""
        return parse_event(self._raw({"tool_calls": [call]}, None, None))

    def finish(self, reason: str) -> Event:
        if self._is_chat:
            return self._event(Choice(delta=Delta(), finish_reason=reason), {}, None, reason)
        return self._event(Choice(text="", finish_reason=reason), "", None, reason)

    def usage(self, usage: Usage) -> Event:
        counts = {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens,
        }
        return Event(raw=self._head + b'],"usage":' + _encode(counts) + b"}", usage=usage)

    def _event(
        self, choice: Choice, said: Json | str, log_probs: Json | None = None, finish_reason: str | None = None
    ) -> Event:
        return Event(raw=self._raw(said, log_probs, finish_reason), choices=(choice,))

    def _raw(self, said: Json | str, log_probs: Json | None, finish_reason: str | None) -> bytes:
        name = b'{"index":0,"delta":' if self._is_chat else b'{"index":0,"text":'
        end = b',"finish_reason":' + _encode(finish_reason) + b"}]}"
        return self._head + name + _encode(said) + b',"logprobs":' + _encode(log_probs) + end

    def _log_probs(self, entries: Sequence[Json]) -> Json:
        if self._is_chat:
            return {"content": list(entries), "refusal": None}
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": None,
        }


class Telling:
    """One answer on its way: `tell` each response, then `close`.

    `max_tokens` is what the model was allowed: an engine that does not say why it ended has ended for that reason when
    it used it up. After `is_over` further responses are of no interest: the answer has reached a stop sequence, or with
    `one_call` a second tool call, which is not told.
    """

    def __init__(
        self,
        frames: Frames,
        *,
        cumulative: bool,
        says_finish_reason: bool,
        echo: PromptEcho | None,
        stops: Sequence[str],
        parser: ToolCallParser | None,
        wants_log_probs: bool,
        tokenizer: Tokenizer | None,
        max_tokens: int,
        one_call: bool = False,
    ) -> None:
        self._frames = frames
        self._deltas = Deltas(cumulative)
        self._says_finish_reason = says_finish_reason
        self._echo = echo
        self._scanner = StopScanner(stops)
        self._parser = parser
        self._log_probs = _LogProbs(tokenizer) if wants_log_probs else None
        self._max_tokens = max_tokens
        self._one_call = one_call
        self._called_enough = False
        self._beside_text: list[Json] = []
        self._count = TokenCount()
        self._finish_reason: str | None = None
        self._last = Told("")
        self._responses = 0
        self.prompt_tokens: int | None = None
        """As the engine told."""
        self.text: list[str] = []
        """All text that the model made, stop sequences included, an echo of the prompt not: what tokens are counted
        from where none are told."""

    @property
    def is_over(self) -> bool:
        return self._scanner.stopped or self._called_enough

    @property
    def is_complete(self) -> bool:
        """Whether the stream of responses may end here: something was said, and why it ended where that is told."""
        return self.is_over or (
            self._responses > 0 and (not self._says_finish_reason or self._finish_reason is not None)
        )

    @property
    def completion_tokens(self) -> int | None:
        """As the engine told; None where it did not."""
        return self._count.tokens

    def tell(self, told: Told) -> list[Event]:
        """The events that a response adds. Raises `UnreadableResponse`."""
        events = [] if self._responses else list(self._frames.opening())
        self._responses += 1
        self._last = told
        if told.prompt_tokens is not None:
            self.prompt_tokens = told.prompt_tokens
        self._count.add(told.completion_tokens if told.completion_tokens is not None else len(told.log_probs))
        self._finish_reason = told.finish_reason or self._finish_reason
        new = self._deltas.feed(told.text)
        if self._echo is not None:
            new = self._echo.feed(new)
        if self._log_probs is not None:
            self._log_probs.add(new, told)
        return events + self._pass_on(new)

    def close(self, completion_tokens: int | None, usage: Usage | None) -> list[Event]:
        """The events at the end. `completion_tokens` as told or counted; None where unknown, as `usage` may be."""
        rest = "" if self.is_over else self._deltas.close(self._last.text)
        if self._echo is not None:
            rest = self._echo.feed(rest) + self._echo.close()
        events = self._pass_on(rest)
        events += self._show(self._scanner.close(), last=not self.is_over)
        if self._parser is not None:
            events += self._pieces(self._parser.close())
        events.append(self._frames.finish(self._reason(completion_tokens)))
        return events if usage is None else [*events, self._frames.usage(usage)]

    def _pass_on(self, new: str) -> list[Event]:
        self.text.append(new)
        return self._show(self._scanner.feed(new))

    def _show(self, text: str, *, last: bool = False) -> list[Event]:
        log_probs = self._log_probs.up_to(len(text), last=last) if self._log_probs is not None else ()
        if self._parser is not None:
            self._beside_text += log_probs
            return self._pieces(self._parser.feed(text)) if text else []
        return [self._frames.text(text, log_probs)] if text or log_probs else []

    def _pieces(self, pieces: Sequence[Piece]) -> list[Event]:
        if self._one_call and not self._called_enough:
            second = next((at for at, piece in enumerate(pieces) if isinstance(piece, CallStart) and piece.index), None)
            self._called_enough = second is not None
            return [self._piece(piece) for piece in pieces[:second]]
        return [] if self._called_enough else [self._piece(piece) for piece in pieces]

    def _piece(self, piece: Piece) -> Event:
        match piece:
            case Text(text):
                log_probs, self._beside_text = self._beside_text, []
                return self._frames.text(text, log_probs)
            case CallStart(index, call_id, name):
                self._beside_text = []  # OpenAI gives those of content only
                function = {"name": name, "arguments": ""}
                return self._frames.tool_call({"index": index, "id": call_id, "type": "function", "function": function})
            case CallArguments(index, text):
                return self._frames.tool_call({"index": index, "function": {"arguments": text}})

    def _reason(self, completion_tokens: int | None) -> str:
        used_up = completion_tokens is not None and completion_tokens >= self._max_tokens
        if not self.is_over and (self._finish_reason == "length" or (self._finish_reason is None and used_up)):
            return "length"
        if self._parser is not None and self._parser.found:
            return "tool_calls"
        return "stop"


class _LogProbs:
    """Log probabilities beside a text that is passed on later than its tokens arrive, or not at all."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._waiting: deque[tuple[int, Json]] = deque()
        self._arrived = 0
        self._shown = 0

    def add(self, new: str, told: Told) -> None:
        log_probs = told.log_probs
        if told.completion_tokens is not None and len(log_probs) > told.completion_tokens > 0:
            log_probs = log_probs[-told.completion_tokens :]  # an engine that repeats those of the tokens before
        for token, log_prob in zip(self._tokens(new, len(log_probs)), log_probs, strict=True):
            # OpenAI's own word for a token that could not have come; JSON has no infinity.
            log_prob = max(_LEAST_LOG_PROB, log_prob)
            entry = {"token": token, "logprob": log_prob, "bytes": list(token.encode()), "top_logprobs": []}
            self._waiting.append((self._arrived, entry))
            self._arrived += len(token)

    def up_to(self, characters: int, *, last: bool) -> list[Json]:
        """The entries of the tokens that begin within the next `characters`; with `last` those at the very end too."""
        self._shown += characters
        shown = []
        while self._waiting and (self._waiting[0][0] < self._shown or (last and self._waiting[0][0] == self._shown)):
            shown.append(self._waiting.popleft()[1])
        return shown

    def _tokens(self, text: str, count: int) -> list[str]:
        """The texts of `count` tokens; where the tokenizer sees other ones, the first stands for all."""
        if count <= 1:
            return [text] * count
        tokens = self._tokenizer.split(text) if self._tokenizer is not None else []
        return tokens if len(tokens) == count else [text, *[""] * (count - 1)]
