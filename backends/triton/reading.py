"""What comes back from a model: typed tensors, and the text in them on its way to the reader.

The text passes steps, each with its own small state: what is new in it (`Deltas`), without the prompt that an older
engine repeats (`PromptEcho`), up to the first stop sequence (`StopScanner`); tool calls are `backends.tool_calls`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import msgspec

from backends.triton.dialect import Dialect
from backends.triton.server import Response

_REPLACEMENT = "\ufffd"
"""What engines write for bytes that are not yet a whole character."""

_FINISH_REASONS = {"stop": "stop", "length": "length", "eos": "stop", "eos_token": "stop", "stop_sequence": "stop"}
"""OpenAI's word for what a model gives as its finish_reason; `cancelled` and `timeout` are failures."""

_UNFINISHED = frozenset({"", "None", "null", "not_finished"})


_SEEN_GOING_UP = 4
"""Responses in a row with ever more tokens each: beyond what speculative decoding does by chance."""


class UnreadableResponse(ValueError):
    """The response is not what the model's metadata promises."""


class Told(msgspec.Struct, frozen=True):
    """One response, read."""

    text: str
    log_probs: tuple[float, ...] = ()
    """Of the tokens that this response adds."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None


def read_response(response: Response, dialect: Dialect) -> Told:
    """The parts of a response that we know. Raises `UnreadableResponse`."""
    tensors = response.tensors
    if "text_output" not in tensors:
        raise UnreadableResponse("the engine sent a response without text_output")
    return Told(
        text=_text(tensors, "text_output"),
        log_probs=_floats(tensors, "output_log_probs"),
        prompt_tokens=_integer(tensors, "num_input_tokens"),
        completion_tokens=_integer(tensors, "num_output_tokens"),
        finish_reason=_finish_reason(tensors) if dialect.takes("finish_reason") else None,
    )


def _finish_reason(tensors: Mapping[str, tuple[str, bytes]]) -> str | None:
    said = _text(tensors, "finish_reason")
    if said in _UNFINISHED:
        return None
    if (reason := _FINISH_REASONS.get(said)) is None:
        raise UnreadableResponse(f"the engine ended the answer with '{said}'")
    return reason


def _text(tensors: Mapping[str, tuple[str, bytes]], name: str) -> str:
    """The first text of a tensor: 4 bytes of length and UTF-8, in which a character may be cut."""
    datatype, content = tensors.get(name, ("BYTES", b""))
    if datatype != "BYTES":
        raise UnreadableResponse(f"{name} is of {datatype}, not text")
    if not content:
        return ""
    end = 4 + int.from_bytes(content[:4], "little")
    if end > len(content):
        raise UnreadableResponse(f"{name} is cut short")
    return content[4:end].decode(errors="replace")


def _floats(tensors: Mapping[str, tuple[str, bytes]], name: str) -> tuple[float, ...]:
    if name not in tensors:
        return ()
    datatype, content = tensors[name]
    if datatype != "FP32" or len(content) % 4:
        raise UnreadableResponse(f"{name} is {len(content)} bytes of {datatype}")
    return struct.unpack(f"<{len(content) // 4}f", content)


def _integer(tensors: Mapping[str, tuple[str, bytes]], name: str) -> int | None:
    datatype, content = tensors.get(name, ("", b""))
    return int.from_bytes(content[: 8 if datatype.endswith("64") else 4], "little", signed=True) if content else None


class TokenCount:
    """How many tokens an answer has, from what each response says of itself.

    TensorRT-LLM counts each response alone; one that counts on (1, 2, 3) is known by going up without a break.
    """

    __slots__ = ("_last", "_responses", "_sum", "_up")

    def __init__(self) -> None:
        self._responses = 0
        self._sum = 0
        self._last = 0
        self._up = True

    def add(self, count: int) -> None:
        if count <= 0:
            return
        self._responses += 1
        self._sum += count
        self._up = self._up and count > self._last
        self._last = count

    @property
    def tokens(self) -> int | None:
        """None where nothing was told."""
        if not self._responses:
            return None
        return self._last if self._up and self._responses >= _SEEN_GOING_UP else self._sum


class Deltas:
    """The new part of each text of an answer."""

    __slots__ = ("_cumulative", "_seen")

    def __init__(self, cumulative: bool) -> None:
        self._cumulative = cumulative
        self._seen = ""

    def feed(self, text: str) -> str:
        """What `text` adds. Raises `UnreadableResponse` where a whole so far does not go on from the one before."""
        if not self._cumulative:
            return text
        # A character that is not whole yet stands as U+FFFD, and becomes itself in a later text.
        return self._after(text.rstrip(_REPLACEMENT))

    def close(self, last: str) -> str:
        """What the last text still holds: then U+FFFD is what the model means."""
        return self._after(last) if self._cumulative else ""

    def _after(self, text: str) -> str:
        if not text.startswith(self._seen):
            if self._seen.startswith(text):
                return ""
            raise UnreadableResponse("the engine changed text that it had sent before")
        new = text[len(self._seen) :]
        self._seen = text
        return new


class PromptEcho:
    """Takes the prompt off the beginning of an answer, for an engine that cannot be told to leave it out.

    Held back is only what could still be the prompt; an answer that does not begin with it passes untouched.
    """

    __slots__ = ("_held", "_prompts")

    def __init__(self, *prompts: str) -> None:
        self._prompts = tuple(prompt for prompt in prompts if prompt)
        self._held: str | None = ""

    def feed(self, text: str) -> str:
        if self._held is None:
            return text
        self._held += text
        for prompt in self._prompts:
            if self._held.startswith(prompt):
                rest, self._held = self._held[len(prompt) :], None
                return rest
        if any(prompt.startswith(self._held) for prompt in self._prompts):
            return ""
        return self.close()

    def close(self) -> str:
        held, self._held = self._held or "", None
        return held


class StopScanner:
    """Passes text on up to the first stop sequence, at whatever places it is cut.

    Held back is only an end that could be the beginning of a stop sequence: less than the longest of them.
    """

    __slots__ = ("_held", "_longest", "_stops", "stopped")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """What may be passed on. After a stop sequence nothing is."""
        if not self._stops:
            return text
        if self.stopped:
            return ""
        text = self._held + text
        # The one that is complete first, so that the cut does not hang on how the text arrives.
        found = min(((at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0), default=None)
        if found is not None:
            self.stopped = True
            self._held = ""
            return text[: found[1]]
        keep = self._beginning_of_a_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def close(self) -> str:
        """What was held back and is no stop sequence after all."""
        held, self._held = self._held, ""
        return held

    def _beginning_of_a_stop(self, text: str) -> int:
        """The length of the longest end of `text` that a stop sequence begins with."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-size:]
            if any(stop.startswith(end) for stop in self._stops):
                return size
        return 0
