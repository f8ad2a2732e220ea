"""The policy in force, and how it changes while requests run: `PolicyWatch` reads the file again when it changes.

A request takes `watch.current` once and uses nothing else: the policy and what was compiled from it are one reference,
so no request ever sees parts of two policies. A file that does not load changes nothing but `last_reload`.

The file's *content* is compared, not its time: every way to change a file is seen alike (written in place, renamed
over, a Kubernetes ConfigMap's symlink moved, a network or container mount that sends no notifications), and none twice.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

import anyio
import anyio.to_thread
import msgspec

from policies.load import no_template_check, parse_policy, read_policy
from policies.mistakes import PolicyError, PolicyMistake
from policies.references import TemplateFault
from policies.routing_policy import Policy

T = TypeVar("T")

POLL_EVERY_S = 0.25
"""A change takes effect after two polls: one sees it, one finds the file at rest. Reading a policy takes ~0.1 ms."""


@dataclass(frozen=True, slots=True)
class InForce(Generic[T]):
    """A policy and what the application made of it."""

    policy: Policy
    compiled: T


class Reload(msgspec.Struct, frozen=True, kw_only=True):
    """What came of reading the policy file once."""

    result: Literal["loaded", "unchanged", "failed"]
    """`unchanged`: the file says what was in force already, in other words or after a failure."""
    version: str
    """Of the policy in force afterwards."""
    at: float
    """On the clock that the watch was given."""
    message: str = ""
    """Why it failed, one line per mistake; never a value that came from the environment."""
    mistakes: tuple[PolicyMistake, ...] = ()

    @property
    def ok(self) -> bool:
        return self.result != "failed"


class PolicyWatch(Generic[T]):
    """Keeps `current` in step with a policy file.

    The constructor reads the file, so a process does not start without a policy: it raises `PolicyError`, or whatever
    `compile` raises. From then on the last good policy stays in force.

    `compile` makes of a policy what requests use (a router, backends); it runs on the event loop and should be short.
    `retire` is given each compiled value that was replaced, while requests that began under it may still run.
    `on_reload` is told of every reload after the first. `now` gives the time for `Reload.at`.
    """

    def __init__(
        self,
        path: Path,
        env: Mapping[str, str],
        compile: Callable[[Policy], T],  # noqa: A002 - the field's word for policy to snapshot
        *,
        now: Callable[[], float],
        template_fault: TemplateFault = no_template_check,
        on_reload: Callable[[Reload], None] | None = None,
        retire: Callable[[T], None] | None = None,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
        poll_every_s: float = POLL_EVERY_S,
    ) -> None:
        self._path = path
        self._env = env
        self._template_fault = template_fault
        self._compile = compile
        self._now = now
        self._on_reload = on_reload
        self._retire = retire
        self._sleep = sleep
        self._poll_every_s = poll_every_s
        self._turn = anyio.Lock()
        content = read_policy(path)
        policy = parse_policy(content, path, env, template_fault)
        self._seen: bytes | str = content
        self._current = InForce(policy, compile(policy))
        self._last_reload = Reload(result="loaded", version=policy.version, at=now())

    @property
    def current(self) -> InForce[T]:
        """What is in force now. Take it once per request."""
        return self._current

    @property
    def last_reload(self) -> Reload:
        """What came of the newest attempt to load, the one at the start included."""
        return self._last_reload

    async def run(self) -> None:
        """Follow the file until cancelled. Run it in a task that the application owns."""
        before = self._seen
        while True:
            await self._sleep(self._poll_every_s)
            found = await anyio.to_thread.run_sync(self._read, abandon_on_cancel=True)
            # A file that still changes is being written: what stands in it now may be the half of a policy.
            if found == before and found != self._seen:
                async with self._turn:
                    await self._load(found)
            before = found

    async def reload(self) -> Reload:
        """Read the file now, as SIGHUP and the admin API ask for, also where its text did not change: weights that were
        missing may be there now. Never raises for a bad file: see `Reload.result`."""
        async with self._turn:
            return await self._load(await anyio.to_thread.run_sync(self._read, abandon_on_cancel=True))

    def _read(self) -> bytes | str:
        """The content of the file, or why there is none."""
        try:
            return read_policy(self._path)
        except PolicyError as error:
            return str(error)

    async def _load(self, found: bytes | str) -> Reload:
        try:
            policy = await anyio.to_thread.run_sync(self._parse, found, abandon_on_cancel=True)
            reload = self._swap(policy)
        except PolicyError as error:
            reload = self._failed(str(error), error.mistakes)
        # Not before the only await: a caller that is cancelled in it must leave the change to be seen by `run`.
        self._seen = found
        self._last_reload = reload
        if self._on_reload is not None:
            self._on_reload(reload)
        return reload

    def _parse(self, found: bytes | str) -> Policy:
        # What could not be read is read again for the error itself, with its mistakes.
        content = found if isinstance(found, bytes) else read_policy(self._path)
        return parse_policy(content, self._path, self._env, self._template_fault)

    def _swap(self, policy: Policy) -> Reload:
        before = self._current
        if policy.file == before.policy.file:
            return Reload(result="unchanged", version=before.policy.version, at=self._now())
        try:
            compiled = self._compile(policy)
        except Exception as error:  # noqa: BLE001 - whatever a policy trips over, the policy in force must stay in force
            return self._failed(f"{policy.label} can not take effect: {type(error).__name__}: {error}")
        self._current = InForce(policy, compiled)
        if self._retire is not None:
            self._retire(before.compiled)
        return Reload(result="loaded", version=policy.version, at=self._now())

    def _failed(self, message: str, mistakes: tuple[PolicyMistake, ...] = ()) -> Reload:
        version = self._current.policy.version
        return Reload(result="failed", version=version, at=self._now(), message=message, mistakes=mistakes)
