"""What the README shows is what there is."""

from __future__ import annotations

import re
from pathlib import Path

from gateway.cli import app
from policies.load import parse_policy
from policies.routing_policy import TritonBackendSpec

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_its_policies_are_some(tmp_path: Path) -> None:
    shown, triton = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    policy = parse_policy(shown.encode(), ROOT / "policies" / "shown.yaml", {"OPENAI_API_KEY": "sk-x"})
    assert policy.file.name == "production"
    assert policy.warnings == ()
    triton = "name: triton\n" + triton.replace("/models/Llama-3.1-8B", str(tmp_path))
    policy = parse_policy(triton.encode(), tmp_path / "shown.yaml", {})
    assert isinstance(policy.file.backends["llama-b"], TritonBackendSpec)
    assert policy.warnings == ()


def test_its_commands_exist() -> None:
    commands = set(re.findall(r"(?:^ +|`)forebay (\w+)", README, re.MULTILINE))
    assert commands >= {"check", "explain", "serve", "keys", "config", "schema"}
    assert commands <= {name for name in app if not name.startswith("-")}


def test_its_make_targets_exist() -> None:
    targets = set(re.findall(r"^ +make (\w+)", README, re.MULTILINE))
    rules = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets == {"run", "test"}
    assert targets <= rules
