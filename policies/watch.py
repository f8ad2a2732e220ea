"""The policy in force, and how it changes while requests run: `PolicyWatch` reads the file again when it changes.

A request takes `watch.current` once and uses nothing else: the policy and what was compiled from it are one reference,
so no request ever sees parts of two policies. A file that does not load changes nothing but `last_reload`; with a
copy of the last policy that did (`last_good`), not even for a process that starts while the file is broken.

The file's *content* is compared, not its time: every way to change a file is seen alike (written in place, renamed
over, a Kubernetes ConfigMap's symlink moved, a network or container mount that sends no notifications), and none twice.
"""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

import anyio
import anyio.to_thread
import msgspec

from policies.load import no_template_check, parse_policy, read_policy
from policies.mistakes import START, Findings, PolicyError, PolicyMistake
from policies.references import TemplateFault
from policies.routing_policy import Policy

T = TypeVar("T")

Found = bytes | tuple[PolicyMistake, ...]
"""What the policy file holds, or why it can not be read."""

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

    The constructor reads the file, so a process does not start without a policy. From then on the last good one stays
    in force. Every content that was accepted is kept in the file `last_good`, and a start whose policy file does not
    load or compile takes that in its place: `last_reload` says so. Where it can not either, the constructor raises
    what came of the policy file itself, `PolicyError` or whatever `compile` raised. It blocks on the disk.

    `compile` makes of a policy what requests use (a router, backends); it runs on the event loop and should be short.
    What it needs that is not, `prepare` does before it, in a thread.
    `retire` is given each compiled value that was replaced, while requests that began under it may still run.
    `on_reload` is told of every reload after the first, and of a first one that failed. `now` gives the time for
    `Reload.at`.
    """

    def __init__(
        self,
        path: Path,
        env: Mapping[str, str],
        compile: Callable[[Policy], T],  # noqa: A002 - the field's word for policy to snapshot
        *,
        now: Callable[[], float],
        last_good: Path | None = None,
        template_fault: TemplateFault = no_template_check,
        prepare: Callable[[Policy], None] | None = None,
        on_reload: Callable[[Reload], None] | None = None,
        retire: Callable[[T], None] | None = None,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
        poll_every_s: float = POLL_EVERY_S,
    ) -> None:
        self._path = path
        self._env = env
        self._template_fault = template_fault
        self._prepare = prepare
        self._compile = compile
        self._now = now
        self._on_reload = on_reload
        self._retire = retire
        self._sleep = sleep
        self._poll_every_s = poll_every_s
        self._turn = anyio.Lock()
        self._last_good = last_good
        self._seen = self._read()
        self._current: InForce[T]
        self._last_reload = self._begin()
        self._unkept = self._keep(self._seen) if self._last_reload.ok else ""
        if on_reload is not None and not self._last_reload.ok:
            on_reload(self._last_reload)

    @property
    def current(self) -> InForce[T]:
        """What is in force now. Take it once per request."""
        return self._current

    @property
    def last_reload(self) -> Reload:
        """What came of the newest attempt to load, the one at the start included."""
        return self._last_reload

    @property
    def unkept(self) -> str:
        """Why the newest good policy is not in `last_good`, so that a later start could fail; empty where it is."""
        return self._unkept

    async def run(self) -> None:
        """Follow the file until cancelled; nothing else ends it. Run it in a task that the application owns."""
        before = self._seen
        while True:
            await self._sleep(self._poll_every_s)
            try:
                before = await self._look(before)
            except Exception as error:  # noqa: BLE001 - of `retire` or `on_reload`: a change may come all the same
                self._last_reload = self._failed(error, "what should follow a reload failed")

    async def reload(self) -> Reload:
        """Read the file now, as SIGHUP and the admin API ask for, also where its text did not change: weights that were
        missing may be there now. Never raises for a bad file: see `Reload.result`."""
        async with self._turn:
            return await self._load(await anyio.to_thread.run_sync(self._read, abandon_on_cancel=True))

    async def _look(self, before: Found) -> Found:
        """Load what stands in the file, if it is at rest and new."""
        found = await anyio.to_thread.run_sync(self._read, abandon_on_cancel=True)
        # A file that still changes is being written: what stands in it now may be the half of a policy.
        if found == before and found != self._seen:
            async with self._turn:
                await self._load(found)
        return found

    def _read(self) -> Found:
        try:
            return read_policy(self._path)
        except PolicyError as error:
            return error.mistakes

    def _parse(self, found: Found) -> Policy:
        """The policy in it, prepared. Raises `PolicyError`, whatever it trips over."""
        if not isinstance(found, bytes):
            raise PolicyError(found)
        try:
            policy = parse_policy(found, self._path, self._env, self._template_fault)
            if self._prepare is not None:
                self._prepare(policy)
        except PolicyError:
            raise
        except Exception as error:  # an operator's text can be odd in ways that nobody thought of
            # Without the error's own text, which may hold a value from the environment.
            message = f"can not be loaded: {type(error).__name__}"
            raise Findings(str(self._path)).fatal(START, (), message) from error
        return policy

    def _begin(self) -> Reload:
        """Put in force what there is to begin with. Returns what came of the policy file."""
        label = ""
        try:
            policy = self._parse(self._seen)
            label = policy.label
            self._current = InForce(policy, self._compile(policy))
        except Exception as error:  # whatever it is: the processes that run already go on with the policy before
            if (fallen_back := self._fallen_back()) is None:
                raise
            self._current = fallen_back
            return self._failed(error, f"{label} can not take effect")
        return Reload(result="loaded", version=policy.version, at=self._now())

    def _fallen_back(self) -> InForce[T] | None:
        """What `last_good` holds, as if it stood in the policy file; None where it holds no policy that works."""
        if self._last_good is None:
            return None
        try:
            policy = self._parse(read_policy(self._last_good))
            return InForce(policy, self._compile(policy))
        except Exception:  # noqa: BLE001 - then the policy file's own error is what has to be told
            return None

    async def _load(self, found: Found) -> Reload:
        before = self._current
        label = ""
        try:
            policy = await anyio.to_thread.run_sync(self._parse, found, abandon_on_cancel=True)
            label = policy.label
            reload = self._swap(policy)
        except Exception as error:  # noqa: BLE001 - whatever a policy trips over, the one in force must stay in force
            reload = self._failed(error, f"{label} can not take effect")
        # Not before the await: a caller that is cancelled in it must leave the change to be seen by `run`.
        self._seen = found
        self._last_reload = reload
        if self._retire is not None and self._current is not before:
            self._retire(before.compiled)
        if self._on_reload is not None:
            self._on_reload(reload)
        if reload.ok and self._last_good is not None:
            self._unkept = await anyio.to_thread.run_sync(self._keep, found)
        return reload

    def _swap(self, policy: Policy) -> Reload:
        if policy.file == self._current.policy.file:
            return Reload(result="unchanged", version=self._current.policy.version, at=self._now())
        self._current = InForce(policy, self._compile(policy))
        return Reload(result="loaded", version=policy.version, at=self._now())

    def _keep(self, found: Found) -> str:
        """Keep what was accepted for the next start. Blocks. Returns why it could not, or nothing."""
        if self._last_good is None or not isinstance(found, bytes):
            return ""
        try:
            if not self._last_good.is_file() or self._last_good.read_bytes() != found:
                _replace(self._last_good, found)
        except OSError as error:
            return f"{self._last_good}: {error.strerror}"
        return ""

    def _failed(self, error: Exception, what: str) -> Reload:
        version = self._current.policy.version
        if isinstance(error, PolicyError):
            return Reload(result="failed", version=version, at=self._now(), message=str(error), mistakes=error.mistakes)
        message = f"{what}: {type(error).__name__}: {error}"
        return Reload(result="failed", version=version, at=self._now(), message=message)


def _replace(path: Path, content: bytes) -> None:
    """Write a file that is never seen in part, and that nobody else may read: a policy can hold a key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(content)
            file.flush()
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
