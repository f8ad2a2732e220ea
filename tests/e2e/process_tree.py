"""`forebay serve` as a user starts it: a process tree with a real model in it, seen from outside."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil  # type: ignore[import-untyped]

from tests.engines import ROOT

SERVING = re.compile(r"Serving \S+ on (http://\S+)")
STARTS_WITHIN_S = 90.0

SCRIPTED_ANSWER = "Words from a script."

POLICY = """
name: tree
backends:
  local: {kind: llamacpp, weights: WEIGHTS, threads: 1, slots: 2, context_tokens: 1024}
  scripted: {kind: scripted, token_delay: 2ms, answer: "ANSWER"}
models:
  small:
    backends: [local]
    context_window: 1024
    price: {input: 0.1, output: 0.4}
    capabilities: [tools, json_schema, logprobs]
  large:
    backends: [scripted]
    context_window: 8192
    price: {input: 1, output: 4}
routes:
  auto: {strategy: threshold, small: small, large: large, threshold: 0.5}
"""


class Tree:
    """A running `forebay serve`: its address, a key for it, its processes and its policy."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, key: str, policy: Path, output: Path) -> None:
        self.process = process
        self.url = url
        self.key = key
        self.policy = policy
        self._output = output

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    @property
    def output(self) -> str:
        return self._output.read_text()

    def ask(self, prompt: str = "Name three colors.", **fields: Any) -> httpx.Response:
        """One chat completion on a connection of its own, so that any worker may take it."""
        body = {
            "model": "small",
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": 16,
            "temperature": 0,
            **fields,
        }
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, headers=self.headers, timeout=60)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", headers=self.headers, timeout=10)

    def processes(self, part_of_command: str = "") -> list[psutil.Process]:
        """The tree's processes below the supervisor whose command line has `part_of_command`."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if part_of_command in " ".join(child.cmdline()) and child.status() != psutil.STATUS_ZOMBIE:
                    found.append(child)
            except psutil.NoSuchProcess:
                continue
        return found

    def workers(self) -> set[int]:
        return {process.pid for process in self.processes("gateway worker")}

    def busy_slots(self) -> int:
        """How many calls the llama.cpp engine is at work on, by its own word."""
        (engine,) = self.processes("llamacpp_engine")
        command = engine.cmdline()
        port = command[command.index("--port") + 1]
        slots = httpx.get(f"http://127.0.0.1:{port}/slots", timeout=10).json()
        return sum(slot["is_processing"] for slot in slots)


def until(holds: Callable[[], object], within_s: float = 20.0) -> None:
    """Wait for what other processes do, which tell us nothing."""
    until_at = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < until_at, "it did not come about in time"
        time.sleep(0.02)


@contextmanager
def process_tree(folder: Path, weights: Path, *, workers: int = 2, drain_s: float = 5.0) -> Iterator[Tree]:
    """Start `forebay serve` in `folder` and wait until it is ready; whatever is left of it in the end is killed."""
    folder.mkdir(exist_ok=True)
    policy = folder / "policy.yaml"
    policy.write_text(POLICY.replace("WEIGHTS", str(weights)).replace("ANSWER", SCRIPTED_ANSWER))
    data = ["--data-dir", str(folder / "data")]
    environment = {**os.environ, "FOREBAY_DRAIN_S": str(drain_s), "COLUMNS": "200"}
    create = [sys.executable, "-m", "gateway", "keys", "create", "--tenant", "acme", "--debug", "--json", *data]
    created = subprocess.run(create, cwd=ROOT, env=environment, capture_output=True, check=True)
    key = msgspec.json.decode(created.stdout)["key"]

    serve = [sys.executable, "-m", "gateway", "serve", "--policy", str(policy), "--port", "0"]
    serve += ["--workers", str(workers), "--log-format", "json", *data]
    output = folder / "output"
    with output.open("wb") as out:
        process = subprocess.Popen(serve, cwd=ROOT, env=environment, stdout=out, stderr=out)
    family: list[psutil.Process] = []
    try:
        url = _address(process, output)
        tree = Tree(process, url, key, policy, output)
        until(lambda: _is_ready(tree, workers), STARTS_WITHIN_S)
        family = tree.processes()
        yield tree
    finally:
        if process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            process.wait()
        for child in family:
            if child.is_running():
                child.kill()


def _address(process: subprocess.Popen[bytes], output: Path) -> str:
    until(lambda: SERVING.search(output.read_text()) or process.poll() is not None, STARTS_WITHIN_S)
    serving = SERVING.search(output.read_text())
    assert serving is not None, output.read_text()
    return serving[1]


def _is_ready(tree: Tree, workers: int) -> bool:
    """Every engine answers, and every worker serves."""
    report = tree.get("/readyz").json()
    return report["status"] == "ready" and len(tree.workers()) == workers
