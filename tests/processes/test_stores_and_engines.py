"""The real Valkey and the real llama.cpp, as the supervisor runs them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import httpx
import pytest
from redis.asyncio import Redis

from gateway.child_specs import SocketPathTooLong, free_loopback_port, llamacpp_child, valkey_child
from tests.processes.world import supervised


async def test_the_state_store_keeps_what_it_was_told_through_kill_9(runtime: Path) -> None:
    store = valkey_child(
        "state",
        directory=runtime / "state",
        socket_path=runtime / "s.sock",
        maxmemory_bytes=64 << 20,
        policy="noeviction",
        persistent=True,
        log_path=runtime / "state.log",
    )
    async with supervised([store], runtime=runtime) as world:
        first = await world.until("state", "ready")
        async with Redis(unix_socket_path=str(runtime / "s.sock")) as redis:
            await redis.set("spent", "17")
            assert (await redis.config_get("maxmemory-policy")) == {"maxmemory-policy": "noeviction"}

        os.kill(first.pid or 0, signal.SIGKILL)
        await world.until("state", "ready", times=2)

        async with Redis(unix_socket_path=str(runtime / "s.sock")) as redis:
            assert await redis.get("spent") == b"17"
    assert world.exit_status == 0


async def test_the_cache_store_evicts_and_writes_nothing_to_disk(runtime: Path) -> None:
    store = valkey_child(
        "cache",
        directory=runtime / "cache",
        socket_path=runtime / "c.sock",
        maxmemory_bytes=4 << 20,
        policy="allkeys-lru",
        persistent=False,
        log_path=runtime / "cache.log",
    )
    async with supervised([store], runtime=runtime) as world:
        await world.until("cache", "ready")
        async with Redis(unix_socket_path=str(runtime / "c.sock")) as redis:
            for key in range(100):
                await redis.set(str(key), bytes(100_000))
            assert 0 < await redis.dbsize() < 100
    assert list((runtime / "cache").iterdir()) == []
    assert world.exit_status == 0


def test_a_directory_too_deep_for_a_unix_socket_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SocketPathTooLong, match="Choose a shorter directory"):
        valkey_child(
            "state",
            directory=tmp_path,
            socket_path=tmp_path / ("d" * 100) / "s.sock",
            maxmemory_bytes=1 << 20,
            policy="noeviction",
            persistent=True,
        )


async def test_a_real_engine_answers_and_comes_back_on_its_port_after_kill_9(runtime: Path, smollm2_path: Path) -> None:
    port = free_loopback_port()
    engine = llamacpp_child("smollm2", weights=smollm2_path, port=port, log_path=runtime / "smollm2.log")
    question = {
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 8,
        "temperature": 0,
    }
    async with (
        supervised([engine], runtime=runtime) as world,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        ready = await world.until("smollm2", "ready")
        before = (await client.post("/v1/chat/completions", json=question)).json()
        slots = (await client.get("/slots")).json()

        os.kill(ready.pid or 0, signal.SIGKILL)
        await world.until("smollm2", "ready", times=2)
        after = (await client.post("/v1/chat/completions", json=question)).json()

    assert [slot["n_ctx"] for slot in slots] == [2048, 2048]
    assert before["usage"]["completion_tokens"] == 8
    assert before["choices"][0]["message"]["content"].strip()
    assert after["choices"][0]["message"] == before["choices"][0]["message"]
    assert world.exit_status == 0


async def test_weights_that_are_none_are_reported_in_words(runtime: Path) -> None:
    weights = runtime / "broken.gguf"
    weights.write_bytes(b"no weights")
    engine = llamacpp_child("broken", weights=weights, port=free_loopback_port(), log_path=runtime / "broken.log")
    async with supervised([engine], runtime=runtime) as world:
        died = await world.until("broken", "died")
    assert f"llama.cpp could not start with {weights}" in died.detail


async def test_an_engine_ends_when_its_standard_input_does(smollm2_path: Path) -> None:
    options = ["--weights", str(smollm2_path), "--port", str(free_loopback_port())]
    command = [sys.executable, "-m", "backends.llamacpp_engine", *options]
    with anyio.fail_after(20):
        async with await anyio.open_process(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            assert process.stdin is not None
            await process.stdin.aclose()
            assert await process.wait() == 0
