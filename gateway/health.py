"""Whether this worker can serve, and what is wrong where it cannot, or can but should be looked at."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec

from backends.backend import Load
from backends.errors import (
    BackendError,
    BackendOverloaded,
    BackendProtocolError,
    BackendRefusedCredentials,
    BackendTimeout,
    BackendUnreachable,
)
from gateway.auth import KeyRing
from gateway.background import Background
from gateway.children import ChildStatus
from gateway.processes import read_status
from gateway.snapshot import Snapshot
from policies.shared_state import SharedState
from policies.watch import PolicyWatch

KEYS_STALE_AFTER_S = 60.0
CHECK_WITHIN_S = 1.0
CHECKED_FOR_S = 2.0


class Trouble(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is not as it should be. `detail` may name hosts, files and others' words: for operators only."""

    what: str
    why: str
    detail: str = ""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """`problems` keep a worker from being ready; `degraded` does not."""

    ready: bool
    status: str
    problems: list[Trouble]
    degraded: list[Trouble]
    policy: str
    backends: dict[str, str]
    loads: dict[str, Load]
    """By backend; `in_flight` is of this worker."""
    redis: dict[str, str]
    children: list[ChildStatus]

    def for_anybody(self) -> dict[str, object]:
        """What may be told without a key: names and states, no addresses, files or process ids."""
        return {
            "ready": self.ready,
            "status": self.status,
            "problems": [f"{trouble.what}: {trouble.why}" for trouble in self.problems],
            "degraded": [f"{trouble.what}: {trouble.why}" for trouble in self.degraded],
            "policy": self.policy,
            "backends": self.backends,
            "redis": self.redis,
            "processes": {child.name: child.state for child in self.children},
        }


class Health:
    """Facts about a worker's dependencies, read when somebody asks."""

    def __init__(
        self,
        *,
        watch: PolicyWatch[Snapshot],
        keys: KeyRing,
        redis: Mapping[str, SharedState],
        loops: Background,
        runtime_dir: str,
    ) -> None:
        self._watch = watch
        self._keys = keys
        self._redis = redis
        self._loops = loops
        self._runtime_dir = runtime_dir
        self.draining = False
        self._turn = anyio.Lock()
        self._checked: tuple[Snapshot, float, dict[str, Trouble | None]] | None = None

    async def report(self) -> Report:
        """Ready means: not draining, keys can be checked, and at least one backend answers."""
        backends = await self._backends()
        children = await anyio.to_thread.run_sync(self._children)
        problems: list[Trouble] = []
        degraded = [
            *self._policy_troubles(),
            *(
                Trouble(what=f"redis {name}", why=shared.state, detail=shared.reason)
                for name, shared in self._redis.items()
                if shared.state != "closed"
            ),
            *(Trouble(what=f"task {name}", why="crashed and was started again") for name in self._loops.troubled),
            *(
                Trouble(what=f"process {child.name}", why=child.state)
                for child in children
                if child.state not in ("ready", "starting")
            ),
        ]
        degraded += broken_promises(self._watch.current.compiled)
        if self.draining:
            problems.append(Trouble(what="worker", why="draining"))
        if self._keys.unseen_s > KEYS_STALE_AFTER_S:
            problems.append(Trouble(what="keys", why="the SQL store does not answer"))
        down = [trouble for trouble in backends.values() if trouble is not None]
        (problems if backends and len(down) == len(backends) else degraded).extend(down)
        return Report(
            ready=not problems,
            status="unready" if problems else "degraded" if degraded else "ready",
            problems=problems,
            degraded=degraded,
            policy=self._watch.current.policy.label,
            backends={name: "ok" if trouble is None else trouble.why for name, trouble in backends.items()},
            loads=self._watch.current.compiled.loads,
            redis={name: "ok" if shared.state == "closed" else shared.state for name, shared in self._redis.items()},
            children=children,
        )

    def _policy_troubles(self) -> list[Trouble]:
        reload, troubles = self._watch.last_reload, []
        if not reload.ok:
            why = f"the last reload failed, {reload.version} stays in force"
            troubles.append(Trouble(what="policy", why=why, detail=reload.message))
        if self._watch.unkept:
            why = "no copy of it could be kept, so that a start with a broken file would fail"
            troubles.append(Trouble(what="policy", why=why, detail=self._watch.unkept))
        return troubles

    async def _backends(self) -> dict[str, Trouble | None]:
        """What the backends said, at most `CHECKED_FOR_S` ago: whoever may ask us must not make us ask them at will."""
        async with self._turn:
            snapshot = self._watch.current.compiled
            if self._checked is None or self._checked[0] is not snapshot or time.monotonic() >= self._checked[1]:
                found = await check_backends(snapshot, within_s=CHECK_WITHIN_S)
                self._checked = (snapshot, time.monotonic() + CHECKED_FOR_S, found)
            return self._checked[2]

    def _children(self) -> list[ChildStatus]:
        return list(read_status(Path(self._runtime_dir))) if self._runtime_dir else []


async def check_backends(snapshot: Snapshot, *, within_s: float) -> dict[str, Trouble | None]:
    """By backend: None for one that answers, else what is the matter. All are asked at once."""
    found: dict[str, Trouble | None] = {}

    async def check(name: str) -> None:
        found[name] = None
        try:
            with anyio.fail_after(within_s):
                await snapshot.backends[name].check(within_s=within_s)
        except BackendError as error:
            found[name] = Trouble(what=f"backend {name}", why=_in_a_word(error), detail=error.message)
        except TimeoutError:
            found[name] = Trouble(what=f"backend {name}", why="slow", detail=f"no answer within {within_s:g} s")

    async with anyio.create_task_group() as group:
        for name in snapshot.backends:
            group.start_soon(check, name)
    return {name: found[name] for name in snapshot.backends}


def broken_promises(snapshot: Snapshot) -> list[Trouble]:
    """Capabilities that a model has by the policy, and that one of its engines says it does not have."""
    return [
        Trouble(what=f"model {card.name}", why=f"backend {name} has no {', '.join(sorted(missing))}")
        for card in snapshot.models.values()
        for name in card.backends
        if (known := snapshot.backends[name].capabilities) is not None and (missing := card.capabilities - known)
    ]


def _in_a_word(error: BackendError) -> str:
    words: dict[type[BackendError], str] = {
        BackendUnreachable: "unreachable",
        BackendOverloaded: "overloaded or loading",
        BackendTimeout: "slow",
        BackendRefusedCredentials: "refuses our credentials, or has no such model",
        BackendProtocolError: "incompatible",
    }
    return words.get(type(error), "failing")
