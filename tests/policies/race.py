"""Several processes that do the same thing at the same moment."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack

_SAY_READY = "import builtins; print('ready', flush=True); builtins.input()\n"


def race(script: str, *arguments: str, racers: int) -> list[str]:
    """What each process printed. All wait at the script's line `input()` until the last one has got there."""
    with ExitStack() as stack:
        running = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-W", "error", "-c", script.replace("input()\n", _SAY_READY), *arguments],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for _ in range(racers)
        ]
        for racer in running:
            stack.callback(racer.kill)
        for racer in running:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        for racer in running:
            assert racer.stdin is not None
            racer.stdin.write("go\n")
            racer.stdin.flush()
        said = [racer.communicate(timeout=30)[0] for racer in running]
        assert [racer.returncode for racer in running] == [0] * racers
        return said
