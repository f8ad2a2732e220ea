"""A client that speaks HTTP by hand, for what no library would send or do: and answers read apart."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from tests.world import POLICY, World, events_of


def policy_with_engine(url: str) -> str:
    """The usual policy, but the small model is served by the OpenAI-compatible engine at `url`."""
    return POLICY.replace("small-1: {kind: scripted}", f"engine-1: {{kind: openai, url: '{url}'}}").replace(
        "backends: [small-1]", "backends: [engine-1]"
    )


class RawClient:
    """One connection to a gateway. `ask` sends a request; reading and leaving are the test's to decide."""

    def __init__(self, world: World, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self._world = world
        self._writer = writer

    async def ask(self, prompt: str = "hello", *, key: str | None = None, **fields: Any) -> None:
        await self.send(msgspec.json.encode(self._world.body(prompt, **fields)), key=key)

    async def send(
        self, body: bytes, *, key: str | None = None, length: int | None = None, headers: Mapping[str, str] = {}
    ) -> None:
        """A request with `body`, which claims to have `length` bytes."""
        said = {
            "host": "gateway",
            "content-length": str(len(body) if length is None else length),
            **self._world.headers(key),
            **headers,
        }
        lines = [f"{name}: {value}" for name, value in said.items()]
        await self.write("\r\n".join(["POST /v1/chat/completions HTTP/1.1", *lines, "", ""]).encode() + body)

    async def write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def read_until(self, end: bytes, within_s: float = 5.0) -> bytes:
        async with asyncio.timeout(within_s):
            return await self.reader.readuntil(end)

    async def read_answer(self, within_s: float = 5.0) -> tuple[int, bytes]:
        """The status and body of an answer that says how long it is."""
        head = (await self.read_until(b"\r\n\r\n", within_s)).decode("latin-1")
        length = next(int(line.split(":")[1]) for line in head.splitlines() if line.startswith("content-length:"))
        async with asyncio.timeout(within_s):
            return int(head.split()[1]), await self.reader.readexactly(length)

    def half_close(self) -> None:
        """Say that nothing more will be sent, and go on reading."""
        self._writer.write_eof()

    def hang_up(self) -> None:
        self._writer.transport.abort()

    async def close(self) -> None:
        self._writer.close()


@asynccontextmanager
async def raw_client(world: World, receive_buffer_bytes: int | None = None) -> AsyncGenerator[RawClient, None]:
    """A connection. With `receive_buffer_bytes` it takes in little that is not read."""
    connection = socket.socket()
    if receive_buffer_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
    host, port = httpx.URL(world.url).host, httpx.URL(world.url).port
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, (host, port))
    limit = 4096 if receive_buffer_bytes is not None else 2**20
    reader, writer = await asyncio.open_connection(sock=connection, limit=limit)
    client = RawClient(world, reader, writer)
    try:
        yield client
    finally:
        client.hang_up()


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error in OpenAI's envelope, which must be all that the body holds."""
    body = response.json()
    assert set(body) == {"error"}, body
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"].startswith("req_")
    error: dict[str, Any] = body["error"]
    assert error["message"]
    return error


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream that ended well."""
    *chunks, last = events_of(response)
    assert last == "[DONE]"
    return chunks


def streamed_text(chunks: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)


async def metric(world: World, name: str, **labels: str) -> float:
    """The sum of a metric's samples that carry these labels."""
    return sum(
        value for sample, having, value in await samples(world) if sample == name and labels.items() <= having.items()
    )


async def samples(world: World) -> list[tuple[str, dict[str, str], float]]:
    """Every sample of a scrape: its name, labels and value."""
    text = (await world.client.get("/metrics")).text
    return [
        (sample.name, sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]


async def demo_tenant_id(world: World) -> str:
    tenant, _ = await world.gateway.store.ensure_demo_tenant()
    return tenant.id
