"""The official JavaScript SDK, in a real Node."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from backends.backend import Call
from backends.scripted import Script
from tests.world import POLICY, open_world

SDK = "openai@7.55.0"
FOLDER = Path(__file__).parents[2] / ".forebay" / "js"
PROGRAM = Path(__file__).with_name("sdk.mjs")


@pytest.fixture(scope="session")
def sdk_folder() -> Path:
    """The SDK, fetched once into `.forebay/js` of the checkout through the user's own npm configuration."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node or npm is not installed: the JavaScript SDK was NOT tried")
    version = FOLDER / "node_modules" / "openai" / "package.json"
    if not version.exists() or msgspec.json.decode(version.read_bytes())["version"] != SDK.partition("@")[2]:
        FOLDER.mkdir(parents=True, exist_ok=True)
        install = ["npm", "install", "--no-audit", "--no-fund", "--silent", "--prefix", str(FOLDER), SDK]
        done = subprocess.run(install, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"npm could not fetch {SDK}: the JavaScript SDK was NOT tried: {done.stderr[-200:]}")
    return FOLDER


WITH_VECTORS = POLICY.replace("models:", "  vectors-1: {kind: scripted}\nmodels:").replace(
    "routes:", "  vectors: {backends: [vectors-1], task: embeddings, context_window: 256}\nroutes:"
)


def script(call: Call) -> Script:
    """Answers at once, but one request, by its seed, with more than anybody would wait for."""
    return Script(tokens=("word ",) * 10_000, token_delay_s=0.005) if call.request.seed == 2 else Script()


async def test_the_sdk_chats_streams_embeds_lists_fails_and_leaves_as_it_should(sdk_folder: Path) -> None:
    breaks = Script(tokens=("One ", "two ", "three."), fault="truncate", fault_after_tokens=2)
    async with open_world(small=script, large=breaks, policy=WITH_VECTORS) as world:
        with anyio.fail_after(60):
            done = await anyio.run_process(
                ["node", str(PROGRAM), world.url, world.key.key],
                env={**os.environ, "SDK_FOLDER": str(sdk_folder)},
                check=False,
            )
        await world.until(lambda: world.small.cancelled == 1)
    assert done.returncode == 0, done.stderr.decode()
    said: dict[str, Any] = msgspec.json.decode(done.stdout)

    assert said["chat"]["content"] == said["helper"] == "This is a scripted answer."
    assert said["chat"]["cache"] == "miss"
    assert said["chat"]["requestId"].startswith("req_")
    *content, last = said["stream"]
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in content) == "This is a scripted answer."
    assert last["usage"] == said["chat"]["usage"]
    assert said["models"] == ["auto", "fast", "smart", "small", "large", "vectors"]
    assert len(said["embeddings"]["packed"]) == 2
    for packed, numbers in zip(*said["embeddings"].values(), strict=True):
        assert packed == pytest.approx(numbers, abs=1e-7)
    assert said["error"]["class"] == "NotFoundError"
    assert (said["error"]["status"], said["error"]["code"], said["error"]["param"]) == (404, "model_not_found", "model")
    assert said["error"]["requestId"].startswith("req_")
    assert said["wrongKey"]["class"] == "AuthenticationError"
    assert said["broken"]["content"] == "One two "
    assert said["broken"]["error"]["code"] == "backend_protocol_error"
    assert said["left"]
