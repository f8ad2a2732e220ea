"""What an answer may take, before it is known: the estimate that is reserved."""

from __future__ import annotations

from typing import Protocol

from backends.catalog import ModelCard
from backends.chat import ChatRequest, Usage
from policies.ledger import Amounts


class OutputLengths(Protocol):
    """How long answers tend to be: the 95th percentile of completion tokens per tenant and model."""

    def p95_tokens(self, tenant_id: str, model: str) -> int: ...


class FixedOutputLength:
    """The same guess for everybody, until lengths are learned."""

    def __init__(self, tokens: int = 512) -> None:
        self._tokens = tokens

    def p95_tokens(self, tenant_id: str, model: str) -> int:
        return self._tokens


def estimate(
    card: ModelCard, request: ChatRequest, *, tenant_id: str, prompt_tokens: int, lengths: OutputLengths
) -> Amounts:
    """Prompt tokens plus the expected completions, each bounded by what the client and the model allow.

    Embeddings have no completions.
    """
    if request.operation == "embeddings":
        prompt_only = Usage(prompt_tokens=prompt_tokens)
        return Amounts(tokens=prompt_tokens, cost_nano_usd=card.price.cost_nano_usd(prompt_only))
    completion = lengths.p95_tokens(tenant_id, card.name)
    for bound in (request.max_tokens, card.max_output_tokens, card.context_window_tokens - prompt_tokens):
        if bound is not None:
            completion = min(completion, max(bound, 1))
    usage = Usage(prompt_tokens=prompt_tokens, completion_tokens=completion * request.n * request.prompts)
    return Amounts(tokens=usage.total_tokens, cost_nano_usd=card.price.cost_nano_usd(usage))
