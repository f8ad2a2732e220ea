"""The seam of the approximate tier: a request that means the same as one answered before.

Only `NoSemanticTier` stands behind it today: every lookup is a miss that costs nothing.
"""

from __future__ import annotations

from typing import Protocol

from backends.chat import ChatRequest
from cache.entry import Entry
from cache.exact import Lookup, Miss
from cache.key import AnswerScope
from policies.tenant import Tenant


class SemanticTier(Protocol):
    """Answers by meaning, within one tenant and one namespace, at a stated rate of wrong hits."""

    async def lookup(self, tenant: Tenant, request: ChatRequest, scope: AnswerScope, *, deadline: float) -> Lookup:
        """A hit, or a miss with its reason. Never raises, never outlasts `deadline` (event-loop clock)."""

    async def store(
        self, tenant: Tenant, request: ChatRequest, scope: AnswerScope, entry: Entry, *, ttl_s: float
    ) -> str | None:
        """Keep an entry. The reason it was not kept, or None."""


class NoSemanticTier:
    async def lookup(self, tenant: Tenant, request: ChatRequest, scope: AnswerScope, *, deadline: float) -> Lookup:
        return Miss(reason="absent_tier")

    async def store(
        self, tenant: Tenant, request: ChatRequest, scope: AnswerScope, entry: Entry, *, ttl_s: float
    ) -> str | None:
        return "absent_tier"
