"""From a name and a request to a decision, top to bottom: resolve, score, prefer, drop what cannot answer."""

from __future__ import annotations

from collections.abc import Mapping

from backends.catalog import ModelCard
from backends.chat import ChatRequest
from policies.routing_policy import FixedRouteSpec, RouteSpec
from routing.decision import Decision, NoEligibleModel, Rejection, Score
from routing.difficulty import Scorer
from routing.eligibility import why_not


class Router:
    """Decides under one policy snapshot. Immutable, so that a request sees one policy from start to end."""

    def __init__(self, models: Mapping[str, ModelCard], routes: Mapping[str, RouteSpec], scorer: Scorer) -> None:
        self._models = models
        self._routes = routes
        self._scorer = scorer

    def route(self, request: ChatRequest, *, prompt_tokens: int) -> Decision:
        """The models that may answer, best first. `request.model` must be a known route or model.

        Whether the key may use that name was settled at the door: a route that it may use grants the route's models.
        Raises `NoEligibleModel` where none can, saying why for each.
        """
        spec = self._routes.get(request.model)
        score: Score | None = None
        if spec is None:
            names, reason = [request.model], "named_model"
        elif isinstance(spec, FixedRouteSpec):
            names, reason = [spec.model, *spec.fallbacks], "fixed"
        else:
            score = self._scorer.score(request)
            hard = score.value >= spec.threshold
            first, other = (spec.large, spec.small) if hard else (spec.small, spec.large)
            reason = "at_or_above_threshold" if hard else "below_threshold"
            names = [first, *(spec.fallbacks if spec.fallbacks is not None else (other,))]
        return self._eligible(request, prompt_tokens, names, reason, score)

    def _eligible(
        self,
        request: ChatRequest,
        prompt_tokens: int,
        names: list[str],
        reason: str,
        score: Score | None,
    ) -> Decision:
        candidates: list[ModelCard] = []
        rejected: list[Rejection] = []
        for name in dict.fromkeys(names):
            card = self._models[name]
            why = why_not(card, request, prompt_tokens)
            if why is None:
                candidates.append(card)
            else:
                rejected.append(Rejection(model=name, reason=why))
        if not candidates:
            raise NoEligibleModel(request.model, tuple(rejected))
        return Decision(
            route=request.model if request.model in self._routes else None,
            candidates=tuple(candidates),
            reason=reason,
            score=score,
            rejected=tuple(rejected),
        )
