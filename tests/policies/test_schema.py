"""The JSON Schema for editors: current, and of one mind with the loader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from policies.load import parse_policy
from policies.mistakes import Findings
from policies.schema import policy_schema
from policies.yaml_source import Mapping, Node, Scalar, core_value, parse_yaml
from tests.policies.policy_text import GOOD, edited

STRUCTURAL = {
    "unknown key": ("small: small-1", "»smal: small-1"),
    "unknown key at the top": ("retries:", "»retrys:"),
    "missing key": ("    context_window: 2048\n", "»"),
    "unknown kind": ("kind: openai", "kind: »opnai"),
    "unknown strategy": ("strategy: fixed", "strategy: »first"),
    "text for a number": ("context_window: 2048", "context_window: »many"),
    "zero": ("context_window: 2048", "context_window: »0"),
    "fraction": ("max_attempts: 2", "max_attempts: »2.5"),
    "above the range": ("threshold: 0.5", "threshold: »1.5"),
    "yes is no bool": ("enabled: true", "enabled: »yes"),
    "text for a list": ("fallbacks: [1e3]", "fallbacks: »1e3"),
    "empty list": ("backends: [vllm]", "backends: »[]"),
    "no such choice": ("fault: none", "fault: »hangs"),
    "bad duration": ("token_delay: 5ms", "token_delay: »5 minutes"),
    "bad URL": ("http://127.0.0.1:8000/v1", "»127.0.0.1:8000"),
    "bad name": ("name: everything", 'name: »"every thing"'),
}


def as_editors_read_it(node: Node) -> Any:
    """YAML as JSON, by YAML 1.2's rules."""
    if isinstance(node, Scalar):
        return core_value(node.text) if node.plain else node.text
    if isinstance(node, Mapping):
        return {key.text: as_editors_read_it(value) for key, value in node.entries}
    return [as_editors_read_it(item) for item in node.items]


def in_an_editor(text: str) -> Any:
    return as_editors_read_it(parse_yaml(text, Findings("policy.yaml")))


def test_the_schema_in_the_repository_is_the_one_the_structs_make() -> None:
    checked_in = json.loads(Path("policies/policy.schema.json").read_text(encoding="utf-8"))

    assert checked_in == json.loads(json.dumps(policy_schema())), (
        "run: python -m policies.schema > policies/policy.schema.json"
    )


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(policy_schema())


@pytest.mark.parametrize("path", sorted(Path("policies").glob("*.yaml")), ids=str)
def test_every_shipped_policy_passes_and_names_the_schema(path: Path) -> None:
    text = path.read_text(encoding="utf-8")

    jsonschema.validate(in_an_editor(text), policy_schema())

    assert text.startswith("# yaml-language-server: $schema=./policy.schema.json\n")


def test_a_policy_in_which_everything_is_used_passes() -> None:
    text = GOOD.replace("answer: no", 'answer: "no"').replace("1e3", '"1e3"').replace('""1e3""', '"1e3"')

    jsonschema.validate(in_an_editor(text), policy_schema())


@pytest.mark.parametrize("mistake", STRUCTURAL)
def test_what_the_loader_refuses_an_editor_underlines(mistake: str) -> None:
    text, _ = edited(*STRUCTURAL[mistake])

    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(in_an_editor(text), policy_schema())


def test_what_a_field_means_is_said_where_it_is_typed() -> None:
    parts = policy_schema()["$defs"]

    assert parts["ThresholdRouteSpec"]["properties"]["threshold"]["description"].startswith("Difficulty in [0, 1]")
    assert parts["ThresholdRouteSpec"]["properties"]["threshold"]["default"] == 0.5
    assert parts["TimeoutsSpec"]["properties"]["connect"]["default"] == 1.0
    assert "GGUF" in parts["LlamaCppBackendSpec"]["properties"]["weights"]["description"]


def test_the_default_of_the_schema_is_the_default_of_the_loader() -> None:
    model = "{kind: scripted}"
    text = f"name: x\nbackends: {{b: {model}}}\nmodels: {{m: {{backends: [b], context_window: 1}}}}\n"
    file = parse_policy(text.encode(), Path("policy.yaml"), {}).file
    exact = policy_schema()["$defs"]["ExactCachePolicy"]["properties"]

    assert {name: getattr(file.cache.exact, name) for name in exact} == {n: s["default"] for n, s in exact.items()}
