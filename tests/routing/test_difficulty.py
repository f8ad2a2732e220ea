"""The heuristic adds up surface features: each of them can only make a request look harder, and none takes long."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.chat import ChatRequest
from routing.decision import Score
from routing.difficulty import HeuristicScorer
from tests.calls import make_request

TEXTS = st.text(max_size=60) | st.sampled_from(
    ["Why?", "prove it step by step", "```py\ndef f():\n```", "1. a\n2. b\n- c\n", "x = 1 + 2", "é" * 3000, "\n" * 500]
)


def score(text: str = "", *, turns: int = 1, **fields: Any) -> Score:
    return HeuristicScorer().score(request(text, turns=turns, **fields))


def request(text: str, *, turns: int = 1, **fields: Any) -> ChatRequest:
    earlier = [{"role": "user", "content": "earlier"}, {"role": "assistant", "content": "why prove = 1 + 1"}]
    return make_request(messages=earlier * (turns - 1) + [{"role": "user", "content": text}], **fields)


@given(TEXTS)
def test_a_score_is_in_0_to_1_and_so_is_every_feature(text: str) -> None:
    scored = score(text, turns=9, tools=[{}], response_format={})

    assert 0.0 <= scored.value <= 1.0
    assert all(0.0 <= value <= 1.0 for value in scored.features.values())


@given(TEXTS, st.integers(1, 9))
def test_tools_a_schema_and_more_turns_never_make_a_request_look_easier(text: str, turns: int) -> None:
    plain = score(text, turns=turns).value

    assert score(text, turns=turns, tools=[{}]).value >= plain
    assert score(text, turns=turns, response_format={}).value >= plain
    assert score(text, turns=turns + 1).value >= plain


@given(st.integers(0, 12_000), st.integers(0, 12_000))
def test_of_two_texts_that_differ_only_in_length_the_longer_never_looks_easier(one: int, other: int) -> None:
    shorter, longer = sorted((one, other))

    assert score("a" * shorter).value <= score("a" * longer).value


@given(TEXTS)
def test_a_request_always_has_the_same_score(text: str) -> None:
    assert score(text) == score(text)


@pytest.mark.parametrize(
    ("text", "feature", "value"),
    [
        ("hello", "length", 5 / 2000),
        ("a" * 4000, "length", 1.0),
        ("write def f(x)", "code", 1.0),
        ("```", "code", 1.0),
        ("undefined returns", "code", 0.0),
        ("what is 3 * 4", "math", 1.0),
        ("call 555", "math", 0.0),
        ("Explain it", "reasoning", 0.5),
        ("WHY, and prove it. Compare.", "reasoning", 1.0),
        ("whyever", "reasoning", 0.0),
        ("1. a\n2) b", "steps", 0.5),
        ("\n\n - a\n\t* b\n• c\n- d\n- e", "steps", 1.0),
        ("a - b", "steps", 0.0),
    ],
)
def test_a_feature_is_seen_in(text: str, feature: str, value: float) -> None:
    assert score(text).features[feature] == pytest.approx(value)


def test_only_what_the_user_said_last_is_read() -> None:
    messages = [
        {"role": "user", "content": "prove = why"},
        {"role": "user", "content": [{"type": "text", "text": "hello"}, {"type": "image_url"}]},
        {"role": "assistant", "content": "```prove```"},
    ]
    features = HeuristicScorer().score(make_request(messages=messages)).features

    assert features["length"] == 5 / 2000
    assert (features["code"], features["math"], features["reasoning"]) == (0.0, 0.0, 0.0)


def test_a_text_completion_is_scored_by_its_prompt_and_one_without_text_is_easy() -> None:
    scorer = HeuristicScorer()

    assert scorer.score(make_request("text_completion", prompt="prove why")).features["reasoning"] == 1.0
    assert scorer.score(make_request(messages=[{"role": "system", "content": "prove why"}])).value == 0.0


def test_a_very_long_text_is_read_at_its_head_and_its_tail() -> None:
    filler = "a " * 50_000

    assert score("prove " + filler).features["reasoning"] == 0.5
    assert score(filler + " prove").features["reasoning"] == 0.5
    assert score(filler + " prove " + filler).features["reasoning"] == 0.0


HOSTILE = [
    "\n",
    " \n",
    "\t\n ",
    "\r\n",
    " ",
    "1",
    "1 ",
    "1. ",
    "1.\n",
    "-\n",
    "- ",
    "{",
    "{ ",
    "; \r",
    "1 -",
    "\\",
    "`",
    "step by ",
    "trade",
    "analy",
    "\u2028",
    "\u00a0\n",
]


@pytest.mark.parametrize("piece", HOSTILE, ids=repr)
def test_no_text_takes_long_to_score(piece: str) -> None:
    """Found by one of them: 8,000 empty lines once took 3.6 s. A linear scan takes about 1 ms of CPU."""
    for text in (piece * (8_000 // len(piece)), piece * (8_000 // len(piece)) + "x", "{1" + piece * 4_000 + "x"):
        began_s = time.process_time()
        score(text)
        assert time.process_time() - began_s < 0.25


@given(st.lists(st.sampled_from(HOSTILE), min_size=1, max_size=4))
def test_no_mixture_of_hostile_texts_takes_long_to_score(pieces: list[str]) -> None:
    text = "".join(pieces)
    began_s = time.process_time()
    score(text * (8_000 // len(text)))
    assert time.process_time() - began_s < 0.25
