"""What is known of a backend's time to its first token: the newest weighs most, and old news fades."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.latency import FirstTokenTimes


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def known(*readings: tuple[float, float]) -> tuple[FirstTokenTimes, Clock]:
    """Times of `a` after readings of (seconds later, first token seconds)."""
    clock = Clock()
    times = FirstTokenTimes(now=clock)
    for later_s, first_token_s in readings:
        clock.now += later_s
        times.committed("a", first_token_s)
    return times, clock


def test_nothing_is_known_of_a_backend_that_has_not_answered() -> None:
    times, _ = known((0, 1.0))
    assert times.among(["b", "a"]) == [None, 1.0]


def test_an_average_halves_in_ten_seconds_without_news_and_is_forgotten_in_the_end() -> None:
    times, clock = known((0, 4.0))
    clock.now += 10
    assert times.of("a") == pytest.approx(2.0)
    clock.now += 200
    assert times.of("a") is None


def test_after_ten_seconds_a_reading_weighs_half_and_at_once_a_tenth() -> None:
    assert known((0, 4.0), (10, 1.0))[0].of("a") == pytest.approx(2.5)
    assert known((0, 4.0), (0, 1.0))[0].of("a") == pytest.approx(3.7)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0.01, 100)), min_size=1))
def test_an_average_is_never_outside_what_was_read(readings: list[tuple[float, float]]) -> None:
    average = known(*readings)[0].of("a")
    assert average is not None
    assert min(first for _, first in readings) * 0.999 <= average <= max(first for _, first in readings) * 1.001


def test_failing_fast_counts_as_slow_and_never_makes_a_slow_one_faster() -> None:
    times, _ = known((0, 0.1))
    times.failed("a", 0.001)
    assert times.of("a") == 1.0
    times.failed("a", 30.0)
    times.failed("a", 0.001)
    assert times.of("a") == 30.0


def test_a_client_that_gave_up_tells_something_only_where_it_waited_longer_than_usual() -> None:
    times, _ = known((0, 1.0))
    times.abandoned("a", 0.5)
    assert times.of("a") == 1.0
    times.abandoned("a", 11.0)
    assert times.of("a") == pytest.approx(2.0)


def test_a_backend_that_replaces_another_of_its_name_is_not_judged_by_it() -> None:
    times, _ = known((0, 1.0))
    times.forget("a")
    times.forget("never heard of")
    assert times.of("a") is None
