"""Which replica of a model is asked first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from backends.backend import Backend

B = TypeVar("B", bound=Backend)


def least_loaded(replicas: Sequence[B]) -> list[B]:
    """The replicas by calls in flight, fewest first; equal ones keep the policy's order."""
    return sorted(replicas, key=lambda backend: backend.load.in_flight)
