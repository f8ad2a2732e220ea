"""Shows that a download by pip moves: how much of it has arrived, every few seconds. On the bare standard library."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

Report = Callable[[str], None]
"""Takes one line of progress, for people."""

_EVERY_S = 2.0


@contextmanager
def arriving(folder: Path, of_bytes: int, report: Report) -> Iterator[None]:
    """Report how much of `of_bytes` lies in the wheels below `folder`, every two seconds while the body runs."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_EVERY_S):
            report(f"{megabytes(_arrived_bytes(folder))} of {megabytes(of_bytes)} MB")

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield
    finally:
        done.set()
        watching.join()


def megabytes(size_bytes: int) -> int:
    return size_bytes // 1_000_000


def _arrived_bytes(folder: Path) -> int:
    total = 0
    for wheel in folder.rglob("*.whl"):
        with suppress(FileNotFoundError):  # pip has just moved it
            total += wheel.stat().st_size
    return total
