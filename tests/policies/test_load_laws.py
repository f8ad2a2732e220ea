"""Laws of the loader: what it writes it reads, whatever it is given it answers, and msgspec agrees."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from policies import yaml_source
from policies.cache_policy import CachePolicy, ExactCachePolicy
from policies.duration import Duration
from policies.load import parse_policy
from policies.mistakes import Findings, PolicyError
from policies.money import UsdPer1M
from policies.routing_policy import (
    BackendTimeoutsSpec,
    FixedRouteSpec,
    LlamaCppBackendSpec,
    ModelSpec,
    OpenAIBackendSpec,
    PolicyFile,
    PriceSpec,
    RetriesSpec,
    ScriptedBackendSpec,
    ThresholdRouteSpec,
    TimeoutsSpec,
)
from policies.yaml_source import core_value, parse_yaml
from tests.policies.policy_text import GOOD, SECRET, dump, mistakes_in, write

NAMES = ("a", "no", "1e3", "gpt-4.1", "org/model:7b", "null", "true", "x_1")

durations = st.one_of(st.integers(0, 10**6), st.floats(0, 10**6)).map(Duration)
prices = st.integers(0, 10**18 - 1).map(UsdPer1M)
counts = st.integers(1, 10**9)
ratios = st.floats(0, 1)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


@st.composite
def timeouts(draw: st.DrawFn) -> TimeoutsSpec:
    total = draw(st.floats(1, 10**6))
    phases = (Duration(draw(st.floats(0.001, 1)) * total) for _ in range(3))
    return TimeoutsSpec(connect=next(phases), first_token=next(phases), idle=next(phases), total=Duration(total))


def own_timeouts() -> st.SearchStrategy[BackendTimeoutsSpec]:
    """A backend's: all of its clocks, since those it leaves out are the policy's."""
    return timeouts().map(
        lambda spec: BackendTimeoutsSpec(
            connect=spec.connect, first_token=spec.first_token, idle=spec.idle, total=spec.total
        )
    )


backends = st.one_of(
    st.builds(
        OpenAIBackendSpec,
        url=st.sampled_from(["http://127.0.0.1:1/v1", "https://example.test/v1"]),
        model=st.none() | texts,
        api_key=st.none() | st.sampled_from(["sk-1", "${not-a-variable}", "no"]),
        headers=st.dictionaries(st.sampled_from(["X-A", "accept"]), st.sampled_from(["", "1", "a: b"])),
        max_concurrent=st.none() | counts,
        max_n=st.none() | counts,
        timeouts=st.none() | own_timeouts(),
    ),
    st.builds(
        LlamaCppBackendSpec,
        url=st.just("http://127.0.0.1:2"),
        threads=counts,
        slots=counts,
        chat_template=st.none() | texts,
        stop=st.lists(texts, max_size=3).map(tuple),
    ),
    st.builds(
        ScriptedBackendSpec,
        answer=texts,
        first_token_delay=durations,
        fault=st.sampled_from(["none", "hang", "reset"]),
        timeouts=st.none() | own_timeouts(),
    ),
)


@st.composite
def policy_files(draw: st.DrawFn) -> PolicyFile:
    known = draw(st.dictionaries(st.sampled_from(NAMES), backends, min_size=1, max_size=3))
    some_backends = st.lists(st.sampled_from(sorted(known)), min_size=1, max_size=3, unique=True).map(tuple)
    model = st.builds(
        ModelSpec,
        backends=some_backends,
        context_window=st.just(10**9),
        max_output_tokens=st.none() | counts,
        price=st.builds(PriceSpec, input=prices, output=prices, cached_input=st.none() | prices),
        capabilities=st.lists(st.sampled_from(["tools", "json_schema", "logprobs", "vision"]), unique=True).map(tuple),
        owned_by=texts,
    )
    models = draw(st.dictionaries(st.sampled_from(NAMES), model, min_size=2, max_size=4))
    name = st.sampled_from(sorted(models))
    fixed = st.builds(FixedRouteSpec, model=name, fallbacks=st.lists(name, max_size=2).map(tuple))
    small, large = draw(st.permutations(sorted(models)))[:2]
    threshold = st.builds(
        ThresholdRouteSpec,
        small=st.just(small),
        large=st.just(large),
        threshold=ratios,
        fallbacks=st.none() | st.lists(name, max_size=2).map(tuple),
    )
    return PolicyFile(
        name=draw(st.sampled_from(NAMES)),
        backends=known,
        models=models,
        routes=draw(st.dictionaries(st.sampled_from(["auto", "fast", "on"]), fixed | threshold)),
        cache=draw(st.builds(CachePolicy, exact=st.builds(ExactCachePolicy, ttl=durations, enabled=st.booleans()))),
        timeouts=draw(timeouts()),
        retries=draw(st.builds(RetriesSpec, max_attempts=counts, budget=ratios)),
    )


@settings(deadline=None, max_examples=40)
@given(policy_files())
def test_what_is_written_down_is_read_back(file: PolicyFile) -> None:
    policy = parse_policy(dump(file).encode(), Path("policy.yaml"), {})

    assert policy.file == file
    assert parse_policy(dump(policy.file).encode(), Path("elsewhere.yaml"), {}).version == policy.version


@settings(deadline=None, max_examples=40)
@given(policy_files(), policy_files(), st.booleans())
def test_two_files_have_one_version_exactly_when_they_say_the_same(
    one: PolicyFile, another: PolicyFile, same: bool
) -> None:
    texts = dump(one), dump(one if same else another, sort_keys=True)
    first, second = (parse_policy(text.encode(), Path("policy.yaml"), {}) for text in texts)

    assert (first.version == second.version) == (first.file == second.file)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """With the weights that GOOD names in it."""
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), GOOD)
        yield Path(name)


@settings(deadline=None, max_examples=250)
@given(
    st.integers(0, len(GOOD) - 1), st.characters() | st.sampled_from("\n\t\r :{}[]&*!|>'\"%@`#-?,$~<.0") | st.just("")
)
@example(0, "\ufeff")
@example(GOOD.index("\n"), "\r")
@example(GOOD.index("\n"), "\x85")
@example(GOOD.index("\n"), "\x0c")
def test_one_wrong_character_is_a_policy_or_a_mistake_in_a_line_of_the_file(
    folder: Path, index: int, character: str
) -> None:
    text = GOOD[:index] + character + GOOD[index + 1 :]

    for mistake in mistakes_in(text.encode("utf-8", "surrogatepass"), folder):
        assert 1 <= mistake.line <= len(text.splitlines())
        assert mistake.column >= 1
        assert SECRET not in str(mistake)
        assert len(str(mistake).splitlines()) == 1


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_policy_or_a_mistake(content: bytes) -> None:
    with pytest.raises(PolicyError):
        parse_policy(content, Path("policy.yaml"), {})


@settings(deadline=None, max_examples=120)
@given(
    st.sampled_from(["2048", "0.5", "5m", "true", "none", "[1e3]", "0.0375", "small-1", "2", "threshold", "scripted"]),
    st.sampled_from(
        ["0", "-1", "1", "2.0", "1e3", "''", "~", "no", "true", ".inf", "[]", "{}", "[a]", "0x10", "1e99", "x"]
    ),
)
def test_what_the_walk_accepts_msgspec_accepts(folder: Path, old: str, new: str) -> None:
    text = GOOD.replace(f" {old}\n", f" {new}\n")

    for mistake in mistakes_in(text.encode(), folder):
        assert "does not fit a policy at" not in str(mistake)  # what msgspec alone would have refused


def test_both_parsers_of_yaml_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = parse_yaml(GOOD, Findings("policy.yaml"))
    monkeypatch.setattr(yaml_source, "_Loader", yaml.SafeLoader)

    assert parse_yaml(GOOD, Findings("policy.yaml")) == fast


@given(st.decimals(0, Decimal("999999999.999999999"), places=9, allow_nan=False, allow_infinity=False))
def test_a_price_is_exact_to_the_nano_dollar(usd: Decimal) -> None:
    assert UsdPer1M.parse(f"{usd:f}") == int(usd * 10**9)


@given(st.floats(allow_nan=True) | st.integers() | st.text() | st.booleans() | st.none())
def test_a_price_is_a_price_or_a_value_error(value: object) -> None:
    try:
        price = UsdPer1M.parse(value)
    except ValueError:
        return
    assert 0 <= price < 10**18
    assert math.isclose(price, float(str(value)) * 1e9, rel_tol=1e-9, abs_tol=1e-9)


@given(
    st.floats(allow_nan=True) | st.integers() | st.text() | st.booleans() | st.from_regex(r"[0-9.]{1,400}(ms|s|m|h|d)?")
)
def test_a_duration_is_finite_and_not_negative_or_a_value_error(value: object) -> None:
    try:
        duration = Duration.parse(value)
    except ValueError:
        return
    assert 0 <= duration < math.inf


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("250ms", 0.25), ("30s", 30), ("5m", 300), ("1.5h", 5400), ("7d", 604_800), ("12", 12), (3, 3)],
)
def test_a_duration_is_in_the_units_that_it_names(text: object, seconds: float) -> None:
    assert Duration.parse(text) == seconds


@given(st.integers(-(10**17), 10**17) | st.floats(allow_nan=False, allow_infinity=False) | st.booleans() | st.none())
def test_what_json_says_yaml_says(value: object) -> None:
    assert core_value(msgspec.json.encode(value).decode()) == value
