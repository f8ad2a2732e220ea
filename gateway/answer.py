"""What the pipeline returns: who answers, from where, and a source of events to read it from."""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

from backends.attempts import FailedAttempt
from backends.chat import Event, Usage
from policies.admission import Admitted
from routing.decision import Decision

CacheVerdict = Literal["exact", "semantic", "coalesced", "miss", "bypass"]


class Source(Protocol):
    """Events, as they become available."""

    async def take(self) -> list[Event]:
        """All that are there, at least one; empty at the end. Raises what ended the answer early."""

    def leave(self) -> None:
        """Stop listening. Idempotent."""


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a flight when it is committed: the same for everybody who follows it."""

    model: str
    """The *response model*: the card's name of the model that answers."""
    backend: str
    decision: Decision
    failed: tuple[FailedAttempt, ...]
    asked_at: float
    """When the answering attempt was sent; event-loop clock, seconds."""
    committed_at: float
    cost_nano_usd: int | None = None
    """What the answer costs; None where it is still streaming."""
    usage: Usage | None = None


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One request's answer."""

    source: Source
    cache: CacheVerdict
    model: str
    route: str | None
    overhead_s: float
    """Forebay's own share of the time until the answer began: everything but waiting for an engine."""
    admitted: Admitted
    """What is left of the tenant's request rate."""
    head: Head | None = None
    """None for an answer from a cache."""
    age_s: float | None = None
    """Age of a cached answer."""
    saved_nano_usd: int = 0
    """What a cached answer would have cost."""
    miss_reason: str | None = None

    @property
    def cost_nano_usd(self) -> int | None:
        """What this request costs its tenant, where it is known before the first byte."""
        if self.head is None or self.cache == "coalesced":
            return 0
        return self.head.cost_nano_usd
