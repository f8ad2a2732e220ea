"""What a policy's parts say about each other: names that exist, routes that differ, clocks that can run out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from policies.conform import Conformed
from policies.mistakes import Findings, Path, suggestion
from policies.routing_policy import (
    PATH_FIELDS,
    BackendSpec,
    BackendTimeoutsSpec,
    EmbedderBackendSpec,
    FixedRouteSpec,
    LlamaCppBackendSpec,
    ModelSpec,
    OpenAIBackendSpec,
    RouteSpec,
    ThresholdRouteSpec,
    TimeoutsSpec,
    TlsSpec,
    TritonBackendSpec,
)

T = TypeVar("T")

_FOLDERS = frozenset({"repository", "model_folder"})


TemplateFault = Callable[[str], str | None]
"""What is wrong with a chat template, or None. Templates are the backends' business, so this is handed in."""


def check_references(policy: Conformed, folder: FilePath, findings: Findings, template_fault: TemplateFault) -> None:
    """Note what is wrong between the sound parts of a policy. A part with mistakes of its own still has its name.

    `folder` is where relative paths of weights begin.
    """
    _Check(policy, folder, findings, template_fault).run()


class _Check:
    def __init__(self, policy: Conformed, folder: FilePath, findings: Findings, template_fault: TemplateFault) -> None:
        self._template_fault = template_fault
        self._policy = policy
        self._folder = folder
        self._findings = findings
        self._backends = self._parts("backends", BackendSpec)
        self._models = self._parts("models", ModelSpec)
        self._routes = self._parts("routes", RouteSpec)

    def run(self) -> None:
        for name, backend in self._sound(self._backends):
            self._backend(("backends", name), backend)
        for name, model in self._sound(self._models):
            self._model(("models", name), model)
        for name in self._routes:
            if name in self._models:
                self._mistake(("routes", name), "a model has this name", "give the route another name", at_key=True)
        for name, route in self._sound(self._routes):
            self._route(("routes", name), route)
        if self._policy.is_sound(("timeouts",)):
            self._timeouts(("timeouts",), msgspec.convert(self._policy.data["timeouts"], TimeoutsSpec))
        self._unused_backends()

    def _backend(self, path: Path, backend: BackendSpec) -> None:
        if isinstance(backend, LlamaCppBackendSpec):
            self._one_of(path, backend, "url", "weights")
        if isinstance(backend, OpenAIBackendSpec):
            self._openai(path, backend)
        if isinstance(backend, TritonBackendSpec):
            self._triton(path, backend)
        template = getattr(backend, "chat_template", None)
        if template is not None and (fault := self._template_fault(template)):
            self._mistake((*path, "chat_template"), f"not a Jinja template: {fault}")
        for name in ("url", "metrics_url"):
            if (url := getattr(backend, name, None)) is not None:
                self._url((*path, name), url)
        for name in PATH_FIELDS:
            if (file := getattr(backend, name, None)) is not None:
                self._path((*path, name), file)
        if (tls := getattr(backend, "tls", None)) is not None:
            self._tls((*path, "tls"), tls)
        if backend.timeouts is not None:
            self._timeouts((*path, "timeouts"), backend.timeouts)

    def _one_of(self, path: Path, backend: BackendSpec, served: str, started: str) -> None:
        """A backend is either somewhere, or started by us from something."""
        has = [getattr(backend, name) is not None for name in (served, started)]
        if sum(has) != 1:
            which = "both" if any(has) else "neither"
            remedy = f"{served} for a server that runs, {started} for one that Forebay starts"
            self._mistake(path, f"needs exactly one of '{served}' and '{started}', has {which}", remedy, at_key=True)

    def _openai(self, path: Path, backend: OpenAIBackendSpec) -> None:
        if "?" in backend.url or "#" in backend.url:
            message = "has a query or a fragment, and paths are added at its end"
            self._mistake((*path, "url"), message, "end it with the path, such as /v1, and write the rest as query")
        if backend.tls is not None and not backend.url.startswith("https://"):
            self._mistake((*path, "tls"), "the URL is not an https:// one", "write https://, or remove tls")
        if backend.api_key_header is not None and backend.api_key is None:
            self._mistake((*path, "api_key_header"), "there is no 'api_key' to send in it", "add api_key")

    def _triton(self, path: Path, backend: TritonBackendSpec) -> None:
        self._one_of(path, backend, "url", "repository")
        if backend.tls is not None and backend.url is None:
            self._mistake((*path, "tls"), "a Triton that Forebay starts is spoken to without TLS", "remove tls")
        elif backend.tls is not None and not (backend.url or "").startswith("grpcs://"):
            self._mistake((*path, "tls"), "the URL is not a grpcs:// one", "write grpcs://, or remove tls")
        if backend.tool_format not in (None, "none") and backend.chat_template is None and backend.model_folder is None:
            self._mistake((*path, "tool_format"), "there is no chat template to show the tools to the model with")

    def _tls(self, path: Path, tls: TlsSpec) -> None:
        for name in PATH_FIELDS:
            if (file := getattr(tls, name, None)) is not None:
                self._path((*path, name), file)
        if (tls.certificate is None) != (tls.key is None):
            missing = "key" if tls.key is None else "certificate"
            self._mistake(path, f"has no '{missing}'", "a certificate of ours needs its private key", at_key=True)

    def _url(self, path: Path, url: str) -> None:
        if not _names_a_server(url):
            example = "grpc://127.0.0.1:8001" if url.startswith("grpc") else "http://127.0.0.1:8000/v1"
            remedy = f"write it like {example}, with a port from 1 to 65535"
            self._mistake(path, f"{self._policy.shown(path, url)} names no server", remedy)

    def _path(self, path: Path, file: str) -> None:
        wants_folder = path[-1] in _FOLDERS
        try:
            there = self._folder / file
            is_there = there.is_dir() if wants_folder else there.is_file()
        except OSError:
            is_there = False
        if not is_there:
            remedy = "a path is relative to the policy file"
            remedy += "; download the model or correct the path" if path[-1] == "weights" else "; correct it"
            kind = "folder" if wants_folder else "file"
            self._mistake(path, f"no such {kind}: {self._policy.shown(path, file)}", remedy)

    def _model(self, path: Path, model: ModelSpec) -> None:
        self._known((*path, "backends"), model.backends, self._backends, "backend")
        if model.max_output_tokens is not None and model.max_output_tokens > model.context_window:
            self._mistake((*path, "max_output_tokens"), f"exceeds the context window of {model.context_window} tokens")
        for i, name in enumerate(model.backends):
            backend = self._backends.get(name)
            self._serves_task((*path, "backends", i), name, backend, model)
            if (
                isinstance(backend, LlamaCppBackendSpec)
                and backend.weights
                and backend.context_tokens < (model.context_window)
            ):
                message = f"backend {name!r} is started with {backend.context_tokens} tokens of context, "
                message += f"the model promises {model.context_window}"
                self._warning((*path, "backends", i), message, "raise context_tokens or lower context_window")

    def _serves_task(self, path: Path, name: str, backend: BackendSpec | None, model: ModelSpec) -> None:
        if isinstance(backend, EmbedderBackendSpec) and model.task != "embeddings":
            self._mistake(path, f"backend {name!r} makes embeddings only", "add task: embeddings to the model")
        elif model.task != "embeddings":
            return
        elif isinstance(backend, TritonBackendSpec):
            self._mistake(path, f"backend {name!r} answers chat only", "use kind: openai or kind: embedder")
        elif isinstance(backend, LlamaCppBackendSpec) and backend.weights:
            message = f"backend {name!r} is a llama.cpp that Forebay starts, which answers chat only"
            self._mistake(path, message, "use kind: embedder, or url with a server started with --embeddings")

    def _one_task(self, named: Sequence[tuple[Path, str]]) -> None:
        """A route is for chat or for embeddings, as its first model is; and vectors of two models do not compare."""
        models = [(here, name, model) for here, name in named if (model := self._models.get(name)) is not None]
        for here, name, model in models[1:]:
            first = models[0][2]
            if model.task != first.task:
                message = f"model {name!r} is for {model.task}, {models[0][1]!r} for {first.task}"
                self._mistake(here, message, "name models for one task in a route")
            elif model.task == "embeddings" and name != models[0][1]:
                self._warning(here, "vectors of two models cannot be compared with each other", "name one model only")

    def _route(self, path: Path, route: RouteSpec) -> None:
        tried: set[str] = set()
        named: list[tuple[Path, str]] = []
        match route:
            case FixedRouteSpec():
                self._known((*path, "model"), route.model, self._models, "model")
                tried.add(route.model)
                named.append(((*path, "model"), route.model))
            case ThresholdRouteSpec():
                for size, name in (("small", route.small), ("large", route.large)):
                    self._known((*path, size), name, self._models, "model")
                    named.append(((*path, size), name))
                if route.small == route.large:
                    remedy = "name two models, or use strategy: fixed"
                    self._mistake((*path, "large"), "the same model as 'small'", remedy)
        self._known((*path, "fallbacks"), route.fallbacks or (), self._models, "model")
        for i, name in enumerate(route.fallbacks or ()):
            if name in tried:
                self._warning((*path, "fallbacks", i), "is tried already when its turn comes", "remove it")
            tried.add(name)
            named.append(((*path, "fallbacks", i), name))
        self._one_task(named)

    def _known(self, path: Path, names: str | tuple[str, ...], known: Mapping[str, object], noun: str) -> None:
        one = isinstance(names, str)
        for i, name in enumerate((names,) if isinstance(names, str) else names):
            if name in known:
                continue
            here = path if one else (*path, i)
            is_route = noun == "model" and name in self._routes
            remedy = "this is a route; name a model" if is_route else suggestion(name, known, noun=f"known {noun}s")
            self._mistake(here, f"unknown {noun} {self._policy.shown(here, name)}", remedy)

    def _timeouts(self, path: Path, timeouts: TimeoutsSpec | BackendTimeoutsSpec) -> None:
        """Only what was written can be mistaken: a default is cut short by `total` without harm."""
        total_s = self._total_s() if timeouts.total is None else timeouts.total
        for phase in ("connect", "first_token", "idle", "total"):
            here = (*path, phase)
            stated = getattr(timeouts, phase)
            if here not in self._policy.values or stated is None:
                continue
            seconds = float(stated)
            if seconds == 0:
                self._mistake(here, "is zero: every call would fail")
            elif seconds > total_s > 0:
                self._mistake(here, f"is longer than total ({total_s:g}s)", "raise total or lower it")

    def _total_s(self) -> float:
        """The policy's own total, or its default."""
        if not self._policy.is_sound(("timeouts",)):
            return float(TimeoutsSpec().total)
        return float(msgspec.convert(self._policy.data["timeouts"], TimeoutsSpec).total)

    def _unused_backends(self) -> None:
        used = {name for _, model in self._sound(self._models) for name in model.backends}
        for name in self._backends:
            if name not in used:
                self._warning(("backends", name), "no model uses this backend", "remove it or name it in a model")

    def _parts(self, section: str, kind: Any) -> dict[str, Any]:
        """The section's parts by name; None for one that has mistakes."""
        data = self._policy.data.get(section) if isinstance(self._policy.data, dict) else None
        written = [path[1] for path in self._policy.keys if len(path) == 2 and path[0] == section]
        return {
            str(name): msgspec.convert(data[name], kind) if data and self._policy.is_sound((section, name)) else None
            for name in written
        }

    @staticmethod
    def _sound(parts: Mapping[str, T | None]) -> Iterator[tuple[str, T]]:
        return ((name, part) for name, part in parts.items() if part is not None)

    def _mistake(self, path: Path, message: str, remedy: str = "", *, at_key: bool = False) -> None:
        place = self._policy.key_place(path) if at_key else self._policy.place(path)
        self._findings.mistake(place, path, message, remedy)

    def _warning(self, path: Path, message: str, remedy: str) -> None:
        self._findings.warning(self._policy.key_place(path), path, message, remedy)


def _names_a_server(url: str) -> bool:
    """Whether a URL has a host, and a port that can be connected to where it has one. gRPC takes these two alone."""
    try:
        parts = urlsplit(url)
        (parts.hostname or "").encode("ascii" if url.isascii() else "idna")
        if parts.scheme.startswith("grpc") and (
            not parts.port or parts.username is not None or "?" in url or "#" in url
        ):
            return False
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
