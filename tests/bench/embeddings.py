"""What a vector costs: CPU of our embedder by batch and length, and what its process and the gateway add to it.

    python -m tests.bench.embeddings [rounds]

Batches are what a caller asks for at once; the embedder cuts them up as it sees fit. Short texts have 14 tokens, long
ones 80. Of several rounds the least is printed: the one least disturbed by whatever else the machine does. The process
is asked for one short text over a kept connection, the gateway for the same, its cache left out.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Awaitable, Callable

import anyio.to_thread
import httpx
import psutil  # type: ignore[import-untyped]
import uvloop

from backends.embedder import MiniLmEmbedder
from tests.engines import embedder_server
from tests.world import POLICY, open_world

SHORT = "How can I reset my password if I lost my phone?"
LONG = " ".join(["The quick brown fox jumps over the lazy dog near the river bank"] * 6)[:380]
CALLS = 15


def computing(rounds: int) -> None:
    began = time.perf_counter()
    embedder = MiniLmEmbedder()
    print(f"loaded in {time.perf_counter() - began:.2f} s, RSS {_rss_mb():.0f} MB")
    for name, text in (("short", SHORT), ("long", LONG)):
        tokens = embedder.tokenize(text).tokens
        for batch in (1, 8, 32):
            least = min(_cpu_ms(embedder, text, batch) for _ in range(rounds))
            print(f"{name:<5} {tokens:>3} tokens  batch {batch:<2} {least:6.2f} ms CPU/text")
    least = min(_tokenize_us(embedder, LONG) for _ in range(rounds))
    print(f"tokenising a long text {least:.0f} us CPU;  RSS {_rss_mb():.0f} MB")


def _cpu_ms(embedder: MiniLmEmbedder, text: str, batch: int) -> float:
    began = time.process_time()
    embedder.embed([embedder.tokenize(text) for _ in range(batch)])
    return (time.process_time() - began) / batch * 1e3


def _tokenize_us(embedder: MiniLmEmbedder, text: str) -> float:
    began = time.process_time()
    for _ in range(20):
        embedder.tokenize(text)
    return (time.process_time() - began) / 20 * 1e6


def _rss_mb() -> float:
    return float(psutil.Process().memory_info().rss / 1e6)


async def hops() -> None:
    embedder = MiniLmEmbedder()
    began = time.perf_counter()
    with embedder_server() as url:
        print(f"process ready in {time.perf_counter() - began:.2f} s, RSS {_child_rss_mb():.0f} MB")
        policy = POLICY.replace("models:", f"  engine: {{kind: openai, url: '{url}'}}\nmodels:").replace(
            "routes:", "  minilm: {backends: [engine], task: embeddings, context_window: 256}\nroutes:"
        )
        async with open_world(policy=policy) as world, httpx.AsyncClient(base_url=url, timeout=30) as client:
            body = {"model": "minilm", "input": SHORT, "encoding_format": "base64"}
            no_store = world.headers(**{"cache-control": "no-store"})

            async def compute() -> None:
                embedder.embed([embedder.tokenize(SHORT)])

            async def ask_process() -> None:
                (await client.post("/embeddings", json=body)).raise_for_status()

            async def ask_gateway() -> None:
                (await world.client.post("/v1/embeddings", json=body, headers=no_store)).raise_for_status()

            async def ask_cache() -> None:
                (await world.client.post("/v1/embeddings", json=body, headers=world.headers())).raise_for_status()

            for name, ask in (
                ("in this process", compute),
                ("embedder process", ask_process),
                ("gateway", ask_gateway),
                ("exact cache", ask_cache),
            ):
                print(f"one short text, {name:<17} {await _least_ms(ask):6.2f} ms wall")


def _child_rss_mb() -> float:
    return float(sum(child.memory_info().rss for child in psutil.Process().children()) / 1e6)


async def _least_ms(ask: Callable[[], Awaitable[None]]) -> float:
    taken = []
    for _ in range(CALLS):
        began = time.perf_counter()
        await ask()
        taken.append(time.perf_counter() - began)
    return min(taken) * 1e3


async def main(rounds: int) -> None:
    await anyio.to_thread.run_sync(computing, rounds)
    await hops()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 6))
