"""What a client says about caching is read as RFC 9111 has it, and never fails a request."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.control import DEFAULT, CacheControl

DIRECTIVES = st.sampled_from(
    [
        "no-cache",
        "no-store",
        "max-age=5",
        "max-age",
        "max-age=",
        "max-age=-1",
        "private",
        "=",
        "",
        " ",
        '"',
        "x=no-store",
    ]
)


@pytest.mark.parametrize(
    ("header", "meaning"),
    [
        (None, DEFAULT),
        ("", DEFAULT),
        ("no-cache", CacheControl(no_cache=True)),
        ("No-Store", CacheControl(no_store=True)),
        (" no-cache ,\tno-store ", CacheControl(no_cache=True, no_store=True)),
        ("max-age=0", CacheControl(max_age_s=0.0)),
        ('max-age="60"', CacheControl(max_age_s=60.0)),
        ("max-age=60, max-age=5", CacheControl(max_age_s=5.0)),
        ('no-cache="set-cookie"', CacheControl(no_cache=True)),
        ("max-age=1.5", DEFAULT),
        ("max-age=-1", DEFAULT),
        ("max-age=ten", DEFAULT),
        ("xno-cache, no-cachex, private", DEFAULT),
    ],
)
def test_a_header_means(header: str | None, meaning: CacheControl) -> None:
    assert CacheControl.parse(header) == meaning


@given(st.text() | st.lists(DIRECTIVES).map(",".join))
def test_no_header_fails_a_request(header: str) -> None:
    control = CacheControl.parse(header)

    assert control.max_age_s is None or control.max_age_s >= 0


@given(st.lists(DIRECTIVES), st.integers(0, 10**400))
def test_what_a_directive_says_counts_wherever_it_stands(around: list[str], age_s: int) -> None:
    control = CacheControl.parse(",".join([*around, "no-store", f"max-age={age_s}"]))

    assert control.no_store
    assert control.max_age_s == float(str(age_s))
    assert control.no_cache == ("no-cache" in around)
