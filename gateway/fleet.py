"""The backends of the policy in force: built from specs, kept over reloads, run, and ended when nobody uses them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import anyio
import msgspec
from aiohttp import ClientSession

from backends.backend import Backend
from backends.fan_out import FanOut
from backends.health import Ejections
from backends.latency import FirstTokenTimes
from backends.llamacpp import LlamaCppBackend
from backends.load_signals import MetricsPages
from backends.openai_http import OpenAIBackend
from backends.scripted import Script, ScriptedBackend, tokens_of
from backends.templates import ChatTemplate
from backends.tls import BadTlsFile, ClientTls
from gateway.background import Background
from policies.routing_policy import (
    BackendSpec,
    EmbedderBackendSpec,
    LlamaCppBackendSpec,
    OpenAIBackendSpec,
    ScriptedBackendSpec,
    TlsSpec,
    TritonBackendSpec,
)

END_WITHIN_S = 2.0


class EngineNotRunning(Exception):
    """A policy names a local engine that this process tree did not start."""


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """A local engine as the supervisor started it."""

    url: str
    runs: str
    """What it was started from, see `engine_identity`."""
    metrics_url: str | None = None


def engine_identity(spec: BackendSpec) -> str | None:
    """What the local engine of `spec` must have been started from; None where it needs none of ours."""
    match spec:
        case LlamaCppBackendSpec(weights=str(weights)):
            return _identity("llamacpp", weights, spec.threads, spec.slots, spec.context_tokens)
        case TritonBackendSpec(repository=str(repository)):
            return _identity("triton", repository)
        case EmbedderBackendSpec():
            return _identity("embedder", spec.threads)
    return None


def _identity(*parts: object) -> str:
    return msgspec.json.encode(parts).decode()


def import_for(specs: Iterable[BackendSpec]) -> None:
    """Import what backends of these specs need and others do not: a quarter of a second for a Triton's. Blocks."""
    if any(isinstance(spec, TritonBackendSpec) for spec in specs):
        importlib.import_module("backends.triton.backend")


@dataclass(frozen=True, slots=True)
class _Member:
    spec: BackendSpec
    backend: Backend
    end_run: Callable[[], object]


class Fleet:
    """Makes the backends that a policy asks for. What a reload did not change is kept, health and all.

    A backend runs (`Backend.run`) from when it is built. One that a policy no longer has is closed `linger_s` seconds
    after: requests that began under the policy before may still be on their way to it. `given` (by name) stand in the
    place of what a spec would build, and stay their giver's to close. `metrics_note` is told by name when an engine's
    load can no longer be read (and why), and when it can again.
    """

    def __init__(
        self,
        *,
        session: ClientSession,
        engines: Mapping[str, Engine],
        given: Mapping[str, Backend],
        loops: Background,
        ejections: Ejections,
        first_tokens: FirstTokenTimes,
        metrics_note: Callable[[str, bool, str], None],
        linger_s: float = 300.0,
    ) -> None:
        self._session = session
        self._engines = engines
        self._given = given
        self._loops = loops
        self._ejections = ejections
        self._first_tokens = first_tokens
        self._metrics_note = metrics_note
        self._linger_s = linger_s
        self._metrics_pages = MetricsPages(lambda: session)
        self._members: list[_Member] = []
        self._leaving: set[Backend] = set()

    def backend(self, name: str, spec: BackendSpec) -> Backend:
        """The backend of that name. Raises `EngineNotRunning`, or ValueError where it cannot be built."""
        if name in self._given:
            return self._given[name]
        for member in self._members:
            if member.backend.name == name and member.spec == spec:
                return member.backend
        backend = self._new(name, spec)
        self._members.append(_Member(spec, backend, self._loops.keep(backend.run, f"backend {name}")))
        return backend

    def keep_only(self, in_force: Collection[Backend]) -> None:
        """Let go of every backend that is not in force: of a policy that was replaced, or that never took effect."""
        for member in tuple(self._members):
            if member.backend not in in_force:
                self._dismiss(member)

    async def aclose(self) -> None:
        """Close every backend there is. Calls in flight fail."""
        with anyio.move_on_after(END_WITHIN_S, shield=True):
            async with anyio.create_task_group() as group:
                for backend in (*(member.backend for member in self._members), *self._leaving):
                    group.start_soon(backend.aclose)

    def _dismiss(self, member: _Member) -> None:
        self._members.remove(member)
        member.end_run()
        self._ejections.forget(member.backend.name)
        self._first_tokens.forget(member.backend.name)
        self._leaving.add(member.backend)
        self._loops.spawn(self._close_later(member.backend))  # type: ignore[unused-awaitable]

    async def _close_later(self, backend: Backend) -> None:
        await anyio.sleep(self._linger_s)
        await backend.aclose()
        self._leaving.discard(backend)

    def _new(self, name: str, spec: BackendSpec) -> Backend:
        match spec:
            case ScriptedBackendSpec():
                return ScriptedBackend(name, _script(spec))
            case OpenAIBackendSpec():
                return self._openai(name, spec)
            case LlamaCppBackendSpec():
                # llama.cpp takes an n up to its slots, but reports the usage of one choice for all of them.
                # Of a list of prompts it streams `null`s.
                return FanOut(self._llamacpp(name, spec), 1, one_prompt=True)
            case EmbedderBackendSpec():
                return OpenAIBackend(name, self._engine(name, spec).url, session=self._session)
            case TritonBackendSpec():
                # One choice of one prompt a call: no tensor says whose a response is, were there several.
                return FanOut(self._triton(name, spec), 1, one_prompt=True)

    def _openai(self, name: str, spec: OpenAIBackendSpec) -> Backend:
        backend = OpenAIBackend(
            name,
            spec.url,
            session=self._session,
            upstream_model=spec.model,
            api_key=spec.api_key,
            api_key_header=spec.api_key_header,
            headers=spec.headers,
            query=spec.query,
            tls=_tls(name, spec.tls),
            max_connections=spec.max_connections,
            metrics_url=spec.metrics_url,
            metrics_note=partial(self._metrics_note, name),
        )
        return backend if spec.max_n is None else FanOut(backend, spec.max_n)

    def _llamacpp(self, name: str, spec: LlamaCppBackendSpec) -> Backend:
        url = spec.url or self._engine(name, spec).url
        template = None if spec.chat_template is None else ChatTemplate(spec.chat_template, now=_utc_now)
        return LlamaCppBackend(
            name,
            url,
            session=self._session,
            chat_template=template,
            stop=spec.stop,
            metrics_note=partial(self._metrics_note, name),
        )

    def _triton(self, name: str, spec: TritonBackendSpec) -> Backend:
        # gRPC and numpy take 37 MB and a quarter of a second (see `import_for`), which nobody pays who has no Triton.
        from backends.triton.backend import TritonBackend
        from backends.triton.model import TritonModel
        from backends.triton.server import Tls, TritonServer

        url, metrics_url = spec.url, spec.metrics_url
        if url is None:
            engine = self._engine(name, spec)
            url, metrics_url = engine.url, metrics_url or engine.metrics_url
        tls = None
        if spec.tls is not None:
            _tls(name, spec.tls)  # refuses files that cannot be used, which gRPC finds out at a call
            files = (spec.tls.ca, spec.tls.certificate, spec.tls.key)
            ca, certificate, key = (None if file is None else Path(file).read_bytes() for file in files)
            tls = Tls(ca=ca, certificate=certificate, key=key, server_name=spec.tls.server_name)
        model = TritonModel(
            name=spec.model,
            folder=None if spec.model_folder is None else Path(spec.model_folder),
            chat_template=spec.chat_template,
            stop=spec.stop,
            tool_format=None if spec.tool_format == "none" else spec.tool_format,
            calls_tools=spec.tool_format != "none",
            adds_bos=spec.adds_bos,
            remote_images=spec.remote_images,
            draft_tokens=spec.draft_tokens,
            metrics_name=spec.metrics_model,
        )
        return TritonBackend(
            name,
            TritonServer(url, backend=name, model=spec.model, tls=tls),
            model,
            metrics=None if metrics_url is None else self._metrics_pages.page(metrics_url),
            metrics_note=partial(self._metrics_note, name),
        )

    def _engine(self, name: str, spec: BackendSpec) -> Engine:
        engine = self._engines.get(name)
        if engine is None or engine.runs != engine_identity(spec):
            raise EngineNotRunning(
                f"backend '{name}' needs a local engine started from these settings, and engines are started with the"
                " gateway: restart it"
            )
        return engine


def _tls(name: str, spec: TlsSpec | None) -> ClientTls | None:
    if spec is None:
        return None
    try:
        return ClientTls(ca=spec.ca, certificate=spec.certificate, key=spec.key, server_name=spec.server_name)
    except BadTlsFile as error:
        raise ValueError(f"backend '{name}': {error}") from error


def _utc_now() -> datetime:
    return datetime.now(UTC)


def _script(spec: ScriptedBackendSpec) -> Script:
    return Script(
        tokens=tokens_of(spec.answer),
        first_token_delay_s=spec.first_token_delay,
        token_delay_s=spec.token_delay,
        fault=spec.fault,
        fault_after_tokens=spec.fault_after_tokens,
    )
