"""Every metric: its name, unit, labels and meaning, once. Labels come from closed sets: the policy's names, our words.

With `PROMETHEUS_MULTIPROC_DIR` set (the supervisor sets it for its workers) each worker keeps its numbers in files
there, and a scrape of any worker adds all of them up, those of workers that have died included.
"""

from __future__ import annotations

from pathlib import Path
from typing import Generic, Literal, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_OVERHEAD_SECONDS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5)


M = TypeVar("M", Counter, Gauge, Histogram)


class Labelled(Generic[M]):
    """A metric with labels whose children are looked up in one step: prometheus_client's own look-up takes a lock."""

    __slots__ = ("_children", "_metric")

    def __init__(self, metric: M) -> None:
        self._metric: M = metric
        self._children: dict[tuple[str, ...], M] = {}

    def labels(self, *values: str) -> M:
        child = self._children.get(values)
        if child is None:
            child = self._children[values] = self._metric.labels(*values)
        return child


class Metrics:
    """One worker's metrics."""

    def __init__(self, shared_dir: str) -> None:
        self._shared_dir = shared_dir
        self._registry = registry = CollectorRegistry()
        self.requests = Labelled(
            Counter(
                "forebay_requests",
                "Requests to the inference routes, by how they ended.",
                ["path", "status", "cache"],
                registry=registry,
            )
        )
        self.duration = Labelled(
            Histogram(
                "forebay_request_duration_seconds",
                "From a request's head to the last byte of its answer.",
                ["path", "cache"],
                buckets=_SECONDS,
                registry=registry,
            )
        )
        self.overhead = Labelled(
            Histogram(
                "forebay_overhead_seconds",
                "Forebay's own share of the time to the beginning of an answer.",
                ["cache"],
                buckets=_OVERHEAD_SECONDS,
                registry=registry,
            )
        )
        self.first_token = Labelled(
            Histogram(
                "forebay_time_to_first_token_seconds",
                "From asking a backend to its first content token (to the whole answer where it does not stream).",
                ["model", "backend"],
                buckets=_SECONDS,
                registry=registry,
            )
        )
        self.clients_gone = Labelled(
            Counter(
                "forebay_clients_gone", "Requests whose client hung up before the end.", ["path"], registry=registry
            )
        )
        self.client_retries = Counter(
            "forebay_client_retries", "Requests that a client's SDK says it has made before.", registry=registry
        )
        self.tokens = Labelled(
            Counter(
                "forebay_tokens",
                "Tokens used upstream. cached is part of prompt, reasoning part of completion.",
                ["model", "kind"],
                registry=registry,
            )
        )
        self.estimated = Labelled(
            Counter("forebay_usage_estimated", "Answers whose usage had to be estimated.", ["model"], registry=registry)
        )
        self.cost = Labelled(Counter("forebay_cost_usd", "Cost of upstream calls.", ["model"], registry=registry))
        self.saved = Labelled(
            Counter("forebay_saved_usd", "Cost avoided by cached answers.", ["model"], registry=registry)
        )
        self.decisions = Labelled(
            Counter("forebay_routing_decisions", "Routing decisions.", ["route", "model", "reason"], registry=registry)
        )
        self.flights = Labelled(
            Counter(
                "forebay_flights", "Upstream calls, shared or not, by how they ended.", ["outcome"], registry=registry
            )
        )
        self.attempts_failed = Labelled(
            Counter(
                "forebay_attempts_failed", "Attempts at a backend that failed.", ["backend", "cause"], registry=registry
            )
        )
        self.ejections = Labelled(Counter("forebay_ejections", "Backends ejected.", ["backend"], registry=registry))
        # Every worker reads the same engines: the newest reading counts. What is known no longer is NaN.
        self.backend_in_flight = _backend_gauge(
            registry, "in_flight", "Calls to a backend under way, of all workers.", "livesum"
        )
        self.backend_queued = _backend_gauge(registry, "queued", "Requests of everybody that wait inside an engine.")
        self.backend_running = _backend_gauge(registry, "running", "Requests of everybody that an engine works on.")
        self.backend_kv_cache_ratio = _backend_gauge(registry, "kv_cache_ratio", "How full an engine's KV cache is.")
        self.stores = Labelled(
            Counter(
                "forebay_cache_stores", "Answers kept (stored) or not kept, by reason.", ["outcome"], registry=registry
            )
        )
        self.settle_failures = Counter(
            "forebay_settle_failures", "Reservations that could not be settled in time.", registry=registry
        )
        self.redis_up = Labelled(
            Gauge(
                "forebay_redis_up",
                "Workers that reach this Redis.",
                ["redis"],
                multiprocess_mode="livesum",
                registry=registry,
            )
        )
        self.policy_reloads = Labelled(
            Counter("forebay_policy_reloads", "Policy reloads.", ["result"], registry=registry)
        )
        self.policy_ok = Gauge(
            "forebay_policy_last_reload_ok",
            "1 where the last reload was accepted in every worker, else 0.",
            multiprocess_mode="livemin",
            registry=registry,
        )
        self.policy_info = Labelled(
            Gauge(
                "forebay_policy_info",
                "Workers that serve this policy.",
                ["name", "version"],
                multiprocess_mode="livesum",
                registry=registry,
            )
        )
        self.build_info = Labelled(
            Gauge(
                "forebay_build_info",
                "Workers of this version.",
                ["version"],
                multiprocess_mode="livesum",
                registry=registry,
            )
        )

    def exposition(self) -> bytes:
        """Prometheus text, of all workers where they share a directory."""
        if not self._shared_dir:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry, path=self._shared_dir)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


def _backend_gauge(
    registry: CollectorRegistry,
    name: str,
    meaning: str,
    mode: Literal["livesum", "livemostrecent"] = "livemostrecent",
) -> Labelled[Gauge]:
    return Labelled(Gauge(f"forebay_backend_{name}", meaning, ["backend"], multiprocess_mode=mode, registry=registry))


def forget_worker(shared_dir: Path, pid: int) -> None:
    """Take a dead worker's gauges out of the sum; its counters stay."""
    multiprocess.mark_process_dead(pid, path=str(shared_dir))  # type: ignore[no-untyped-call]
