"""CPU microseconds per GET of a 1 kB value: our one connection against redis-py's pool, interleaved, client side only.

    python -m tests.bench.redis_connection [rounds]

Many short rounds, and the least of them printed: the one least disturbed by whatever else the machine does. Every GET
of ours carries a time-out, as in the product; redis-py's sockets have one of the same length.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import closing

import anyio
import redis.asyncio
import uvloop

from tests.valkey import Valkey, running

CALLS = 2_560
WITHIN_S = 1.0


async def measure(get: Callable[[], Awaitable[object]], concurrency: int, calls: int) -> tuple[float, float]:
    """CPU and wall microseconds per call, `concurrency` tasks asking one at a time."""

    async def ask() -> None:
        for _ in range(calls // concurrency):
            assert await get() is not None

    cpu, wall = time.process_time(), time.perf_counter()
    async with anyio.create_task_group() as group:
        for _ in range(concurrency):
            group.start_soon(ask)
    return (time.process_time() - cpu) / calls * 1e6, (time.perf_counter() - wall) / calls * 1e6


async def main(rounds: int) -> None:
    with closing(Valkey()) as server:
        server.start().command("SET", "key", "x" * 1024)
        pool = redis.asyncio.Redis(
            unix_socket_path=str(server.socket_path), socket_timeout=WITHIN_S, max_connections=64, protocol=3
        )
        async with running(server.url) as (shared, _), pool:
            ours = lambda: shared.execute("GET", "key", within_s=WITHIN_S)  # noqa: E731
            theirs = lambda: pool.get("key")  # noqa: E731
            for concurrency in (1, 64):
                best: dict[str, tuple[float, float]] = {}
                for _ in range(rounds):
                    for name, get, calls in (("ours", ours, CALLS), ("redis-py", theirs, CALLS // 4)):
                        figure = await measure(get, concurrency, calls)
                        best[name] = min(best.get(name, figure), figure)
                for name, (cpu_us, wall_us) in best.items():
                    print(f"c={concurrency:<3} {name:<9} {cpu_us:6.1f} us CPU/GET  {wall_us:6.1f} us wall/GET")


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 40))
