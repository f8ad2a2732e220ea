"""A good world to start a test from: a whole gateway over scripted backends, and a client. State only what differs.

    async with open_world(small=Script(fault="overloaded")) as world:
        answer = await world.ask("hello")

The gateway is the real one (`gateway.app.open_gateway`) behind a real uvicorn on a free loopback port; only the
engines are scripted. With `redis` the exact cache is a real Valkey's, without it this process's memory.
"""

from __future__ import annotations

import asyncio
import socket
import tempfile
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import httpx
import msgspec
import structlog

from backends.backend import Backend, Call
from backends.scripted import Script, ScriptedBackend
from gateway.app import Gateway, open_gateway
from gateway.settings import Settings
from gateway.worker import serve_app
from policies.tenant import NewKey

SMALL = "small"
LARGE = "large"

POLICY = """
name: world
backends:
  small-1: {kind: scripted}
  large-1: {kind: scripted}
models:
  small:
    backends: [small-1]
    context_window: 8192
    price: {input: 0.10, output: 0.40, cached_input: 0.05}
    capabilities: [tools, json_schema, logprobs]
  large:
    backends: [large-1]
    context_window: 32768
    price: {input: 1, output: 4}
    capabilities: [tools, json_schema, logprobs, vision]
routes:
  auto: {strategy: threshold, small: small, large: large, threshold: 0.5}
  fast: {strategy: fixed, model: small, fallbacks: [large]}
  smart: {strategy: fixed, model: large, fallbacks: []}
"""


class Lines(list[dict[str, Any]]):
    """Log lines, kept instead of written."""

    def log(self) -> Any:
        return structlog.wrap_logger(structlog.PrintLogger(), processors=[self._keep])

    def _keep(self, logger: object, method: str, event: Mapping[str, Any]) -> Mapping[str, Any]:
        self.append({**event, "level": method})
        raise structlog.DropEvent

    def about(self, text: str) -> list[dict[str, Any]]:
        return [line for line in self if text in line["event"]]


@dataclass
class World:
    gateway: Gateway
    url: str
    key: NewKey
    client: httpx.AsyncClient
    small: ScriptedBackend
    large: ScriptedBackend
    log: Lines
    policy_path: Path
    settings: Settings
    extra: dict[str, Any] = field(default_factory=dict)

    def body(self, prompt: str = "hello", **fields: Any) -> dict[str, Any]:
        return {"model": "fast", "messages": [{"role": "user", "content": prompt}], **fields}

    def headers(self, key: str | None = None, **more: str) -> dict[str, str]:
        return {"authorization": f"Bearer {key or self.key.key}", **more}

    async def ask(
        self, prompt: str = "hello", *, key: str | None = None, headers: Mapping[str, str] = {}, **fields: Any
    ) -> httpx.Response:
        """One chat completion; a stream is read to its end."""
        return await self.client.post(
            "/v1/chat/completions",
            content=msgspec.json.encode(self.body(prompt, **fields)),
            headers={**self.headers(key), "content-type": "application/json", **headers},
        )

    async def new_tenant(self, name: str, **options: Any) -> str:
        """The key of a new tenant in an organisation of its own."""
        store = self.gateway.store
        organisation = await store.create_organisation(f"org-{name}")
        tenant = await store.create_tenant(organisation.id, name)
        new_key = await store.create_key(tenant.id, **options)
        await self.gateway.keys.poll_once()
        return new_key.key

    @property
    def following(self) -> int:
        """How many requests wait for, or are being sent, an answer that is under way."""
        return sum(len(flight._followers) for flight in self.gateway.pipeline._flights._in_air)

    async def until(self, happened: Callable[[], object], within_s: float = 5.0) -> None:
        """Wait for something another task or process is about to do."""
        with anyio.fail_after(within_s):
            while not happened():
                await anyio.sleep(0.002)


def text_of(response: httpx.Response) -> str:
    return str(response.json()["choices"][0]["message"]["content"])


def events_of(response: httpx.Response) -> list[Any]:
    """The JSON of each event of a stream, and `[DONE]` as it is."""
    frames = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [frame if frame == "[DONE]" else msgspec.json.decode(frame) for frame in frames]


@asynccontextmanager
async def open_world(
    *,
    small: Script | Callable[[Call], Script] | ScriptedBackend | None = None,
    large: Script | Callable[[Call], Script] | None = None,
    backends: Mapping[str, Backend] = {},
    policy: str = POLICY,
    redis: str = "",
    settings: Mapping[str, Any] = {},
    exact: Any = None,
    admission: Any = None,
) -> AsyncGenerator[World, None]:
    scripted = {
        "small-1": small if isinstance(small, ScriptedBackend) else ScriptedBackend("small-1", small),
        "large-1": ScriptedBackend("large-1", large),
    }
    log = Lines()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "policy.yaml"
        path.write_text(policy)
        given = Settings(policy=str(path), data_dir=folder, cache_url=redis, **{"drain_s": 1.0, **settings})
        async with open_gateway(
            given, environment={}, log=log.log(), backends={**scripted, **backends}, exact=exact, admission=admission
        ) as gateway:
            _, key = await gateway.store.ensure_demo_tenant()
            assert key is not None
            await gateway.keys.poll_once()
            async with _served(gateway, given) as url, httpx.AsyncClient(base_url=url, timeout=30) as client:
                yield World(
                    gateway=gateway,
                    url=url,
                    key=key,
                    client=client,
                    small=scripted["small-1"],
                    large=scripted["large-1"],
                    log=log,
                    policy_path=path,
                    settings=given,
                )


@asynccontextmanager
async def _served(gateway: Gateway, settings: Settings) -> AsyncGenerator[str, None]:
    started, stopped = asyncio.Event(), asyncio.Event()
    server = serve_app(gateway, settings, on_started=started.set)

    async def serve(listener: socket.socket) -> None:
        try:
            await server.serve(sockets=[listener])
        finally:
            stopped.set()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with anyio.create_task_group() as group:
            group.start_soon(serve, listener)
            await started.wait()
            try:
                yield f"http://127.0.0.1:{listener.getsockname()[1]}"
            finally:
                server.should_exit = True
                server.force_exit = True
                # Also after a test that failed: uvloop waits for ever for a listener that nobody closed.
                with anyio.move_on_after(5.0, shield=True):
                    await stopped.wait()
