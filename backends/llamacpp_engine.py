"""One llama.cpp server in a process of its own: `python -m backends.llamacpp_engine --weights F --port N`.

It listens on the loopback interface at once, answers 503 "Loading model" until the weights are in memory, then speaks
OpenAI's protocol. It ends, with status 0, on SIGTERM or SIGINT, and when its standard input reaches the end: the parent
keeps the other end of that pipe open for as long as it lives. Weights or a port it cannot use end it with status 1.
llama.cpp writes why to standard error.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec
import xllamacpp

_ENDS_BY = frozenset({signal.SIGTERM, signal.SIGINT})

_HTTP_THREADS = 64
"""llama.cpp holds one per call, queued or not. Behind 20 calls /health took 4.7 s with its own 6, 16 ms with 64."""

_WARNINGS = 2
"""llama.cpp's verbosity: at its own 3 it writes six lines per call."""


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine serves, and with how much of the machine."""

    weights: Path
    port: int
    threads: int
    """Threads that compute. llama.cpp's threads spin while they wait for each other: 1 unless cores are idle."""
    slots: int
    """Calls answered at once."""
    context_tokens: int
    """Context window of each slot."""
    alias: str
    """What answers call the model; empty: the path of its weights, which is nobody's business."""

    def params(self) -> xllamacpp.CommonParams:
        params = xllamacpp.CommonParams()
        params.model.path = str(self.weights)
        params.hostnames = ["127.0.0.1"]
        params.port = self.port
        if self.alias:
            params.model_alias = {self.alias}
        params.n_parallel = self.slots
        params.n_ctx = self.slots * self.context_tokens
        params.cpuparams.n_threads = self.threads
        params.cpuparams_batch.n_threads = self.threads
        params.n_threads_http = _HTTP_THREADS
        params.n_gpu_layers = 0
        params.fit_params = False
        params.warmup = False
        params.cache_ram_mib = 0  # by default up to 8 GiB of old prompts; what the slots hold is still reused
        params.endpoint_metrics = True
        params.endpoint_slots = True
        params.ui = False
        params.cors_origins = ""  # by default any web page the user visits may call it
        params.offline = True
        params.verbosity = _WARNINGS
        return params


def serve(engine: Engine) -> None:
    """Serve until a signal or the parent's end. Never returns: the process ends here."""
    # llama.cpp holds the thread it loads in, so signals are taken by the main thread and by no other.
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS_BY)
    threading.Thread(target=_load, args=(engine,), daemon=True).start()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.sigwait(_ENDS_BY)
    # Nothing here is worth saving, and llama.cpp's own way out first finishes the answers it is writing.
    os._exit(0)


def _load(engine: Engine) -> None:
    try:
        server = xllamacpp.Server(engine.params())
    except RuntimeError as error:
        sys.stderr.write(f"llama.cpp could not start with {engine.weights} on port {engine.port}: {error}\n")
        os._exit(1)
    threading.Event().wait()  # for good: the server stops when nobody refers to it
    del server


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _arguments(argv: Sequence[str]) -> Engine:
    parser = argparse.ArgumentParser(prog="backends.llamacpp_engine", description="Serve one GGUF model on loopback.")
    parser.add_argument("--weights", type=Path, required=True, help="GGUF file")
    parser.add_argument("--port", type=int, required=True, help="port on 127.0.0.1")
    parser.add_argument("--threads", type=int, default=1, help="threads that compute")
    parser.add_argument("--slots", type=int, default=2, help="calls answered at once")
    parser.add_argument("--context-tokens", type=int, default=2048, help="context window of each slot")
    parser.add_argument("--alias", default="", help="what answers call the model")
    return Engine(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    serve(_arguments(sys.argv[1:]))
