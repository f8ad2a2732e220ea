"""Reserve before a call, settle after it: the `Ledger` protocol and its in-memory implementation.

Law: for every tenant, settled + live reservations = counter. A reservation is settled or released exactly once,
whatever happens to the call; settling twice, or settling what has expired, changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from policies.tenant import Tenant


class Amounts(msgspec.Struct, frozen=True, kw_only=True):
    """What a call takes, or may take. Tokens are prompt + completion; money is nano-dollars (1e-9 USD)."""

    tokens: int = 0
    cost_nano_usd: int = 0

    def __add__(self, other: Amounts) -> Amounts:
        return Amounts(tokens=self.tokens + other.tokens, cost_nano_usd=self.cost_nano_usd + other.cost_nano_usd)

    def __sub__(self, other: Amounts) -> Amounts:
        return Amounts(tokens=self.tokens - other.tokens, cost_nano_usd=self.cost_nano_usd - other.cost_nano_usd)


class Reservation(msgspec.Struct, frozen=True, kw_only=True):
    """A claim on a tenant's limits, alive until it is settled, released or not renewed for `lease_s`."""

    request_id: str
    tenant_id: str
    amounts: Amounts
    expires_at: float
    """On the ledger's clock, seconds."""


class QuotaExceeded(Exception):
    """A limit has no room for the request. `limit` names it; `retry_after_s` is None where waiting does not help."""

    def __init__(self, message: str, *, limit: str, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.message = message
        self.limit = limit
        self.retry_after_s = retry_after_s


class Ledger(Protocol):
    """Who may spend how much, exact on every exit path. `tests/contract/test_ledgers.py` is the proof."""

    lease_s: float

    async def reserve(self, tenant: Tenant, request_id: str, estimate: Amounts) -> Reservation:
        """Claim `estimate` on all of the tenant's limits at once, or raise `QuotaExceeded` and claim nothing."""

    async def renew(self, reservation: Reservation) -> Reservation:
        """Prolong the lease by `lease_s` from now, at the same amounts. One that has expired is claimed again."""

    async def top_up(self, reservation: Reservation, more: Amounts) -> Reservation:
        """Claim `more` on top, or raise `QuotaExceeded` and leave the reservation as it was."""

    async def settle(self, reservation: Reservation, attempt: int, actual: Amounts) -> None:
        """End the reservation and count `actual` in its stead. Idempotent by request id and attempt."""

    async def release(self, reservation: Reservation) -> None:
        """End the reservation and count nothing. Idempotent."""
