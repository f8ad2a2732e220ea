"""One multiplexed connection to a Redis or Valkey: many callers, one socket, replies matched in order.

Commands of one turn of the event loop leave in one write. Every command holds a slot until its reply has come, also
when its caller has long timed out or been cancelled: the late reply is dropped and can never reach somebody else. A
connection that stays silent aborts itself, so that a hung server costs a few time-outs and no more.

    SharedStateError
    ├── SharedStateUnavailable   no connection, it broke, or no reply in time: the command may or may not have run
    └── SharedStateRefused       the server answered with an error: the command did not run, or a script failed in it
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

import hiredis

from policies.redis_address import RedisAddress

Argument = bytes | str | int
Reply = bytes | int | float | bool | list[Any] | dict[Any, Any] | None
"""What RESP3 can say, text as bytes. Errors inside an array (`EXEC`) are `SharedStateRefused` values."""
PushListener = Callable[[list[Any]], None]

_INCOMPLETE = object()  # hiredis' own mark is False, which RESP3 also sends as a value
_LAST_LOOK_S = 0.001
_MAX_BACKLOG_BYTES = 32 * 1024 * 1024


class SharedStateError(Exception):
    """Shared state did not do what was asked."""


class SharedStateUnavailable(SharedStateError):
    """Nobody answered. Whether the command ran is unknown: what must not happen twice has to be idempotent."""


class SharedStateRefused(SharedStateError):
    """The server's own error; `code` is its first word (OOM, WRONGTYPE, NOSCRIPT, READONLY, BUSY, ERR...)."""

    @property
    def code(self) -> str:
        return str(self).partition(" ")[0]


class RedisConnection(asyncio.Protocol):
    """A connection that has said HELLO. Made by `connect`, used from one event loop, never reused once `lost` is set.

    It aborts itself after `max_timeouts` time-outs in a row with no reply in between (`unresponsive` tells that from a
    connection that broke), and when the server turns into a read-only replica.
    """

    def __init__(self, *, max_timeouts: int, on_push: PushListener | None = None) -> None:
        self.lost = asyncio.Event()
        self.lost_because = ""
        self.unresponsive = False
        self._max_timeouts = max_timeouts
        self._timeouts_in_a_row = 0
        self._on_push = on_push
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader(replyError=SharedStateRefused, notEnoughData=_INCOMPLETE)
        self._slots: deque[tuple[asyncio.Future[Reply], asyncio.TimerHandle]] = deque()
        self._outgoing: list[bytes] = []
        self._transport: asyncio.Transport | None = None
        self._backlogged = False

    def send(self, command: tuple[Argument, ...], *, within_s: float) -> asyncio.Future[Reply]:
        """Put `command` on the wire with this turn of the loop; its reply or a `SharedStateError` within `within_s`.

        Every failure comes out of the future, also at once where there is no connection; it may be dropped unawaited.
        Raises TypeError for an argument that is not bytes, str or int.
        """
        packed: bytes = hiredis.pack_command(command)  # type: ignore[arg-type]  # its stub names a tuple of one
        if self._transport is None or self._backlogged:
            return failed_future(self.lost_because or "the server does not keep up with what is sent to it")
        future: asyncio.Future[Reply] = self._loop.create_future()
        self._slots.append((future, self._loop.call_later(within_s, self._look_again, future, within_s)))
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        self._outgoing.append(packed)
        return future

    def abort(self, reason: str) -> None:
        """Hang up now; everything in flight fails with `reason`. Does nothing on a connection that is already lost."""
        if self._transport is None:
            return
        self._transport.abort()
        self._transport = None
        self._outgoing.clear()
        self.lost_because = reason
        while self._slots:
            future, timer = self._slots.popleft()
            timer.cancel()
            _fail(future, SharedStateUnavailable(reason))
        self.lost.set()

    def _flush(self) -> None:
        if self._transport is not None:
            self._transport.write(b"".join(self._outgoing))
            self._outgoing.clear()

    def _look_again(self, future: asyncio.Future[Reply], within_s: float) -> None:
        # uvloop runs timers before it reads sockets: after a stall of the loop the reply may lie there unread.
        if not future.done():
            self._loop.call_later(_LAST_LOOK_S, self._time_out, future, within_s)

    def _time_out(self, future: asyncio.Future[Reply], within_s: float) -> None:
        if future.done():
            return
        _fail(future, SharedStateUnavailable(f"no reply within {within_s * 1000:g} ms"))
        self._timeouts_in_a_row += 1
        if self._timeouts_in_a_row >= self._max_timeouts:
            self.unresponsive = True
            self.abort(f"no reply within {within_s * 1000:g} ms, {self._timeouts_in_a_row} times in a row")

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not every event loop's transport inherits from asyncio's, so isinstance would say no to some of them.
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=_MAX_BACKLOG_BYTES)

    def data_received(self, data: bytes) -> None:
        try:
            self._reader.feed(data)
            while (reply := self._reader.gets()) is not _INCOMPLETE:
                if type(reply) is hiredis.PushNotification:
                    if self._on_push is not None:
                        self._on_push(reply)
                elif self._slots:
                    self._deliver(reply)
                else:
                    self.abort("the server sent a reply that nobody asked for")
        except hiredis.ProtocolError as error:
            self.abort(f"what came back is not the Redis protocol: {error}")

    def _deliver(self, reply: Any) -> None:
        future, timer = self._slots.popleft()
        timer.cancel()
        if type(reply) is SharedStateRefused:
            if not future.done():
                self._timeouts_in_a_row = 0
                _fail(future, reply)
            if reply.code == "READONLY":
                # A failover made this server a replica; a new connection may find the new primary under the same name.
                self.abort("the server has become a read-only replica")
        elif not future.done():
            self._timeouts_in_a_row = 0
            future.set_result(reply)

    def pause_writing(self) -> None:
        self._backlogged = True

    def resume_writing(self) -> None:
        self._backlogged = False

    def connection_lost(self, exc: Exception | None) -> None:
        self.abort(f"the connection broke: {exc}" if exc else "the server closed the connection")


async def connect(
    address: RedisAddress,
    tls: ssl.SSLContext | None,
    *,
    client_name: str,
    connect_within_s: float,
    probe_within_s: float,
    max_timeouts: int,
    prelude: Sequence[tuple[Argument, ...]] = (),
    on_push: PushListener | None = None,
) -> RedisConnection:
    """A connection that works: greeted in RESP3, authenticated, `prelude` sent, a PING answered in `probe_within_s`.

    Raises SharedStateUnavailable that says why there is none, within `connect_within_s` plus `probe_within_s`. A server
    that is a replica, or runs as a cluster or a sentinel, counts as unavailable.
    """
    connection = RedisConnection(max_timeouts=max_timeouts, on_push=on_push)
    try:
        async with asyncio.timeout(connect_within_s):
            await _open(connection, address, tls)
            await _greet(connection, address, client_name, within_s=connect_within_s)
            for command in prelude:
                await connection.send(command, within_s=connect_within_s)
        await connection.send(("PING",), within_s=probe_within_s)
    except BaseException as error:
        connection.abort("it never came up")
        if isinstance(error, TimeoutError):
            raise SharedStateUnavailable(f"{address}: no connection within {connect_within_s:g} s") from error
        if isinstance(error, SharedStateError | OSError | UnicodeError):  # UnicodeError: a host name that is none
            raise SharedStateUnavailable(f"{address}: {error}") from error
        raise
    return connection


async def _open(connection: RedisConnection, address: RedisAddress, tls: ssl.SSLContext | None) -> None:
    loop = asyncio.get_running_loop()
    if address.path is not None:
        await loop.create_unix_connection(lambda: connection, address.path)
    else:
        transport, _ = await loop.create_connection(lambda: connection, address.host, address.port, ssl=tls)
        # So that a peer that vanished behind a firewall is noticed although nothing is being asked.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


async def _greet(connection: RedisConnection, address: RedisAddress, client_name: str, *, within_s: float) -> None:
    auth = () if address.password is None else ("AUTH", address.username, address.password)
    server = await connection.send(("HELLO", 3, *auth, "SETNAME", client_name), within_s=within_s)
    if not isinstance(server, dict):
        raise SharedStateUnavailable("the server does not speak RESP3")
    if (mode := server.get(b"mode", b"standalone")) != b"standalone":
        raise SharedStateUnavailable(f"the server runs in {mode.decode()} mode, which is not supported")
    if server.get(b"role", b"master") != b"master":
        raise SharedStateUnavailable("the server is a read-only replica")
    if address.db:
        await connection.send(("SELECT", address.db), within_s=within_s)


def failed_future(reason: str) -> asyncio.Future[Reply]:
    """A future that has already failed with `SharedStateUnavailable(reason)`."""
    future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
    _fail(future, SharedStateUnavailable(reason))
    return future


def _fail(future: asyncio.Future[Reply], error: SharedStateError) -> None:
    if not future.done():
        future.set_exception(error)
        # Looked at once here, so that a caller who lost interest leaves no "exception was never retrieved" in the log.
        future.exception()
