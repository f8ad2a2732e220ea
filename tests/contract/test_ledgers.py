"""The contract of `Ledger`, for every implementation: nothing is lost, nothing is counted twice, no limit is passed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policies.ledger import NOTHING, Amounts, Ledger, MemoryLedger, QuotaExceeded, Reservation
from policies.tenant import Tenant

LIMIT = Amounts(tokens=100, cost_nano_usd=1000)
LEASE_S = 60.0


def tenant(name: str) -> Tenant:
    return Tenant(id=name, organisation_id="o", key_id=f"key of {name}")


ANN, BOB, FREE = tenant("ann"), tenant("bob"), tenant("free")
"""`FREE` has no limit, the others have `LIMIT` each."""


def amounts(tokens: int, cost_nano_usd: int = 0) -> Amounts:
    return Amounts(tokens=tokens, cost_nano_usd=cost_nano_usd)


class Books(Protocol):
    """What a ledger says of a tenant."""

    def counter(self, tenant_id: str) -> Amounts: ...
    def settled(self, tenant_id: str) -> Amounts: ...
    def live(self, tenant_id: str) -> tuple[Reservation, ...]: ...


@dataclass
class Opened:
    """A ledger with `LIMIT` and leases of `LEASE_S`, its books, and a way to let time go by."""

    ledger: Ledger
    books: Books
    pass_time: Callable[[float], None]

    def check_law(self) -> None:
        """Settled + live reservations = counter, for every tenant."""
        for one in (ANN, BOB, FREE):
            live = sum((held.amounts for held in self.books.live(one.id)), NOTHING)
            assert self.books.counter(one.id) == self.books.settled(one.id) + live


@asynccontextmanager
async def in_memory() -> AsyncGenerator[Opened, None]:
    clock = [1000.0]

    def pass_time(seconds: float) -> None:
        clock[0] += seconds

    ledger = MemoryLedger(
        now=lambda: clock[0], lease_s=LEASE_S, limit_for=lambda tenant: None if tenant == FREE else LIMIT
    )
    yield Opened(ledger, ledger, pass_time)


Factory = Callable[[], AbstractAsyncContextManager[Opened]]
FACTORIES: dict[str, Factory] = {"memory": in_memory}


@pytest.fixture(params=FACTORIES.values(), ids=list(FACTORIES))
def factory(request: pytest.FixtureRequest) -> Factory:
    made: Factory = request.param
    return made


@pytest.fixture
async def opened(factory: Factory) -> AsyncGenerator[Opened, None]:
    async with factory() as opened:
        yield opened
        opened.check_law()


async def test_what_is_settled_counts_in_place_of_what_was_reserved(opened: Opened) -> None:
    reservation = await opened.ledger.reserve(ANN, "r1", amounts(40, 400))
    assert opened.books.counter("ann") == amounts(40, 400)

    await opened.ledger.settle(reservation, amounts(7, 70))

    assert opened.books.counter("ann") == opened.books.settled("ann") == amounts(7, 70)
    assert opened.books.live("ann") == ()


async def test_what_is_released_counts_nothing(opened: Opened) -> None:
    reservation = await opened.ledger.reserve(ANN, "r1", amounts(40))
    await opened.ledger.release(reservation)
    await opened.ledger.release(reservation)

    assert opened.books.counter("ann") == NOTHING


@pytest.mark.parametrize("limit", [amounts(100, 0), amounts(0, 1000)])
async def test_a_limit_can_be_used_up_and_not_passed(opened: Opened, limit: Amounts) -> None:
    await opened.ledger.reserve(ANN, "r1", limit)
    one_more = amounts(min(limit.tokens, 1), min(limit.cost_nano_usd, 1))

    with pytest.raises(QuotaExceeded) as denied:
        await opened.ledger.reserve(ANN, "r2", one_more)

    assert denied.value.limit == ("tokens" if limit.tokens else "budget")
    assert opened.books.counter("ann") == limit
    assert [held.request_id for held in opened.books.live("ann")] == ["r1"]


async def test_one_tenants_spending_is_not_anothers(opened: Opened) -> None:
    of_ann = await opened.ledger.reserve(ANN, "r1", LIMIT)
    of_bob = await opened.ledger.reserve(BOB, "r1", LIMIT)

    assert (of_ann.tenant_id, of_bob.tenant_id) == ("ann", "bob")
    await opened.ledger.settle(of_ann, amounts(1))
    assert opened.books.counter("bob") == LIMIT
    await opened.ledger.release(of_bob)
    assert opened.books.counter("ann") == amounts(1)


async def test_a_tenant_without_a_limit_is_counted_all_the_same(opened: Opened) -> None:
    reservation = await opened.ledger.reserve(FREE, "r1", amounts(10**12, 10**15))
    await opened.ledger.settle(reservation, amounts(5, 5))

    assert opened.books.counter("free") == amounts(5, 5)


async def test_settling_twice_counts_once(opened: Opened) -> None:
    reservation = await opened.ledger.reserve(ANN, "r1", amounts(40))
    await opened.ledger.settle(reservation, amounts(7))
    await opened.ledger.settle(reservation, amounts(9))
    await opened.ledger.release(reservation)

    assert opened.books.counter("ann") == amounts(7)


async def test_settling_what_was_released_or_never_reserved_counts_nothing(opened: Opened) -> None:
    reservation = await opened.ledger.reserve(ANN, "r1", amounts(40))
    await opened.ledger.release(reservation)
    await opened.ledger.settle(reservation, amounts(7))
    unknown = Reservation(request_id="r9", attempt=0, tenant_id="ann", amounts=amounts(5), expires_at=1e9)
    await opened.ledger.settle(unknown, amounts(7))
    await opened.ledger.release(unknown)
    await opened.ledger.renew(unknown)
    await opened.ledger.top_up(ANN, unknown, amounts(1))

    assert opened.books.counter("ann") == NOTHING


async def test_an_answer_may_take_more_than_was_reserved_and_all_of_it_counts(opened: Opened) -> None:
    reservation = await opened.ledger.reserve(ANN, "r1", amounts(40))
    await opened.ledger.settle(reservation, amounts(140))

    assert opened.books.counter("ann") == amounts(140)
    with pytest.raises(QuotaExceeded):
        await opened.ledger.reserve(ANN, "r2", amounts(1))


async def test_reserving_twice_claims_once_and_each_attempt_for_itself(opened: Opened) -> None:
    first = await opened.ledger.reserve(ANN, "r1", amounts(40))
    assert await opened.ledger.reserve(ANN, "r1", amounts(40)) == first
    await opened.ledger.reserve(ANN, "r1", amounts(30), attempt=1)

    assert opened.books.counter("ann") == amounts(70)


async def test_a_lease_that_nobody_renews_expires_and_makes_room(opened: Opened) -> None:
    await opened.ledger.reserve(ANN, "r1", LIMIT)
    opened.pass_time(LEASE_S - 1)
    with pytest.raises(QuotaExceeded):
        await opened.ledger.reserve(ANN, "r2", amounts(1))

    opened.pass_time(1)
    await opened.ledger.reserve(ANN, "r2", LIMIT)


async def test_a_lease_that_is_renewed_or_topped_up_lives_on(opened: Opened) -> None:
    one = await opened.ledger.reserve(ANN, "r1", amounts(10))
    other = await opened.ledger.reserve(ANN, "r2", amounts(20))
    for _ in range(3):
        opened.pass_time(LEASE_S - 1)
        one = await opened.ledger.renew(one)
        other = await opened.ledger.top_up(ANN, other, amounts(5))

    assert (one.amounts, other.amounts) == (amounts(10), amounts(35))
    assert opened.books.counter("ann") == amounts(45)
    with pytest.raises(QuotaExceeded):
        await opened.ledger.reserve(ANN, "r3", amounts(56))


async def test_a_top_up_that_does_not_fit_leaves_the_reservation_as_it_was(opened: Opened) -> None:
    reservation = await opened.ledger.reserve(ANN, "r1", amounts(60))
    with pytest.raises(QuotaExceeded):
        await opened.ledger.top_up(ANN, reservation, amounts(41))

    assert opened.books.live("ann") == (reservation,)


async def test_an_answer_whose_lease_expired_is_still_paid_for_once(opened: Opened) -> None:
    reservation = await opened.ledger.reserve(ANN, "r1", amounts(40))
    opened.pass_time(LEASE_S)
    await opened.ledger.reserve(ANN, "r2", amounts(100))
    await opened.ledger.settle(reservation, amounts(7))
    await opened.ledger.settle(reservation, amounts(7))

    assert opened.books.settled("ann") == amounts(7)


async def test_what_expired_and_was_reserved_again_is_one_reservation(opened: Opened) -> None:
    reservation = await opened.ledger.reserve(ANN, "r1", amounts(40))
    opened.pass_time(LEASE_S)
    await opened.ledger.reserve(ANN, "r1", amounts(30))
    await opened.ledger.settle(reservation, amounts(7))
    await opened.ledger.settle(reservation, amounts(7))

    assert opened.books.counter("ann") == amounts(7)


async def test_what_expired_is_claimed_again_as_a_whole_when_it_is_topped_up(opened: Opened) -> None:
    reservation = await opened.ledger.reserve(ANN, "r1", amounts(60))
    opened.pass_time(LEASE_S)
    await opened.ledger.reserve(ANN, "r2", amounts(30))
    with pytest.raises(QuotaExceeded):
        await opened.ledger.top_up(ANN, reservation, amounts(11))

    await opened.ledger.top_up(ANN, reservation, amounts(10))
    assert opened.books.counter("ann") == amounts(100)
    opened.pass_time(LEASE_S - 1)
    with pytest.raises(QuotaExceeded):
        await opened.ledger.reserve(ANN, "r3", amounts(1))


PLACES = st.tuples(st.sampled_from([ANN, BOB]), st.sampled_from(["r1", "r2", "r3"]))
SOME = st.builds(amounts, st.sampled_from([0, 1, 30, 60, 100]), st.sampled_from([0, 1, 400, 1000]))
STEPS = st.one_of(
    st.tuples(st.just("reserve"), PLACES, SOME),
    st.tuples(st.just("reserve"), PLACES, SOME),
    st.tuples(st.sampled_from(["renew", "release"]), PLACES, st.just(NOTHING)),
    st.tuples(st.sampled_from(["top_up", "settle"]), PLACES, SOME),
    st.tuples(st.just("pass"), st.sampled_from([1.0, 29.0, LEASE_S]), st.just(NOTHING)),
)


@dataclass
class Model:
    """What the books must say: every reservation that is open, when its lease ends, and what was settled."""

    now: float = 0.0
    open: dict[tuple[str, str], tuple[Amounts, float]] = field(default_factory=dict)
    settled: dict[str, Amounts] = field(default_factory=lambda: {"ann": NOTHING, "bob": NOTHING})

    def claimed(self, tenant_id: str, but: tuple[str, str] | None = None) -> Amounts:
        """Settled, and live in leases that have not ended."""
        live = [self.open[place][0] for place in self.live_of(tenant_id) if place != but]
        return sum(live, self.settled[tenant_id])

    def hold(self, place: tuple[str, str], claim: Amounts) -> None:
        self.open[place] = (claim, self.now + LEASE_S)

    def live_of(self, tenant_id: str) -> list[tuple[str, str]]:
        return [place for place in self.open if place[0] == tenant_id and self.is_live(place)]

    def is_live(self, place: tuple[str, str]) -> bool:
        return place in self.open and self.open[place][1] > self.now


def fits(claim: Amounts) -> bool:
    return claim.tokens <= LIMIT.tokens and claim.cost_nano_usd <= LIMIT.cost_nano_usd


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, max_size=30))
async def test_whatever_is_done_in_whatever_order_the_books_are_right(factory: Factory, steps: list[object]) -> None:
    async with factory() as opened:
        model = Model()
        for step in steps:
            await take(step, opened, model)
            opened.check_law()
            for one in (ANN, BOB):
                assert opened.books.settled(one.id) == model.settled[one.id]
                live = {held.request_id: held.amounts for held in opened.books.live(one.id)}
                for place in model.live_of(one.id):
                    assert live[place[1]] == model.open[place][0]


async def take(step: object, opened: Opened, model: Model) -> None:
    """One step, on the ledger and on the model, which must agree on whether there is room."""
    match step:
        case "pass", float(seconds), _:
            opened.pass_time(seconds)
            model.now += seconds
        case "reserve", (Tenant() as who, str(request_id)), Amounts() as claim:
            place = (who.id, request_id)
            if model.is_live(place):
                held = await opened.ledger.reserve(who, request_id, claim)
                assert held.amounts == model.open[place][0]
            elif fits(model.claimed(who.id) + claim):
                await opened.ledger.reserve(who, request_id, claim)
                model.hold(place, claim)
            else:
                with pytest.raises(QuotaExceeded):
                    await opened.ledger.reserve(who, request_id, claim)
        case "top_up", (Tenant() as who, str(request_id)), Amounts() as more:
            await top_up(who, request_id, more, opened, model)
        case str(end), (Tenant() as who, str(request_id)), Amounts() as actual:
            place = (who.id, request_id)
            reservation = known(who, request_id)
            if end == "renew":
                await opened.ledger.renew(reservation)
                if place in model.open:
                    model.hold(place, model.open[place][0])
                return
            if end == "settle":
                await opened.ledger.settle(reservation, actual)
                if place in model.open:
                    model.settled[who.id] += actual
            else:
                await opened.ledger.release(reservation)
            model.open.pop(place, None)


async def top_up(who: Tenant, request_id: str, more: Amounts, opened: Opened, model: Model) -> None:
    place = (who.id, request_id)
    if place not in model.open:
        return
    claim = model.open[place][0] + more
    if fits(model.claimed(who.id, but=place) + claim):
        topped_up = await opened.ledger.top_up(who, known(who, request_id), more)
        assert topped_up.amounts == claim
        model.hold(place, claim)
    else:
        with pytest.raises(QuotaExceeded):
            await opened.ledger.top_up(who, known(who, request_id), more)


def known(who: Tenant, request_id: str) -> Reservation:
    """A reservation as its request remembers it, however it has fared since."""
    return Reservation(request_id=request_id, attempt=0, tenant_id=who.id, amounts=amounts(999), expires_at=0.0)
