"""Becomes a Triton server, and leaves somebody behind who clears up after it: `triton_launch.py NAME COMMAND...`.

Models run in processes of their own, and one that waits for the server's answer when the server is killed waits for
good, holding its memory. Nothing inside it can help: it holds the interpreter's lock meanwhile, and the thread of the
server that started it, to which the kernel would tie it, is long gone. So a process is split off that sleeps until the
server has ended, however it did, and then ends whatever carries the server's mark and removes its shared memory.

The mark is NAME and the server's process id; the Python backend puts it into the names of shared memory and so into
the arguments of every model's process. Standard library only: run it by path, with `python -I -S`.
"""

import os
import select
import signal
import sys
import time
from pathlib import Path

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory is on Linux
_LOOK_EVERY_S = 0.05
_LOOKS = 20
"""A process that the server was just starting may bear its mark a little later."""


def main(name: str, *command: str) -> None:
    """Replace this process by `command`, once the one that clears up is there."""
    server = os.getpid()
    mark = f"{name}{server}-"
    ended = os.pidfd_open(server)
    if os.fork() == 0:
        _clear_up_after(ended, mark)
        os._exit(0)
    os.execv(command[0], [*command, f"--backend-config=python,shm-region-prefix-name={mark}"])  # noqa: S606


def _clear_up_after(ended: int, mark: str) -> None:
    """It is no part of what started the server: neither a terminal's signals nor pipes that somebody reads reach it."""
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    select.select([ended], [], [])
    for _ in range(_LOOKS):
        for pid in _bearing(mark):
            _kill(pid)
        time.sleep(_LOOK_EVERY_S)
    for region in _SHARED_MEMORY.glob(f"{mark}*"):
        region.unlink(missing_ok=True)


def _bearing(mark: str) -> list[int]:
    """The processes, other than this one, that have `mark` in their arguments."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:  # it has just ended
            continue
    return [pid for pid in found if pid != os.getpid()]


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    main(*sys.argv[1:])
