"""The command line, as the console script runs it: what it prints, what it refuses, and with which status it ends."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from gateway.children import ChildEvent
from gateway.cli import _print_child_event, main

POLICY = """
name: scripted
backends:
  played: {kind: scripted, answer: "${FOREBAY_ANSWER:-yes}"}
models:
  m: {backends: [played], context_window: 8192, price: {input: 1, output: 1}}
routes:
  auto: {strategy: fixed, model: m}
"""


class Said(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.out)


Run = Callable[..., Said]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """One command on a data directory of the test's own, without any setting of the environment."""
    for name in [name for name in os.environ if name.startswith("FOREBAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FOREBAY_DATA_DIR", str(tmp_path / "data"))

    def run(*words: str) -> Said:
        with pytest.raises(SystemExit) as ended:
            main(words)
        return Said(int(ended.value.code or 0), *capsys.readouterr())

    return run


def test_a_tenant_of_that_name_in_another_organisation_is_another_tenant(run: Run) -> None:
    first = run("keys", "create", "--tenant", "search", "--organisation", "acme", "--json").json
    second = run("keys", "create", "--tenant", "search", "--organisation", "other", "--json").json
    again = run("keys", "create", "--tenant", "search", "--organisation", "acme", "--json").json

    assert first["tenant_id"] == again["tenant_id"]
    assert first["tenant_id"] != second["tenant_id"]


def test_a_name_that_several_organisations_have_is_refused_with_theirs(run: Run) -> None:
    for organisation in ("acme", "other"):
        run("keys", "create", "--tenant", "search", "--organisation", organisation)

    refused = run("keys", "create", "--tenant", "search")

    assert refused.status == 2
    assert "several organisations have a tenant 'search': give --organisation, one of acme, other" in refused.err
    assert refused.out == ""
    assert len(run("keys", "list", "--json").json) == 2


def test_without_an_organisation_the_one_tenant_of_that_name_or_id_is_meant_else_a_new_one_is_made(run: Run) -> None:
    there = run("keys", "create", "--tenant", "search", "--organisation", "acme", "--json").json

    assert run("keys", "create", "--tenant", "search", "--json").json["tenant_id"] == there["tenant_id"]
    assert run("keys", "create", "--tenant", there["tenant_id"], "--json").json["tenant_id"] == there["tenant_id"]
    new = run("keys", "create", "--tenant", "chat", "--json").json["tenant_id"]
    keys = {key["tenant_id"]: key for key in run("keys", "list", "--json").json}
    assert keys[new]["organisation_id"] != keys[there["tenant_id"]]["organisation_id"]
    assert run("keys", "create", "--tenant", "chat", "--organisation", "chat", "--json").json["tenant_id"] == new


@pytest.mark.parametrize("role", ["viewer", "operator", "owner"])
def test_an_admin_key_can_be_made_by_who_owns_the_machine(run: Run, role: str) -> None:
    made = run("keys", "create", "--admin", role, "--name", "mine")

    (record,) = run("keys", "list", "--json").json
    assert made.status == 0
    assert made.out.startswith("fb-admin-")
    assert (record["role"], record["name"], record["tenant_id"]) == (role, "mine", None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "give exactly one of --tenant NAME and --admin ROLE"),
        (("--tenant", "t", "--admin", "owner"), "give exactly one of --tenant NAME and --admin ROLE"),
        (("--admin", "owner", "--model", "auto"), "an admin key has none of them"),
        (("--admin", "owner", "--debug"), "an admin key has none of them"),
        (("--tenant", "t", "--expires", "2026-01-31"), "--expires 2026-01-31 is over"),
    ],
)
def test_what_makes_no_sense_makes_no_key(run: Run, words: tuple[str, ...], said: str) -> None:
    refused = run("keys", "create", *words)

    assert (refused.status, refused.out) == (2, "")
    assert said in refused.err
    assert run("keys", "list", "--json").json == []


def test_the_day_a_key_expires_is_the_last_one_it_works(run: Run) -> None:
    run("keys", "create", "--tenant", "t", "--expires", "2077-01-31")

    (record,) = run("keys", "list", "--json").json
    assert record["expires_at"] == datetime(2077, 2, 1, tzinfo=UTC).timestamp()
    assert "until 2077-01-31" in run("keys", "list").out


def test_a_key_may_expire_today(run: Run) -> None:
    today = (datetime.now(UTC) + timedelta(seconds=5)).date().isoformat()

    assert run("keys", "create", "--tenant", "t", "--expires", today).status == 0


def test_data_that_looks_like_markup_is_printed_as_it_is(run: Run) -> None:
    tenant = "[/models/x] [bold]b[/] :smile:"

    made = run("keys", "create", "--tenant", tenant, "--name", "[red]")
    listed = run("keys", "list")
    revoked = run("keys", "revoke", "[/]")

    assert (made.status, listed.status, revoked.status) == (0, 0, 2)
    assert tenant in made.err
    assert tenant in listed.out
    assert "[red]" in listed.out
    assert "there is no key '[/]'" in revoked.err


def test_a_report_about_a_process_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    _print_child_event(ChildEvent(name="engine", kind="died", pid=1, detail="exit status 1: [/models/x.gguf] :bug:"))

    assert "engine died exit status 1: [/models/x.gguf] :bug:\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("FOREBAY_CACHE_URL", "http://u:hunter2@h", "not a Redis URL"),
        ("FOREBAY_STATE_URL", "redis://:hunter2@h:99999", "not a URL"),
        ("FOREBAY_STORE_URL", "oracle://u:hunter2@h/d", "oracle:// is no store"),
        ("FOREBAY_LOG_FORMAT", "xml", "expected console or json, got 'xml'"),
        ("FOREBAY_DRAIN_S", "inf", "expected `float` <= 86400.0"),
        ("FOREBAY_ROOT_SECRET", "hunter2", "a root secret needs at least 32 bytes"),
    ],
)
def test_a_setting_that_cannot_be_ends_the_start_with_one_line_that_names_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY)
    monkeypatch.setenv(
        "FOREBAY_HOST", "192.0.2.1"
    )  # of no machine: where nothing is refused, the start ends all the same
    monkeypatch.setenv(name, value)

    refused = run("serve", "--policy", str(policy), "--port", "0")

    assert refused.status == 2
    assert refused.err.count("\n") == 1
    assert said in refused.err
    assert f"environment {name}: " in refused.err
    assert "hunter2" not in refused.err


def test_the_settings_are_shown_without_credentials(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREBAY_STORE_URL", "postgresql://forebay:hunt@er2/x@db:5432/forebay")
    monkeypatch.setenv("FOREBAY_STATE_URL", "rediss://:hunter2@redis:6380/1")
    monkeypatch.setenv("FOREBAY_ROOT_SECRET", "hunter2" * 8)

    table, json = run("config"), run("config", "--json").json

    assert "hunt" not in table.out + repr(json)
    assert json["store_url"] == {"value": "postgresql://***@db:5432/forebay", "origin": "environment FOREBAY_STORE_URL"}
    assert json["state_url"]["value"] == "rediss://***@redis:6380/1"
    assert "rediss://***@redis:6380/1" in table.out


def test_a_variable_that_names_no_setting_is_noted_unless_the_policy_uses_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY)
    monkeypatch.setenv("FOREBAY_ANSWER", "no")
    monkeypatch.setenv("FOREBAY_WORKER", "4")
    monkeypatch.setenv("FOREBAY_COLOUR_OF_THE_BOX", "red")
    monkeypatch.setenv("FOREBAY_HOST", "192.0.2.1")  # of no machine: the start ends here

    noted = run("serve", "--policy", str(policy), "--port", "0")

    assert "FOREBAY_WORKER names no setting; did you mean FOREBAY_WORKERS?\n" in noted.err
    assert "FOREBAY_COLOUR_OF_THE_BOX names no setting\n" in noted.err
    assert "FOREBAY_ANSWER" not in noted.err
    assert (noted.status, "Cannot listen on 192.0.2.1" in noted.err) == (1, True)


def test_a_request_to_explain_may_come_from_standard_input(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY)
    body = b'{"model": "auto", "messages": [{"role": "user", "content": "hi"}]}'
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(body)))

    assert run("explain", str(policy), "--request", "-", "--json").json["asked_for"] == "auto"


def test_a_model_for_embeddings_is_explained_as_one(run: Run, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    vectors = "  vectors: {backends: [played], task: embeddings, context_window: 256, price: {input: 1}}\nroutes:"
    policy.write_text(POLICY.replace("routes:", vectors))
    request = tmp_path / "request.json"
    request.write_bytes(b'{"model": "vectors", "input": ["one", "two"]}')

    by_prompt = run("explain", str(policy), "--model", "vectors", "--prompt", "hello", "--json").json
    by_request = run("explain", str(policy), "--request", str(request), "--json").json
    for explained in (by_prompt, by_request):
        [candidate] = explained["candidates"]
        assert candidate["model"] == "vectors"
        assert candidate["reserved_tokens"] == explained["prompt_tokens"] > 0

    request.write_bytes(b'{"model": "vectors", "messages": [{"role": "user", "content": "hi"}]}')
    wrong = run("explain", str(policy), "--request", str(request))
    assert wrong.status == 2
    assert "input" in wrong.err
