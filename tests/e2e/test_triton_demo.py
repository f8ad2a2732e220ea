"""`make run BACKEND=triton` as a user starts it: two real models on a real Triton, through the real SDK."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil  # type: ignore[import-untyped]
import pytest
from openai import OpenAI

from gateway.demo_models import fetch_all
from gateway.triton_install import Installation
from tests.e2e.process_tree import SERVING, STARTS_WITHIN_S, Tree, until
from tests.engines import ROOT

pytestmark = pytest.mark.slow

MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "Name three colors."}]
SCHEMA = {
    "type": "object",
    "properties": {"age": {"enum": [30, 40]}},
    "required": ["age"],
    "additionalProperties": False,
}


@contextmanager
def demo(folder: Path) -> Iterator[Tree]:
    """Start the demo and wait until it is ready; whatever is left of it in the end is killed."""
    local = ROOT / ".forebay"
    fetch_all(local / "models", print)
    for shared in ("models", "triton"):
        (folder / shared).symlink_to(local / shared)
    command = [sys.executable, "-m", "gateway", "demo", "--backend", "triton", "--port", "0", "--data-dir", str(folder)]
    output = folder / "output"
    environment = {**os.environ, "COLUMNS": "200", "FOREBAY_DRAIN_S": "5"}
    with output.open("wb") as out, subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out) as run:
        try:
            until(lambda: SERVING.search(output.read_text()) or run.poll() is not None, STARTS_WITHIN_S)
            serving = SERVING.search(output.read_text())
            assert serving, output.read_text()
            policy = ROOT / "policies" / "demo-triton.yaml"
            tree = Tree(run, serving[1], (folder / "demo-key").read_text(), policy, output)
            until(lambda: tree.get("/readyz").json()["status"] == "ready", STARTS_WITHIN_S)
            yield tree
        finally:
            for process in [*psutil.Process(run.pid).children(recursive=True), run] if run.poll() is None else []:
                process.kill()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, triton_installation: Installation) -> Iterator[Tree]:
    with demo(tmp_path_factory.mktemp("demo")) as running:
        yield running


def sdk(tree: Tree) -> OpenAI:
    return OpenAI(base_url=f"{tree.url}/v1", api_key=tree.key, max_retries=0, _strict_response_validation=True)


def servers(tree: Tree) -> list[psutil.Process]:
    return [process for process in tree.processes("--model-repository") if process.name() == "tritonserver"]


def active(tree: Tree, model: str = "small_llm") -> float:
    """Requests that the model works on, by its own metric."""
    [server] = servers(tree)
    port = next(word.partition("=")[2] for word in server.cmdline() if word.startswith("--metrics-port="))
    page = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text
    found = re.search(rf'nv_trt_llm_request_metrics{{model="{model}",request_type="active",[^}}]*}} (\S+)', page)
    return float(found[1]) if found else 0.0


def test_both_models_answer_whole_and_streamed_with_the_engines_own_counts(tree: Tree) -> None:
    with sdk(tree) as client:
        for model in ("fast", "smart"):
            whole = client.chat.completions.create(model=model, messages=MESSAGES, temperature=0, max_tokens=24)
            chunks = list(
                client.chat.completions.create(
                    model=model,
                    messages=MESSAGES,
                    temperature=0,
                    max_tokens=24,
                    stream=True,
                    stream_options={"include_usage": True},
                    extra_headers={"cache-control": "no-cache"},
                )
            )
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            assert text == whole.choices[0].message.content != ""
            assert whole.usage is not None
            assert chunks[-1].usage == whole.usage


def test_a_schema_binds_the_answer_and_log_probabilities_come_with_it(tree: Tree) -> None:
    with sdk(tree) as client:
        answer = client.chat.completions.create(
            model="fast",
            messages=[{"role": "user", "content": "Give a person as JSON."}],
            max_tokens=40,
            temperature=0,
            logprobs=True,
            response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}},
        )
    assert re.fullmatch(r'\s*\{\s*"age"\s*:\s*[34]0\s*\}\s*', answer.choices[0].message.content or "")
    assert answer.choices[0].logprobs is not None
    tokens = [entry.token for entry in answer.choices[0].logprobs.content or ()]
    assert "".join(tokens) == answer.choices[0].message.content


def test_what_this_engine_cannot_do_is_refused_by_its_name(tree: Tree) -> None:
    with sdk(tree) as client, pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="fast", messages=MESSAGES, logit_bias={"5": 1})
    assert refused.value.param == "logit_bias"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_the_model(tree: Tree, stream: bool) -> None:
    body: dict[str, Any] = {"model": "fast", "messages": MESSAGES, "max_tokens": 1500, "stream": stream}
    with httpx.Client(base_url=tree.url, headers=tree.headers, timeout=60) as client:
        if stream:
            with client.stream("POST", "/v1/chat/completions", json={**body, "min_tokens": 1500}) as answer:
                lines = answer.iter_lines()  # kept: the answer is closed with it
                assert next(lines)
                until(lambda: active(tree) == 1)
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/chat/completions", json={**body, "min_tokens": 1500}, timeout=1.0)
    until(lambda: active(tree) == 0, within_s=5.0)


def test_a_triton_that_was_killed_comes_back_and_answers_again(tree: Tree) -> None:
    for process in servers(tree):
        process.send_signal(signal.SIGKILL)
    until(lambda: tree.get("/readyz").json()["backends"]["triton-small"] != "ok")
    until(lambda: tree.get("/readyz").json()["status"] == "ready", within_s=60.0)
    with sdk(tree) as client:
        answer = client.chat.completions.create(model="fast", messages=MESSAGES, max_tokens=8)
    assert answer.choices[0].message.content


def test_an_interrupt_ends_the_whole_tree(tree: Tree) -> None:
    processes = tree.processes()
    tree.process.send_signal(signal.SIGINT)
    assert tree.process.wait(30) == 0
    # What clears up after a Triton is the last to go.
    until(lambda: not [process for process in processes if process.is_running()], within_s=5.0)
