"""Where a Redis or Valkey stands: `redis://`, `rediss://` (TLS) and `unix://` URLs, read once at start.

    redis[s]://[[user]:password@]host[:port][/db]       unix://[[user]:password@]/path[?db=0]

`rediss://` verifies the server against the system's authorities, or those of `?ssl_ca_certs=FILE`. Cluster and Sentinel
have no URL here yet. No message of this module repeats a URL, since it may hold a password.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

_DEFAULT_PORT = 6379
_SUPPORTED = "supported are redis://host:port/db, rediss://host:port/db and unix:///path?db=0"
_QUERY = {"redis": {"db"}, "rediss": {"db", "ssl_ca_certs"}, "unix": {"db"}}


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisAddress:
    """One server and one database of it: a Unix socket where `path` is set, else TCP."""

    host: str = ""
    port: int = _DEFAULT_PORT
    path: str | None = None
    tls: bool = False
    ca_file: str | None = None
    username: str = "default"
    password: str | None = field(default=None, repr=False)
    db: int = 0

    @classmethod
    def parse(cls, url: str) -> RedisAddress:
        """The address that `url` names. Raises ValueError that says what is wrong and what is supported."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            # The parser quotes what it could not read, and that can be a password with an unescaped character.
            raise ValueError(f"not a URL (are special characters of the password %-escaped?); {_SUPPORTED}") from None
        if parts.scheme not in _QUERY:
            cluster = "cluster" in parts.scheme or "sentinel" in parts.scheme
            why = "Redis Cluster and Sentinel are not supported" if cluster else "not a Redis URL"
            raise ValueError(f"{parts.scheme}://: {why}; {_SUPPORTED}")
        if "," in (parts.netloc.rpartition("@")[2]):
            raise ValueError(f"{parts.scheme}://: several hosts are not supported, name one server; {_SUPPORTED}")
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        if unknown := query.keys() - _QUERY[parts.scheme]:
            raise ValueError(f"{parts.scheme}://: unknown parameter {min(unknown)!r}; {_SUPPORTED}")
        is_unix = parts.scheme == "unix"
        if (is_unix and not parts.path) or (not is_unix and not parts.hostname):
            raise ValueError(f"{parts.scheme}://: no {'path' if is_unix else 'host'}; {_SUPPORTED}")
        return cls(
            host=parts.hostname or "",
            port=_DEFAULT_PORT if port is None else port,
            path=unquote(parts.path) if is_unix else None,
            tls=parts.scheme == "rediss",
            ca_file=query.get("ssl_ca_certs"),
            username=unquote(parts.username or "") or "default",
            password=None if parts.password is None else unquote(parts.password),
            db=_db(parts, query, from_path=not is_unix),
        )

    def __str__(self) -> str:
        """For people and logs: never a credential."""
        where = self.path if self.path is not None else f"{self.host}:{self.port}"
        return f"{where} (db {self.db})" if self.db else str(where)


def _db(parts: SplitResult, query: dict[str, str], *, from_path: bool) -> int:
    text = query.get("db", (parts.path.strip("/") if from_path else "") or "0")
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{parts.scheme}://: the database is a number; {_SUPPORTED}")
    return int(text)
