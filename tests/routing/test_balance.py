"""Replicas are balanced by what they have to do, and a conversation finds the replica that knows its beginning."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from backends.attempts import Target
from backends.backend import Load
from backends.catalog import ModelCard
from backends.chat import ChatRequest, Message
from backends.errors import BackendFailed
from backends.health import Ejections
from backends.latency import FirstTokenTimes
from backends.scripted import ScriptedBackend
from routing.balance import BOUND, Affinity, Balancer, Replicas, affinity_of, calls_under_way
from tests.calls import make_request

CARD = ModelCard(name="m", context_window_tokens=100)
FAULT = BackendFailed("down")
LONG = "You are a patient assistant. " * 50


class Replica(ScriptedBackend):
    """A backend whose load is said by the test."""

    said = Load()

    @property
    def load(self) -> Load:
        return self.said


class House:
    """The replicas of one model, `names` in the policy's order, and a balancer over them."""

    def __init__(self, names: Sequence[str], loads: Mapping[str, Load] | None = None, *, seed: int = 0) -> None:
        self.clock = 1000.0
        self.replica = {name: Replica(name) for name in names}
        for name, load in (loads or {}).items():
            self.replica[name].said = load
        self.ejections = Ejections(now=lambda: self.clock, threshold=1)
        self.first_tokens = FirstTokenTimes(now=lambda: self.clock)
        self.random = random.Random(seed)
        self.balancer = Balancer(
            ejections=self.ejections, first_tokens=self.first_tokens, random=lambda: self.random.random()
        )
        self.replicas = Replicas(
            [Target(card=CARD, backend=backend) for backend in self.replica.values()], affinity=True
        )

    def order(self, affinity: Affinity | None = None) -> list[str]:
        return [target.backend.name for target in self.balancer.order(self.replicas, affinity)]

    def first(self, affinity: Affinity | None = None) -> str:
        return self.order(affinity)[0]

    def shares(self, draws: int = 400) -> dict[str, float]:
        """How often each is chosen without affinity."""
        chosen = [self.first() for _ in range(draws)]
        return {name: chosen.count(name) / draws for name in self.replica}


names_of = st.integers(1, 9).map(lambda count: [f"replica-{number}" for number in range(count)])
load = st.builds(
    Load,
    in_flight=st.integers(0, 30),
    queued=st.none() | st.integers(0, 30),
    running=st.none() | st.integers(0, 30),
    kv_cache_ratio=st.none() | st.floats(0, 1),
    in_flight_then=st.integers(0, 30),
)
position = st.integers(0, 2**64 - 1)
affinities = st.none() | st.builds(Affinity, position, position)
speeds = st.none() | st.floats(0.001, 60.0)


@st.composite
def houses(draw: st.DrawFn) -> House:
    names = draw(names_of)
    house = House(names, {name: draw(load) for name in names}, seed=draw(st.integers(0, 2**32)))
    for name in names:
        if (first_token_s := draw(speeds)) is not None:
            house.first_tokens.committed(name, first_token_s)
    return house


@given(houses(), affinities, st.data())
def test_every_replica_is_listed_once_and_those_that_are_ejected_last(
    house: House, affinity: Affinity | None, data: st.DataObject
) -> None:
    down = data.draw(st.sets(st.sampled_from(list(house.replica))))
    for name in down:
        house.ejections.failed(name, FAULT)

    order = house.order(affinity)

    assert sorted(order) == sorted(house.replica)
    assert [name in down for name in order] == sorted(name in down for name in order)


@given(houses(), affinities)
def test_when_all_are_ejected_the_choice_is_as_if_none_were(house: House, affinity: Affinity | None) -> None:
    state = house.random.getstate()
    before = house.order(affinity)
    for name in house.replica:
        house.ejections.failed(name, FAULT)
    house.random.setstate(state)

    assert house.order(affinity) == before


@given(houses(), affinities, st.data())
def test_more_load_never_makes_a_replica_the_choice(
    house: House, affinity: Affinity | None, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(list(house.replica)))
    replica = house.replica[name]
    more = data.draw(st.sampled_from(["in_flight", "queued", "running", "kv_cache_ratio", "first token"]))
    state = house.random.getstate()
    before = house.first(affinity)
    assume(before != name)

    match more:
        case "first token":
            assume(affinity is None and house.first_tokens.of(name) is not None)
            assume(all(house.first_tokens.of(other) is not None for other in house.replica))
            house.first_tokens.failed(name, 61.0)
        case "kv_cache_ratio":
            replica.said = msgspec.structs.replace(replica.said, kv_cache_ratio=1.0)
        case _:
            known = getattr(replica.said, more) or 0
            replica.said = msgspec.structs.replace(replica.said, **{more: known + data.draw(st.integers(1, 50))})
    house.random.setstate(state)

    assert house.first(affinity) != name


@given(houses(), st.builds(Affinity, position, position))
def test_affinity_never_takes_a_replica_above_its_bound(house: House, affinity: Affinity) -> None:
    assume(len(house.replica) > 1)
    first = house.first(affinity)
    calls = {name: calls_under_way(replica.said) for name, replica in house.replica.items()}
    weights = dict(zip(house.replica, house.balancer._state(house.replicas, house.replicas.everyone)[1], strict=True))
    level = (sum(calls.values()) + 1) / sum(1 / weight**2 for weight in weights.values())

    assert calls[first] < math.ceil(BOUND * level / weights[first] ** 2 * (1 + 1e-9))


@given(st.lists(st.integers(0, 40), min_size=2, max_size=9), position)
def test_among_equals_no_replica_takes_more_than_its_share_and_a_quarter(calls: list[int], at: int) -> None:
    house = House(
        [f"replica-{number}" for number in range(len(calls))],
        {f"replica-{number}": Load(in_flight=count) for number, count in enumerate(calls)},
    )
    first = house.first(Affinity(at, at))

    assert house.replica[first].load.in_flight + 1 <= math.ceil(1.25 * (sum(calls) + 1) / len(calls))


@given(names_of, st.lists(position, min_size=1, max_size=50), st.integers(0, 8))
def test_a_replica_that_comes_takes_its_share_and_moves_nothing_else(
    names: list[str], keys: list[int], at: int
) -> None:
    more = [*names[:at], "newcomer", *names[at:]]
    before, after = House(names), House(more)

    for key in keys:
        assert after.first(Affinity(key, key)) in (before.first(Affinity(key, key)), "newcomer")


def test_a_replica_that_comes_takes_about_its_share() -> None:
    names = [f"replica-{number}" for number in range(7)]
    drawn = random.Random(1)
    keys = [drawn.getrandbits(64) for _ in range(4000)]
    after = House([*names, "newcomer"])

    moved = sum(after.first(Affinity(key, key)) == "newcomer" for key in keys) / len(keys)
    assert 1 / 8 * 0.7 < moved < 1 / 8 * 1.3


def test_a_conversation_goes_home_until_home_is_busier_than_most_and_then_always_to_the_same_next() -> None:
    house = House("abcd")
    key = Affinity(4711, 4711)
    home = house.first(key)
    house.replica[home].said = Load(in_flight=1)
    nexts = {house.first(key) for _ in range(20)}

    for other in set("abcd") - {home}:
        house.replica[other].said = Load(in_flight=1)
    assert len(nexts) == 1
    assert home not in nexts
    assert house.first(key) == home


def test_conversations_with_one_home_part_ways_when_it_is_full_and_each_keeps_to_its_own() -> None:
    house = House("abcdefgh")
    home = house.first(Affinity(4711, 4711))
    house.replica[home].said = Load(in_flight=9)
    drawn = random.Random(1)
    places = [Affinity(4711, drawn.getrandbits(64)) for _ in range(40)]
    nexts = [house.first(place) for place in places]

    assert len(set(nexts)) > 4
    assert home not in nexts
    assert [house.first(place) for place in places] == nexts


def test_an_ejected_home_is_stood_in_for_by_one_and_the_same() -> None:
    house = House("abcd")
    key = Affinity(4711, 4711)
    home = house.first(key)
    house.ejections.failed(home, FAULT)

    assert len({house.first(key) for _ in range(20)}) == 1
    assert house.first(key) != home
    assert house.order(key)[-1] == home


def conversation(*texts: str, system: str | None = None) -> Affinity:
    roles = itertools.cycle(["user", "assistant"])
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    opening = [] if system is None else [{"role": "system", "content": system}]
    affinity = affinity_of(make_request(messages=[*opening, *messages]), tenant_id="t1", model="m")
    assert affinity is not None
    return affinity


def test_the_turns_of_a_conversation_share_their_place() -> None:
    opening = conversation("Hello", system="Be brief.")
    assert opening == conversation("Hello", "Hi.", "And now?", system="Be brief.")
    assert opening.home == opening.conversation
    assert opening != conversation("Good morning", system="Be brief.")
    assert opening != conversation("Hello", system="Be long.")
    assert opening != conversation("Hello")


def test_requests_with_one_long_system_prompt_share_their_home_and_part_ways_when_it_is_full() -> None:
    one, other = conversation("Hello", system=LONG), conversation("Good morning", system=LONG)
    assert one.home == other.home
    assert one.conversation != other.conversation
    assert one.home != conversation("Hello", system=LONG + LONG).home


def test_a_text_completion_goes_by_the_beginning_of_its_prompt() -> None:
    one = affinity_of(make_request("text_completion", prompt=LONG + "one"), tenant_id="t1", model="m")
    other = affinity_of(make_request("text_completion", prompt=LONG + "other"), tenant_id="t1", model="m")
    assert one == other
    assert one != affinity_of(make_request("text_completion", prompt="else"), tenant_id="t1", model="m")


@pytest.mark.parametrize("differs", [{"tenant_id": "t2"}, {"model": "n"}], ids=lambda differs: next(iter(differs)))
def test_tenants_and_models_never_share_a_place(differs: dict[str, str]) -> None:
    request = make_request()
    one = affinity_of(request, tenant_id="t1", model="m")
    assert one != affinity_of(request, **{"tenant_id": "t1", "model": "m", **differs})


def test_any_text_has_a_place() -> None:
    spoken = (Message(role="system", content="\ud800"),)
    request = msgspec.structs.replace(make_request(), messages=spoken)
    assert isinstance(affinity_of(request, tenant_id="t1", model="m"), Affinity)


@pytest.mark.parametrize(
    "request_",
    [
        make_request("embeddings", input="Hello"),
        make_request("text_completion", prompt=["Hello", "Good morning"]),
        make_request("text_completion", prompt=[1, 2, 3]),
        make_request(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
    ],
    ids=["embeddings", "several prompts", "token ids", "an image alone"],
)
def test_requests_without_a_text_to_find_again_do_not_all_go_to_one_place(request_: ChatRequest) -> None:
    assert affinity_of(request_, tenant_id="t1", model="m") is None


def test_of_two_equal_replicas_each_is_chosen_half_of_the_time() -> None:
    assert House("ab").shares()["a"] == pytest.approx(0.5, abs=0.1)


def test_the_busiest_of_many_is_never_chosen_and_the_idlest_most_often() -> None:
    shares = House("abcd", {name: Load(in_flight=number) for number, name in enumerate("abcd")}).shares()
    assert shares["d"] == 0
    assert shares["a"] == pytest.approx(1 / 2, abs=0.1)
    assert shares["a"] > shares["b"] > shares["c"] > 0


def test_calls_that_others_sent_count_as_far_as_the_engine_said_so() -> None:
    house = House("ab", {"a": Load(in_flight=2), "b": Load(in_flight=1, queued=1, running=3, in_flight_then=1)})
    assert house.shares()["a"] == 1


def test_calls_of_others_count_half_since_many_of_them_have_ended_meanwhile() -> None:
    house = House("ab", {"a": Load(in_flight=2), "b": Load(queued=1, running=2)})
    assert house.shares()["b"] == 1
    house.replica["b"].said = Load(queued=2, running=3)
    assert house.shares()["a"] == 1


def test_calls_sent_since_an_old_reading_count_at_once() -> None:
    old = {"queued": 0, "running": 4, "in_flight_then": 4, "age_s": 0.5}
    house = House("ab", {"a": Load(in_flight=9, **old), "b": Load(in_flight=6, **old)})
    assert house.shares()["b"] == 1


def test_our_own_calls_are_not_counted_again_in_what_the_engine_says() -> None:
    house = House("ab", {"a": Load(in_flight=3), "b": Load(in_flight=2, queued=1, running=1, in_flight_then=2)})
    assert house.shares()["b"] == 1


def test_a_slow_replica_is_given_less_and_tried_again_when_that_is_long_ago() -> None:
    house = House("ab", {"a": Load(in_flight=1)})
    house.first_tokens.committed("b", 4.0)
    house.first_tokens.committed("a", 0.5)
    assert house.shares()["a"] == 1

    house.clock += 40
    house.first_tokens.committed("a", 0.5)
    assert house.shares()["b"] == 1


def test_a_cache_that_is_nearly_full_counts_as_up_to_twice_the_calls() -> None:
    house = House("ab", {"a": Load(in_flight=2, kv_cache_ratio=0.99), "b": Load(in_flight=4, kv_cache_ratio=0.8)})
    assert house.shares()["b"] == 1
    house.replica["a"].said = Load(in_flight=2, kv_cache_ratio=0.8)
    assert house.shares()["a"] == 1


def test_one_request_probes_what_was_ejected_although_others_are_well_and_slow_as_it_was() -> None:
    house = House("abc")
    house.ejections.failed("b", FAULT)
    house.first_tokens.failed("b", 30.0)
    house.clock += 5.0

    for affinity in (None, Affinity(1, 2)):
        assert house.first(affinity) == "b"
    house.ejections.began("b")
    assert [house.order()[-1] for _ in range(5)] == ["b"] * 5

    house.ejections.committed("b")
    for other in "ac":
        house.first_tokens.committed(other, 0.1)
    assert house.shares()["b"] == 0  # it takes part again, as the slow one that it was
    house.clock += 100
    assert house.shares()["b"] > 0
