"""A kept answer is told again in the shape that is asked for, under an id of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.chat import Event, Operation, Usage
from backends.fold import fold
from cache.replay import Replay
from tests.cache.entries import completion, entry
from tests.calls import make_request

CHOICES: list[dict[str, Any]] = [
    {},
    {"message": {"role": "assistant", "content": "é 🎉", "reasoning_content": "hm"}},
    {"logprobs": {"content": [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}], "refusal": None}},
    {
        "finish_reason": "tool_calls",
        "message": {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}],
        },
    },
]
USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


def kept(operation: Operation = "chat", choice: Mapping[str, Any] = {}, **fields: Any) -> dict[str, Any]:
    answer = msgspec.json.decode(completion(operation, **choice), type=dict[str, Any])
    name = "chat.completion" if operation == "chat" else "text_completion"
    return {**answer, "object": name, "usage": USAGE, "system_fingerprint": "fp", **fields}


async def replayed(answer: dict[str, Any], operation: Operation = "chat", **fields: Any) -> list[Event]:
    request = make_request(operation, **fields)
    replay = Replay(entry(operation=operation, completion=msgspec.json.encode(answer)), request, "chatcmpl-fresh")
    events = await replay.take()
    assert await replay.take() == []
    return events


@pytest.mark.parametrize("choice", CHOICES)
async def test_one_body_is_the_answer_under_a_fresh_id(choice: dict[str, Any]) -> None:
    [event] = await replayed(kept(choice=choice))

    assert event.whole
    assert msgspec.json.decode(event.raw) == {**kept(choice=choice), "id": "chatcmpl-fresh"}


async def test_embeddings_get_a_fresh_id_only_where_they_had_one() -> None:
    answer = {"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": "AACAPw=="}], "model": "m"}
    for extra, fresh in (({}, {}), ({"id": "embd-1"}, {"id": "chatcmpl-fresh"})):
        [event] = await replayed(answer | extra, "embeddings")
        assert msgspec.json.decode(event.raw) == answer | fresh


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("include_usage", [True, False])
async def test_a_stream_adds_up_to_the_answer(choice: dict[str, Any], include_usage: bool) -> None:
    events = await replayed(kept(choice=choice), stream=True, stream_options={"include_usage": include_usage})

    answer = {**kept(choice=choice), "id": "chatcmpl-fresh"}
    if not include_usage:
        del answer["usage"]
    assert msgspec.json.decode(fold([event.raw for event in events], "chat")) == answer
    assert {msgspec.json.decode(event.raw)["id"] for event in events} == {"chatcmpl-fresh"}
    assert events[-1].is_usage_only == include_usage
    assert [event.usage for event in events if event.usage] == [
        Usage(prompt_tokens=3, completion_tokens=4)
    ] * include_usage


async def test_a_text_completion_streams_as_one() -> None:
    events = await replayed(kept("text_completion"), "text_completion", stream=True)

    answer = msgspec.json.decode(fold([event.raw for event in events], "text_completion"))
    assert answer["choices"] == kept("text_completion")["choices"]


@given(st.dictionaries(st.sampled_from(["x_one", "service_tier"]), st.sampled_from([None, 1, "a", [1], {"a": 1}])))
async def test_fields_that_nobody_knows_are_told_again(unknown: dict[str, Any]) -> None:
    [event] = await replayed(kept(**unknown))

    assert msgspec.json.decode(event.raw) == {**kept(**unknown), "id": "chatcmpl-fresh"}


async def test_who_has_left_hears_nothing() -> None:
    replay = Replay(entry(), make_request(stream=True), "chatcmpl-fresh")
    replay.leave()

    assert await replay.take() == []
