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


NOTHING = Amounts()

_Place = tuple[str, str, int]
"""Which reservation: tenant, request, attempt."""

MAX_EXPIRED = 10_000
"""Expired reservations that a late settle can still find."""


class Reservation(msgspec.Struct, frozen=True, kw_only=True):
    """A claim on a tenant's limits, alive until it is settled, released or not renewed for `lease_s`."""

    request_id: str
    attempt: int
    """Which paid attempt of the request: 0 for the first. A cascade reserves for each model it asks."""
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

    async def reserve(self, tenant: Tenant, request_id: str, estimate: Amounts, *, attempt: int = 0) -> Reservation:
        """Claim `estimate` on all of the tenant's limits at once, or raise `QuotaExceeded` and claim nothing."""

    async def renew(self, reservation: Reservation) -> Reservation:
        """Prolong the lease by `lease_s` from now, at the same amounts. One that has expired is claimed again."""

    async def top_up(self, tenant: Tenant, reservation: Reservation, more: Amounts) -> Reservation:
        """Claim `more` on top and renew, or raise `QuotaExceeded` and leave the reservation as it was.

        One that has expired is claimed again as a whole, if there is room for the whole.
        """

    async def settle(self, reservation: Reservation, actual: Amounts) -> None:
        """End the reservation and count `actual` in its stead. Idempotent by request id and attempt.

        One that has expired is settled all the same: an answer that was given is never free.
        """

    async def release(self, reservation: Reservation) -> None:
        """End the reservation and count nothing. Idempotent."""


class MemoryLedger:
    """Counters of one process, lost with it: for a laptop without limits, and as the model that laws are tested on."""

    def __init__(
        self,
        *,
        now: Callable[[], float],
        lease_s: float = 60.0,
        limit_for: Callable[[Tenant], Amounts | None] = lambda tenant: None,
    ) -> None:
        self.lease_s = lease_s
        self._now = now
        self._limit_for = limit_for
        self._live: dict[_Place, Reservation] = {}
        """In the order in which they expire: whoever begins a lease, or begins it anew, goes to the end."""
        self._expired: dict[_Place, Reservation] = {}
        self._counters: dict[str, Amounts] = {}
        self._settled: dict[str, Amounts] = {}

    def counter(self, tenant_id: str) -> Amounts:
        """What counts against the tenant's limits."""
        return self._counters.get(tenant_id, NOTHING)

    def settled(self, tenant_id: str) -> Amounts:
        return self._settled.get(tenant_id, NOTHING)

    def live(self, tenant_id: str) -> tuple[Reservation, ...]:
        return tuple(reservation for reservation in self._live.values() if reservation.tenant_id == tenant_id)

    async def reserve(self, tenant: Tenant, request_id: str, estimate: Amounts, *, attempt: int = 0) -> Reservation:
        self._expire()
        place = (tenant.id, request_id, attempt)
        held = self._live.get(place)
        if held is not None:
            return held
        self._check(tenant, estimate)
        self._expired.pop(place, None)
        return self._hold(place, estimate)

    async def renew(self, reservation: Reservation) -> Reservation:
        held = self._take(reservation)
        return reservation if held is None else self._hold(_place(held), held.amounts)

    async def top_up(self, tenant: Tenant, reservation: Reservation, more: Amounts) -> Reservation:
        self._expire()
        lapsed = self._expired.get(_place(reservation))
        self._check(tenant, more if lapsed is None else lapsed.amounts + more)
        held = self._take(reservation)
        return reservation if held is None else self._hold(_place(held), held.amounts + more)

    async def settle(self, reservation: Reservation, actual: Amounts) -> None:
        if self._take(reservation) is not None:
            self._add(reservation.tenant_id, actual)
            self._settled[reservation.tenant_id] = self.settled(reservation.tenant_id) + actual

    async def release(self, reservation: Reservation) -> None:
        self._take(reservation)

    def _check(self, tenant: Tenant, more: Amounts) -> None:
        limit = self._limit_for(tenant)
        if limit is None:
            return
        wanted = self.counter(tenant.id) + more
        if wanted.tokens > limit.tokens:
            raise QuotaExceeded(f"the limit of {limit.tokens} tokens is reached", limit="tokens", retry_after_s=None)
        if wanted.cost_nano_usd > limit.cost_nano_usd:
            dollars = f"${limit.cost_nano_usd / 1e9:.2f}"
            raise QuotaExceeded(f"the budget of {dollars} is spent", limit="budget", retry_after_s=None)

    def _hold(self, place: _Place, amounts: Amounts) -> Reservation:
        """Claim `amounts` for a lease that begins now."""
        tenant_id, request_id, attempt = place
        held = self._live[place] = Reservation(
            request_id=request_id,
            attempt=attempt,
            tenant_id=tenant_id,
            amounts=amounts,
            expires_at=self._now() + self.lease_s,
        )
        self._add(tenant_id, amounts)
        return held

    def _take(self, reservation: Reservation) -> Reservation | None:
        """Remove the reservation, live or expired, and its claim. None where it has ended already."""
        place = _place(reservation)
        held = self._live.pop(place, None)
        if held is None:
            return self._expired.pop(place, None)
        self._add(held.tenant_id, NOTHING - held.amounts)
        return held

    def _expire(self) -> None:
        now = self._now()
        while self._live and (first := next(iter(self._live.values()))).expires_at <= now:
            self._take(first)
            self._expired[_place(first)] = first
        while len(self._expired) > MAX_EXPIRED:
            del self._expired[next(iter(self._expired))]

    def _add(self, tenant_id: str, amounts: Amounts) -> None:
        self._counters[tenant_id] = self.counter(tenant_id) + amounts


def _place(reservation: Reservation) -> _Place:
    return reservation.tenant_id, reservation.request_id, reservation.attempt
