"""`SharedState`: the one way to Redis, with a deadline on every command and a circuit breaker in front of the network.

    connecting ──> closed <──> open

*Closed*: one connection, used by everybody (`redis_connection`). It opens when a few commands in a row get no reply in
time, or when the connection broke and could not be made again at once. *Open*: every command fails within microseconds,
and a probe (connect, greet, PING) is tried after growing, jittered delays until one succeeds. Nobody's request is ever
the probe. Forebay uses two instances: "state" (counters and leases, noeviction) and "cache" (evicting).
"""

from __future__ import annotations

import asyncio
import hashlib
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import anyio

from policies.redis_address import RedisAddress
from policies.redis_connection import (
    Argument,
    PushListener,
    RedisConnection,
    Reply,
    SharedStateError,
    SharedStateRefused,
    SharedStateUnavailable,
    connect,
    failed_future,
)

__all__ = [
    "Argument",
    "BreakerState",
    "Limits",
    "Reply",
    "Script",
    "SharedState",
    "SharedStateError",
    "SharedStateRefused",
    "SharedStateUnavailable",
]

BreakerState = Literal["connecting", "closed", "open"]
_SHUTTING_DOWN = "shutting down"
OnTransition = Callable[[str, BreakerState, str], None]


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script, known to the server by its SHA-1."""

    name: str
    text: str
    sha1: str

    @classmethod
    def of(cls, name: str, text: str) -> Script:
        return cls(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When to give up on a server, and how often to ask after it."""

    connect_within_s: float = 1.0
    probe_within_s: float = 0.25
    """The PING that lets a new connection in, and the one sent every `heartbeat_s`, must be answered in this time."""
    max_timeouts: int = 3
    """Time-outs in a row that open the breaker."""
    heartbeat_s: float = 5.0
    """How often a PING checks the connection, so that a hung server is noticed without any traffic."""
    first_delay_s: float = 0.05
    longest_delay_s: float = 2.0
    """Delays between probes double from `first_delay_s` to this, each shortened by up to half at random. A connection
    that lives longer than this starts the count again."""

    def delay_s(self, attempt: int, jitter: float) -> float:
        """How long to wait before the `attempt`-th probe in a row (from 0); `jitter` is random in [0, 1)."""
        # 2.0**attempt overflows after some ten thousand probes, and sixteen doublings are beyond any sensible bound.
        return float(min(self.first_delay_s * 2 ** min(attempt, 16), self.longest_delay_s) * (1.0 - jitter / 2))


class SharedState:
    """One named Redis. Commands may be sent from any task of the loop that `run` runs on; none waits for a connection.

    `on_transition(name, state, reason)` is called once per change of state, from `run`; it must not raise.
    `prelude` is sent on every new connection (`CLIENT TRACKING ON`, say). `on_push` gets the server's RESP3 pushes, and
    `[b"invalidate", None]`, which is how the server says "forget everything", whenever a connection is lost.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        on_transition: OnTransition,
        jitter: Callable[[], float],
        limits: Limits = Limits(),
        prelude: Sequence[tuple[Argument, ...]] = (),
        on_push: PushListener | None = None,
    ) -> None:
        """Does not connect: `run` does. Raises ValueError for a URL that is not understood or not supported, and
        OSError for a certificate file that cannot be read."""
        self.name = name
        self.address = RedisAddress.parse(url)
        self.state: BreakerState = "connecting"
        self.reason = "not connected yet"
        """Why the breaker is open; for people, and free of credentials."""
        self._tls = ssl.create_default_context(cafile=self.address.ca_file) if self.address.tls else None
        self._limits = limits
        self._jitter = jitter
        self._on_transition = on_transition
        self._prelude = prelude
        self._on_push = on_push
        self._connection: RedisConnection | None = None
        self._up = asyncio.Event()
        self._closing = asyncio.Event()

    def send(self, *command: Argument, within_s: float) -> asyncio.Future[Reply]:
        """Send `command` with this turn of the loop, and return its reply to come, within `within_s` seconds.

        Does not wait: send several, then await each, and they share one round trip. Every failure comes out of the
        future as SharedStateUnavailable or SharedStateRefused; a future may also be dropped. Since everybody shares the
        connection, commands that block it (BLPOP, XREAD BLOCK) or change it (SELECT, SUBSCRIBE) are not for this.
        """
        if self._connection is None:
            return failed_future(f"{self.name}: {self.reason}")
        return self._connection.send(command, within_s=within_s)

    async def execute(self, *command: Argument, within_s: float) -> Reply:
        """The reply to `command`. Raises SharedStateUnavailable, within `within_s` seconds, or SharedStateRefused."""
        return await self.send(*command, within_s=within_s)

    async def evaluate(
        self, script: Script, *, keys: Sequence[str], args: Sequence[Argument] = (), within_s: float
    ) -> Reply:
        """Run `script` atomically on the server, and teach it the script where it does not know it (any more).

        Raises as `execute` does; both round trips share `within_s`.
        """
        rest = (len(keys), *keys, *args)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + within_s
        try:
            return await self.send("EVALSHA", script.sha1, *rest, within_s=within_s)
        except SharedStateRefused as error:
            if error.code != "NOSCRIPT":
                raise
        return await self.send("EVAL", script.text, *rest, within_s=max(0.0, deadline - loop.time()))

    async def available(self, *, within_s: float) -> bool:
        """Whether the breaker is closed, or closes within `within_s` seconds."""
        with anyio.move_on_after(within_s):
            await self._up.wait()
        return self._up.is_set()

    async def run(self) -> None:
        """Keep the connection up until `aclose`, or until cancelled. Runs once, in a task group of the app."""
        attempt = 0
        while not self._closing.is_set():
            try:
                connection = await self._connect()
            except SharedStateUnavailable as error:
                self._become("open", str(error))
            else:
                if await self._use(connection) > self._limits.longest_delay_s:
                    attempt = 0
                if attempt == 0 and not connection.unresponsive:
                    attempt = 1  # a restart or an idle time-out: not worth a transition if the next try succeeds
                    continue
                self._become("open", connection.lost_because)
            with anyio.move_on_after(self._limits.delay_s(attempt, self._jitter())):
                await self._closing.wait()
            attempt += 1

    async def aclose(self) -> None:
        """Hang up; what is in flight fails with SharedStateUnavailable and `run` returns. Idempotent."""
        self._closing.set()
        self.reason = _SHUTTING_DOWN
        if self._connection is not None:
            self._connection.abort(_SHUTTING_DOWN)
        await asyncio.sleep(0)  # one turn of the loop, in which the transport closes its socket

    async def _connect(self) -> RedisConnection:
        return await connect(
            self.address,
            self._tls,
            client_name=f"forebay-{self.name}",
            connect_within_s=self._limits.connect_within_s,
            probe_within_s=self._limits.probe_within_s,
            max_timeouts=self._limits.max_timeouts,
            prelude=self._prelude,
            on_push=self._on_push,
        )

    async def _use(self, connection: RedisConnection) -> float:
        """Offer `connection` to everybody until it is lost; how long it lived, in seconds."""
        loop = asyncio.get_running_loop()
        since = loop.time()
        try:
            if not self._closing.is_set():
                self._connection = connection
                self._up.set()
                self._become("closed", "connected")
                await self._watch(connection)
        finally:
            connection.abort(_SHUTTING_DOWN)
            self._connection = None
            self._up.clear()
            self.reason = connection.lost_because
            if self._on_push is not None:
                self._on_push([b"invalidate", None])
        return loop.time() - since

    async def _watch(self, connection: RedisConnection) -> None:
        """Return when `connection` is lost; make it notice by PINGs when nothing else would."""
        quiet_s = self._limits.heartbeat_s
        while not connection.lost.is_set():
            with anyio.move_on_after(quiet_s):
                await connection.lost.wait()
                return
            try:
                await connection.send(("PING",), within_s=self._limits.probe_within_s)
                quiet_s = self._limits.heartbeat_s
            except SharedStateError:
                quiet_s = 0.0  # the connection counts its time-outs itself: ask again until it gives up or answers

    def _become(self, state: BreakerState, reason: str) -> None:
        if self._closing.is_set():
            return
        self.reason = reason
        if state != self.state:
            self.state = state
            self._on_transition(self.name, state, reason)
