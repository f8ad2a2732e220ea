"""A backend that fails in a row is asked last for a while; retries cost what the traffic can afford."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.errors import (
    BackendError,
    BackendFailed,
    BackendOverloaded,
    BackendProtocolError,
    BackendRefusedCredentials,
    BackendTimeout,
    BackendUnreachable,
    RequestRejected,
)
from backends.health import Ejections, RetryBudget

FAULT = BackendFailed("down")
UPSTREAM = [
    FAULT,
    BackendUnreachable("gone"),
    BackendTimeout("slow", phase="first_token"),
    BackendProtocolError("nonsense"),
    BackendRefusedCredentials("no"),
]
NOT_UPSTREAM = [BackendOverloaded("busy", retry_after_s=9.0), RequestRejected("bad request")]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def after_faults(count: int, error: BackendError = FAULT) -> tuple[Ejections, Clock, list[bool]]:
    clock = Clock()
    ejections = Ejections(now=clock)
    told = []
    for _ in range(count):
        ejections.began("a")
        told.append(ejections.failed("a", error))
    return ejections, clock, told


@pytest.mark.parametrize("error", UPSTREAM, ids=lambda error: type(error).__name__)
def test_five_upstream_faults_in_a_row_eject(error: BackendError) -> None:
    ejections, _, told = after_faults(5, error)

    assert told == [False, False, False, False, True]
    assert ejections.is_ejected("a")
    assert ejections.order(["a", "b"]) == [1, 0]
    assert ejections.order(["a"]) == [0]  # the last one standing is never out of reach


@pytest.mark.parametrize("error", NOT_UPSTREAM, ids=lambda error: type(error).__name__)
def test_what_is_no_fault_of_the_upstream_never_ejects(error: BackendError) -> None:
    ejections, _, told = after_faults(50, error)

    assert not any(told)
    assert not ejections.is_ejected("a")


def test_an_answer_that_came_to_its_end_breaks_the_row() -> None:
    ejections, _, _ = after_faults(4)
    ejections.began("a")
    ejections.committed("a")
    ejections.completed("a")

    assert not any(ejections.failed("a", FAULT) for _ in range(4))
    assert ejections.failed("a", FAULT)


def test_answers_that_all_break_off_eject_although_each_of_them_began() -> None:
    ejections = Ejections(now=Clock())
    told = []
    for _ in range(5):
        ejections.began("a")
        ejections.committed("a")
        told.append(ejections.failed("a", FAULT))

    assert told == [False, False, False, False, True]


def test_an_ejection_ends_with_its_time_and_one_probe_decides() -> None:
    ejections, clock, _ = after_faults(5)
    clock.now += 4.999
    assert ejections.is_ejected("a")

    clock.now += 0.001
    assert ejections.order(["a", "b"]) == [0, 1]
    ejections.began("a")
    assert ejections.order(["a", "b"]) == [1, 0]  # the others prefer the rest while the probe is on its way

    ejections.committed("a")
    assert ejections.order(["a", "b"]) == [0, 1]


def test_a_probe_that_fails_ejects_at_once_and_for_twice_as_long_up_to_the_cap() -> None:
    ejections, clock, _ = after_faults(5)
    for lasted_s in (5, 10, 20, 40, 60, 60):
        clock.now += lasted_s - 0.001
        assert ejections.is_ejected("a"), lasted_s
        clock.now += 0.001
        assert not ejections.is_ejected("a"), lasted_s
        ejections.began("a")
        assert ejections.failed("a", FAULT)


def test_a_probe_that_says_nothing_lets_the_next_one_probe() -> None:
    ejections, clock, _ = after_faults(5)
    for end in (lambda: ejections.abandoned("a"), lambda: ejections.failed("a", NOT_UPSTREAM[0])):
        clock.now += 5
        ejections.began("a")
        assert ejections.is_ejected("a")
        end()
        assert not ejections.is_ejected("a")


def test_of_two_who_probe_one_that_says_nothing_leaves_the_other_to_decide() -> None:
    ejections, clock, _ = after_faults(5)
    clock.now += 5.0
    ejections.began("a")
    ejections.began("a")  # nobody else was left
    ejections.abandoned("a")
    assert ejections.probe_due(["a"]) is None
    ejections.abandoned("a")
    assert ejections.probe_due(["a"]) == 0


def test_a_probe_is_due_when_an_ejection_is_over_until_somebody_makes_it() -> None:
    ejections, clock, _ = after_faults(5)
    assert ejections.probe_due(["b", "a"]) is None
    assert ejections.among(["b", "a"]) == {1}

    clock.now += 5
    assert ejections.probe_due(["b", "a"]) == 1
    assert ejections.among(["b", "a"]) == set()

    ejections.began("a")
    assert ejections.probe_due(["b", "a"]) is None
    assert ejections.among(["b", "a"]) == {1}

    ejections.committed("a")
    assert ejections.probe_due(["b", "a"]) is None
    assert ejections.among(["b", "a"]) == set()


def test_failures_that_did_not_eject_call_for_no_probe() -> None:
    ejections, _, _ = after_faults(4)
    assert ejections.probe_due(["a"]) is None
    assert ejections.among(["a"]) == set()


def test_one_outage_that_many_calls_meet_is_one_ejection() -> None:
    ejections, clock, _ = after_faults(5)
    assert not any(ejections.failed("a", FAULT) for _ in range(100))

    clock.now += 5
    assert not ejections.is_ejected("a")


def test_a_backend_that_replaces_another_of_its_name_begins_anew() -> None:
    ejections, _, _ = after_faults(5)
    ejections.forget("a")
    ejections.forget("never heard of")

    assert not ejections.is_ejected("a")


def test_an_answer_of_an_ejected_backend_brings_it_back() -> None:
    ejections, _, _ = after_faults(5)
    ejections.began("a")
    ejections.committed("a")

    assert not ejections.is_ejected("a")


@given(st.lists(st.sampled_from("abc"), max_size=6), st.sets(st.sampled_from("abc")))
def test_order_moves_the_ejected_back_and_nobody_else(names: list[str], down: set[str]) -> None:
    ejections = Ejections(now=Clock(), threshold=1)
    for name in down:
        ejections.failed(name, FAULT)

    ordered = ejections.order(names)

    assert sorted(ordered) == list(range(len(names)))
    assert [i for i in ordered if names[i] not in down] == [i for i in range(len(names)) if names[i] not in down]
    assert [names[i] in down for i in ordered] == sorted(name in down for name in names)


@given(st.lists(st.booleans(), max_size=300), st.sampled_from([0.0, 0.1, 0.2, 1.0]))
def test_retries_never_exceed_their_share_of_requests_and_the_first_ten(steps: list[bool], ratio: float) -> None:
    budget = RetryBudget(ratio=ratio)
    requests = retries = 0
    for is_request in steps:
        if is_request:
            budget.earn()
            requests += 1
        else:
            retries += budget.spend()
        assert retries <= 10 + ratio * requests + 1e-6


def test_a_fifth_of_the_requests_may_be_retried_and_an_idle_time_saves_up_ten() -> None:
    budget = RetryBudget(ratio=0.2)
    assert [budget.spend() for _ in range(12)] == [True] * 10 + [False] * 2

    spent = 0
    for _ in range(1000):
        budget.earn()
        spent += budget.spend()
    assert 195 <= spent <= 200

    for _ in range(1000):
        budget.earn()
    assert sum(budget.spend() for _ in range(100)) == 10
