"""The whole product on one machine, from its command line: two workers, two Valkeys, a real model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import openai
import psutil  # type: ignore[import-untyped]
import pytest
from openai import OpenAI

from gateway.demo_models import SMOLLM2, fetch
from tests.e2e.process_tree import SCRIPTED_ANSWER, Tree, process_tree, until
from tests.engines import ROOT

MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "Tell me a long story."}]
LONG = {"max_tokens": 900, "temperature": 0.7, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, fetched once into `.forebay/models` of the checkout."""
    return fetch(SMOLLM2, ROOT / ".forebay" / "models", print)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Iterator[Tree]:
    with process_tree(tmp_path_factory.mktemp("tree"), smollm2) as running:
        yield running


def sdk(tree: Tree) -> OpenAI:
    return OpenAI(base_url=f"{tree.url}/v1", api_key=tree.key, max_retries=0, _strict_response_validation=True)


def test_a_real_model_answers_through_the_sdk_whole_and_streamed(tree: Tree) -> None:
    with sdk(tree) as client:
        whole = client.chat.completions.create(model="small", messages=MESSAGES, max_tokens=20, temperature=0)
        stream = client.chat.completions.create(
            model="small",
            messages=MESSAGES,
            max_tokens=20,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)

    content = whole.choices[0].message.content
    assert content
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 20
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == content
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 20
    assert len({chunk.id for chunk in chunks}) == 1


def test_what_one_worker_was_told_the_other_knows(tree: Tree) -> None:
    first = tree.ask("Count to five.", model="large", max_tokens=100)
    again = [tree.ask("Count to five.", model="large", max_tokens=100) for _ in range(12)]
    assert first.headers["x-forebay-cache"] == "miss"
    assert {response.headers["x-forebay-cache"] for response in again} == {"exact"}
    assert {response.json()["choices"][0]["message"]["content"] for response in again} == {SCRIPTED_ANSWER}


def test_a_repeated_answer_of_the_real_model_comes_from_the_cache(tree: Tree) -> None:
    question = "Reply with one word: what color is the sky?"
    first = tree.ask(question, max_tokens=200)
    again = tree.ask(question, max_tokens=200)
    assert first.json()["choices"][0]["finish_reason"] == "stop"
    assert again.headers["x-forebay-cache"] == "exact"
    assert again.json()["choices"] == first.json()["choices"]
    assert again.json()["usage"] == first.json()["usage"]


def test_a_client_that_leaves_in_the_middle_frees_the_models_slot(tree: Tree) -> None:
    with sdk(tree) as client:
        stream = client.chat.completions.create(model="small", messages=MESSAGES, stream=True, **LONG)  # type: ignore[call-overload]
        for count, _ in enumerate(stream):
            if count == 3:
                break
        assert tree.busy_slots() == 1
        stream.close()
    until(lambda: tree.busy_slots() == 0, within_s=3.0)


def test_a_client_that_leaves_while_it_waits_for_a_whole_answer_frees_the_slot_too(tree: Tree) -> None:
    with pytest.raises(openai.APITimeoutError), sdk(tree) as client:
        client.chat.completions.create(model="small", messages=MESSAGES, timeout=0.7, seed=2, **LONG)  # type: ignore[call-overload]
    until(lambda: tree.busy_slots() == 0, within_s=3.0)


def test_a_worker_that_is_killed_is_covered_and_comes_back(tree: Tree) -> None:
    before = tree.workers()
    victim = min(before)
    asked = _requests_counted(tree)
    os.kill(victim, signal.SIGKILL)

    statuses: list[int] = []

    def back() -> bool:
        statuses.append(tree.ask(f"Question {len(statuses)}", model="large").status_code)
        return len(tree.workers()) == 2 and victim not in tree.workers()

    until(back)
    until(lambda: all(tree.get("/readyz").json()["status"] == "ready" for _ in range(4)))
    assert set(statuses) == {200}
    assert _requests_counted(tree) >= asked + len(statuses), "what the dead worker counted still counts"


def _requests_counted(tree: Tree) -> float:
    lines = tree.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("forebay_requests_total{"))


def test_an_edit_of_the_policy_reaches_every_worker_and_a_broken_one_none(tree: Tree) -> None:
    def labels() -> set[str]:
        return {tree.ask("Which policy?", model="large").headers["x-forebay-policy"] for _ in range(8)}

    (before,) = labels()
    good = tree.policy.read_text().replace("name: tree", "name: tree-edited")
    tree.policy.write_text(good)
    until(lambda: all(label.startswith("tree-edited@") for label in labels()))
    (after,) = labels()

    tree.policy.write_text(good.replace("routes:", "rouds:"))
    until(lambda: all(tree.get("/readyz").json()["status"] == "degraded" for _ in range(8)))
    report = tree.get("/readyz").json()
    assert report["ready"]
    assert any(line.startswith("policy:") for line in report["degraded"])
    assert labels() == {after} != {before}

    tree.policy.write_text(good)
    until(lambda: all(tree.get("/readyz").json()["status"] == "ready" for _ in range(6)))


def test_keys_made_and_revoked_on_the_command_line_work_and_stop_working(tree: Tree) -> None:
    keys = ["keys", "create", "--tenant", "newcomer", "--json", "--data-dir", str(tree.policy.parent / "data")]
    new = _forebay(*keys)
    key, key_id = new["key"], new["id"]
    headers = {"authorization": f"Bearer {key}"}
    assert httpx.get(f"{tree.url}/v1/models", headers=headers).status_code == 200

    _forebay("keys", "revoke", key_id, "--data-dir", str(tree.policy.parent / "data"))
    until(
        lambda: all(httpx.get(f"{tree.url}/v1/models", headers=headers).status_code == 401 for _ in range(6)),
        within_s=5.0,
    )


def _forebay(*arguments: str) -> dict[str, str]:
    done = subprocess.run([sys.executable, "-m", "gateway", *arguments], cwd=ROOT, capture_output=True, check=True)
    answer: dict[str, str] = msgspec.json.decode(done.stdout) if done.stdout.startswith(b"{") else {}
    return answer


def test_told_to_stop_it_finishes_what_runs_exits_with_0_and_leaves_no_process(tmp_path: Path, smollm2: Path) -> None:
    with process_tree(tmp_path / "stop", smollm2, workers=2, drain_s=20.0) as tree, sdk(tree) as client:
        family = tree.processes()
        stream = client.chat.completions.create(
            model="small", messages=MESSAGES, stream=True, max_tokens=60, extra_body={"ignore_eos": True}
        )
        chunks = [next(stream)]
        tree.process.terminate()
        chunks += list(stream)
        status = tree.process.wait(timeout=30)

        assert chunks[-1].choices[0].finish_reason == "length", "the answer that ran was finished"
        assert status == 0, tree.output
        assert len(family) >= 5, "two workers, two Valkeys, one engine"
        assert not [child for child in family if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
        with pytest.raises(httpx.ConnectError):
            tree.get("/healthz")
        assert "Traceback" not in tree.output


def test_killed_outright_it_leaves_no_process_either(tmp_path: Path, smollm2: Path) -> None:
    with process_tree(tmp_path / "kill", smollm2, workers=1) as tree:
        family = tree.processes()
        tree.process.kill()
        tree.process.wait()
        until(lambda: not [c for c in family if c.is_running() and c.status() != psutil.STATUS_ZOMBIE], within_s=20)
