"""One listening socket, bound once, inherited by every worker."""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

import anyio
import pytest

from gateway.child_specs import worker_child
from gateway.processes import CannotListen, listen
from tests.processes.supervised import WORKER
from tests.processes.world import supervised


async def ask(listener: socket.socket) -> int:
    """The process id of the worker that took the connection."""
    host, port = listener.getsockname()[:2]
    async with await anyio.connect_tcp(host, port) as stream:
        return int(await stream.receive())


async def test_workers_share_the_socket_and_one_killed_is_covered_by_the_other(runtime: Path) -> None:
    with listen("127.0.0.1", 0) as listener:
        command = (sys.executable, "-c", WORKER, str(listener.fileno()), str(runtime / "drained"))
        workers = [worker_child(index, command=command, listener=listener) for index in (0, 1)]
        async with supervised(workers, runtime=runtime) as world:
            first = await world.until("worker-0", "ready")
            second = await world.until("worker-1", "ready")

            os.kill(first.pid or 0, signal.SIGKILL)
            await world.until("worker-0", "died")
            answered = {await ask(listener) for _ in range(20)}
            again = await world.until("worker-0", "ready", times=2)

            assert answered <= {second.pid, again.pid}
            os.kill(second.pid or 0, signal.SIGKILL)
            await world.until("worker-1", "died")
            assert await ask(listener) in {again.pid, (await world.until("worker-1", "ready", times=2)).pid}
    assert world.exit_status == 0


def test_a_port_that_is_taken_is_named_with_what_to_do() -> None:
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(CannotListen, match=rf"Port {port} on 127.0.0.1 is taken .* choose another port"):
            listen("127.0.0.1", port)


def test_an_address_of_another_machine_is_refused_with_a_reason() -> None:
    with pytest.raises(CannotListen, match=r"Cannot listen on 192\.0\.2\.1, port 0: .* Check the address"):
        listen("192.0.2.1", 0)


def test_a_port_can_be_had_again_right_after_its_connections_closed() -> None:
    with listen("127.0.0.1", 0) as listener:
        address = listener.getsockname()
        with socket.create_connection(address) as client, listener.accept()[0]:
            pass
        del client
    listen(*address).close()


def test_ipv6_is_served_where_the_host_is_an_ipv6_address() -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    with listen("::1", 0) as listener:
        assert listener.family == socket.AF_INET6
