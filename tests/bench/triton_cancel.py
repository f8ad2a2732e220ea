"""How soon a model on Triton knows that its reader has left: milliseconds from the leaving to the model's own note.

    python -m tests.bench.triton_cancel [--tries 60]

A real Triton plays a script that waits, and notes on this machine's monotonic clock when it finds itself cancelled. It
looks every 2 ms while it waits, which is part of every figure. Who leaves is

    backend   the reader of `TritonBackend.answer`, cancelled or closed
    gateway   a client of the whole gateway, whose socket is closed

before the first token, and in the middle of a stream.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import secrets
import statistics
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, closing
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread
import uvloop
from msgspec.structs import replace

from backends.triton.backend import TritonBackend
from backends.triton.model import TritonModel
from backends.triton.server import TritonServer as Connection
from gateway.triton_install import SystemUnsupported, install
from tests.calls import make_call
from tests.gateway.wire import raw_client
from tests.triton import TritonServer
from tests.triton_models import BLS, Script, write_model
from tests.world import POLICY, World, open_world

MODEL = "bls"
TEMPLATE = "{{ messages[-1].content }}"
LOCAL = Path(__file__).parents[2] / ".forebay"
WORDS = ("one ", "two ", "three ")
MOMENTS = {
    "before the first token": Script(pieces=WORDS, first_delay_ms=60_000),
    "in mid-stream": Script(pieces=WORDS, hang_after=len(WORDS)),
}
_UNDISTURBED_S = 0.03
"""Before the journal is looked into, which would hold up the gateway in this process."""

Leave = Callable[[], Awaitable[None]]
Reader = Callable[[str, int], AbstractAsyncContextManager[Leave]]
"""Asks with a prompt, reads so many pieces, and gives what makes it leave."""


@asynccontextmanager
async def backend_reader(backend: TritonBackend, prompt: str, pieces: int) -> AsyncGenerator[Leave, None]:
    call = make_call(stream=True, messages=[{"role": "user", "content": prompt}], within_s=60)
    call = replace(call, request_id=secrets.token_hex(8))
    has_read = asyncio.Event()

    async def read() -> None:
        left = pieces
        async with aclosing(backend.answer(call)) as events:
            async for event in events:
                left -= event.has_content
                if not left:
                    has_read.set()

    async def leave() -> None:
        task.cancel()
        await asyncio.wait([task])

    if not pieces:
        has_read.set()
    task = asyncio.get_running_loop().create_task(read())
    await has_read.wait()
    yield leave


@asynccontextmanager
async def gateway_client(world: World, prompt: str, pieces: int) -> AsyncGenerator[Leave, None]:
    async with raw_client(world) as client:
        await client.ask(prompt, stream=True)
        for word in WORDS[:pieces]:
            await client.read_until(word.encode())

        async def leave() -> None:
            client.hang_up()

        yield leave


async def measure(server: TritonServer, reader: Reader, script: Script, tries: int) -> list[float]:
    """Milliseconds until the model knew, of each try."""
    latencies = []
    for number in range(tries):
        before = len(server.events("received"))
        # A text of its own keeps a try out of the gateway's cache.
        prompt, pieces = f"{number} {time.monotonic()} {script}", script.hang_after or 0
        async with reader(prompt, pieces) as leave:
            while len(received := server.events("received")) == before:
                await anyio.sleep(0.005)
            await anyio.sleep(random.uniform(0.01, 0.02))
            left_at = time.monotonic()
            await leave()
            await anyio.sleep(_UNDISTURBED_S)
            noted = await anyio.to_thread.run_sync(partial(server.event, "cancelled", request_id=received[-1]["id"]))
            latencies.append((noted["at_s"] - left_at) * 1e3)
    return latencies


@asynccontextmanager
async def readers(server: TritonServer) -> AsyncGenerator[dict[str, Reader], None]:
    url = f"grpc://{server.grpc_address}"
    backend = TritonBackend(
        "bench",
        Connection(url, backend="bench", model=MODEL),
        TritonModel(name=MODEL, chat_template=TEMPLATE),
    )
    spec = f"{{kind: triton, model: {MODEL}, url: '{url}', chat_template: '{TEMPLATE}'}}"
    policy = POLICY.replace("small-1: {kind: scripted}", f"engine: {spec}").replace(
        "backends: [small-1]", "backends: [engine]"
    )
    try:
        await backend.check(within_s=10)
        async with open_world(policy=policy) as world:
            gc.collect()
            gc.freeze()  # as a worker does: a full collection would be measured, here and there
            yield {"backend": partial(backend_reader, backend), "gateway": partial(gateway_client, world)}
    finally:
        await backend.aclose()


async def compare(server: TritonServer, tries: int) -> None:
    print(f"{'':9} {'':23} {'tries':>5} {'median ms':>10} {'p95 ms':>8} {'worst ms':>9}")
    async with readers(server) as by_name:
        for name, reader in by_name.items():
            for moment, script in MOMENTS.items():
                latencies = sorted(await measure(server, reader, script, tries))
                p95 = latencies[int(len(latencies) * 0.95)]
                print(
                    f"{name:9} {moment:23} {len(latencies):5} {statistics.median(latencies):10.1f}"
                    f" {p95:8.1f} {latencies[-1]:9.1f}"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=60)
    options = parser.parse_args()
    try:
        installation = install(LOCAL / "triton", print)
    except SystemUnsupported as reason:
        print(f"not measured: {reason}")
        return
    with closing(TritonServer(installation, lambda repository: write_model(repository, MODEL, BLS))) as server:
        server.start()
        uvloop.run(compare(server, options.tries))


if __name__ == "__main__":
    main()
