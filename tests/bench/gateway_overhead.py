"""What Forebay adds to a request: CPU µs per request and latency, against a bare server, in interleaved rounds.

    python -m tests.bench.gateway_overhead [--rounds 5] [--seconds 2] [--json FILE]

The targets, each a process of its own on loopback:

    bare           uvicorn with the smallest ASGI application that answers the same bytes
    scripted       one Forebay worker, everything on, a miss answered by the scripted backend (8 tokens)
    upstream       the same, a miss answered by a `bare` server over HTTP
    upstream-sse   the same, streamed: 32 events
    exact          the same, a hit in the exact cache (Valkey)

CPU is user and system time of the worker process from /proc, so that the load generator and the upstream do not count.
Latency is measured at one connection; compare within a run only.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import uvicorn

from gateway.processes import read_status

CONNECTIONS = 32
COMPLETION = msgspec.json.encode(
    {
        "id": "chatcmpl-bench",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "bench",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "word " * 120},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 150, "completion_tokens": 120, "total_tokens": 270},
    }
)


def _chunk(delta: dict[str, str], finish: str | None = None) -> bytes:
    chunk = {
        "id": "chatcmpl-bench",
        "object": "chat.completion.chunk",
        "created": 1_700_000_000,
        "model": "bench",
        "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}],
    }
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


STREAM = b"".join([_chunk({"role": "assistant"}), *[_chunk({"content": "word "})] * 30, _chunk({}, "stop")]) + (
    b'data: {"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1,"model":"bench","choices":[],'
    b'"usage":{"prompt_tokens":150,"completion_tokens":30,"total_tokens":180}}\n\ndata: [DONE]\n\n'
)


async def bare_app(scope: Any, receive: Any, send: Any) -> None:
    """Reads the body and answers a fixed completion, or a fixed stream."""
    if scope["type"] != "http":
        return
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    stream = b'"stream":true' in body
    answer = STREAM if stream else COMPLETION
    kind = b"text/event-stream" if stream else b"application/json"
    headers = [(b"content-type", kind), (b"content-length", str(len(answer)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


POLICY = """
name: bench
backends:
  scripted: {{kind: scripted, answer: "{answer}"}}
  upstream: {{kind: openai, url: "{url}/v1"}}
models:
  scripted: {{backends: [scripted], context_window: 100000, price: {{input: 1, output: 2}}}}
  upstream: {{backends: [upstream], context_window: 100000, price: {{input: 1, output: 2}}}}
routes:
  auto: {{strategy: threshold, small: scripted, large: upstream, threshold: 1.0}}
  large: {{strategy: threshold, small: scripted, large: upstream, threshold: 0.0}}
"""


@dataclass(frozen=True)
class Target:
    name: str
    port: int
    pid: int
    model: str
    key: str = ""
    unique: bool = True
    """Whether every request has a text of its own, so that none is a hit."""
    stream: bool = False

    def request(self, number: int) -> bytes:
        text = "Say the word a hundred times, and mind the budget. " * 10 + (f"{number:012d}" if self.unique else "")
        fields: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": text}]}
        if self.stream:
            fields["stream"] = True
        body = msgspec.json.encode(fields)
        return (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {self.key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode() + body


@dataclass
class Sample:
    requests: int
    cpu_us: float
    latencies_us: list[float]


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def one_connection(target: Target, numbers: Iterator[int], seconds: float) -> list[float]:
    """Latencies in µs of requests one after another."""
    latencies = []
    with socket.create_connection(("127.0.0.1", target.port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            request = target.request(next(numbers))
            began = time.perf_counter()
            connection.sendall(request)
            _read_answer(connection)
            latencies.append((time.perf_counter() - began) * 1e6)
    return latencies


def _read_answer(connection: socket.socket) -> None:
    received = b""
    while b"\r\n\r\n" not in received:
        received += _more(connection)
    head, _, body = received.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(received.decode())
    lower = head.lower()
    if b"content-length:" in lower:
        length = int(lower.split(b"content-length:")[1].split(b"\r\n")[0])
        while len(body) < length:
            body += _more(connection)
    else:
        while not body.endswith(b"0\r\n\r\n"):
            body += _more(connection)


def _more(connection: socket.socket) -> bytes:
    part = connection.recv(65536)
    if not part:
        raise RuntimeError("the server hung up")
    return part


async def many_connections(target: Target, numbers: Iterator[int], seconds: float) -> int:
    """Requests answered over many connections at once."""
    done = 0
    until = time.perf_counter() + seconds

    async def client() -> None:
        nonlocal done
        reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
        while time.perf_counter() < until:
            writer.write(target.request(next(numbers)))
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            if not head.startswith(b"http/1.1 200"):
                raise RuntimeError(head.decode())
            if b"content-length:" in head:
                await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
            else:
                await reader.readuntil(b"0\r\n\r\n")
            done += 1
        writer.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(CONNECTIONS):
            group.create_task(client())
    return done


@contextmanager
def bare_server() -> Iterator[tuple[int, int]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        command = [sys.executable, "-m", "tests.bench.gateway_overhead", "--bare-fd", str(listener.fileno())]
        process = subprocess.Popen(command, pass_fds=[listener.fileno()])
    try:
        _wait_for(f"http://127.0.0.1:{port}/", process)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait()


@contextmanager
def forebay_server(folder: Path, upstream_port: int) -> Iterator[tuple[int, int, str]]:
    policy = folder / "policy.yaml"
    policy.write_text(POLICY.format(url=f"http://127.0.0.1:{upstream_port}", answer=" ".join(["word"] * 8)))
    data = folder / "data"
    forebay = [sys.executable, "-m", "gateway"]
    key = subprocess.run(
        [*forebay, "keys", "create", "--tenant", "bench", "--data-dir", str(data)], check=True, capture_output=True
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [*forebay, "serve", "--policy", str(policy), "--port", str(port), "--data-dir", str(data)],
        stderr=(folder / "log").open("w"),
    )
    try:
        _wait_for(f"http://127.0.0.1:{port}/healthz", process)
        (worker,) = [child.pid for child in read_status(data / "run") if child.name.startswith("worker")]
        assert worker is not None
        yield port, worker, key.stdout.decode().strip()
    finally:
        process.terminate()
        process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        if process.poll() is not None:
            raise RuntimeError(f"{url}: the server ended with {process.returncode}")
        try:
            httpx.get(url)
        except httpx.TransportError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"{url} never answered")


def measure(target: Target, numbers: Iterator[int], seconds: float) -> Sample:
    latencies = one_connection(target, numbers, seconds)
    before = cpu_s(target.pid)
    requests = asyncio.run(many_connections(target, numbers, seconds))
    return Sample(requests, (cpu_s(target.pid) - before) * 1e6 / requests, latencies)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--bare-fd", type=int)
    options = parser.parse_args()
    if options.bare_fd is not None:
        config = uvicorn.Config(bare_app, log_level="warning", access_log=False, lifespan="off")
        uvicorn.Server(config).run(sockets=[socket.socket(fileno=options.bare_fd)])
        return
    numbers = iter(range(10**12))
    samples: dict[str, list[Sample]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bare_port, bare_pid = stack.enter_context(bare_server())
        upstream_port, _ = stack.enter_context(bare_server())
        port, pid, key = stack.enter_context(forebay_server(folder, upstream_port))
        targets = [
            Target("bare", bare_port, bare_pid, "any"),
            Target("scripted", port, pid, "auto", key),
            Target("upstream", port, pid, "large", key),
            Target("upstream-sse", port, pid, "large", key, stream=True),
            Target("exact", port, pid, "auto", key, unique=False),
        ]
        for target in targets:
            measure(target, numbers, 0.5)
        for _ in range(options.rounds):
            for target in targets:
                samples.setdefault(target.name, []).append(measure(target, numbers, options.seconds))
    report(samples, options.json)


def report(samples: dict[str, list[Sample]], path: Path | None) -> None:
    rows = {}
    bare_cpu_us = statistics.median(sample.cpu_us for sample in samples["bare"])
    print(f"{'target':14} {'requests':>8} {'CPU us/req':>10} {'x bare':>7} {'p10 us':>8} {'p50 us':>8} {'p99 us':>8}")
    for name, rounds in samples.items():
        latencies = sorted(latency for sample in rounds for latency in sample.latencies_us)
        cpu_us = statistics.median(sample.cpu_us for sample in rounds)
        p10, p50, p99 = (latencies[int(len(latencies) * share)] for share in (0.10, 0.50, 0.99))
        rows[name] = {
            "requests": sum(sample.requests for sample in rounds),
            "cpu_us": cpu_us,
            "ratio_to_bare": cpu_us / bare_cpu_us,
            "latency_us": {"p10": p10, "p50": p50, "p99": p99},
        }
        print(
            f"{name:14} {rows[name]['requests']:8} {cpu_us:10.0f} {cpu_us / bare_cpu_us:7.1f}"
            f" {p10:8.0f} {p50:8.0f} {p99:8.0f}"
        )
    if path is not None:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(rows)))


if __name__ == "__main__":
    main()
