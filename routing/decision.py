"""What routing decides and why, as values that headers, logs and `explain` show alike."""

from __future__ import annotations

import msgspec

from backends.catalog import ModelCard


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """How hard a request looks. `value` is in [0, 1]; what it means is its scorer's to say."""

    value: float
    scorer: str
    """Name and version of the scorer."""
    features: dict[str, float] = {}


class Rejection(msgspec.Struct, frozen=True, kw_only=True):
    """A model that was not a candidate, and why."""

    model: str
    reason: str


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """Which models may answer, best first, and how that came about."""

    route: str | None
    """The route's name; None where the client named a model."""
    candidates: tuple[ModelCard, ...]
    reason: str
    """From a closed set: named_model, fixed, below_threshold, at_or_above_threshold."""
    score: Score | None = None
    rejected: tuple[Rejection, ...] = ()

    @property
    def model(self) -> ModelCard:
        return self.candidates[0]


class NoEligibleModel(Exception):
    """No model of the route can answer this request; `rejected` says why, model by model."""

    def __init__(self, name: str, rejected: tuple[Rejection, ...]) -> None:
        reasons = "; ".join(f"{rejection.model}: {rejection.reason}" for rejection in rejected)
        super().__init__(f"no model can answer this request as '{name}': {reasons}")
        self.rejected = rejected
