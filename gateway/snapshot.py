"""A policy, compiled: everything a request needs from it, in one object that is swapped as a whole."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from backends.attempts import Attempts, Target
from backends.backend import Backend, Load, Timeouts
from backends.catalog import ModelCard, Price, Task
from backends.chat import ChatRequest
from cache.key import AnswerScope
from policies.routing_policy import (
    BackendSpec,
    BackendTimeoutsSpec,
    EmbedderBackendSpec,
    FixedRouteSpec,
    LlamaCppBackendSpec,
    ModelSpec,
    OpenAIBackendSpec,
    Policy,
    PolicyFile,
    ScriptedBackendSpec,
    TimeoutsSpec,
    TritonBackendSpec,
)
from routing.balance import Balancer, Replicas, affinity_of
from routing.difficulty import Scorer
from routing.router import Router


class UnknownModel(Exception):
    """The client named neither a model nor a route. `known` are the names this key may use."""

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        super().__init__(f"the model '{name}' does not exist; known: {', '.join(known) or 'none'}")
        self.name = name
        self.known = known


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One policy at work."""

    policy: Policy
    models: Mapping[str, ModelCard]
    backends: Mapping[str, Backend]
    replicas: Mapping[str, Replicas]
    """By model name."""
    scopes: Mapping[str, AnswerScope]
    """By model or route name: what an exact answer under that name depends on."""
    tasks: Mapping[str, Task]
    """By model or route name, routes first: what it is for."""
    router: Router
    balancer: Balancer
    attempts: Attempts

    def targets(self, candidates: tuple[ModelCard, ...], request: ChatRequest, tenant_id: str) -> list[Target]:
        """Every backend of every candidate, candidates in order, replicas of one model as they are balanced now."""
        return [target for card in candidates for target in self._balanced(card.name, request, tenant_id)]

    @property
    def loads(self) -> dict[str, Load]:
        """How busy each backend is, by name."""
        return {name: backend.load for name, backend in self.backends.items()}

    def _balanced(self, model: str, request: ChatRequest, tenant_id: str) -> list[Target]:
        replicas = self.replicas[model]
        affinity = affinity_of(request, tenant_id=tenant_id, model=model) if replicas.affinity else None
        return self.balancer.order(replicas, affinity)


def compile_snapshot(
    policy: Policy,
    *,
    build_backend: Callable[[str, BackendSpec], Backend],
    build_attempts: Callable[[PolicyFile], Attempts],
    balancer: Balancer,
    scorer: Scorer,
) -> Snapshot:
    """Compile a checked policy. What `build_backend` raises refuses the policy as a whole."""
    file = policy.file
    models = cards(file)
    backends = {name: build_backend(name, spec) for name, spec in file.backends.items()}
    return Snapshot(
        policy=policy,
        models=models,
        backends=backends,
        replicas={name: _replicas(card, file, backends) for name, card in models.items()},
        scopes=_scopes(file),
        tasks=tasks(file),
        router=Router(models, file.routes, scorer),
        balancer=balancer,
        attempts=build_attempts(file),
    )


def cards(file: PolicyFile) -> dict[str, ModelCard]:
    """The model cards of a policy, by name."""
    return {name: _card(name, spec) for name, spec in file.models.items()}


def tasks(file: PolicyFile) -> dict[str, Task]:
    """What every route and model of a policy is for; all models of a route are for the same."""
    of_routes = {
        name: file.models[route.model if isinstance(route, FixedRouteSpec) else route.small].task
        for name, route in file.routes.items()
    }
    return of_routes | {name: model.task for name, model in file.models.items()}


def _card(name: str, spec: ModelSpec) -> ModelCard:
    price = spec.price
    return ModelCard(
        name=name,
        price=Price(
            input_nano_usd_per_1m=price.input,
            output_nano_usd_per_1m=price.output,
            cached_input_nano_usd_per_1m=price.cached_input,
        ),
        context_window_tokens=spec.context_window,
        max_output_tokens=spec.max_output_tokens,
        capabilities=frozenset(spec.capabilities),
        task=spec.task,
        owned_by=spec.owned_by,
        backends=spec.backends,
    )


def _replicas(card: ModelCard, file: PolicyFile, backends: Mapping[str, Backend]) -> Replicas:
    targets = [
        Target(
            card=card,
            backend=backends[name],
            timeouts=_timeouts(file.timeouts, file.backends[name].timeouts),
        )
        for name in card.backends
    ]
    return Replicas(targets, affinity=file.models[card.name].balance.affinity)


def _timeouts(spec: TimeoutsSpec, own: BackendTimeoutsSpec | None) -> Timeouts:
    """The policy's clocks, with a backend's own in their place where it states any."""
    own = own or BackendTimeoutsSpec()
    return Timeouts(
        connect_s=spec.connect if own.connect is None else own.connect,
        first_token_s=spec.first_token if own.first_token is None else own.first_token,
        idle_s=spec.idle if own.idle is None else own.idle,
        total_s=spec.total if own.total is None else own.total,
    )


def _scopes(file: PolicyFile) -> dict[str, AnswerScope]:
    """What can change an answer under each name: the engines behind a model; the rule and the models of a route."""
    models = {
        name: _digest([_answering(file.backends[backend]) for backend in m.backends]) for name, m in file.models.items()
    }
    scopes = {name: AnswerScope(name=name, settings_digest=d, epoch=file.cache.epoch) for name, d in models.items()}
    for name, route in file.routes.items():
        used = (
            [route.model, *route.fallbacks]
            if isinstance(route, FixedRouteSpec)
            else [route.small, route.large, *(route.fallbacks or ())]
        )
        settings = [msgspec.to_builtins(route), {model: models[model] for model in used}]
        scopes[name] = AnswerScope(name=name, settings_digest=_digest(settings), epoch=file.cache.epoch)
    return scopes


def _answering(spec: BackendSpec) -> list[object]:
    """The settings of a backend that its answers depend on; keys, clocks and limits are not among them."""
    match spec:
        case LlamaCppBackendSpec():
            return ["llamacpp", spec.url, spec.weights, spec.context_tokens, spec.chat_template, spec.stop]
        case TritonBackendSpec():
            where = [spec.url, spec.repository, spec.model, spec.model_folder]
            prompt = [spec.chat_template, spec.stop, spec.tool_format, spec.adds_bos, spec.remote_images]
            return ["triton", where, prompt, spec.draft_tokens]
        case ScriptedBackendSpec():
            return ["scripted", spec.answer]
        case EmbedderBackendSpec():
            return ["embedder"]
        case OpenAIBackendSpec():
            return ["openai", spec.url, spec.model, spec.query]


def _digest(settings: object) -> str:
    return hashlib.blake2b(msgspec.json.encode(settings, order="sorted"), digest_size=8).hexdigest()
