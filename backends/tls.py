"""TLS towards an engine: who vouches for it, what it is called, and the certificate that says who we are."""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Callable
from typing import TypedDict

import anyio.to_thread

RECHECK_S = 10.0
"""How long a certificate that was replaced on disk may go unnoticed."""


class ConnectionSettings(TypedDict, total=False):
    """aiohttp's words for how a connection is made."""

    ssl: ssl.SSLContext
    server_hostname: str | None


class BadTlsFile(ValueError):
    """A file of the TLS settings can not be used. `field` is the setting that names it."""

    def __init__(self, field: str, path: str, reason: str) -> None:
        super().__init__(f"tls.{field}: {path} {reason}")
        self.field = field


class ClientTls:
    """The TLS settings of one backend: TLS 1.2 at least, and an engine that is who it says it is.

    `ca` (default: the system's authorities), `certificate` and `key` are PEM files. `server_name` is what the engine's
    certificate must be for where that is not the host of the URL. The files are read here, which blocks, and again when
    they have changed: connections that are new by then use what stands in them. Files that have become bad change
    nothing. Raises `BadTlsFile`.
    """

    def __init__(
        self,
        *,
        ca: str | None = None,
        certificate: str | None = None,
        key: str | None = None,
        server_name: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.server_name = server_name
        self._ca = ca
        self._certificate = certificate
        self._key = key
        self._clock = clock
        self._stamps = self._stamps_now()
        self._context = self._read()
        self._check_at = clock() + RECHECK_S

    async def context(self) -> ssl.SSLContext:
        """What a new connection is made with; another one after the files changed, so that no handshake sees both."""
        if self._clock() >= self._check_at:
            self._check_at = self._clock() + RECHECK_S
            await anyio.to_thread.run_sync(self._refresh, abandon_on_cancel=True)
        return self._context

    async def settings(self) -> ConnectionSettings:
        """What a request to the engine is made with."""
        return {"ssl": await self.context(), "server_hostname": self.server_name}

    def _refresh(self) -> None:
        stamps = self._stamps_now()
        if stamps == self._stamps:
            return
        try:
            self._context = self._read()
        except BadTlsFile:
            return  # half written perhaps: looked at again the next time
        self._stamps = stamps

    def _stamps_now(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(path) for path in (self._ca, self._certificate, self._key) if path is not None]

    def _read(self) -> ssl.SSLContext:
        context = _trusting(self._ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self._certificate is not None:
            self._identify(context, self._certificate)
        return context

    def _identify(self, context: ssl.SSLContext, certificate: str) -> None:
        """Make `context` show our certificate. The file of it is looked at first, to tell whose fault a failure is."""
        alone = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        _load("certificate", certificate, lambda: alone.load_verify_locations(certificate))
        key = self._key or certificate

        def no_password() -> str:
            raise BadTlsFile("key", key, "is encrypted, and there is nobody to ask for its password")

        _load("key", key, lambda: context.load_cert_chain(certificate, key, password=no_password))


def _trusting(ca: str | None) -> ssl.SSLContext:
    if ca is None:
        return ssl.create_default_context()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # asks for a certificate, and looks at the name in it
    _load("ca", ca, lambda: context.load_verify_locations(ca))
    return context


def _load(field: str, path: str, load: Callable[[], None]) -> None:
    try:
        load()
    except ssl.SSLError as error:
        reason = (error.reason or "not PEM").lower().replace("_", " ")
        raise BadTlsFile(field, path, f"can not be used: {reason}") from error
    except OSError as error:
        raise BadTlsFile(field, path, f"can not be read: {error.strerror}") from error


def _stamp(path: str) -> tuple[int, int, int] | None:
    """Differs when a file was replaced or written to; None where there is none."""
    try:
        found = os.stat(path)  # noqa: PTH116 - a path as the policy has it
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
