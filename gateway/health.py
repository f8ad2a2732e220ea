"""Whether this worker can serve, and what is wrong where it cannot, or can but should be looked at."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio
import msgspec

from backends.errors import BackendError
from gateway.auth import KeyRing
from gateway.processes import read_status
from gateway.snapshot import Snapshot
from policies.shared_state import SharedState
from policies.watch import PolicyWatch

KEYS_STALE_AFTER_S = 60.0
CHECK_WITHIN_S = 1.0
CHECKED_FOR_S = 2.0


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """`problems` keep it from being ready; `degraded` does not."""

    ready: bool
    status: str
    problems: list[str]
    degraded: list[str]
    policy: dict[str, Any]
    redis: dict[str, str]
    backends: dict[str, str]
    children: list[dict[str, Any]]


class Health:
    """Facts about a worker's dependencies, read when somebody asks."""

    def __init__(
        self, *, watch: PolicyWatch[Snapshot], keys: KeyRing, redis: Mapping[str, SharedState], runtime_dir: str
    ) -> None:
        self._watch = watch
        self._keys = keys
        self._redis = redis
        self._runtime_dir = runtime_dir
        self.draining = False
        self._turn = anyio.Lock()
        self._checked: tuple[Snapshot, float, dict[str, str]] | None = None

    async def report(self) -> Report:
        """Ready means: not draining, keys can be checked, and at least one backend answers."""
        problems: list[str] = []
        degraded: list[str] = []
        if self.draining:
            problems.append("draining: the gateway is shutting down")
        if self._keys.unseen_s > KEYS_STALE_AFTER_S:
            problems.append("keys: the SQL store does not answer")
        reload = self._watch.last_reload
        if not reload.ok:
            degraded.append(f"policy: the last reload failed, {reload.version} stays in force: {reload.message}")
        redis = {name: shared.state for name, shared in self._redis.items()}
        degraded += [f"redis {name}: {self._redis[name].reason}" for name, state in redis.items() if state != "closed"]
        backends = await self._backends()
        down = [f"backend {name}: {state}" for name, state in backends.items() if state != "ok"]
        if backends and len(down) == len(backends):
            problems += down
        else:
            degraded += down
        children = self._children()
        degraded += [
            f"process {child['name']}: {child['state']}"
            for child in children
            if child["state"] not in ("ready", "starting")
        ]
        policy = self._watch.current.policy
        return Report(
            ready=not problems,
            status="unready" if problems else "degraded" if degraded else "ready",
            problems=problems,
            degraded=degraded,
            policy={
                "name": policy.file.name,
                "version": policy.version,
                "source": policy.source,
                "last_reload": reload.result,
                "last_reload_age_s": round(time.time() - reload.at, 1),
            },
            redis=dict(redis),
            backends=backends,
            children=children,
        )

    async def _backends(self) -> dict[str, str]:
        """What the backends said, at most `CHECKED_FOR_S` ago: whoever may ask us must not make us ask them at will."""
        async with self._turn:
            snapshot = self._watch.current.compiled
            if self._checked is None or self._checked[0] is not snapshot or time.monotonic() >= self._checked[1]:
                found = await check_backends(snapshot, within_s=CHECK_WITHIN_S)
                self._checked = (snapshot, time.monotonic() + CHECKED_FOR_S, found)
            return self._checked[2]

    def _children(self) -> list[dict[str, Any]]:
        if not self._runtime_dir:
            return []
        return [msgspec.to_builtins(child) for child in read_status(Path(self._runtime_dir))]


async def check_backends(snapshot: Snapshot, *, within_s: float) -> dict[str, str]:
    """By backend: `ok`, or what is the matter. All are asked at once."""
    found: dict[str, str] = {}

    async def check(name: str) -> None:
        try:
            with anyio.fail_after(within_s):
                await snapshot.backends[name].check(within_s=within_s)
            found[name] = "ok"
        except BackendError as error:
            found[name] = error.message
        except TimeoutError:
            found[name] = f"no answer within {within_s:g} s"

    async with anyio.create_task_group() as group:
        for name in snapshot.backends:
            group.start_soon(check, name)
    return {name: found[name] for name in snapshot.backends}
