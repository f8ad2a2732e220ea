"""What a streamed token of a Triton costs its reader: CPU µs of the client's process, by client, in interleaved rounds.

    python -m tests.bench.triton_streaming [--rounds 5] [--tokens 64] [--requests 16] [--plain-grpc]

One real Triton plays a script without delays to each of

    backend        `TritonBackend.answer`, as the gateway calls it: OpenAI events, clocks, counts
    inference      `Inference.next` alone: the same stream, its tensors found and not told
    grpc.aio       the stub's messages, not looked at: what gRPC itself takes
    tritonclient   the official client's `stream_infer`, texts by `as_numpy`
    aiohttp        `generate_stream` over HTTP, each event's JSON decoded: the least that a client can do

gRPC is set as in a worker (`gateway.serve.GRPC_ENVIRONMENT`), with `--plain-grpc` as it comes.

CPU is that of all threads of this process; Triton is another one. Requests are a part of it, by the tokens they have.
The loop has a timer set throughout, as a gateway's always has, which costs every wait a little. Printed is the median
of the rounds, the least of them, and the ratio to aiohttp in the same rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import grpc.aio
import msgspec
import numpy as np
import tritonclient.grpc.aio as official
import uvloop
from tritonclient.grpc import service_pb2, service_pb2_grpc

from backends.triton.backend import TritonBackend
from backends.triton.dialect import Tensor
from backends.triton.model import TritonModel
from backends.triton.server import TritonServer as Connection
from gateway.serve import GRPC_ENVIRONMENT
from gateway.triton_install import SystemUnsupported, install
from tests.calls import make_call
from tests.triton import TritonServer
from tests.triton_models import BLS, Script, write_model

MODEL = "bls"
CONCURRENCIES = (1, 16)
LOCAL = Path(__file__).parents[2] / ".forebay"

Read = Callable[[], Awaitable[int]]
"""Asks once, reads the answer to its end, and returns how many pieces of text it had."""


@asynccontextmanager
async def clients(server: TritonServer, prompt: str) -> AsyncGenerator[dict[str, Read], None]:
    """The ways to read one answer. All ask for `prompt` with the same tensors."""
    address = server.grpc_address
    connection = Connection(f"grpc://{address}", backend="bench", model=MODEL)
    backend = TritonBackend("bench", connection, TritonModel(name=MODEL, chat_template="{{ messages[-1].content }}"))
    async with (
        aiohttp.ClientSession(server.url) as session,
        grpc.aio.insecure_channel(address) as channel,
        official.InferenceServerClient(address) as client,
    ):
        try:
            yield {
                "backend": partial(by_backend, backend, prompt),
                "inference": partial(by_inference, connection, prompt),
                "grpc.aio": partial(by_stub, service_pb2_grpc.GRPCInferenceServiceStub(channel), prompt),
                "tritonclient": partial(by_tritonclient, client, prompt),
                "aiohttp": partial(by_http, session, prompt),
            }
        finally:
            await backend.aclose()


async def by_backend(backend: TritonBackend, prompt: str) -> int:
    pieces = 0
    call = make_call(stream=True, messages=[{"role": "user", "content": prompt}], within_s=60)
    async with aclosing(backend.answer(call)) as events:
        async for event in events:
            delta = event.choices[0].delta if event.choices else None
            pieces += bool(delta and delta.content)
    return pieces


async def by_inference(connection: Connection, prompt: str) -> int:
    pieces = 0
    inference = connection.infer(_tensors(prompt), "bench")
    while (response := await inference.next()) is not None:
        pieces += "text_output" in response.tensors
    return pieces


async def by_stub(stub: Any, prompt: str) -> int:
    pieces = 0
    request = service_pb2.ModelInferRequest(model_name=MODEL, id="bench")
    for tensor in _tensors(prompt):
        request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        request.raw_input_contents.append(tensor.content)
    call = stub.ModelStreamInfer()
    await call.write(request)
    await call.done_writing()
    while await call.read() is not grpc.aio.EOF:
        pieces += 1
    return pieces


async def by_tritonclient(client: official.InferenceServerClient, prompt: str) -> int:
    pieces = 0

    async def asked() -> AsyncIterator[dict[str, Any]]:
        yield {"model_name": MODEL, "inputs": inputs, "request_id": "bench"}

    inputs = []
    for name, datatype, value in _values(prompt):
        inputs.append(official.InferInput(name, [1, 1], datatype))
        inputs[-1].set_data_from_numpy(np.array([[value]], dtype=_DTYPES[datatype]))
    async for result, error in client.stream_infer(asked()):
        if error is not None:
            raise error
        pieces += len(result.as_numpy("text_output"))
    return pieces


async def by_http(session: aiohttp.ClientSession, prompt: str) -> int:
    pieces = 0
    asked = {name: value.decode() if isinstance(value, bytes) else value for name, _, value in _values(prompt)}
    async with session.post(f"/v2/models/{MODEL}/generate_stream", json=asked) as response:
        async for line in response.content:
            if line.startswith(b"data: "):
                pieces += "text_output" in msgspec.json.decode(line[6:])
    return pieces


_DTYPES: dict[str, Any] = {"BYTES": np.object_, "INT32": np.int32, "BOOL": np.bool_}


def _values(prompt: str) -> list[tuple[str, str, Any]]:
    return [
        ("text_input", "BYTES", prompt.encode()),
        ("max_tokens", "INT32", 2048),
        ("stream", "BOOL", True),
        ("exclude_input_in_output", "BOOL", True),
        ("return_num_input_tokens", "BOOL", True),
        ("return_num_output_tokens", "BOOL", True),
    ]


def _tensors(prompt: str) -> list[Tensor]:
    pack: dict[str, Callable[[Any], bytes]] = {
        "BYTES": lambda value: len(value).to_bytes(4, "little") + value,
        "INT32": lambda value: int(value).to_bytes(4, "little"),
        "BOOL": lambda value: bytes([value]),
    }
    return [Tensor(name, datatype, (1, 1), pack[datatype](value)) for name, datatype, value in _values(prompt)]


async def measure(read: Read, concurrency: int, requests: int, tokens: int) -> float:
    """CPU µs per token of `requests` answers, `concurrency` at a time."""

    async def ask() -> None:
        for _ in range(requests // concurrency):
            if (pieces := await read()) != tokens:
                raise RuntimeError(f"an answer of {pieces} pieces, not of {tokens}")

    began = time.process_time()
    async with anyio.create_task_group() as group:
        for _ in range(concurrency):
            group.start_soon(ask)
    return (time.process_time() - began) / (requests * tokens) * 1e6


async def compare(server: TritonServer, rounds: int, requests: int, tokens: int) -> None:
    prompt = str(Script(pieces=[" word"] * tokens))
    timer = asyncio.get_running_loop().call_later(3600, print)
    async with clients(server, prompt) as reads:
        for read in reads.values():
            await read()
        for concurrency in CONCURRENCIES:
            figures: dict[str, list[float]] = {name: [] for name in reads}
            for _ in range(rounds):
                for name, read in reads.items():
                    figures[name].append(await measure(read, concurrency, requests, tokens))
            report(figures, concurrency)
    timer.cancel()


def report(figures: dict[str, list[float]], concurrency: int) -> None:
    print(f"{concurrency} at a time  {'CPU us/token':>13} {'least':>7} {'x aiohttp':>10}")
    for name, samples in figures.items():
        ratio = statistics.median(ours / least for ours, least in zip(samples, figures["aiohttp"], strict=True))
        print(f"  {name:<13} {statistics.median(samples):10.1f} {min(samples):9.1f} {ratio:10.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--plain-grpc", action="store_true")
    options = parser.parse_args()
    if not options.plain_grpc and not GRPC_ENVIRONMENT.items() <= os.environ.items():
        # gRPC has read its settings by now.
        command = [sys.executable, "-m", "tests.bench.triton_streaming", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **GRPC_ENVIRONMENT})
    try:
        installation = install(LOCAL / "triton", print)
    except SystemUnsupported as reason:
        print(f"not measured: {reason}")
        return
    with closing(TritonServer(installation, lambda repository: write_model(repository, MODEL, BLS))) as server:
        server.start()
        uvloop.run(compare(server, options.rounds, options.requests, options.tokens))


if __name__ == "__main__":
    main()
