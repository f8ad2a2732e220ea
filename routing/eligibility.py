"""Which models can answer a request at all. Eligibility comes before preference."""

from __future__ import annotations

from backends.catalog import TASKS, Capability, ModelCard
from backends.chat import ChatRequest

CONTEXT_WINDOW = "context_window"


def why_not(card: ModelCard, request: ChatRequest, prompt_tokens: int) -> str | None:
    """The reason `card` cannot answer, in words for a person; None where it can.

    `prompt_tokens` is an estimate: a model is refused for its window only where the prompt clearly cannot fit, and the
    engine has the last word on what is close.
    """
    if card.task != TASKS[request.operation]:
        return f"it is for {card.task}, not for {TASKS[request.operation]}"
    for wanted, capability in _wanted(request):
        if wanted and capability not in card.capabilities:
            return f"it has no {capability}"
    tokens_at_once = prompt_tokens // request.inputs  # of the average text: each has the window to itself
    if tokens_at_once > card.context_window_tokens * _ESTIMATE_SLACK:
        return (
            f"{CONTEXT_WINDOW}: about {tokens_at_once} prompt tokens do not fit its {card.context_window_tokens} tokens"
        )
    return None


_ESTIMATE_SLACK = 1.25
"""Bytes-per-token estimates err by about a fifth between languages before they are learned (3.2 to 4.9 bytes)."""


def _wanted(request: ChatRequest) -> tuple[tuple[bool, Capability], ...]:
    return (
        (request.wants_tools, "tools"),
        (request.wants_json_schema, "json_schema"),
        (request.wants_logprobs, "logprobs"),
        (request.has_images, "vision"),
    )
