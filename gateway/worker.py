"""One worker process: uvicorn around a gateway, on a listening socket that it inherited."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
from collections.abc import Callable, Generator, Mapping

import anyio
import uvicorn
import uvloop

from gateway.app import Gateway, open_gateway
from gateway.child_specs import WORKER_READY_LINE
from gateway.children import parent_gone
from gateway.settings import Settings
from gateway.telemetry.logs import open_log

CLOSE_AFTER_DRAIN_S = 2
"""Time for the error events of answers that the drain cut off to reach their clients."""

KEEP_ALIVE_S = 75
"""Longer than the idle time of the usual load balancers, so that they hang up first and never race with us."""


def run_worker(settings: Settings, listener_fd: int, environment: Mapping[str, str]) -> None:
    """Serve on the inherited socket until SIGTERM, SIGINT or the end of the supervisor, then drain."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings, socket.socket(fileno=listener_fd), environment))


async def _serve(settings: Settings, listener: socket.socket, environment: Mapping[str, str]) -> None:
    log = open_log(settings.log_format)
    async with open_gateway(settings, environment=environment, log=log) as gateway:
        server = serve_app(gateway, settings, on_started=lambda: print(WORKER_READY_LINE, flush=True))  # noqa: T201
        stop_asked = anyio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, stop_asked.set)
        loop.add_signal_handler(signal.SIGINT, stop_asked.set)
        loop.add_signal_handler(signal.SIGHUP, lambda: gateway.background.spawn(gateway.reload()))
        # What stands now stands for good: taken out of every collection, a full one costs 1 ms instead of 80.
        gc.collect()
        gc.freeze()
        async with anyio.create_task_group() as serving:
            serving.start_soon(_set_when_orphaned, stop_asked)
            serving.start_soon(_drain, gateway, server, stop_asked, settings)
            await server.serve(sockets=[listener])
            serving.cancel_scope.cancel()


async def _set_when_orphaned(stop_asked: anyio.Event) -> None:
    await parent_gone()
    stop_asked.set()


async def _drain(gateway: Gateway, server: uvicorn.Server, stop_asked: anyio.Event, settings: Settings) -> None:
    """Turn `/readyz` at once, and accept for a while yet: whoever connects meanwhile is told, not left hanging."""
    await stop_asked.wait()
    gateway.begin_drain(settings.drain_s)
    await anyio.sleep(settings.drain_notice_s)
    server.should_exit = True


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers, that says when it accepts."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()


def serve_app(gateway: Gateway, settings: Settings, *, on_started: Callable[[], None]) -> uvicorn.Server:
    """The HTTP server around a gateway. Set `should_exit` to drain it."""
    config = uvicorn.Config(
        gateway.app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nobody here asks for the address of a client
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(settings.drain_s) + CLOSE_AFTER_DRAIN_S,
    )
    return _Server(config, on_started)
