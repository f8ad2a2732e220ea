"""What is particular to the ledger in memory; the rest is in `tests/contract/test_ledgers.py`."""

from __future__ import annotations

import pytest

from policies.ledger import MAX_EXPIRED, NOTHING, Amounts, MemoryLedger, QuotaExceeded
from policies.tenant import Tenant

TENANT = Tenant(id="t", organisation_id="o", key_id="k")
ONE = Amounts(tokens=1)


def test_amounts_add_and_subtract_each_for_itself() -> None:
    one, other = Amounts(tokens=3, cost_nano_usd=50), Amounts(tokens=1, cost_nano_usd=70)

    assert one + other == Amounts(tokens=4, cost_nano_usd=120)
    assert one + other - other == one


async def test_of_expired_reservations_only_so_many_are_remembered_and_the_youngest() -> None:
    clock = [0.0]
    ledger = MemoryLedger(now=lambda: clock[0], lease_s=1.0)
    held = [await ledger.reserve(TENANT, f"r{number}", ONE) for number in range(MAX_EXPIRED + 2)]
    clock[0] = 1.0
    await ledger.reserve(TENANT, "another", NOTHING)
    for reservation in held:
        await ledger.settle(reservation, ONE)

    assert ledger.settled("t") == Amounts(tokens=MAX_EXPIRED)


async def test_a_denial_says_what_the_limit_is() -> None:
    ledger = MemoryLedger(now=lambda: 0.0, limit_for=lambda tenant: Amounts(tokens=5, cost_nano_usd=2_500_000_000))
    with pytest.raises(QuotaExceeded, match="the limit of 5 tokens is reached"):
        await ledger.reserve(TENANT, "r1", Amounts(tokens=6))
    with pytest.raises(QuotaExceeded, match=r"the budget of \$2.50 is spent") as denied:
        await ledger.reserve(TENANT, "r1", Amounts(cost_nano_usd=2_500_000_001))
    assert denied.value.retry_after_s is None
