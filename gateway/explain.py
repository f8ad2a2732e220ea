"""What a policy would do with a request, and why, without calling a model."""

from __future__ import annotations

import msgspec

from backends.chat import ChatRequest
from backends.tokens import BytesPerToken
from gateway.openai.endpoint import usd
from gateway.openai.translate import read_chat, read_embeddings
from gateway.pipeline import DEFAULT_TEMPERATURE
from gateway.snapshot import UnknownModel, cards, tasks
from policies.routing_policy import Policy, ThresholdRouteSpec
from routing.cost import FixedOutputLength, estimate
from routing.decision import Rejection, Score
from routing.difficulty import HeuristicScorer
from routing.router import Router


class _Named(msgspec.Struct, frozen=True):
    model: str = ""


def prompt_body(policy: Policy, model: str, prompt: str) -> bytes:
    """The body of a request that asks `model` for what it is for, about `prompt`."""
    if _is_for_embeddings(policy, model):
        return msgspec.json.encode({"model": model, "input": prompt})
    return msgspec.json.encode({"model": model, "messages": [{"role": "user", "content": prompt}]})


def read_request(policy: Policy, body: bytes) -> ChatRequest:
    """The request in `body`, read as one for what the model it names is for. Raises `RequestError`."""
    try:
        model = msgspec.json.decode(body, type=_Named).model
    except (msgspec.DecodeError, UnicodeDecodeError):
        model = ""  # reading it in full says what is wrong
    return read_embeddings(body) if _is_for_embeddings(policy, model) else read_chat(body)


def _is_for_embeddings(policy: Policy, model: str) -> bool:
    return tasks(policy.file).get(model) == "embeddings"


class ExplainedCandidate(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    backends: tuple[str, ...]
    reserved_tokens: int
    reserved_usd: str
    """What would be reserved before the call: the prompt and an expected completion, priced."""


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    policy: str
    asked_for: str
    route: str | None
    reason: str
    score: Score | None
    threshold: float | None
    candidates: tuple[ExplainedCandidate, ...]
    rejected: tuple[Rejection, ...]
    cache: str
    prompt_tokens: int


def explain_request(policy: Policy, request: ChatRequest) -> Explanation:
    """Raises `UnknownModel` and `NoEligibleModel`, as the request itself would."""
    models = cards(policy.file)
    if request.model not in policy.names:
        raise UnknownModel(request.model, policy.names)
    prompt_tokens = BytesPerToken().estimate((), request.size_bytes)
    decision = Router(models, policy.file.routes, HeuristicScorer()).route(request, prompt_tokens=prompt_tokens)
    route = policy.file.routes.get(request.model)
    lengths = FixedOutputLength()
    candidates = []
    for card in decision.candidates:
        claim = estimate(card, request, tenant_id="", prompt_tokens=prompt_tokens, lengths=lengths)
        candidates.append(
            ExplainedCandidate(
                model=card.name,
                backends=card.backends,
                reserved_tokens=claim.tokens,
                reserved_usd=usd(claim.cost_nano_usd).decode(),
            )
        )
    return Explanation(
        policy=policy.label,
        asked_for=request.model,
        route=decision.route,
        reason=decision.reason,
        score=decision.score,
        threshold=route.threshold if isinstance(route, ThresholdRouteSpec) else None,
        candidates=tuple(candidates),
        rejected=decision.rejected,
        cache=_cache_verdict(policy, request),
        prompt_tokens=prompt_tokens,
    )


def _cache_verdict(policy: Policy, request: ChatRequest) -> str:
    exact = policy.file.cache.exact
    if not exact.enabled:
        return "bypass: the policy has the exact cache off"
    temperature = DEFAULT_TEMPERATURE if request.temperature is None else request.temperature
    if temperature > exact.max_temperature:
        return f"bypass: temperature {temperature:g} is above the policy's {exact.max_temperature:g}"
    return f"looked up, and kept for {exact.ttl:g} s if the answer may be"
