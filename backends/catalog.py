"""Model cards: what a model costs, holds and can do. Facts only; who prefers which is routing's business."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from backends.chat import Operation, Usage

Capability = Literal["tools", "json_schema", "logprobs", "vision"]
Task = Literal["chat", "embeddings"]
"""What a model is for: chat and text completions, or embeddings."""

TASKS: Mapping[Operation, Task] = {"chat": "chat", "text_completion": "chat", "embeddings": "embeddings"}
"""What a model must be for, to be asked for an operation."""


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """Prices as vendors quote them, per 1M tokens, in integer nano-dollars (1e-9 USD): $0.15 is 150_000_000."""

    input_nano_usd_per_1m: int = 0
    output_nano_usd_per_1m: int = 0
    cached_input_nano_usd_per_1m: int | None = None
    """None: cached prompt tokens cost what other prompt tokens cost."""

    def cost_nano_usd(self, usage: Usage) -> int:
        """What `usage` costs, in integer nano-dollars, the last fraction of one rounded up."""
        cached = min(usage.cached_tokens, usage.prompt_tokens)
        cached_price = (
            self.input_nano_usd_per_1m
            if self.cached_input_nano_usd_per_1m is None
            else self.cached_input_nano_usd_per_1m
        )
        per_million = (
            (usage.prompt_tokens - cached) * self.input_nano_usd_per_1m
            + cached * cached_price
            + usage.completion_tokens * self.output_nano_usd_per_1m
        )
        return -(-per_million // 1_000_000)


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """One model as clients name it, and the facts that make it eligible for a request."""

    name: str
    price: Price = Price()
    context_window_tokens: int
    max_output_tokens: int | None = None
    capabilities: frozenset[Capability] = frozenset()
    owned_by: str = "forebay"
    task: Task = "chat"
    backends: tuple[str, ...] = ()
    """Names of the backends that serve it: replicas, in the order the policy gives them."""
