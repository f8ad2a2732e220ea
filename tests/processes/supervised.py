"""A whole small Forebay as a program, to be signalled and killed: a Valkey, a worker of our own, a stubborn stranger.

`python -m tests.processes.supervised RUNTIME_DIRECTORY LOOP`, where LOOP is `asyncio` or `uvloop`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import anyio

from gateway.child_specs import valkey_child, worker_child
from gateway.processes import Supervisor, claimed, listen
from tests.processes.world import STUBBORN, shell

WORKER = """
import signal, socket, sys, threading
from pathlib import Path
listener = socket.socket(fileno=int(sys.argv[1]))
listener.setblocking(True)
drained = Path(sys.argv[2])

def drain(*_):
    drained.touch()
    sys.exit(0)

signal.signal(signal.SIGTERM, drain)
print("ready", flush=True)
while True:
    connection, _ = listener.accept()
    connection.sendall(str(__import__("os").getpid()).encode())
    connection.close()
"""
"""A worker that answers each connection with its process id."""


async def main(runtime: Path) -> int:
    with claimed(runtime), listen("127.0.0.1", 0) as listener:
        valkey = valkey_child(
            "state",
            directory=runtime / "state",
            socket_path=runtime / "state.sock",
            maxmemory_bytes=64 << 20,
            policy="noeviction",
            persistent=True,
            log_path=runtime / "state.log",
        )
        command = (sys.executable, "-c", WORKER, str(listener.fileno()), str(runtime / "drained"))
        supervisor = Supervisor(
            [
                [valkey],
                [shell("stubborn", STUBBORN, stop_grace_s=0.5)],
                [worker_child(0, command=command, listener=listener)],
            ],
            runtime_directory=runtime,
            on_event=lambda event: print(event, flush=True),
        )
        return await supervisor.run()


if __name__ == "__main__":
    sys.exit(anyio.run(main, Path(sys.argv[1]), backend_options={"use_uvloop": sys.argv[2] == "uvloop"}))
