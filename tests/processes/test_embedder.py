"""The embedder as the supervisor runs it, alone and below `forebay serve`: it comes back, or says why it cannot."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import anyio
import httpx

from gateway.child_specs import embedder_child, free_loopback_port
from gateway.processes import read_status
from tests.processes.served import served
from tests.processes.test_serve import key_for
from tests.processes.world import supervised

POLICY = """
name: vectors
backends:
  own: {kind: embedder}
models:
  minilm: {backends: [own], task: embeddings, context_window: 256, price: {input: 0.002}}
"""
QUESTION = {"model": "minilm", "input": "Where is the engine?"}


async def test_it_answers_and_comes_back_on_its_port_after_kill_9(runtime: Path) -> None:
    port = free_loopback_port()
    engine = embedder_child("embedder", port=port, log_path=runtime / "embedder.log")
    async with (
        supervised([engine], runtime=runtime) as world,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client,
    ):
        ready = await world.until("embedder", "ready")
        before = (await client.post("/v1/embeddings", json=QUESTION)).json()

        os.kill(ready.pid or 0, signal.SIGKILL)
        await world.until("embedder", "ready", times=2)
        after = (await client.post("/v1/embeddings", json=QUESTION)).json()

    assert len(before["data"][0]["embedding"]) == 384
    assert after == before
    assert world.exit_status == 0


async def test_a_port_that_is_taken_is_reported_in_words(runtime: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        engine = embedder_child("embedder", port=port, log_path=runtime / "embedder.log")
        async with supervised([engine], runtime=runtime) as world:
            died = await world.until("embedder", "died")
    assert f"the embedder on port {port} failed" in died.detail


async def test_it_ends_when_its_standard_input_does_and_on_sigterm() -> None:
    for ending in ("stdin", "signal"):
        command = [sys.executable, "-m", "backends.embedder_engine", "--port", str(free_loopback_port())]
        with anyio.fail_after(20):
            async with await anyio.open_process(command, stdout=subprocess.DEVNULL, stderr=None) as process:
                assert process.stdin is not None
                await _until_it_listens(int(command[-1]))
                if ending == "stdin":
                    await process.stdin.aclose()
                else:
                    process.terminate()
                assert await process.wait() == 0


async def _until_it_listens(port: int) -> None:
    while True:
        with suppress(OSError):
            return await (await anyio.connect_tcp("127.0.0.1", port)).aclose()
        await anyio.sleep(0.02)


async def test_a_tree_answers_embeddings_and_does_again_after_its_engine_is_killed(runtime: Path) -> None:
    data, policy = runtime / "data", runtime / "policy.yaml"
    policy.write_text(POLICY)
    headers = {"authorization": f"Bearer {await key_for(data)}", "cache-control": "no-store"}
    async with (
        served(data, policy) as gateway,
        httpx.AsyncClient(base_url=await gateway.url(), headers=headers, timeout=30) as client,
    ):
        before = await _until_answered(client)
        killed = _engine(data)
        os.kill(killed, signal.SIGKILL)
        down = await client.post("/v1/embeddings", json=QUESTION)
        after = await _until_answered(client)

        assert _engine(data) != killed
        assert down.status_code in (502, 503)
        assert down.json()["error"]["code"] in ("backend_unreachable", "backend_overloaded")
        assert after == before
        gateway.process.terminate()
        assert await gateway.process.wait() == 0


async def _until_answered(client: httpx.AsyncClient) -> object:
    with anyio.fail_after(30):
        while (answer := await client.post("/v1/embeddings", json=QUESTION)).status_code != 200:
            assert answer.status_code in (502, 503), answer.text
            await anyio.sleep(0.05)
    return answer.json()["data"]


def _engine(data: Path) -> int:
    (pid,) = [child.pid for child in read_status(data / "run") if child.name == "engine-own"]
    assert pid is not None
    return pid
