"""A decision: who may answer, best first, and why not the others."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.catalog import ModelCard
from backends.chat import ChatRequest, Message
from policies.routing_policy import FixedRouteSpec, RouteSpec, ThresholdRouteSpec
from routing.decision import Decision, NoEligibleModel, Score
from routing.difficulty import HeuristicScorer
from routing.router import Router
from tests.calls import make_request

SMALL = ModelCard(name="small", context_window_tokens=1000)
LARGE = ModelCard(
    name="large", context_window_tokens=4000, capabilities=frozenset({"tools", "json_schema", "logprobs"})
)
EYES = ModelCard(name="eyes", context_window_tokens=4000, capabilities=frozenset({"vision"}))
CARDS = {card.name: card for card in (SMALL, LARGE, EYES)}
ROUTES: dict[str, RouteSpec] = {
    "fast": FixedRouteSpec(model="small", fallbacks=("large", "small", "eyes")),
    "only": FixedRouteSpec(model="small"),
    "auto": ThresholdRouteSpec(small="small", large="large", threshold=0.5),
    "auto-alone": ThresholdRouteSpec(small="small", large="large", threshold=0.5, fallbacks=()),
    "auto-eyes": ThresholdRouteSpec(small="small", large="large", threshold=0.5, fallbacks=("eyes", "small")),
    "all-large": ThresholdRouteSpec(small="small", large="large", threshold=0.0),
}


class Scored:
    """A scorer that says what it was told to say."""

    def __init__(self, value: float = 0.0) -> None:
        self.value = value

    def score(self, request: ChatRequest) -> Score:
        return Score(value=self.value, scorer="told")


def route(model: str, *, difficulty: float = 0.0, prompt_tokens: int = 10, **fields: Any) -> Decision:
    router = Router(CARDS, ROUTES, Scored(difficulty))
    return router.route(make_request(model=model, **fields), prompt_tokens=prompt_tokens)


def names(decision: Decision) -> list[str]:
    return [card.name for card in decision.candidates]


@pytest.mark.parametrize(
    ("model", "difficulty", "candidates", "reason", "by_route"),
    [
        ("large", 0.9, ["large"], "named_model", None),
        ("fast", 0.9, ["small", "large", "eyes"], "fixed", "fast"),
        ("only", 0.9, ["small"], "fixed", "only"),
        ("auto", 0.4999, ["small", "large"], "below_threshold", "auto"),
        ("auto", 0.5, ["large", "small"], "at_or_above_threshold", "auto"),
        ("auto-alone", 0.4999, ["small"], "below_threshold", "auto-alone"),
        ("auto-alone", 0.5, ["large"], "at_or_above_threshold", "auto-alone"),
        ("auto-eyes", 0.0, ["small", "eyes"], "below_threshold", "auto-eyes"),
        ("auto-eyes", 1.0, ["large", "eyes", "small"], "at_or_above_threshold", "auto-eyes"),
        ("all-large", 0.0, ["large", "small"], "at_or_above_threshold", "all-large"),
    ],
)
def test_a_name_becomes_candidates(
    model: str, difficulty: float, candidates: list[str], reason: str, by_route: str | None
) -> None:
    decision = route(model, difficulty=difficulty)

    assert (names(decision), decision.reason, decision.route) == (candidates, reason, by_route)
    assert decision.model.name == candidates[0]
    assert (decision.score is not None) == model.startswith("a")
    assert decision.rejected == ()


@pytest.mark.parametrize(
    ("wants", "capability"),
    [
        ({"tools": [{}]}, "tools"),
        ({"response_format": {}}, "json_schema"),
        ({"logprobs": True}, "logprobs"),
    ],
)
def test_a_model_that_cannot_is_no_candidate_and_says_why(wants: dict[str, Any], capability: str) -> None:
    decision = route("fast", **wants)

    assert names(decision) == ["large"]
    assert [(one.model, one.reason) for one in decision.rejected] == [
        ("small", f"it has no {capability}"),
        ("eyes", f"it has no {capability}"),
    ]


def test_an_image_goes_to_a_model_that_sees() -> None:
    request = ChatRequest(operation="chat", model="fast", fields={}, messages=(Message(role="user"),), has_images=True)

    assert names(Router(CARDS, ROUTES, Scored()).route(request, prompt_tokens=1)) == ["eyes"]


def test_a_model_is_refused_only_for_a_prompt_that_clearly_does_not_fit() -> None:
    assert names(route("fast", prompt_tokens=1250)) == ["small", "large", "eyes"]

    decision = route("fast", prompt_tokens=1251)
    assert names(decision) == ["large", "eyes"]
    [rejection] = decision.rejected
    assert rejection.reason == "context_window: about 1251 prompt tokens do not fit its 1000 tokens"


VECTORS = ModelCard(name="vectors", context_window_tokens=256, task="embeddings")


def test_a_model_answers_only_what_it_is_for() -> None:
    router = Router({**CARDS, "vectors": VECTORS}, ROUTES, Scored())
    assert names(router.route(make_request("embeddings", model="vectors"), prompt_tokens=5)) == ["vectors"]

    for operation, model, says in (
        ("chat", "vectors", "it is for embeddings, not for chat"),
        ("text_completion", "vectors", "it is for embeddings, not for chat"),
        ("embeddings", "small", "it is for chat, not for embeddings"),
    ):
        with pytest.raises(NoEligibleModel) as refused:
            router.route(make_request(operation, model=model), prompt_tokens=5)  # type: ignore[arg-type]
        assert [one.reason for one in refused.value.rejected] == [says]


def test_each_of_many_texts_has_the_window_to_itself() -> None:
    router = Router({"vectors": VECTORS}, {}, Scored())
    many = make_request("embeddings", model="vectors", input=["a"] * 10)
    assert names(router.route(many, prompt_tokens=3200)) == ["vectors"]
    with pytest.raises(NoEligibleModel, match="context_window: about 321 prompt tokens do not fit"):
        router.route(many, prompt_tokens=3210)


@pytest.mark.parametrize("model", ["small", "only"])
def test_where_no_model_can_every_reason_is_named(model: str) -> None:
    with pytest.raises(NoEligibleModel) as refused:
        route(model, tools=[{}])

    assert [(one.model, one.reason) for one in refused.value.rejected] == [("small", "it has no tools")]
    assert str(refused.value) == f"no model can answer this request as '{model}': small: it has no tools"


@given(
    st.lists(st.sampled_from(["Hello", "prove why", "x = 1 + 2", "```", "- a\n" * 4, "long " * 300]), max_size=4),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_raising_the_threshold_never_sends_more_prompts_to_the_large_model(
    pieces: list[str], one: float, other: float
) -> None:
    request = make_request(model="auto", messages=[{"role": "user", "content": " ".join(pieces)}])

    def is_large(threshold: float) -> bool:
        routes: dict[str, RouteSpec] = {"auto": ThresholdRouteSpec(small="small", large="large", threshold=threshold)}
        return Router(CARDS, routes, HeuristicScorer()).route(request, prompt_tokens=1).model is LARGE

    assert is_large(min(one, other)) >= is_large(max(one, other))
    assert is_large(0.0)
