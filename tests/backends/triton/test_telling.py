"""What the responses of a model become as the events of an answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from backends.fold import fold
from backends.tool_calls.parser import tool_call_parser
from backends.triton.reading import PromptEcho, Told
from backends.triton.telling import Frames, Telling
from tests.calls import make_call

CALL = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'


@pytest.fixture
async def frames() -> Frames:
    return Frames(make_call(), 1)


def telling(frames: Frames, *, tools: bool = False, **changes: Any) -> Telling:
    ids: Iterator[str] = map(str, range(9))
    parser = tool_call_parser("hermes", names={"f"}, fresh_id=lambda: next(ids)) if tools else None
    settings: dict[str, Any] = {
        "cumulative": False,
        "says_finish_reason": False,
        "echo": None,
        "stops": (),
        "parser": parser,
        "wants_log_probs": False,
        "tokenizer": None,
        "max_tokens": 100,
    }
    return Telling(frames, **{**settings, **changes})


def choice_of(answer: Telling, responses: Iterable[Told | str]) -> dict[str, Any]:
    """The one choice of an answer of these responses, read to where the answer is over."""
    events = []
    for told in responses:
        events += answer.tell(Told(told) if isinstance(told, str) else told)
        if answer.is_over:
            break
    events += answer.close(answer.completion_tokens, None)
    choice: dict[str, Any] = json.loads(fold([event.raw for event in events], "chat"))["choices"][0]
    return choice


def tokens_of(choice: dict[str, Any]) -> list[str]:
    return [entry["token"] for entry in choice["logprobs"]["content"]] if choice["logprobs"] else []


async def test_a_prompt_that_an_engine_repeats_is_no_text_that_the_model_made(frames: Frames) -> None:
    answer = telling(frames, echo=PromptEcho("Say hello."), wants_log_probs=True)
    choice = choice_of(answer, [Told("Say hello.Hi", log_probs=(-0.5,))])
    assert choice["message"]["content"] == "Hi"
    assert tokens_of(choice) == ["Hi"]
    assert "".join(answer.text) == "Hi"


async def test_an_answer_that_is_cut_at_a_stop_sequence_did_not_end_for_its_length(frames: Frames) -> None:
    told = Told("one STOP two", finish_reason="length")
    assert choice_of(telling(frames, says_finish_reason=True, stops=("STOP",)), [told])["finish_reason"] == "stop"
    assert choice_of(telling(frames, says_finish_reason=True), [told])["finish_reason"] == "length"


async def test_a_stop_sequence_that_is_a_token_of_its_own_leaves_no_log_probability(frames: Frames) -> None:
    responses = [Told("Hi ", log_probs=(-0.5,)), Told("STOP", log_probs=(-1.5,))]
    assert tokens_of(choice_of(telling(frames, stops=("STOP",), wants_log_probs=True), responses)) == ["Hi "]


async def test_an_answer_that_could_have_been_tool_calls_has_its_log_probabilities(frames: Frames) -> None:
    responses = [Told("Hi", log_probs=(-0.5,)), Told(" <b", log_probs=(-1.5,)), Told(">", log_probs=(-2.5,))]
    choice = choice_of(telling(frames, tools=True, wants_log_probs=True), responses)
    assert choice["message"]["content"] == "Hi <b>"
    assert tokens_of(choice) == ["Hi", " <b", ">"]


async def test_log_probabilities_of_a_tool_call_are_not_those_of_content(frames: Frames) -> None:
    responses = [Told("Well", log_probs=(-0.5,)), Told(CALL, log_probs=(-1.5,))]
    choice = choice_of(telling(frames, tools=True, wants_log_probs=True), responses)
    assert len(choice["message"]["tool_calls"]) == 1
    assert tokens_of(choice) == ["Well"]


@pytest.mark.parametrize("impossible", [float("-inf"), float("nan"), -1e38])
async def test_a_log_probability_is_a_number_that_json_has(frames: Frames, impossible: float) -> None:
    choice = choice_of(telling(frames, wants_log_probs=True), [Told("Hi", log_probs=(impossible,))])
    assert [entry["logprob"] for entry in choice["logprobs"]["content"]] == [-9999.0]


@pytest.mark.parametrize("pieces", [[CALL, CALL, "x"], [CALL + CALL], list(CALL + CALL)])
async def test_a_client_that_takes_one_call_is_told_one(frames: Frames, pieces: list[str]) -> None:
    answer = telling(frames, tools=True, one_call=True)
    choice = choice_of(answer, pieces)
    assert len(choice["message"]["tool_calls"]) == 1
    assert not choice["message"]["content"]
    assert choice["finish_reason"] == "tool_calls"
    assert len(choice_of(telling(frames, tools=True), pieces)["message"]["tool_calls"]) == 2
