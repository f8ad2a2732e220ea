"""A short directory for Unix sockets, and the small real model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.demo_models import SMOLLM2, fetch

_ROOT = Path(__file__).parents[2]


@pytest.fixture
def runtime() -> Iterator[Path]:
    """Not `tmp_path`, whose name alone can be longer than the path of a Unix socket may be."""
    with tempfile.TemporaryDirectory(prefix="fb") as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct, fetched once into `.forebay/models` of the checkout."""
    return fetch(SMOLLM2, _ROOT / ".forebay" / "models", print)
