"""A place at an engine is taken once and given back once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.errors import BackendOverloaded
from backends.slots import Flow, ImmediateSlots, Slot

FLOW = Flow(tenant_id="t1", tokens=10)


def places(**limits: int) -> ImmediateSlots:
    slots = ImmediateSlots()
    slots.limits = limits
    return slots


async def test_a_full_backend_is_overloaded_at_once_and_others_are_not() -> None:
    slots = places(a=1)
    taken = await slots.acquire("a", FLOW, deadline=0.0)

    with pytest.raises(BackendOverloaded) as refused:
        await slots.acquire("a", FLOW, deadline=0.0)
    assert (refused.value.backend, refused.value.retry_after_s) == ("a", 1.0)
    for _ in range(100):
        await slots.acquire("b", FLOW, deadline=0.0)

    taken.release()
    await slots.acquire("a", FLOW, deadline=0.0)


@given(limit=st.integers(1, 4), steps=st.lists(st.integers(0, 6), max_size=40))
async def test_never_more_places_than_the_limit_however_often_one_is_given_back(limit: int, steps: list[int]) -> None:
    slots = places(a=limit)
    held: list[Slot] = []
    given_back: list[Slot] = []
    for step in steps:
        if step < len(held):
            given_back.append(held.pop(step))
            given_back[-1].release()
            given_back[step % len(given_back)].release()
        elif len(held) < limit:
            held.append(await slots.acquire("a", FLOW, deadline=0.0))
        else:
            with pytest.raises(BackendOverloaded):
                await slots.acquire("a", FLOW, deadline=0.0)


async def test_a_limit_that_changes_counts_the_places_already_taken() -> None:
    slots = places(a=2)
    taken = [await slots.acquire("a", FLOW, deadline=0.0) for _ in range(2)]
    slots.limits = {"a": 1}
    taken[0].release()
    with pytest.raises(BackendOverloaded):
        await slots.acquire("a", FLOW, deadline=0.0)

    taken[1].release()
    await slots.acquire("a", FLOW, deadline=0.0)
