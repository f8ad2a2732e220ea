"""The composition root: builds every object of a worker by hand, in the open, and owns how they start and stop.

`open_gateway` is the whole of it: what it yields serves requests, and when it is left everything that was started is
ended, in the opposite order. The command line, the tests and the benchmarks all start here.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec
from litestar import Litestar

from backends.attempts import Attempts
from backends.backend import Backend
from backends.chat import Operation
from backends.health import Ejections, RetryBudget
from backends.latency import FirstTokenTimes
from backends.openai_http import new_session
from backends.slots import ImmediateSlots
from backends.templates import template_fault
from backends.tokens import BytesPerToken, count_tokens
from cache.exact import ExactCache, MemoryExactCache, RedisExactCache
from cache.inflight import Flights
from cache.semantic import NoSemanticTier
from gateway.answer import Head
from gateway.auth import KeyRing
from gateway.background import Background
from gateway.faces import build_app
from gateway.fleet import Engine, Fleet, import_for
from gateway.health import Health
from gateway.pipeline import Pipeline
from gateway.settings import Settings
from gateway.snapshot import Snapshot, compile_snapshot
from gateway.telemetry.logs import Log
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.record import Record
from policies.admission import Admission, Unlimited
from policies.ledger import MemoryLedger
from policies.routing_policy import Policy, PolicyFile
from policies.secrets import RootSecret, root_secret_file
from policies.shared_state import SharedState
from policies.store import Store
from policies.watch import PolicyWatch, Reload
from routing.balance import Balancer
from routing.cost import FixedOutputLength
from routing.difficulty import HeuristicScorer

REDIS_UP_WITHIN_S = 1.0
"""How long a starting worker waits for a Redis before it serves without."""

TELL_LOADS_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Gateway:
    """A worker at work: its ASGI application and the parts that others ask about."""

    app: Litestar
    watch: PolicyWatch[Snapshot]
    keys: KeyRing
    store: Store
    health: Health
    pipeline: Pipeline
    background: Background
    ledger: MemoryLedger

    async def reload(self) -> None:
        await self.watch.reload()

    def begin_drain(self, within_s: float) -> None:
        """Stop being ready now; let answers in flight finish for `within_s` seconds, then end them with an error."""
        self.health.draining = True
        asyncio.get_running_loop().call_later(within_s, self.pipeline.abort)


def load_root_secret(settings: Settings) -> RootSecret:
    """The root secret from the settings, else from its file in the data directory, made there once. Blocks on disk."""
    if settings.root_secret:
        return RootSecret.parse(settings.root_secret.encode())
    settings.data_path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return root_secret_file(settings.data_path / "root-secret")


@asynccontextmanager
async def open_store(settings: Settings, root: RootSecret) -> AsyncGenerator[Store, None]:
    """The migrated store."""
    settings.data_path.mkdir(parents=True, exist_ok=True, mode=0o700)
    store = Store(settings.resolved_store_url, root)
    try:
        await store.migrate()
        yield store
    finally:
        with anyio.move_on_after(2.0, shield=True):
            await store.aclose()


@asynccontextmanager
async def open_gateway(
    settings: Settings,
    *,
    environment: Mapping[str, str],
    log: Log,
    backends: Mapping[str, Backend] | None = None,
    exact: ExactCache | None = None,
    admission: Admission | None = None,
) -> AsyncGenerator[Gateway, None]:
    """Build a worker and run what it runs in the background.

    `backends` (by name), `exact` and `admission` replace what the policy and the settings would have built: the seams
    that tests and benchmarks use. Raises `PolicyError`, `RootSecretTooShort`, `StoreUnreachable` and ValueError for bad
    URLs.
    """
    clock = time.monotonic  # the event loop's clock, but for uvloop's rounding of it to whole milliseconds
    metrics = Metrics(settings.metrics_dir)
    record = Record(metrics, log)
    root = await anyio.to_thread.run_sync(load_root_secret, settings)
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(open_store(settings, root))
        session = new_session()
        stack.push_async_callback(session.close)
        loops = await stack.enter_async_context(Background(record.task_crashed))
        redis = {
            name: SharedState(
                name,
                url,
                on_transition=lambda name, state, reason: record.redis_changed(name, state == "closed", reason),
                jitter=random.random,
            )
            for name, url in (("state", settings.state_url), ("cache", settings.cache_url))
            if url
        }
        for shared in redis.values():
            loops.keep(shared.run, f"redis {shared.name}")
            stack.push_async_callback(shared.aclose)
        for shared in redis.values():
            await shared.available(within_s=REDIS_UP_WITHIN_S)

        ejections = Ejections(now=clock)
        first_tokens = FirstTokenTimes(now=clock)
        fleet = Fleet(
            session=session,
            engines=msgspec.json.decode(settings.engines, type=dict[str, Engine]),
            given=backends or {},
            loops=loops,
            ejections=ejections,
            first_tokens=first_tokens,
            metrics_note=record.engine_metrics_changed,
        )
        stack.push_async_callback(fleet.aclose)
        balancer = Balancer(ejections=ejections, first_tokens=first_tokens, random=random.random)
        build = _AttemptsBuilder(ejections, first_tokens)
        watch = _watch_policy(settings, environment, fleet, build, balancer, record)
        loops.keep(watch.run, "policy watch")
        loops.keep(lambda: _tell_loads(watch, record), "backend loads")

        keys = KeyRing(store, root)
        await keys.poll_once()
        loops.keep(keys.run, "key ring")

        # Entered last, so that flights end while everything that they settle and store with still runs.
        background = await stack.enter_async_context(Background(record.task_crashed))
        ledger = MemoryLedger(now=clock)
        pipeline = Pipeline(
            admission=admission or Unlimited(),
            exact=exact or _exact_cache(redis),
            flights=Flights[Head](background.spawn),
            semantic=NoSemanticTier(),
            ledger=ledger,
            bytes_per_token=BytesPerToken(),
            output_lengths=FixedOutputLength(),
            count_tokens=count_tokens,
            recorder=record,
            clock=clock,
            now=time.time,
            jitter=random.random,
            fresh_id=_fresh_completion_id,
        )
        loops.keep(pipeline.renew_leases, "lease renewal")

        health = Health(watch=watch, keys=keys, redis=redis, loops=loops, runtime_dir=settings.runtime_dir)
        metrics.build_info.labels(version("forebay")).set(1)
        app = build_app(
            settings=settings,
            keys=keys,
            current=lambda: watch.current.compiled,
            pipeline=pipeline,
            background=background,
            record=record,
            metrics=metrics,
            health=health,
            watch=watch,
            store=store,
        )
        yield Gateway(
            app=app,
            watch=watch,
            keys=keys,
            store=store,
            health=health,
            pipeline=pipeline,
            background=background,
            ledger=ledger,
        )


def _watch_policy(
    settings: Settings,
    environment: Mapping[str, str],
    fleet: Fleet,
    build: _AttemptsBuilder,
    balancer: Balancer,
    record: Record,
) -> PolicyWatch[Snapshot]:
    in_force: tuple[str, str] | None = None

    def compile_policy(policy: Policy) -> Snapshot:
        nonlocal in_force
        snapshot = compile_snapshot(
            policy,
            build_backend=fleet.backend,
            build_attempts=build.attempts,
            balancer=balancer,
            scorer=HeuristicScorer(),
        )
        fleet.keep_only(snapshot.backends.values())
        record.policy_loaded(policy.file.name, policy.version, in_force)
        in_force = (policy.file.name, policy.version)
        return snapshot

    def reloaded(reload: Reload) -> None:
        if not reload.ok:
            record.policy_refused(reload.message)
        elif reload.result == "unchanged":
            record.policy_unchanged()

    return PolicyWatch(
        Path(settings.policy),
        environment,
        compile_policy,
        now=time.time,
        last_good=_last_good_path(settings),
        template_fault=template_fault,
        prepare=lambda policy: import_for(policy.file.backends.values()),
        on_reload=reloaded,
    )


async def _tell_loads(watch: PolicyWatch[Snapshot], record: Record) -> None:
    """Keep the gauges of this worker's backends up, since a scrape may meet any worker."""
    while True:
        record.loads_are(watch.current.compiled.loads)
        await anyio.sleep(TELL_LOADS_EVERY_S)


def _last_good_path(settings: Settings) -> Path:
    """One for each policy file, so that no process ever falls back on another file's policy."""
    of = hashlib.blake2b(str(Path(settings.policy).absolute()).encode(), digest_size=4).hexdigest()
    return settings.data_path / f"policy-{of}.last-good.yaml"


def _exact_cache(redis: Mapping[str, SharedState]) -> ExactCache:
    shared = redis.get("cache")
    return MemoryExactCache(now=time.time) if shared is None else RedisExactCache(shared, now=time.time)


class _AttemptsBuilder:
    """Makes `Attempts` of a policy. What outlives one (slots taken, retries saved, ejections, speeds) is handed on."""

    def __init__(self, ejections: Ejections, first_tokens: FirstTokenTimes) -> None:
        self._ejections = ejections
        self._first_tokens = first_tokens
        self._slots = ImmediateSlots()
        self._budget = RetryBudget(ratio=0.0)

    def attempts(self, file: PolicyFile) -> Attempts:
        self._slots.limits = {name: spec.max_concurrent for name, spec in file.backends.items() if spec.max_concurrent}
        self._budget.ratio = file.retries.budget
        return Attempts(
            ejections=self._ejections,
            first_tokens=self._first_tokens,
            budget=self._budget,
            slots=self._slots,
            max_attempts=file.retries.max_attempts,
            jitter=random.random,
        )


def _fresh_completion_id(operation: Operation) -> str:
    prefixes: Mapping[Operation, str] = {"chat": "chatcmpl", "text_completion": "cmpl", "embeddings": "embd"}
    return f"{prefixes[operation]}-{secrets.token_hex(12)}"
