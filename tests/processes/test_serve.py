"""`forebay serve` from start to end: what it needs to start, what it says once, how it leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import httpx
import psutil  # type: ignore[import-untyped]
import pytest

from gateway.app import load_root_secret, open_store
from gateway.processes import AlreadyRunning, CannotListen, claimed, listen, read_status
from gateway.serve import GRPC_ENVIRONMENT, serve
from gateway.settings import Settings
from policies.tenant import KeyRecord
from tests.processes.served import Served, served
from tests.processes.world import runs

POLICY = """
name: scripted
backends:
  played: {kind: scripted, answer: "one two three four five six seven eight nine ten", token_delay: 0.25s}
models:
  m: {backends: [played], context_window: 8192, price: {input: 1, output: 1}}
routes:
  auto: {strategy: fixed, model: m}
"""

NOTICE_S = 1.0
BODY = {"model": "auto", "stream": True, "messages": [{"role": "user", "content": "count"}]}


@pytest.fixture
def policy(runtime: Path) -> Path:
    path = runtime / "policy.yaml"
    path.write_text(POLICY)
    return path


async def key_for(data: Path) -> str:
    settings = Settings(data_dir=str(data))
    async with open_store(settings, load_root_secret(settings)) as store:
        organisation = await store.create_organisation("acme")
        return (await store.create_key((await store.create_tenant(organisation.id, "acme")).id)).key


async def owner_keys(data: Path) -> list[KeyRecord]:
    settings = Settings(data_dir=str(data))
    async with open_store(settings, load_root_secret(settings)) as store:
        return [key for key in await store.list_keys() if key.role == "owner"]


async def start_here(data: Path, policy: Path, port: int = 0) -> None:
    """The same start in this process, for one that fails."""
    settings = Settings(policy=str(policy), data_dir=str(data), port=port)
    await serve(settings, {}, on_event=print, on_serving=print)


async def test_while_it_drains_nobody_who_connects_is_left_hanging_and_what_runs_is_finished(
    runtime: Path, policy: Path
) -> None:
    data = runtime / "data"
    headers = {"authorization": f"Bearer {await key_for(data)}"}
    met: list[tuple[float, int | str]] = []

    async with (
        served(data, policy, workers=2, drain_notice_s=NOTICE_S, drain_s=20) as gateway,
        httpx.AsyncClient(base_url=await gateway.url(), headers=headers, timeout=20) as client,
        client.stream("POST", "/v1/chat/completions", json=BODY) as answer,
    ):
        lines = answer.aiter_lines()
        async for line in lines:
            if '"content":"one' in line:
                break
        assert await ask_readiness(gateway) == 200

        gateway.process.send_signal(signal.SIGTERM)
        signalled = anyio.current_time()
        with anyio.fail_after(NOTICE_S + 1):
            while not met or met[-1][1] != "refused":
                met.append((anyio.current_time() - signalled, await ask_readiness(gateway)))
        rest = [line async for line in lines]
        with anyio.fail_after(10):
            status = await gateway.process.wait()

    turned_s = next(after_s for after_s, answered in met if answered == 503)
    refused_s, _ = met[-1]
    assert turned_s < NOTICE_S / 2
    assert refused_s >= NOTICE_S * 0.9
    assert {answered for after_s, answered in met if after_s > NOTICE_S / 2} == {503, "refused"}
    assert any('"content":" ten"' in line or '"content":"ten"' in line for line in rest)
    assert [line for line in rest if line][-1] == "data: [DONE]"
    assert status == 0


async def ask_readiness(gateway: Served) -> int | str:
    """What somebody meets who connects anew: a status, or `refused`. To be left hanging is to fail."""
    try:
        async with httpx.AsyncClient(base_url=await gateway.url(), timeout=1.5) as client:
            return (await client.get("/readyz")).status_code
    except (httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError):
        return "refused"


async def test_a_second_one_on_the_same_data_is_refused_and_leaves_the_first_alone(runtime: Path, policy: Path) -> None:
    data = runtime / "data"
    async with served(data, policy) as first:
        url = await first.url()
        metrics = {path.name for path in (data / "run" / "metrics").iterdir()}
        with pytest.raises(AlreadyRunning, match="Forebay already runs in"):
            await start_here(data, policy)

        assert metrics
        assert {path.name for path in (data / "run" / "metrics").iterdir()} >= metrics
        async with httpx.AsyncClient(base_url=url) as client:
            assert "forebay_build_info" in (await client.get("/metrics")).text
        first.process.terminate()
        assert await first.process.wait() == 0


async def test_no_start_that_fails_makes_an_owners_key_and_the_first_that_serves_shows_it(
    runtime: Path, policy: Path
) -> None:
    data = runtime / "data"
    with listen("127.0.0.1", 0) as taken, pytest.raises(CannotListen, match="taken by another program"):
        await start_here(data, policy, port=taken.getsockname()[1])
    with claimed(data / "run"), pytest.raises(AlreadyRunning):
        await start_here(data, policy)
    async with served(data, policy) as interrupted:
        await interrupted.until("worker-0 starting")
        interrupted.process.send_signal(signal.SIGINT)
        await interrupted.process.wait()
        assert "fb-admin-" not in interrupted.said
    assert await owner_keys(data) == []

    async with served(data, policy) as gateway:
        key = (await gateway.until(r"fb-admin-\w+"))[0]
        assert len(await owner_keys(data)) == 1
        async with httpx.AsyncClient(base_url=await gateway.url()) as client:
            answer = await client.get("/admin/v1/keys", headers={"authorization": f"Bearer {key}"})
        assert answer.status_code == 200
        gateway.process.terminate()
        assert await gateway.process.wait() == 0


async def test_last_words_that_look_like_markup_harm_nobody(runtime: Path) -> None:
    weights = runtime / "[" / "models" / "x]" / "broken.gguf"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"no weights")
    local = f"  local: {{kind: llamacpp, weights: '{weights}', context_tokens: 512}}\nmodels:\n"
    model = "  l: {backends: [local], context_window: 512, price: {input: 1, output: 1}}\nroutes:\n"
    policy = runtime / "policy.yaml"
    policy.write_text(POLICY.replace("models:\n", local).replace("routes:\n", model))

    async with served(runtime / "data", policy) as gateway:
        died = await gateway.until(r"engine-local died .*")
        assert str(weights) in died[0]
        assert runs(gateway.process.pid)
        await gateway.url()
        gateway.process.terminate()
        assert await gateway.process.wait() == 0
    assert "Traceback" not in gateway.said


async def test_workers_have_grpc_read_on_the_thread_that_waits_unless_the_operator_says_otherwise(
    runtime: Path, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRPC_EXPERIMENTS", raising=False)
    async with served(runtime / "data", policy) as world:
        await world.url()
        assert GRPC_ENVIRONMENT.items() <= worker_environment(world).items()
    monkeypatch.setenv("GRPC_EXPERIMENTS", "mine")
    async with served(runtime / "data", policy) as world:
        await world.url()
        assert worker_environment(world)["GRPC_EXPERIMENTS"] == "mine"


def worker_environment(world: Served) -> dict[str, str]:
    (pid,) = [child.pid for child in read_status(world.data / "run") if child.name.startswith("worker")]
    environment: dict[str, str] = psutil.Process(pid).environ()
    return environment


@pytest.mark.parametrize(("setting", "complains"), [(GRPC_ENVIRONMENT["GRPC_EXPERIMENTS"], False), ("-no_such", True)])
async def test_grpc_knows_the_setting(setting: str, complains: bool) -> None:
    """It ignores one that it does not know, and says so where it should be quiet."""
    ran = await anyio.run_process(
        [sys.executable, "-c", "import grpc"], env={**os.environ, "GRPC_EXPERIMENTS": setting}, stderr=subprocess.PIPE
    )
    assert (b"Unknown experiment" in ran.stderr) is complains
