"""Turns what happened into metrics and log lines. The only module that increments anything."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from backends.attempts import AnswerBroke, AttemptsFailed, FailedAttempt
from backends.backend import Load
from backends.chat import Usage
from gateway.answer import Answer, Head
from gateway.context import RequestContext
from gateway.errors import Rendered
from gateway.telemetry.logs import Log
from gateway.telemetry.metrics import Metrics

CLIENT_GONE_STATUS = 499
"""nginx's number for a client that hung up before its answer."""


@dataclass(slots=True)
class Exchange:
    """One request's course, for the record only: nothing is ever decided by it."""

    request_id: str
    path: str
    started_at: float
    is_retry: bool = False
    """Whether the client says that it has asked this before."""
    status: int = 0
    answer: Answer | None = None
    error: Exception | None = None
    gone: bool = False

    def answered(self, answer: Answer) -> None:
        self.answer = answer

    def failed(self, error: Exception, rendered: Rendered) -> None:
        self.error = error
        self.status = rendered.status  # of a stream that broke as well, although its head said 200

    def client_gone(self) -> None:
        self.gone = True
        self.status = CLIENT_GONE_STATUS


class Record:
    """One worker's record: metrics for everything, a log line for what somebody should read."""

    def __init__(self, metrics: Metrics, log: Log) -> None:
        self._metrics = metrics
        self._log = log
        self._loads: Mapping[str, Load] = {}

    def exchange_ended(self, exchange: Exchange, at: float) -> None:
        """A request is over, one way or another."""
        metrics, answer = self._metrics, exchange.answer
        cache = answer.cache if answer is not None else "none"
        metrics.requests.labels(exchange.path, str(exchange.status), cache).inc()
        if exchange.is_retry:
            metrics.client_retries.inc()
        if exchange.gone:
            metrics.clients_gone.labels(exchange.path).inc()
        if answer is not None:
            metrics.duration.labels(exchange.path, cache).observe(at - exchange.started_at)
            metrics.overhead.labels(cache).observe(answer.overhead_s)
            if answer.saved_nano_usd:
                metrics.saved.labels(answer.model).inc(answer.saved_nano_usd / 1e9)
        if exchange.error is not None and exchange.status >= 500:
            self._log_failure(exchange, exchange.error)

    def attempt_failed(self, failed: FailedAttempt) -> None:
        self._metrics.attempts_failed.labels(failed.backend, type(failed.error).__name__).inc()
        if failed.ejected:
            self._metrics.ejections.labels(failed.backend).inc()
            self._log.warning("backend ejected", backend=failed.backend, cause=str(failed.error))

    def flight_ended(
        self,
        context: RequestContext,
        model: str,
        head: Head | None,
        usage: Usage,
        cost_nano_usd: int,
        outcome: str,
    ) -> None:
        metrics = self._metrics
        metrics.flights.labels(outcome).inc()
        if head is not None:
            metrics.decisions.labels(head.decision.route or "", head.model, head.decision.reason).inc()
            metrics.first_token.labels(head.model, head.backend).observe(head.committed_at - head.asked_at)
        for kind, count in (
            ("prompt", usage.prompt_tokens),
            ("completion", usage.completion_tokens),
            ("cached", usage.cached_tokens),
            ("reasoning", usage.reasoning_tokens),
        ):
            if count:
                metrics.tokens.labels(model, kind).inc(count)
        if cost_nano_usd:
            metrics.cost.labels(model).inc(cost_nano_usd / 1e9)
        if usage.estimated:
            metrics.estimated.labels(model).inc()

    def stored(self, reason: str | None) -> None:
        self._metrics.stores.labels(reason or "stored").inc()

    def settle_failed(self, request_id: str, error: BaseException | None) -> None:
        self._metrics.settle_failures.inc()
        self._log.error("reservation not settled", request_id=request_id, cause=repr(error) if error else "out of time")

    def redis_changed(self, name: str, up: bool, reason: str) -> None:
        """A connection to Redis came up or went down: one line per change, however many requests notice."""
        self._metrics.redis_up.labels(name).set(1 if up else 0)
        if up:
            self._log.info("redis reachable", redis=name)
        else:
            self._log.warning("redis away", redis=name, cause=reason)

    def loads_are(self, loads: Mapping[str, Load]) -> None:
        """How busy each backend of the policy in force is now, by name."""
        for name in {**self._loads, **loads}:
            load, before = loads.get(name, Load()), self._loads.get(name, Load())
            self._metrics.backend_in_flight.labels(name).set(load.in_flight)
            for gauge, value, known in (
                (self._metrics.backend_queued, load.queued, before.queued),
                (self._metrics.backend_running, load.running, before.running),
                (self._metrics.backend_kv_cache_ratio, load.kv_cache_ratio, before.kv_cache_ratio),
            ):
                if value is not None or known is not None:
                    gauge.labels(name).set(math.nan if value is None else value)
        self._loads = dict(loads)

    def engine_metrics_changed(self, backend: str, known: bool, why: str) -> None:
        """An engine's load is known, or is not any more: one line per change."""
        if known:
            self._log.info("engine load known again", backend=backend)
        else:
            self._log.warning("engine load unknown", backend=backend, cause=why)

    def policy_loaded(self, name: str, version: str, previous: tuple[str, str] | None) -> None:
        if previous is not None:
            self._metrics.policy_info.labels(*previous).set(0)
            self._metrics.policy_reloads.labels("accepted").inc()
        self._metrics.policy_info.labels(name, version).set(1)
        self._metrics.policy_ok.set(1)
        self._log.info("policy in force", policy=f"{name}@{version}")

    def policy_unchanged(self) -> None:
        """The file says again what is in force, maybe after it did not."""
        self._metrics.policy_ok.set(1)

    def policy_refused(self, message: str) -> None:
        self._metrics.policy_reloads.labels("refused").inc()
        self._metrics.policy_ok.set(0)
        self._log.error("policy refused, the last good one stays in force", cause=message)

    def unexpected(self, request_id: str, error: BaseException) -> None:
        self._log.error("unexpected error", request_id=request_id, exc_info=error)

    def task_crashed(self, name: str, error: BaseException) -> None:
        self._log.error("background task crashed", task=name, exc_info=error)

    def _log_failure(self, exchange: Exchange, error: Exception) -> None:
        if isinstance(error, AttemptsFailed | AnswerBroke):
            cause = error.error
            self._log.warning(
                "no answer",
                request_id=exchange.request_id,
                status=exchange.status,
                backend=cause.backend,
                cause=f"{type(cause).__name__}: {cause}",
            )
        elif exchange.status == 500:
            self.unexpected(exchange.request_id, error)
