"""A real HTTP engine on loopback that does what a test says: answers, stalls, breaks off, and notices who hangs up.

    async with Upstream() as upstream:
        upstream.plays(*sse(chunk("Hel"), chunk("lo"), finish(), usage(3, 2)))
        ...
        assert upstream.requests[-1].json["model"] == "m"

A *play* is a list of acts, carried out in order for one request; the last play that was set answers all that follow.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

JSON_HEAD = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Head:
    """The status line and headers; the body that follows is chunked unless `headers` give it a length."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "text/event-stream"})


@dataclass(frozen=True)
class Send:
    """A piece of the body, written and flushed on its own."""

    piece: bytes


@dataclass(frozen=True)
class Raw:
    """Bytes written as they are, outside any HTTP framing."""

    piece: bytes


class Hang:
    """Wait until the client hangs up."""


class Reset:
    """Break the connection with a TCP reset."""


class Close:
    """Close the connection without ending the body."""


Act = Head | Send | Raw | Hang | Reset | Close


@dataclass(frozen=True)
class Received:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Upstream:
    """The engine. `hung_up` counts clients that left before their answer's end, `connections` all that were opened."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self.requests: list[Received] = []
        self.connections = 0
        self.hung_up = 0
        self.answered = 0
        self.port = 0
        self.plays_for: Callable[[Received], tuple[Act, ...]] = lambda received: ()
        """What is done with a request."""
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"http{'s' if self._tls else ''}://127.0.0.1:{self.port}/v1"

    def plays(self, *acts: Act) -> None:
        self.plays_for = lambda received: acts

    async def until_hung_up(self, times: int = 1, within_s: float = 2.0) -> None:
        """Return when that many clients have hung up."""
        await self._until(lambda: self.hung_up >= times, within_s)

    async def until_asked(self, times: int = 1, within_s: float = 2.0) -> None:
        """Return when that many requests have arrived."""
        await self._until(lambda: len(self.requests) >= times, within_s)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._server.wait_closed()

    async def _until(self, is_so: Any, within_s: float) -> None:
        async with asyncio.timeout(within_s), self._changed:
            await self._changed.wait_for(is_so)

    async def _count(self, name: str) -> None:
        async with self._changed:
            setattr(self, name, getattr(self, name) + 1)
            self._changed.notify_all()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            while (received := await _read_request(reader)) is not None:
                async with self._changed:
                    self.requests.append(received)
                    self._changed.notify_all()
                if not await self._answer(reader, writer, self.plays_for(received)):
                    return
        except asyncio.CancelledError:
            pass  # the test is over; a streams server reports a cancelled handler as an error
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, acts: tuple[Act, ...]) -> bool:
        """Whether the connection lives on."""
        loop = asyncio.get_running_loop()
        acting = loop.create_task(self._act(writer, acts))
        leaving = loop.create_task(reader.read(1))
        try:
            await asyncio.wait([acting, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not acting.done():
                await self._count("hung_up")
                return False
            if acting.exception() is not None:
                await self._count("hung_up")
                return False
            await self._count("answered")
            return acting.result()
        finally:
            for task in (acting, leaving):
                task.cancel()
            await asyncio.wait([acting, leaving])
            if not leaving.cancelled():
                leaving.exception()

    async def _act(self, writer: asyncio.StreamWriter, acts: Iterable[Act]) -> bool:
        chunked = False
        for act in acts:
            match act:
                case Head(status, headers):
                    chunked = "Content-Length" not in headers
                    more = {"Transfer-Encoding": "chunked"} if chunked else {}
                    lines = [f"HTTP/1.1 {status} X", *(f"{k}: {v}" for k, v in (headers | more).items()), "", ""]
                    writer.write("\r\n".join(lines).encode())
                case Send(piece):
                    writer.write(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
                case Raw(piece):
                    writer.write(piece)
                case Hang():
                    await asyncio.Event().wait()
                case Reset():
                    sock = writer.get_extra_info("socket")
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    writer.transport.abort()
                    return False
                case Close():
                    return False
            await writer.drain()
            await asyncio.sleep(0)
        if chunked:
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        return True


async def _read_request(reader: asyncio.StreamReader) -> Received | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    first, *lines = head.splitlines()
    method, path, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    body = b""
    if "chunked" in headers.get("transfer-encoding", ""):
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            await reader.readline()
        await reader.readline()
    else:
        body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Received(method, path, headers, body)


def sse(*frames: dict[str, Any] | bytes, done: bool = True) -> tuple[Act, ...]:
    """A stream that ends well: each frame its own piece."""
    pieces = [frame if isinstance(frame, bytes) else event(frame) for frame in frames]
    return (Head(), *map(Send, pieces), *([Send(b"data: [DONE]\n\n")] if done else []))


def event(frame: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(frame).encode() + b"\n\n"


def answers(body: object, status: int = 200, **headers: str) -> tuple[Act, ...]:
    """A JSON (or plain) answer in one piece."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return (Head(status, {**JSON_HEAD, "Content-Length": str(len(raw)), **names}), Raw(raw))


def chunk(content: str | None = None, index: int = 0, finish_reason: str | None = None, **delta: Any) -> dict[str, Any]:
    said = delta if content is None else {"content": content, **delta}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1_700_000_000,
        "model": "upstream-model",
        "choices": [{"index": index, "delta": said, "finish_reason": finish_reason}],
    }


def finish(index: int = 0) -> dict[str, Any]:
    return chunk(index=index, finish_reason="stop")


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    counted = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    return {**chunk(), "choices": [], "usage": counted}


def completion(*contents: str, prompt_tokens: int = 3, completion_tokens: int = 2) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "upstream-model",
        "choices": [
            {"index": index, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
            for index, content in enumerate(contents)
        ],
        "usage": usage(prompt_tokens, completion_tokens)["usage"],
    }
