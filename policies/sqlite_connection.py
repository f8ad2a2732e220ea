"""A SQLite connection for `policies.store`: every one with the same pragmas, and one that can be stopped twice."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from typing import Any

import aiosqlite
import anyio

BUSY_TIMEOUT_S = 5.0
"""How long a statement waits for another process's lock before it fails."""

_STOP_WITHIN_S = 1.0
_PRAGMAS = (
    f"busy_timeout = {int(BUSY_TIMEOUT_S * 1000)}",
    "journal_mode = WAL",  # readers never wait for a writer
    "foreign_keys = ON",
)


class SQLiteConnection(aiosqlite.Connection):
    """aiosqlite's connection, except that `stop` may be called again.

    SQLAlchemy closes the connection of a cancelled statement, and where the close is cancelled too, stops it on top.
    aiosqlite answers the first stop only; whoever waited for the second one, the close, waited for ever, and with it
    the end of the event loop.
    """

    def __init__(self, connector: Callable[[], sqlite3.Connection]) -> None:
        super().__init__(connector, iter_chunk_size=64)
        self._thread.daemon = True  # else a connection that nobody closed keeps the process from ending
        self._stopped: asyncio.Future[Any] | None = None

    def stop(self) -> asyncio.Future[Any] | None:
        if self._stopped is None:
            self._stopped = super().stop()
        return self._stopped


async def connect(*arguments: Any, **options: Any) -> SQLiteConnection:
    """A connection that is open; arguments and errors are those of `sqlite3.connect`."""

    def connector() -> sqlite3.Connection:
        connection: sqlite3.Connection = sqlite3.connect(*arguments, **options)
        try:
            for pragma in _PRAGMAS:
                connection.execute(f"PRAGMA {pragma}").close()
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    connection = SQLiteConnection(connector)
    try:
        _ = await connection
    except BaseException:
        if (stopped := connection.stop()) is not None:
            with anyio.move_on_after(_STOP_WITHIN_S, shield=True):
                await stopped  # the thread reports to the event loop once more, which may end with this failure
        raise
    return connection
