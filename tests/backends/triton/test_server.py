"""A channel to a server over TLS: whom it trusts, and who it says it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest

from backends.errors import BackendUnreachable
from backends.triton.server import Tls, TritonServer
from tests.certificates import Authority


@asynccontextmanager
async def tls_server(certificate: Path, clients: Path | None = None) -> AsyncGenerator[str, None]:
    """The URL of a gRPC server with this certificate, which asks for one that `clients` vouch for."""
    pem = certificate.read_bytes()
    ca = None if clients is None else clients.read_bytes()
    server = grpc.aio.server()
    credentials = grpc.ssl_server_credentials([(pem, pem)], ca, require_client_auth=ca is not None)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield f"grpcs://127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def connect(url: str, tls: Tls | None = None) -> None:
    server = TritonServer(url, backend="a", model="m", tls=tls)
    try:
        await server.connect(asyncio.get_running_loop().time() + 5)
    finally:
        await server.aclose()


async def test_the_systems_authorities_are_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority(tmp_path)
    async with tls_server(authority.issue("127.0.0.1")) as url:
        with pytest.raises(BackendUnreachable):
            await connect(url)
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.path))
        await connect(url)


async def test_an_authority_of_the_policys_own_a_certificate_and_a_name(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    ours = authority.issue("us").read_bytes()
    tls = Tls(ca=authority.path.read_bytes(), certificate=ours, key=ours, server_name="engine")
    async with tls_server(authority.issue("engine"), clients=authority.path) as url:
        await connect(url, tls)
        with pytest.raises(BackendUnreachable):
            await connect(url, Tls(ca=authority.path.read_bytes(), certificate=ours, key=ours))
