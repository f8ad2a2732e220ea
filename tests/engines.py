"""Real engines with real small models, for tests that want no imitation."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
SMOLLM2 = ROOT / ".forebay" / "models" / "smollm2-135m-instruct.gguf"


@contextmanager
def llamacpp_server(weights: Path, *, slots: int = 2, context_tokens: int = 512, ready: bool = True) -> Iterator[str]:
    """A llama.cpp server on a free loopback port; its URL up to and including `/v1`."""
    options = {"--weights": weights, "--slots": slots, "--context-tokens": context_tokens}
    with _engine("backends.llamacpp_engine", options, ready) as url:
        yield url


@contextmanager
def embedder_server(*, ready: bool = True) -> Iterator[str]:
    """Our embedder on a free loopback port; its URL up to and including `/v1`."""
    with _engine("backends.embedder_engine", {}, ready) as url:
        yield url


@contextmanager
def _engine(module: str, options: Mapping[str, object], ready: bool) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [str(word) for pair in {"--port": port, **options}.items() for word in pair]
    command = [sys.executable, "-m", module, *words]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            if ready:
                _wait_for(f"http://127.0.0.1:{port}/health", process)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


def _wait_for(url: str, process: subprocess.Popen[bytes], within_s: float = 60.0) -> None:
    until = time.monotonic() + within_s
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            time.sleep(0.05)
    raise TimeoutError(f"no engine at {url}")
