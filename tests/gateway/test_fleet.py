"""What a policy's backends are built from, and what is loaded for them."""

from __future__ import annotations

import subprocess
import sys

import pytest

ASK = """
import sys
from gateway.fleet import import_for
from policies.routing_policy import OpenAIBackendSpec, TritonBackendSpec
assert "grpc" not in sys.modules, "imported for nothing"
import_for([{spec}])
print("grpc" in sys.modules, "backends.triton.model" in sys.modules)
"""


@pytest.mark.parametrize(
    ("spec", "printed"),
    [
        ("OpenAIBackendSpec(url='http://127.0.0.1:9')", "False False"),
        ("TritonBackendSpec(url='grpc://127.0.0.1:9', model='m')", "True True"),
    ],
)
def test_grpc_is_loaded_for_a_triton_and_for_nothing_else(spec: str, printed: str) -> None:
    """In a process of its own: the rest of this suite has long loaded it."""
    asked = subprocess.run(
        [sys.executable, "-c", ASK.format(spec=spec)], capture_output=True, text=True, check=False, timeout=60
    )
    assert asked.stdout.strip() == printed, asked.stderr
