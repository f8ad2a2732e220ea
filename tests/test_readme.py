"""What the README shows is what there is."""

from __future__ import annotations

import re
from pathlib import Path

from gateway.cli import app
from policies.load import parse_policy

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_its_policy_is_one() -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    policy = parse_policy(shown.encode(), ROOT / "policies" / "shown.yaml", {"OPENAI_API_KEY": "sk-x"})
    assert policy.file.name == "production"
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
