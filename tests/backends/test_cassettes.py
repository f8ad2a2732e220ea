"""What engines really send, played through the real backend over a real connection, cut in any places.

Where each cassette comes from is told in `tests/cassettes/README.md`.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from openai.lib.streaming._deltas import accumulate_delta
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from backends.chat import Event
from backends.errors import (
    BackendError,
    BackendFailed,
    BackendOverloaded,
    BackendProtocolError,
    RequestRejected,
)
from backends.openai_http import OpenAIBackend
from backends.sse import SseParser
from tests.calls import collect, collect_into, make_call, whole_of
from tests.upstream import Act, Head, Send, Upstream

CASSETTES = Path(__file__).parents[1] / "cassettes"
CONTENT_TYPES = {
    ".sse": "text/event-stream",
    ".json": "application/json",
    ".html": "text/html",
    ".ndjson": "application/x-ndjson",
}
WEATHER = ("weather", '{"city":"Köln"}')
TIME = ("time", '{"zone":"東京"}')


@dataclass(frozen=True, kw_only=True)
class Cassette:
    """A recorded answer, and what a client is to make of it. `usage` are prompt and completion tokens, where told."""

    path: str
    text: str | None = ""
    reasoning: str = ""
    tools: tuple[tuple[str, str], ...] = ()
    reason: str = "stop"
    usage: tuple[int, int] | None = None
    untouched: bool = False
    """Whether every frame is relayed as it came."""
    request: dict[str, Any] = field(default_factory=dict)

    @property
    def text_completion(self) -> bool:
        return Path(self.path).name.startswith("text")

    @property
    def stream(self) -> bool:
        return self.path.endswith(".sse")


ANSWERS = [
    Cassette(path="openai/chat_usage.sse", text="Hello!", usage=(19, 2), untouched=True),
    Cassette(path="openai/forced_tool.sse", text=None, tools=(WEATHER,), untouched=True, request={"tool_choice": {}}),
    Cassette(path="openai/forced_tool.sse", text=None, tools=(WEATHER,), reason="tool_calls"),
    Cassette(path="azure/prompt_filter_results.sse", text=" have their"),
    Cassette(path="azure/async_filter.sse", text="The end"),
    Cassette(path="vllm/usage_on_every_chunk.sse", text="! glare", usage=(16, 3)),
    Cassette(
        path="vllm/usage_on_every_chunk.sse",
        text="! glare",
        usage=(16, 3),
        untouched=True,
        request={"stream_options": {"continuous_usage_stats": True}},
    ),
    Cassette(path="vllm/usage_null.sse", text="1", reason="length", usage=(16, 1), untouched=True),
    Cassette(path="vllm/reasoning.sse", text="Yes.", reasoning="Let me see.", untouched=True),
    Cassette(path="tgi/token_index_no_done.sse", text="I'm", reason="length"),
    Cassette(path="tgi/eos_token.sse", text="I'm"),
    Cassette(path="tgi/text_empty_finish_reason.sse", text="\nObject-oriented", reason="length", usage=(14, 3)),
    Cassette(path="sglang/reasoning_nulls.sse", text="Fine.", reasoning="\nOkay", usage=(20, 5), untouched=True),
    Cassette(path="sglang/tool_index_stuck.sse", tools=(WEATHER, TIME), reason="tool_calls"),
    Cassette(path="trtllm/chat.sse", text="New York", reason="length", usage=(43, 2), untouched=True),
    Cassette(path="llamacpp/chat.sse", text="À la légère, äöü.", reason="length", usage=(44, 12)),
    Cassette(path="llamacpp/chat.json", text="À la légère, äöü.", reason="length", usage=(44, 12), untouched=True),
    Cassette(path="llamacpp/chat_logprobs.sse", text="À la", reason="length", usage=(44, 3)),
    Cassette(path="llamacpp/text.sse", text=" or three, and the number", reason="length", usage=(4, 6)),
    Cassette(
        path="llamacpp/text.json", text=" or three, and the number", reason="length", usage=(4, 6), untouched=True
    ),
    Cassette(path="llamacpp_2025/no_blank_line_after_done.sse", text="test"),
    Cassette(path="ollama/role_and_empty_reason.sse", text=" if you have"),
    Cassette(path="ollama/reasoning.sse", text="Hi", reasoning="The user greets.", usage=(68, 9)),
    Cassette(path="ollama/parallel_tools.sse", tools=(WEATHER, TIME), reason="tool_calls"),
    Cassette(path="mistral/thinking_parts.sse", text="Hello!", reasoning="Okay, so", usage=(8, 12)),
    Cassette(path="mistral/usage_on_last_choice.sse", text="1, 2, 3.", usage=(7, 8)),
    Cassette(path="mistral/tools_without_index.sse", tools=(WEATHER, TIME), reason="tool_calls", usage=(90, 40)),
    Cassette(path="mistral/model_length.json", text="I don't", reason="length", usage=(14, 3)),
    Cassette(path="deepseek/keep_alive_reasoning.sse", text="Paris", reasoning="Hmm", usage=(9, 11)),
    Cassette(path="deepseek/blank_lines_before.json", text="Paris", usage=(9, 1), untouched=True),
    Cassette(path="openrouter/comments.sse", text="Hi", usage=(4, 1)),
    Cassette(path="groq/x_groq_usage.sse", text="Hello!", usage=(23, 19)),
    Cassette(path="groq/service_tier.json", text="Hello", usage=(23, 19)),
    Cassette(path="together/text_chunk.sse", text='   ":', usage=(17, 200)),
    Cassette(path="gemini/parallel_tools.sse", text=None, tools=(WEATHER, TIME), reason="tool_calls"),
    Cassette(path="proxies/id_changes.sse", tools=(("weather", '{"city": "Köln"}'),), reason="tool_calls"),
    Cassette(path="proxies/crlf_bom_done_spaces.sse", text="Héllo", untouched=True),
    Cassette(path="proxies/multi_line_data.sse", text="ab"),
    Cassette(path="proxies/delta_null.sse", text="ab", reasoning="c"),
    Cassette(path="proxies/stop_on_every_chunk.sse", text="I am whole"),
    Cassette(path="proxies/unknown_reason.json", text="Hi", tools=(("f", '{"a":1}'),), reason="length"),
    Cassette(path="proxies/usage_of_completion_only.json", text="Thanks", usage=(0, 25)),
]

ERRORS: list[tuple[str, type[BackendError], str]] = [
    ("vllm/error_top_level.sse", RequestRejected, "maximum context length"),
    ("vllm/error_in_200.json", BackendFailed, "CUDA out of memory"),
    ("vllm/abort.sse", BackendFailed, "'abort'"),
    ("tgi/error.sse", BackendFailed, "CUDA error"),
    ("tgi/error_first.sse", BackendOverloaded, "Model is overloaded"),
    ("tgi/text_never_finished.sse", BackendProtocolError, "broke off before its finish_reason"),
    ("sglang/error_without_blank_line.sse", RequestRejected, "Requested token count exceeds"),
    ("trtllm/cancelled.sse", BackendFailed, "'cancelled'"),
    ("llamacpp_2025/error_field.sse", RequestRejected, "exceeds the available context size"),
    ("ollama/native_stream.ndjson", BackendProtocolError, "line by line"),
    ("ollama/native.json", BackendProtocolError, "without a choice"),
    ("lmstudio/error_event.sse", BackendFailed, "The number of tokens to keep"),
    ("deepseek/insufficient_system_resource.sse", BackendOverloaded, "insufficient_system_resource"),
    ("openrouter/error_mid_stream.sse", BackendFailed, "Provider disconnected"),
    ("openrouter/error_first.sse", BackendOverloaded, "Provider returned error"),
    ("openrouter/error_in_200.json", BackendFailed, "model is down"),
    ("gemini/error_list.json", RequestRejected, "Unknown name"),
    ("gemini/error_list_in_stream.sse", BackendOverloaded, "exhausted"),
    ("proxies/bad_gateway.html", BackendProtocolError, "a page for people"),
    ("proxies/cloudflare_errors.json", BackendOverloaded, "Too many requests"),
    ("proxies/no_finish_reason.json", BackendProtocolError, "without a finish_reason"),
]
REFUSALS = [("llamacpp/error_context.json", 400)]


@pytest.fixture(scope="module")
async def upstream() -> AsyncIterator[Upstream]:
    async with Upstream() as upstream:
        yield upstream


@pytest.fixture
async def backend(upstream: Upstream) -> AsyncIterator[OpenAIBackend]:
    backend = OpenAIBackend("a", upstream.url, wall_clock=lambda: 1_700_000_000.0)
    yield backend
    await backend.aclose()


def pieces(answer: bytes, split: str) -> list[bytes]:
    if split == "whole":
        return [answer]
    if split == "bytes":
        return [answer[at : at + 1] for at in range(len(answer))]
    chance = random.Random(split)
    cuts = sorted(chance.sample(range(1, len(answer)), min(20, len(answer) - 1)))
    return [answer[start:end] for start, end in zip([0, *cuts], [*cuts, len(answer)], strict=True)]


def acts(path: str, split: str, status: int = 200, content_type: str | None = None) -> list[Act]:
    answer = (CASSETTES / path).read_bytes()
    said = CONTENT_TYPES[Path(path).suffix] if content_type is None else content_type
    return [Head(status, {"Content-Type": said} if said else {}), *map(Send, pieces(answer, split))]


@pytest.mark.parametrize("split", ["whole", "bytes", "cut 1", "cut 2", "cut 3"])
@pytest.mark.parametrize("cassette", ANSWERS, ids=lambda cassette: cassette.path)
async def test_an_engines_answer_is_read_whole_and_strictly_whatever_its_quirks(
    backend: OpenAIBackend, upstream: Upstream, cassette: Cassette, split: str
) -> None:
    upstream.plays(*acts(cassette.path, split))
    operation: Any = "text_completion" if cassette.text_completion else "chat"

    events = await collect(backend, make_call(operation, stream=cassette.stream, **cassette.request))

    assert all(strictly_read(event, operation) for event in events)
    assert frames_of(cassette) == [event.raw for event in events] or not cassette.untouched
    whole = whole_of(events, operation)
    [choice] = whole["choices"]
    message = {"content": choice["text"]} if operation == "text_completion" else choice["message"]
    assert message["content"] == cassette.text
    assert (message.get("reasoning_content") or message.get("reasoning") or "") == cassette.reasoning
    calls = message.get("tool_calls") or ()
    assert tuple((call["function"]["name"], call["function"]["arguments"]) for call in calls) == cassette.tools
    assert choice["finish_reason"] == cassette.reason
    assert usage_of(events) == cassette.usage
    if cassette.stream:
        assert_is_one_stream(events, cassette)


def strictly_read(event: Event, operation: str) -> object:
    """The event as OpenAI's own types, every field of them checked."""
    if operation == "text_completion":
        # The SDK's type has no null for the frames before a text's end, though OpenAI sends it.
        return Completion.model_validate_json(event.raw.replace(b'"finish_reason":null', b'"finish_reason":"stop"'))
    return (ChatCompletion if event.whole else ChatCompletionChunk).model_validate_json(event.raw)


def frames_of(cassette: Cassette) -> list[bytes]:
    answer = (CASSETTES / cassette.path).read_bytes()
    if not cassette.stream:
        return [answer.strip()]
    frames = [frame.data for frame in SseParser().feed(answer)]
    return [frame for frame in frames if b'"choices"' in frame]


def usage_of(events: Iterable[Event]) -> tuple[int, int] | None:
    told = [event.usage for event in events if event.usage is not None]
    return (told[-1].prompt_tokens, told[-1].completion_tokens) if told else None


def assert_is_one_stream(events: list[Event], cassette: Cassette) -> None:
    """What the SDKs rely on: one id, the role and the end of each choice once, usage last and by itself."""
    frames = [msgspec.json.decode(event.raw) for event in events]
    choices = [choice for frame in frames for choice in frame["choices"]]
    assert len({(frame["id"], frame["model"]) for frame in frames}) == 1
    assert [choice["finish_reason"] for choice in choices if choice.get("finish_reason")] == [cassette.reason]
    if not cassette.request.get("stream_options"):
        assert not any(frame.get("usage") for frame in frames if frame["choices"])
    assert bool(frames[-1].get("usage")) is (cassette.usage is not None)
    if not cassette.text_completion:
        said: Any = {}
        for choice in choices:
            said = accumulate_delta(said, choice["delta"])  # as the SDK's own stream helper puts it together
        assert said["role"] == "assistant"
        assert (said.get("content") or None) == (cassette.text or None)
        calls = said.get("tool_calls") or ()
        assert tuple((call["function"]["name"], call["function"]["arguments"]) for call in calls) == cassette.tools
        assert len({call["id"] for call in calls}) == len(calls)
        assert all(call["id"] and call["type"] == "function" for call in calls)


@pytest.mark.parametrize("split", ["whole", "bytes", "cut 1"])
@pytest.mark.parametrize(("path", "error", "words"), ERRORS, ids=lambda value: value if isinstance(value, str) else "")
async def test_an_error_inside_a_200_is_the_error_that_it_means(
    backend: OpenAIBackend, upstream: Upstream, path: str, error: type[BackendError], words: str, split: str
) -> None:
    upstream.plays(*acts(path, split))
    operation: Any = "text_completion" if "text_" in path else "chat"
    seen: list[Event] = []
    with pytest.raises(error, match=words) as failure:
        await collect_into(seen, backend, make_call(operation, stream=not path.endswith(".json")))
    assert type(failure.value) is error
    assert all(strictly_read(event, operation) for event in seen)
    assert not any(choice.finish_reason for event in seen for choice in event.choices)


@pytest.mark.parametrize("path", ["openrouter/error_first.sse"])
async def test_an_error_inside_a_200_may_say_when_to_come_back(
    backend: OpenAIBackend, upstream: Upstream, path: str
) -> None:
    upstream.plays(*acts(path, "whole"))
    with pytest.raises(BackendOverloaded) as failure:
        await collect(backend, make_call(stream=True))
    assert failure.value.retry_after_s == 7.0


@pytest.mark.parametrize(("path", "status"), REFUSALS)
async def test_a_refusal_is_rejected_in_the_engines_own_words(
    backend: OpenAIBackend, upstream: Upstream, path: str, status: int
) -> None:
    upstream.plays(*acts(path, "whole", status))
    with pytest.raises(RequestRejected, match="exceeds the available context size") as failure:
        await collect(backend, make_call(stream=True))
    assert failure.value.error_type == "exceed_context_size_error"


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/octet-stream", "application/json"])
@pytest.mark.parametrize("split", ["whole", "bytes"])
async def test_a_stream_is_known_by_its_first_bytes_whatever_its_content_type(
    backend: OpenAIBackend, upstream: Upstream, content_type: str, split: str
) -> None:
    upstream.plays(*acts("openai/chat_usage.sse", split, content_type=content_type))
    events = await collect(backend, make_call(stream=True))
    assert len(events) == 5
    assert usage_of(events) == (19, 2)


@pytest.mark.parametrize("content_type", ["", "text/plain", "text/event-stream"])
async def test_a_whole_answer_to_a_request_for_a_stream_is_known_by_its_first_bytes_too(
    backend: OpenAIBackend, upstream: Upstream, content_type: str
) -> None:
    upstream.plays(*acts("llamacpp/chat.json", "bytes", content_type=content_type))
    [only] = await collect(backend, make_call(stream=True))
    assert only.whole
    assert only.raw == (CASSETTES / "llamacpp/chat.json").read_bytes()


async def test_a_stream_that_nobody_asked_for_is_a_protocol_error(backend: OpenAIBackend, upstream: Upstream) -> None:
    upstream.plays(*acts("openai/chat_usage.sse", "whole"))
    with pytest.raises(BackendProtocolError, match="none was asked for"):
        await collect(backend, make_call())


async def test_what_azure_found_in_the_prompt_is_told_with_the_first_choice(
    backend: OpenAIBackend, upstream: Upstream
) -> None:
    upstream.plays(*acts("azure/prompt_filter_results.sse", "whole"))
    first, *others = await collect(backend, make_call(stream=True))
    assert b'"prompt_filter_results":[{"prompt_index":0' in first.raw
    assert not any(b"prompt_filter_results" in event.raw for event in others)


async def test_a_word_that_was_replaced_stays_beside_it(backend: OpenAIBackend, upstream: Upstream) -> None:
    upstream.plays(*acts("tgi/eos_token.sse", "whole"))
    events = await collect(backend, make_call(stream=True))
    assert b'"native_finish_reason":"eos_token"' in events[-1].raw
    upstream.plays(*acts("openrouter/comments.sse", "whole"))
    assert b'"native_finish_reason":"end_turn"' in (await collect(backend, make_call(stream=True)))[2].raw


def test_every_cassette_is_played_and_has_its_source_told() -> None:
    played = {cassette.path for cassette in ANSWERS} | {path for path, *_ in (*ERRORS, *REFUSALS)}
    there = {str(path.relative_to(CASSETTES)) for path in CASSETTES.rglob("*") if path.suffix in CONTENT_TYPES}
    assert there == played
    sources = (CASSETTES / "README.md").read_text()
    assert [path for path in sorted(there) if f"`{path}`" not in sources] == []
