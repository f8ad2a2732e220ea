"""What a kept answer depends on: the settings of a backend that change what it says, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from backends.scripted import ScriptedBackend
from gateway.snapshot import compile_snapshot
from policies.load import load_policy

POLICY = """\
name: scopes
backends:
  t: {kind: triton, url: "grpc://h:8001", model: ensemble%s}
models:
  m: {backends: [t], context_window: 2048}
"""


def digest_of(path: Path, settings: str) -> str:
    """The digest of what answers of a Triton with these settings besides depend on."""
    path.write_text(POLICY % settings)
    nobody: Any = None
    snapshot = compile_snapshot(
        load_policy(path, {}),
        build_backend=lambda name, spec: ScriptedBackend(name),
        build_attempts=lambda file: nobody,
        balancer=nobody,
        scorer=nobody,
    )
    return snapshot.scopes["m"].settings_digest


@pytest.mark.parametrize(
    "settings",
    ["draft_tokens: 4", "remote_images: true", "chat_template: x", "stop: [x]", "tool_format: none", "adds_bos: false"],
)
def test_answers_of_a_triton_are_not_shared_between_settings_that_change_them(tmp_path: Path, settings: str) -> None:
    path = tmp_path / "policy.yaml"
    assert digest_of(path, ", " + settings) != digest_of(path, "")


@pytest.mark.parametrize("settings", ["max_concurrent: 4", "timeouts: {idle: 3s}", "metrics_model: x"])
def test_answers_of_a_triton_are_shared_between_limits_and_clocks(tmp_path: Path, settings: str) -> None:
    path = tmp_path / "policy.yaml"
    assert digest_of(path, ", " + settings) == digest_of(path, "")
