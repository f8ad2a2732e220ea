"""Without limits everybody is admitted, at once."""

from __future__ import annotations

import asyncio

from policies.admission import Admitted, Unlimited
from policies.tenant import Tenant


async def test_everybody_is_admitted_without_a_turn_of_the_loop() -> None:
    tenant = Tenant(id="t", organisation_id="o", key_id="k")
    turned: list[bool] = []
    asyncio.get_running_loop().call_soon(turned.append, True)

    assert await Unlimited().admit(tenant) == Admitted()
    assert turned == []


async def test_an_admission_may_be_left_unawaited() -> None:
    begun = Unlimited().admit(Tenant(id="t", organisation_id="o", key_id="k"))
    del begun
