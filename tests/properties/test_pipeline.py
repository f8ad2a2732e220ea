"""However a request ends, its reservation ends with it, and what is settled is what was taken."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import anyio
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.attempts import AnswerBroke, Attempts, AttemptsFailed, FailedAttempt
from backends.backend import Backend
from backends.chat import ChatRequest, Event, Usage
from backends.health import Ejections, RetryBudget
from backends.latency import FirstTokenTimes
from backends.scripted import Script
from backends.slots import ImmediateSlots
from backends.tokens import BytesPerToken
from cache.control import CacheControl
from cache.exact import MemoryExactCache
from cache.inflight import Flights
from cache.semantic import NoSemanticTier
from gateway.answer import Answer, Head
from gateway.background import Background
from gateway.context import RequestContext
from gateway.errors import DeadlinePassed
from gateway.pipeline import Pipeline
from gateway.snapshot import Snapshot, compile_snapshot
from policies.admission import Unlimited
from policies.ledger import NOTHING, Amounts, MemoryLedger, QuotaExceeded
from policies.money import UsdPer1M
from policies.routing_policy import FixedRouteSpec, ModelSpec, Policy, PolicyFile, PriceSpec, ScriptedBackendSpec
from policies.tenant import Tenant
from routing.balance import Balancer
from routing.cost import FixedOutputLength
from routing.difficulty import HeuristicScorer
from tests.backends.stepping import Stepping
from tests.calls import make_request, texts_of

TENANT = Tenant(id="t1", organisation_id="o1", key_id="k1", cache_secret=b"1" * 32)
OTHER_KEY = msgspec.structs.replace(TENANT, key_id="k2")
HUNG_S = 10.0
PRICE = PriceSpec(input=UsdPer1M.parse("1"), output=UsdPer1M.parse("3"))
"""1,000 and 3,000 nano-dollars a token."""
FILE = PolicyFile(
    name="test",
    backends={"small-1": ScriptedBackendSpec(), "large-1": ScriptedBackendSpec()},
    models={
        "small": ModelSpec(backends=("small-1",), context_window=4096, price=PRICE),
        "large": ModelSpec(backends=("large-1",), context_window=4096, price=PRICE),
    },
    routes={"fast": FixedRouteSpec(model="small", fallbacks=("large",))},
)
SETTLED = Amounts(tokens=16, cost_nano_usd=11 * 1000 + 5 * 3000)
"""What the usual script tells: 11 tokens of prompt and 5 of completion."""
USUAL = Script(prompt_tokens=11)


@dataclass
class Recorded:
    """A `Recorder` that keeps what it is told."""

    ended: list[tuple[str, str, Usage, int]] = field(default_factory=list)
    """Outcome, model, usage and cost of each flight."""
    failed: list[FailedAttempt] = field(default_factory=list)
    kept: list[str | None] = field(default_factory=list)
    unsettled: list[BaseException | None] = field(default_factory=list)

    def attempt_failed(self, failed: FailedAttempt) -> None:
        self.failed.append(failed)

    def flight_ended(
        self, context: RequestContext, model: str, head: Head | None, usage: Usage, cost_nano_usd: int, outcome: str
    ) -> None:
        self.ended.append((outcome, model, usage, cost_nano_usd))

    def stored(self, reason: str | None) -> None:
        self.kept.append(reason)

    def settle_failed(self, request_id: str, error: BaseException | None) -> None:
        self.unsettled.append(error)


class House:
    """A pipeline and everything it stands on, with engines that can be interrupted anywhere."""

    def __init__(
        self,
        background: Background,
        small: Script,
        large: Script,
        limit_for: Callable[[Tenant], Amounts | None],
        count_tokens: Callable[[str], Awaitable[int]],
    ) -> None:
        loop = asyncio.get_running_loop()
        self.background = background
        self.engines = {"small-1": Stepping("small-1", small), "large-1": Stepping("large-1", large)}
        self.recorded = Recorded()
        self.ledger = MemoryLedger(now=loop.time, limit_for=limit_for)
        self.exact = MemoryExactCache(now=lambda: 1e9)
        self.flights = Flights[Head](background.spawn)
        self.slots = ImmediateSlots()
        self.ejections = Ejections(now=loop.time)
        self.snapshot = self._snapshot()
        self.asked = 0
        self.pipeline = Pipeline(
            admission=Unlimited(),
            exact=self.exact,
            flights=self.flights,
            semantic=NoSemanticTier(),
            ledger=self.ledger,
            bytes_per_token=BytesPerToken(),
            output_lengths=FixedOutputLength(),
            count_tokens=count_tokens,
            recorder=self.recorded,
            clock=loop.time,
            now=lambda: 1e9,
            jitter=lambda: 0.0,
            fresh_id=lambda operation: "chatcmpl-fresh",
        )

    def _snapshot(self) -> Snapshot:
        engines: dict[str, Backend] = dict(self.engines)
        first_tokens = FirstTokenTimes(now=asyncio.get_running_loop().time)
        return compile_snapshot(
            Policy(file=FILE, version="v1", source="test"),
            build_backend=lambda name, spec: engines[name],
            build_attempts=lambda file: Attempts(
                ejections=self.ejections,
                first_tokens=first_tokens,
                budget=RetryBudget(ratio=0.2),
                slots=self.slots,
                max_attempts=2,
                jitter=lambda: 0.0,
            ),
            balancer=Balancer(ejections=self.ejections, first_tokens=first_tokens, random=lambda: 0.0),
            scorer=HeuristicScorer(),
        )

    async def ask(
        self, request: ChatRequest, *, tenant: Tenant = TENANT, within_s: float = HUNG_S, control: str | None = None
    ) -> Answer:
        self.asked += 1
        now = asyncio.get_running_loop().time()
        context = RequestContext(
            request_id=f"r{self.asked}",
            tenant=tenant,
            snapshot=self.snapshot,
            started_at=now,
            deadline=now + within_s,
            cache_control=CacheControl.parse(control),
        )
        return await self.pipeline.run(context, request)

    async def read(self, request: ChatRequest, *, tenant: Tenant = TENANT, within_s: float = HUNG_S) -> str:
        """The answer's text, read to its end."""
        answer = await self.ask(request, tenant=tenant, within_s=within_s)
        try:
            return texts_of(await rest_of(answer))[0]
        finally:
            answer.source.leave()

    async def until_quiet(self) -> None:
        """Wait for the flights to end, as they must without being told to."""
        while self.background._spawned:
            await asyncio.sleep(0)

    def check_nothing_left(self) -> None:
        assert self.ledger.live("t1") == ()
        assert self.pipeline._live == {}
        assert len(self.flights) == 0
        assert not any(self.slots._taken.values())
        assert [engine.in_flight for engine in self.engines.values()] == [0, 0]
        assert self.recorded.unsettled == []

    def check_books(self) -> None:
        """What is settled is what the flights took, each as its outcome has it."""
        taken = [Amounts(tokens=usage.total_tokens, cost_nano_usd=cost) for _, _, usage, cost in self.recorded.ended]
        assert self.ledger.settled("t1") == self.ledger.counter("t1") == sum(taken, NOTHING)


async def rest_of(answer: Answer) -> list[Event]:
    events: list[Event] = []
    while more := await answer.source.take():
        events += more
    return events


async def count_words(text: str) -> int:
    await asyncio.sleep(0)
    return len(text.split())


@asynccontextmanager
async def open_house(
    *,
    small: Script = USUAL,
    large: Script = USUAL,
    limit_for: Callable[[Tenant], Amounts | None] = lambda tenant: None,
    count_tokens: Callable[[str], Awaitable[int]] = count_words,
) -> AsyncGenerator[House, None]:
    """A house that must be empty and its books right once everybody has left."""
    async with Background(lambda name, error: None) as background:
        with anyio.fail_after(HUNG_S):
            house = House(background, small, large, limit_for, count_tokens)
            yield house
            await house.until_quiet()
        house.check_nothing_left()
        house.check_books()


FAULTS = st.builds(
    Script,
    fault=st.sampled_from(
        ["none", "none", "unreachable", "overloaded", "error", "reject", "truncate", "midstream_error"]
    ),
    fault_after_tokens=st.integers(0, 3),
    finish_reason=st.sampled_from(["stop", "stop", "length"]),
    reports_usage=st.sampled_from([True, True, False]),
    prompt_tokens=st.just(11),
)


@dataclass(frozen=True)
class Client:
    """Asks one of two questions, and may leave between two events or be cut off in the midst of anything."""

    question: str
    stream: bool
    begins_after: int
    leaves_after: int | None
    cut_off_after: int | None


CLIENTS = st.lists(
    st.builds(
        Client,
        question=st.sampled_from(["a", "a", "b"]),
        stream=st.booleans(),
        begins_after=st.integers(0, 8),
        leaves_after=st.sampled_from([None, None, 0, 1, 3]),
        cut_off_after=st.none() | st.integers(0, 40),
    ),
    min_size=1,
    max_size=4,
)


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def serve(house: House, client: Client) -> None:
    """What a face does for a client, whatever comes of it."""
    await turns(client.begins_after)
    request = make_request(model="fast", stream=client.stream, messages=[{"role": "user", "content": client.question}])
    with suppress(AttemptsFailed, AnswerBroke):
        answer = await house.ask(request)
        try:
            seen = 0
            while client.leaves_after is None or seen < client.leaves_after:
                events = await answer.source.take()
                if not events:
                    break
                seen += len(events)
                await asyncio.sleep(0)
        finally:
            answer.source.leave()


async def cut_off(task: asyncio.Task[None], after: int) -> None:
    await turns(after)
    task.cancel()


@settings(max_examples=200, deadline=None)
@given(small=FAULTS, large=FAULTS, clients=CLIENTS)
async def test_on_every_way_out_reservations_end_and_what_was_taken_is_settled(
    small: Script, large: Script, clients: list[Client]
) -> None:
    async with open_house(small=small, large=large) as house, asyncio.TaskGroup() as group:
        for client in clients:
            task = group.create_task(serve(house, client))
            if client.cut_off_after is not None:
                group.create_task(cut_off(task, client.cut_off_after))

    scripts = {"small": small, "large": large}
    for outcome, model, usage, _ in house.recorded.ended:
        script = scripts[model]
        if outcome == "answered" and script.reports_usage:
            assert usage == Usage(prompt_tokens=11, completion_tokens=len(script.tokens))
        elif outcome == "answered":
            assert usage.estimated
            assert usage.completion_tokens == len(script.tokens)
        elif usage.total_tokens:
            told = Usage(prompt_tokens=11, completion_tokens=len(script.tokens))
            assert usage == told or (usage.estimated and usage.completion_tokens <= len(script.tokens))
    answered = [model for outcome, model, _, _ in house.recorded.ended if outcome == "answered"]
    assert house.recorded.kept.count(None) == sum(scripts[model].finish_reason == "stop" for model in answered)
    assert len(house.exact._entries) <= house.recorded.kept.count(None)


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_settles_what_the_engine_told(stream: bool) -> None:
    async with open_house() as house:
        assert await house.read(make_request(model="fast", stream=stream)) == "This is a scripted answer."

    assert house.ledger.settled("t1") == SETTLED
    assert [outcome for outcome, *_ in house.recorded.ended] == ["answered"]
    assert house.recorded.kept == [None]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_failure_before_the_first_word_settles_nothing(stream: bool) -> None:
    async with open_house(small=Script(fault="unreachable"), large=Script(fault="error")) as house:
        with pytest.raises(AttemptsFailed):
            await house.read(make_request(model="fast", stream=stream))

    assert house.ledger.settled("t1") == NOTHING
    assert [failed.model for failed in house.recorded.failed] == ["small", "large"]


async def test_a_fallback_is_settled_at_the_price_of_who_answered_and_the_first_failure_is_told() -> None:
    async with open_house(small=Script(fault="overloaded")) as house:
        await house.read(make_request(model="fast"))

    assert [(outcome, model) for outcome, model, *_ in house.recorded.ended] == [("answered", "large")]
    assert [failed.model for failed in house.recorded.failed] == ["small"]


async def test_an_answer_that_broke_off_settles_what_came_and_keeps_nothing() -> None:
    async with open_house(small=Script(fault="midstream_error", fault_after_tokens=2)) as house:
        with pytest.raises(AnswerBroke):
            await house.read(make_request(model="fast", stream=True))

    [(outcome, _, usage, _)] = house.recorded.ended
    assert (outcome, usage.completion_tokens, usage.estimated) == ("failed", 2, True)
    assert house.recorded.kept == []


@pytest.mark.parametrize("hang_after_tokens", [0, 2])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_deadline_ends_the_call_and_the_reservation(stream: bool, hang_after_tokens: int) -> None:
    async with open_house(small=Script(fault="hang", fault_after_tokens=hang_after_tokens)) as house:
        with pytest.raises((DeadlinePassed, AttemptsFailed, AnswerBroke)):
            await house.read(make_request(model="fast", stream=stream), within_s=0.03)

    assert len(house.recorded.ended) == 1


@pytest.mark.parametrize(
    ("small", "kept"),
    [
        (USUAL, [None]),
        (Script(finish_reason="length"), ["finish_reason_length"]),
        (Script(finish_reason="content_filter"), ["finish_reason_content_filter"]),
        (Script(tokens=()), ["empty"]),
        (
            Script(tool_calls=({"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}},)),
            ["tool_calls"],
        ),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_only_an_answer_that_stopped_by_itself_is_told_again(
    small: Script, kept: list[str | None], stream: bool
) -> None:
    verdicts = []
    async with open_house(small=small) as house:
        for _ in range(2):
            answer = await house.ask(make_request(model="fast", stream=stream))
            await rest_of(answer)
            answer.source.leave()
            await house.until_quiet()
            verdicts.append(answer.cache)

    assert verdicts == ["miss", "exact" if kept == [None] else "miss"]
    assert house.recorded.kept == kept * (1 if kept == [None] else 2)


@pytest.mark.parametrize(
    ("control", "verdicts", "calls"),
    [
        ("no-store", ["bypass", "bypass"], 2),
        ("no-cache", ["miss", "miss"], 2),
        ("max-age=0", ["miss", "exact"], 1),
        (None, ["miss", "exact"], 1),
    ],
)
async def test_a_client_decides_what_it_takes_from_the_cache(
    control: str | None, verdicts: list[str], calls: int
) -> None:
    seen = []
    async with open_house() as house:
        for _ in verdicts:
            answer = await house.ask(make_request(model="fast"), control=control)
            await rest_of(answer)
            answer.source.leave()
            seen.append(answer.cache)

    assert seen == verdicts
    assert house.engines["small-1"].calls == calls


@pytest.mark.parametrize("stream", [True, False])
async def test_identical_requests_share_one_call_and_one_bill(stream: bool) -> None:
    async with open_house() as house, asyncio.TaskGroup() as group:
        texts = [group.create_task(house.read(make_request(model="fast", stream=stream))) for _ in range(8)]

    assert {text.result() for text in texts} == {"This is a scripted answer."}
    assert house.engines["small-1"].calls == 1
    assert house.ledger.settled("t1") == SETTLED


async def test_where_the_opener_is_denied_the_next_in_line_opens() -> None:
    def limit_for(tenant: Tenant) -> Amounts | None:
        return NOTHING if tenant.key_id == "k1" else None

    async with open_house(limit_for=limit_for) as house, asyncio.TaskGroup() as group:
        denied = group.create_task(denied_by_quota(house, TENANT))
        followers = [group.create_task(house.read(make_request(model="fast"), tenant=OTHER_KEY)) for _ in range(3)]

    assert denied.result()
    assert {text.result() for text in followers} == {"This is a scripted answer."}
    assert house.engines["small-1"].calls == 1


async def denied_by_quota(house: House, tenant: Tenant) -> bool:
    try:
        await house.read(make_request(model="fast"), tenant=tenant)
    except QuotaExceeded:
        return True
    return False


async def test_where_everybody_in_line_is_denied_everybody_hears_it_and_no_engine_is_asked() -> None:
    async with open_house(limit_for=lambda tenant: NOTHING) as house, asyncio.TaskGroup() as group:
        asked = [group.create_task(denied_by_quota(house, TENANT)) for _ in range(4)]

    assert [one.result() for one in asked] == [True] * 4
    assert house.engines["small-1"].calls == 0


async def test_a_client_that_leaves_while_its_answer_is_being_settled_changes_nothing() -> None:
    counting, counted = asyncio.Event(), asyncio.Event()

    async def count(text: str) -> int:
        counting.set()
        await counted.wait()
        return 5

    async with open_house(small=Script(reports_usage=False), count_tokens=count) as house:
        answer = await house.ask(make_request(model="fast", stream=True))
        await counting.wait()
        answer.source.leave()
        await turns(5)
        counted.set()

    [(outcome, _, usage, _)] = house.recorded.ended
    assert (outcome, usage.completion_tokens) == ("answered", 5)


async def test_an_answer_whose_tokens_take_too_long_to_count_is_settled_by_its_frames() -> None:
    async def count(text: str) -> int:
        await asyncio.Event().wait()
        raise AssertionError

    async with open_house(small=Script(reports_usage=False), count_tokens=count) as house:
        await house.read(make_request(model="fast", stream=True))

    [(outcome, _, usage, _)] = house.recorded.ended
    assert (outcome, usage.completion_tokens, usage.estimated) == ("answered", 5, True)


async def test_an_opener_that_runs_out_of_time_takes_nobody_with_it() -> None:
    async with open_house() as house:
        scripts = iter([Script(fault="hang"), USUAL])
        house.engines["small-1"].script = lambda call: next(scripts)
        async with asyncio.TaskGroup() as group:
            opener = group.create_task(out_of_time(house))
            follower = group.create_task(house.read(make_request(model="fast")))

    assert opener.result()
    assert follower.result() == "This is a scripted answer."


async def out_of_time(house: House) -> bool:
    try:
        await house.read(make_request(model="fast"), within_s=0.03)
    except (DeadlinePassed, AttemptsFailed):
        return True
    return False


async def test_who_wants_a_fresh_answer_shares_none() -> None:
    async with open_house(small=Script(fault="hang", fault_after_tokens=1)) as house:
        answers = [await house.ask(make_request(model="fast", stream=True), control=no) for no in (None, "no-cache")]
        for answer in answers:
            answer.source.leave()

    assert [answer.cache for answer in answers] == ["miss", "miss"]
    assert house.engines["small-1"].calls == 2


async def test_an_opener_that_leaves_takes_nothing_from_who_still_listens() -> None:
    async with open_house() as house:
        opener = await house.ask(make_request(model="fast", stream=True))
        follower = await house.ask(make_request(model="fast", stream=True))
        opener.source.leave()
        assert texts_of(await rest_of(follower)) == ["This is a scripted answer."]
        follower.source.leave()

    assert follower.cache == "coalesced"
    assert house.ledger.settled("t1") == SETTLED


async def test_when_everybody_left_the_engine_is_hung_up_on_at_once() -> None:
    async with open_house(small=Script(fault="hang", fault_after_tokens=2)) as house:
        answers = [await house.ask(make_request(model="fast", stream=True)) for _ in range(2)]
        answers[0].source.leave()
        await turns(3)
        assert house.engines["small-1"].cancelled == 0
        answers[1].source.leave()
        await house.until_quiet()

    assert house.engines["small-1"].cancelled == 1
    [(outcome, _, usage, _)] = house.recorded.ended
    assert (outcome, usage.completion_tokens, usage.estimated) == ("abandoned", 2, True)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_cut_off_before_the_first_word_takes_its_call_down(stream: bool) -> None:
    async with open_house(small=Script(fault="hang")) as house:
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(house.ask(make_request(model="fast", stream=stream)))
            while not house.engines["small-1"].in_flight:
                await asyncio.sleep(0)
            asking.cancel()
        await house.until_quiet()

    assert house.engines["small-1"].cancelled == 1
    assert [outcome for outcome, *_ in house.recorded.ended] == ["abandoned"]


async def test_leases_of_calls_that_last_are_renewed_and_no_others() -> None:
    async with open_house(small=Script(fault="hang", fault_after_tokens=2)) as house:
        house.ledger.lease_s = 0.03
        answer = await house.ask(make_request(model="fast", stream=True))
        [before] = house.ledger.live("t1")
        async with asyncio.TaskGroup() as group:
            renewal = group.create_task(house.pipeline.renew_leases())
            while house.ledger.live("t1") == (before,):
                await anyio.sleep(0.002)
            renewal.cancel()
        [after] = house.ledger.live("t1")
        assert after.expires_at > before.expires_at
        assert after.amounts == before.amounts
        answer.source.leave()
