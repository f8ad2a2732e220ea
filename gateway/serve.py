"""`forebay serve`: the process tree of one host, under one supervisor.

supervisor ─┬─ valkey state, valkey cache     (embedded, where no URL was given)
            ├─ one llama.cpp engine or embedder per local backend of the policy
            └─ N workers on one listening socket
"""

from __future__ import annotations

import shutil
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import anyio
import msgspec

from backends.templates import template_fault
from gateway.app import load_root_secret, open_store
from gateway.child_specs import (
    SocketPathTooLong,
    embedder_child,
    free_loopback_port,
    llamacpp_child,
    triton_child,
    valkey_child,
    worker_child,
)
from gateway.children import ChildEvent, ChildSpec
from gateway.fleet import Engine, engine_identity
from gateway.processes import Supervisor, claimed, listen
from gateway.settings import ENVIRONMENT_PREFIX, Settings
from gateway.telemetry.metrics import forget_worker
from gateway.triton_install import Installation, Ports, install
from policies.load import load_policy
from policies.routing_policy import EmbedderBackendSpec, LlamaCppBackendSpec, Policy, TritonBackendSpec
from policies.secrets import RootSecret
from policies.store import Store, StoreError
from policies.tenant import NewKey

STATE_MAX_MEMORY_BYTES = 256 * 1024 * 1024
STOP_GRACE_BEYOND_DRAIN_S = 5.0
OWNER_KEY_WITHIN_S = 10.0

GRPC_ENVIRONMENT: Mapping[str, str] = {"GRPC_EXPERIMENTS": "-event_engine_client"}
"""Has gRPC read a connection on the thread that waits for it, not hand every message on through a pool of threads: 2.5
context switches a token of a Triton instead of 6.5, and a third less CPU (tests/bench/triton_streaming.py). gRPC reads
it when it is imported; what the operator set stands."""

_TOLD_TO_MODELS = ("FOREBAY_MODELS",)
"""What the models of a repository may read of our environment: where weights are, and no secret."""


@dataclass(frozen=True, slots=True)
class Announcement:
    """What a process tree says about itself once it serves."""

    url: str
    policy: Policy
    owner_key: NewKey | None
    """The first owner's key, where this start made one. It is shown now or never."""
    owner_key_trouble: str = ""
    """Why it is not known whether there is an owner's key."""


async def serve(
    settings: Settings,
    environment: Mapping[str, str],
    *,
    on_event: Callable[[ChildEvent], None],
    on_serving: Callable[[Announcement], None],
    on_progress: Callable[[str], None] = lambda line: None,
    prepare: Callable[[Store], Awaitable[None]] | None = None,
) -> int:
    """Run until told to stop; the exit status. `on_serving` is called once, when the first worker accepts requests.

    `prepare` gets the migrated store before anything is started. Only what serves has an owner: the first owner's key
    is made just before `on_serving`, so that no start that fails can lose it.
    Where the policy has a Triton started, that is installed first, and `on_progress` told line by line.
    Raises what keeps it from starting: `PolicyError`, `CannotListen`, `AlreadyRunning`, `TritonUnavailable`, store and
    secret errors.
    """
    policy = await anyio.to_thread.run_sync(load_policy, Path(settings.policy), environment, template_fault)
    with claimed(runtime_path(settings)), listen(settings.host, settings.port) as listener:
        root = await anyio.to_thread.run_sync(load_root_secret, settings)
        async with open_store(settings, root) as store:
            if prepare is not None:
                await prepare(store)
        tree = _Tree(settings, environment, policy, await _installed_triton(settings, policy, on_progress))
        try:
            return await _supervise(tree, listener, root, on_event, on_serving)
        finally:
            tree.remove_sockets()


async def _installed_triton(
    settings: Settings, policy: Policy, on_progress: Callable[[str], None]
) -> Installation | None:
    """The Triton for CPUs, where the policy has a model repository served; in the data directory."""
    backends = policy.file.backends.values()
    if not any(isinstance(backend, TritonBackendSpec) and backend.repository is not None for backend in backends):
        return None
    return await anyio.to_thread.run_sync(install, settings.data_path.absolute() / "triton", on_progress)


async def _supervise(
    tree: _Tree,
    listener: socket.socket,
    root: RootSecret,
    on_event: Callable[[ChildEvent], None],
    on_serving: Callable[[Announcement], None],
) -> int:
    first_ready = anyio.Event()
    url = _url(listener)

    def event(child: ChildEvent) -> None:
        if child.name.startswith("worker"):
            if child.kind == "ready":
                first_ready.set()
            elif child.kind == "died" and child.pid is not None:
                forget_worker(tree.metrics_dir, child.pid)
        on_event(child)

    async def announce() -> None:
        await first_ready.wait()
        with anyio.CancelScope(shield=True):  # a key that was made is shown
            key, trouble = await _first_owner_key(tree.settings, root)
            on_serving(Announcement(url=url, policy=tree.policy, owner_key=key, owner_key_trouble=trouble))

    supervisor = Supervisor(
        [tree.valkeys(), tree.engines(), tree.workers(listener)],
        runtime_directory=tree.runtime_dir,
        on_event=event,
        on_stopping=listener.close,
    )
    async with anyio.create_task_group() as running:
        running.start_soon(announce)
        status = await supervisor.run()
        running.cancel_scope.cancel()
    return status


async def _first_owner_key(settings: Settings, root: RootSecret) -> tuple[NewKey | None, str]:
    """The key, if this call made it, and why that is not known where the store does not answer."""
    try:
        with anyio.fail_after(OWNER_KEY_WITHIN_S):
            async with open_store(settings, root) as store:
                return await store.first_owner_key(), ""
    except StoreError as error:
        return None, str(error)
    except TimeoutError:
        return None, f"the store did not answer within {OWNER_KEY_WITHIN_S:g} s"


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def runtime_path(settings: Settings) -> Path:
    """Where the one supervisor of a data directory keeps what lasts as long as it runs."""
    return settings.data_path.absolute() / "run"


class _Tree:
    """The children of one host and the folders they share. Made by the one who holds the runtime directory."""

    def __init__(
        self, settings: Settings, environment: Mapping[str, str], policy: Policy, triton: Installation | None
    ) -> None:
        data = settings.data_path.absolute()
        self.settings = settings
        self.policy = policy
        self._environment = environment
        self.runtime_dir = runtime_path(settings)
        self.metrics_dir = self.runtime_dir / "metrics"
        self._logs = data / "logs"
        self._sockets = self.runtime_dir
        self._temporary: Path | None = None
        self._urls = {"state": settings.state_url, "cache": settings.cache_url}
        self._engines: dict[str, Engine] = {}
        self._triton = triton
        self._triton_ports: dict[str, Ports] = {}
        """By model repository."""
        self._logs.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.metrics_dir, ignore_errors=True)  # the numbers of an earlier run are not this run's
        self.metrics_dir.mkdir(parents=True)

    def valkeys(self) -> list[ChildSpec]:
        return [self._valkey(name) for name, url in list(self._urls.items()) if not url]

    def _valkey(self, name: str) -> ChildSpec:
        state = name == "state"
        cache_bytes = self.settings.cache_max_memory_mb * 1024 * 1024

        def child(sockets: Path) -> ChildSpec:
            path = sockets / f"{name}.sock"
            spec = valkey_child(
                f"valkey-{name}",
                directory=self.settings.data_path.absolute() / f"valkey-{name}",
                socket_path=path,
                maxmemory_bytes=STATE_MAX_MEMORY_BYTES if state else cache_bytes,
                policy="noeviction" if state else "allkeys-lru",
                persistent=state,
                log_path=self._logs / f"valkey-{name}.log",
            )
            self._urls[name] = f"unix://{quote(str(path))}"
            return spec

        try:
            return child(self._sockets)
        except SocketPathTooLong:
            self._temporary = self._sockets = Path(tempfile.mkdtemp(prefix="forebay-"))
            return child(self._sockets)

    def engines(self) -> list[ChildSpec]:
        specs = []
        for name, backend in self.policy.file.backends.items():
            identity = engine_identity(backend)
            if identity is None:
                continue
            if isinstance(backend, TritonBackendSpec):
                self._engines[name] = self._triton_engine(backend, identity)
                continue
            port = free_loopback_port()
            match backend:
                case LlamaCppBackendSpec():
                    specs.append(self._llamacpp(name, backend, port))
                case EmbedderBackendSpec():
                    specs.append(self._embedder(name, backend, port))
                case _:
                    continue
            self._engines[name] = Engine(url=f"http://127.0.0.1:{port}/v1", runs=identity)
        return [*specs, *self._tritons()]

    def _triton_engine(self, backend: TritonBackendSpec, identity: str) -> Engine:
        """The model's engine: one Triton for all the models of a repository."""
        repository = backend.repository or ""
        if repository not in self._triton_ports:
            ports = (free_loopback_port() for _ in range(3))
            self._triton_ports[repository] = Ports(http=next(ports), grpc=next(ports), metrics=next(ports))
        ports_of_it = self._triton_ports[repository]
        metrics_url = f"http://127.0.0.1:{ports_of_it.metrics}/metrics"
        return Engine(url=f"grpc://127.0.0.1:{ports_of_it.grpc}", runs=identity, metrics_url=metrics_url)

    def _tritons(self) -> list[ChildSpec]:
        if self._triton is None:
            return []
        backends = [b for b in self.policy.file.backends.values() if isinstance(b, TritonBackendSpec)]
        return [
            triton_child(
                f"triton-{number}" if number else "triton",
                installation=self._triton,
                repository=Path(repository),
                ports=ports,
                load=tuple(dict.fromkeys(b.model for b in backends if b.repository == repository)),
                env={name: self._environment[name] for name in _TOLD_TO_MODELS if name in self._environment},
                log_path=self._logs / f"triton-{number}.log",
            )
            for number, (repository, ports) in enumerate(self._triton_ports.items())
        ]

    def _embedder(self, name: str, backend: EmbedderBackendSpec, port: int) -> ChildSpec:
        log_path = self._logs / f"engine-{name}.log"
        return embedder_child(f"engine-{name}", port=port, threads=backend.threads, log_path=log_path)

    def _llamacpp(self, name: str, backend: LlamaCppBackendSpec, port: int) -> ChildSpec:
        return llamacpp_child(
            f"engine-{name}",
            weights=Path(backend.weights or ""),
            port=port,
            threads=backend.threads,
            slots=backend.slots,
            context_tokens=backend.context_tokens,
            alias=next((m for m, spec in self.policy.file.models.items() if name in spec.backends), name),
            log_path=self._logs / f"engine-{name}.log",
        )

    def workers(self, listener: socket.socket) -> list[ChildSpec]:
        settings = self.settings
        return [
            worker_child(
                index,
                command=(sys.executable, "-m", "gateway", "worker", "--fd", str(listener.fileno())),
                listener=listener,
                stop_grace_s=settings.drain_notice_s + settings.drain_s + STOP_GRACE_BEYOND_DRAIN_S,
                env=self._worker_environment(),
            )
            for index in range(settings.workers)
        ]

    def _worker_environment(self) -> dict[str, str]:
        """Everything a worker is told: our environment, with every setting as this process resolved it."""
        told = msgspec.structs.replace(
            self.settings,
            state_url=self._urls["state"],
            cache_url=self._urls["cache"],
            engines=msgspec.json.encode(self._engines).decode(),
            metrics_dir=str(self.metrics_dir),
            runtime_dir=str(self.runtime_dir),
        )
        resolved = {
            f"{ENVIRONMENT_PREFIX}{name.upper()}": str(value) for name, value in msgspec.structs.asdict(told).items()
        }
        told_besides = {**resolved, "PROMETHEUS_MULTIPROC_DIR": str(self.metrics_dir)}
        return {**GRPC_ENVIRONMENT, **self._environment, **told_besides}

    def remove_sockets(self) -> None:
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
