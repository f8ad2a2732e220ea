"""Law: whoever times out, is cancelled or asks for more, a reply reaches the caller who asked for it, or nobody."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import anyio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policies.shared_state import Limits, SharedState, SharedStateRefused, SharedStateUnavailable
from tests.valkey import Valkey, running

NEVER_OPEN = Limits(max_timeouts=1_000_000)


@dataclass(frozen=True)
class Caller:
    """Asks for `size` bytes with its own number in front, and may lose patience or be cancelled."""

    command: str
    size: int
    within_s: float
    cancelled_after_turns: int | None


callers = st.lists(
    st.builds(
        Caller,
        command=st.sampled_from(["ECHO", "ECHO", "ECHO", "EVAL", "NONSENSE", "SLEEP"]),
        size=st.sampled_from([0, 1, 100, 20_000]),
        within_s=st.sampled_from([0.0, 0.001, 5.0, 5.0, 5.0]),
        cancelled_after_turns=st.one_of(st.none(), st.none(), st.integers(0, 6)),
    ),
    min_size=1,
    max_size=40,
)


async def ask(shared: SharedState, number: int, caller: Caller) -> None:
    own = f"{number}:".encode() + b"x" * caller.size
    command: tuple[bytes | str | int, ...]
    match caller.command:
        case "EVAL":
            command = ("EVAL", "return ARGV[1]", 0, own)
        case "SLEEP":
            command = ("DEBUG", "SLEEP", "0.002")
        case name:
            command = (name, own)
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            if caller.cancelled_after_turns is not None:
                group.start_soon(cancel_later, scope, caller.cancelled_after_turns)
            try:
                reply = await shared.execute(*command, within_s=caller.within_s)
            except SharedStateUnavailable:
                assert caller.within_s < 1.0
            except SharedStateRefused as refused:
                assert (caller.command, f"'{number}:" in str(refused)) == ("NONSENSE", True)  # noqa: PT017 - one of three
            else:
                assert reply == (b"OK" if caller.command == "SLEEP" else own)
            group.cancel_scope.cancel()


async def cancel_later(scope: anyio.CancelScope, turns: int) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)
    scope.cancel()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(waves=st.lists(callers, min_size=1, max_size=3))
async def test_no_mixture_of_timeouts_and_cancellations_lets_a_reply_reach_another_caller(
    valkey: Valkey, waves: list[list[Caller]]
) -> None:
    async with running(valkey.url, limits=NEVER_OPEN) as (shared, transitions):
        number = 0
        for wave in waves:
            async with anyio.create_task_group() as group:
                for caller in wave:
                    number += 1
                    group.start_soon(ask, shared, number, caller)

        assert await shared.execute("ECHO", "in step", within_s=5.0) == b"in step"
        assert transitions.states == ["closed"]
