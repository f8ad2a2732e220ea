"""TLS towards engines: against a real TLS server, with certificates made for each test."""

from __future__ import annotations

import asyncio
import os
import ssl
import warnings
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from backends.errors import BackendUnreachable
from backends.openai_http import OpenAIBackend
from backends.tls import RECHECK_S, BadTlsFile, ClientTls
from tests.calls import collect, make_call, texts_of
from tests.certificates import Authority
from tests.upstream import Upstream, answers, chunk, completion, finish, sse

HOST = "127.0.0.1"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@asynccontextmanager
async def engine(server: ssl.SSLContext, tls: ClientTls | None) -> AsyncGenerator[tuple[Upstream, OpenAIBackend], None]:
    async with Upstream(server) as upstream:
        backend = OpenAIBackend("a", upstream.url, tls=tls)
        upstream.plays_for = lambda received: (
            sse(chunk("x", role="assistant"), finish()) if received.json["stream"] else answers(completion("x"))
        )
        try:
            yield upstream, backend
        finally:
            await backend.aclose()


async def ask(backend: OpenAIBackend, stream: bool = True) -> list[str]:
    return texts_of(await collect(backend, make_call(stream=stream)))


@pytest.mark.parametrize("stream", [True, False])
async def test_an_engine_that_our_authority_vouches_for_is_answered_by(authority: Authority, stream: bool) -> None:
    async with engine(authority.server(HOST), ClientTls(ca=str(authority.path))) as (upstream, backend):
        assert await ask(backend, stream) == ["x"]
        assert await ask(backend, stream) == ["x"]
        upstream.plays(*answers({"data": []}))
        await backend.check(within_s=2.0)
    assert upstream.connections == 1


async def test_an_engines_metrics_are_read_from_whom_our_authority_vouches_for(authority: Authority) -> None:
    async with Upstream(authority.server(HOST)) as upstream:
        upstream.plays(*answers(b"vllm:num_requests_running 3\n"))
        url = upstream.url.removesuffix("/v1") + "/metrics"
        backend = OpenAIBackend("a", upstream.url, tls=ClientTls(ca=str(authority.path)), metrics_url=url)
        polling = asyncio.get_running_loop().create_task(backend.run())
        try:
            async with asyncio.timeout(5):
                while backend.load.running != 3:
                    await asyncio.sleep(0.01)
        finally:
            polling.cancel()
            await asyncio.wait([polling])
            await backend.aclose()


@pytest.mark.parametrize(
    ("server", "tls"),
    [
        pytest.param(lambda ours, other: ours.server(HOST), lambda ours, other: None, id="system's authorities"),
        pytest.param(
            lambda ours, other: other.server(HOST),
            lambda ours, other: ClientTls(ca=str(ours.path)),
            id="another authority",
        ),
        pytest.param(
            lambda ours, other: ours.server("elsewhere.example"),
            lambda ours, other: ClientTls(ca=str(ours.path)),
            id="another name",
        ),
        pytest.param(
            lambda ours, other: ours.server(HOST),
            lambda ours, other: ClientTls(ca=str(ours.path), server_name="elsewhere.example"),
            id="not the name we were told",
        ),
        pytest.param(
            lambda ours, other: ours.server(HOST, expired=True),
            lambda ours, other: ClientTls(ca=str(ours.path)),
            id="expired",
        ),
    ],
)
async def test_an_engine_that_does_not_prove_who_it_is_is_told_nothing(
    authority: Authority,
    tmp_path: Path,
    server: Callable[[Authority, Authority], ssl.SSLContext],
    tls: Callable[[Authority, Authority], ClientTls | None],
) -> None:
    other = Authority(tmp_path, "other")
    async with engine(server(authority, other), tls(authority, other)) as (upstream, backend):
        for stream in (True, False):
            with pytest.raises(BackendUnreachable, match="certificate verify failed"):
                await ask(backend, stream)
        with pytest.raises(BackendUnreachable):
            await backend.check(within_s=2.0)
    assert upstream.requests == []


async def test_an_engine_may_have_another_name_than_its_address(authority: Authority) -> None:
    tls = ClientTls(ca=str(authority.path), server_name="engine.internal")
    async with engine(authority.server("engine.internal"), tls) as (_, backend):
        assert await ask(backend) == ["x"]


async def test_nothing_below_tls_1_2_is_spoken(authority: Authority) -> None:
    server = authority.server(HOST)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        server.minimum_version, server.maximum_version = ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_1
    server.set_ciphers("ALL:@SECLEVEL=0")
    lax = ssl.create_default_context(cafile=authority.path)
    lax.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        lax.minimum_version = ssl.TLSVersion.TLSv1_1
    async with engine(server, ClientTls(ca=str(authority.path))) as (upstream, backend):
        _, writer = await asyncio.open_connection(HOST, upstream.port, ssl=lax)
        assert writer.get_extra_info("ssl_object").version() == "TLSv1.1", "the server would speak it"
        writer.transport.abort()
        with pytest.raises(BackendUnreachable):
            await ask(backend)
    assert upstream.requests == []


@pytest.mark.parametrize("shown", ["ours", "none", "a stranger's"])
async def test_an_engine_that_asks_who_we_are_is_shown_our_certificate(
    authority: Authority, tmp_path: Path, shown: str
) -> None:
    server = authority.server(HOST)
    server.verify_mode = ssl.CERT_REQUIRED
    server.load_verify_locations(authority.path)
    issuer = authority if shown == "ours" else Authority(tmp_path, "stranger")
    certificate = None if shown == "none" else str(issuer.issue("gateway"))
    tls = ClientTls(ca=str(authority.path), certificate=certificate, key=certificate)
    async with engine(server, tls) as (upstream, backend):
        if shown == "ours":
            assert await ask(backend) == ["x"]
        else:
            with pytest.raises(BackendUnreachable):
                await ask(backend)
            assert upstream.requests == []


async def test_a_certificate_replaced_on_disk_is_shown_on_new_connections(authority: Authority, tmp_path: Path) -> None:
    now = 0.0
    server = authority.server(HOST)
    server.verify_mode = ssl.CERT_REQUIRED
    server.load_verify_locations(authority.path)
    certificate = Authority(tmp_path, "stranger").issue("gateway")
    tls = ClientTls(ca=str(authority.path), certificate=str(certificate), key=str(certificate), clock=lambda: now)
    async with engine(server, tls) as (_, backend):
        authority.issue("gateway")  # over the stranger's
        with pytest.raises(BackendUnreachable):
            await ask(backend)
        now = RECHECK_S
        assert await ask(backend) == ["x"]


async def test_a_replacement_that_is_no_certificate_changes_nothing_until_it_is_one(
    authority: Authority, tmp_path: Path
) -> None:
    now = 0.0
    certificate = authority.issue("gateway")
    good = certificate.read_bytes()
    tls = ClientTls(ca=str(authority.path), certificate=str(certificate), key=str(certificate), clock=lambda: now)
    first = await tls.context()
    for broken in (b"", good[:100]):
        certificate.write_bytes(broken)
        now += RECHECK_S
        assert await tls.context() is first
    certificate.write_bytes(good)
    os.utime(certificate, ns=(1, 1))
    now += RECHECK_S
    assert await tls.context() is not first


@pytest.mark.parametrize(
    ("field", "settings", "reason"),
    [
        ("ca", {"ca": "missing.pem"}, "No such file"),
        ("ca", {"ca": "text.pem"}, "no certificate or crl found"),
        ("certificate", {"certificate": "text.pem", "key": "good.pem"}, "no certificate or crl found"),
        ("key", {"certificate": "good.pem", "key": "missing.pem"}, "No such file"),
        ("key", {"certificate": "good.pem", "key": "text.pem"}, "can not be used"),
        ("key", {"certificate": "good.pem", "key": "other.pem"}, "key values mismatch"),
        ("key", {"certificate": "locked.pem", "key": "locked.pem"}, "is encrypted"),
    ],
)
def test_a_file_that_can_not_be_used_is_named(
    authority: Authority, tmp_path: Path, field: str, settings: dict[str, str], reason: str
) -> None:
    authority.issue("good")
    authority.issue("other")
    authority.issue("locked", password=b"secret")
    (tmp_path / "text.pem").write_text("not a certificate")
    paths: dict[str, Any] = {name: str(tmp_path / file) for name, file in settings.items()}
    with pytest.raises(BadTlsFile, match=reason) as failure:
        ClientTls(**paths)
    assert failure.value.field == field
    assert str(failure.value).startswith(f"tls.{field}: {paths[field]}")
