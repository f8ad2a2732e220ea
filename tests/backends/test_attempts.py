"""One request, several attempts: who is asked, in which order, how often, and what a cancelled one leaves behind."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field

import anyio
import pytest

from backends.attempts import AnswerBroke, Attempts, AttemptsFailed, OpenAnswer, Target
from backends.backend import Call, Timeouts
from backends.catalog import ModelCard
from backends.chat import Event
from backends.errors import BackendFailed, BackendOverloaded, BackendTimeout, RequestRejected
from backends.health import Ejections, RetryBudget
from backends.latency import FirstTokenTimes
from backends.scripted import Fault, Script, ScriptedBackend
from backends.slots import Flow, ImmediateSlots, Slot
from tests.backends.stepping import Stepping
from tests.calls import make_request, texts_of

FLOW = Flow(tenant_id="t1")
ANSWER = "This is a scripted answer."


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Trial:
    """Attempts over scripted backends. Each target is written as `model@backend`, the backend's script by its name."""

    scripts: dict[str, Script | Callable[[Call], Script]] = field(default_factory=dict)
    max_attempts: int = 3
    retry_ratio: float = 0.2
    limits: dict[str, int] = field(default_factory=dict)
    timeouts: Timeouts = field(default_factory=Timeouts)
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.backends: dict[str, ScriptedBackend] = {}
        self.asked: list[str] = []
        self.jitters: list[float] = []
        self.ejections = Ejections(now=self.clock)
        self.first_tokens = FirstTokenTimes(now=self.clock)
        self.budget = RetryBudget(ratio=self.retry_ratio)
        self.slots = ImmediateSlots()
        self.slots.limits = self.limits
        self.attempts = Attempts(
            ejections=self.ejections,
            first_tokens=self.first_tokens,
            budget=self.budget,
            slots=self.slots,
            max_attempts=self.max_attempts,
            jitter=lambda: self.jitters.pop(0) if self.jitters else 0.0,
        )

    def target(self, name: str) -> Target:
        model, _, backend = name.partition("@")
        if backend not in self.backends:
            self.backends[backend] = ScriptedBackend(backend, lambda call: self._script(backend, call))
        card = ModelCard(name=model, context_window_tokens=100)
        return Target(card=card, backend=self.backends[backend], timeouts=self.timeouts)

    def _script(self, backend: str, call: Call) -> Script:
        self.asked.append(f"{call.model}@{backend}")
        script = self.scripts.get(backend, Script())
        return script(call) if callable(script) else script

    async def open(self, *targets: str, within_s: float = 5.0, stream: bool = True) -> OpenAnswer:
        loop = asyncio.get_running_loop()
        return await self.attempts.open(
            make_request(stream=stream),
            [self.target(target) for target in targets],
            request_id="req-1",
            flow=FLOW,
            deadline=loop.time() + within_s,
        )

    async def ask(self, *targets: str, within_s: float = 5.0, stream: bool = True) -> tuple[str, list[str]]:
        """The answer's text, and who failed before it."""
        answer = await self.open(*targets, within_s=within_s, stream=stream)
        try:
            events = [event async for event in answer]
        finally:
            await answer.aclose()
        self.assert_nothing_left()
        return texts_of(events)[0], [f"{failed.model}@{failed.backend}" for failed in answer.failed]

    async def fail(self, *targets: str, within_s: float = 5.0) -> AttemptsFailed:
        with pytest.raises(AttemptsFailed) as failed:
            await self.open(*targets, within_s=within_s)
        self.assert_nothing_left()
        return failed.value

    def assert_nothing_left(self) -> None:
        assert [backend.in_flight for backend in self.backends.values()] == [0] * len(self.backends)
        assert not any(self.slots._taken.values())


async def read(answer: OpenAnswer, seen: list[Event]) -> None:
    async for event in answer:
        seen.append(event)


def failing(fault: Fault, after_tokens: int = 0, retry_after_s: float | None = None) -> Script:
    return Script(fault=fault, fault_after_tokens=after_tokens, retry_after_s=retry_after_s)


async def test_the_first_target_answers_and_nobody_else_is_asked() -> None:
    trial = Trial()

    assert await trial.ask("small@a", "large@b") == (ANSWER, [])
    assert trial.asked == ["small@a"]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("fault", ["unreachable", "overloaded", "error", "refused", "truncate", "garbage"])
async def test_any_failure_before_the_first_word_falls_back(fault: Fault, stream: bool) -> None:
    trial = Trial({"a": failing(fault)})

    assert await trial.ask("small@a", "large@b", stream=stream) == (ANSWER, ["small@a"])
    assert trial.asked == ["small@a", "large@b"]


async def test_a_request_at_fault_is_shown_to_nobody_else() -> None:
    trial = Trial({"a": failing("reject")})

    failed = await trial.fail("small@a", "large@b")

    assert isinstance(failed.error, RequestRejected)
    assert trial.asked == ["small@a"]


@pytest.mark.parametrize(("fault", "times"), [("unreachable", 3), ("error", 3)])
async def test_what_may_pass_by_itself_is_asked_again(fault: Fault, times: int) -> None:
    trial = Trial({"a": failing(fault)})

    failed = await trial.fail("small@a")

    assert trial.asked == ["small@a"] * times
    assert len(failed.failed) == times


@pytest.mark.parametrize("fault", ["overloaded", "refused", "garbage", "truncate"])
async def test_what_will_not_pass_is_not_asked_again_by_this_request(fault: Fault) -> None:
    trial = Trial({name: failing(fault, retry_after_s=30.0) for name in "ab"}, max_attempts=9)

    await trial.fail("small@a", "small@b")

    assert trial.asked == ["small@a", "small@b"]


async def test_an_overloaded_engine_is_left_alone_even_after_another_one_failed() -> None:
    trial = Trial({"a": failing("overloaded", retry_after_s=30.0), "b": failing("unreachable")}, max_attempts=5)

    failed = await trial.fail("small@a", "large@b")

    assert trial.asked == ["small@a", *["large@b"] * 4]
    assert isinstance(failed.failed[0].error, BackendOverloaded)
    assert failed.failed[0].error.retry_after_s == 30.0


async def test_a_slow_first_word_is_a_failure_and_the_next_target_answers() -> None:
    trial = Trial({"a": Script(first_token_delay_s=60.0)}, timeouts=Timeouts(first_token_s=0.02))

    assert await trial.ask("small@a", "large@b") == (ANSWER, ["small@a"])


async def test_one_engine_that_lacks_one_model_is_still_asked_for_the_other() -> None:
    trial = Trial({"a": lambda call: failing("refused") if call.model == "small" else Script()})

    assert await trial.ask("small@a", "large@a") == (ANSWER, ["small@a"])


async def test_no_more_attempts_than_the_policy_allows_and_the_last_is_for_another_model() -> None:
    trial = Trial({name: failing("unreachable") for name in "abcde"}, max_attempts=3)

    await trial.fail("small@a", "small@b", "small@c", "large@d", "large@e")

    assert trial.asked == ["small@a", "small@b", "large@d"]


async def test_one_attempt_is_for_the_first_target() -> None:
    trial = Trial({"a": failing("unreachable")}, max_attempts=1)

    await trial.fail("small@a", "large@b")

    assert trial.asked == ["small@a"]


async def test_a_fallback_that_refuses_a_request_not_meant_for_it_does_not_hide_why_it_was_asked() -> None:
    trial = Trial({"a": failing("overloaded"), "b": failing("reject")})

    failed = await trial.fail("small@a", "large@b")
    assert isinstance(failed.error, BackendOverloaded)
    assert [one.model for one in failed.failed] == ["small", "large"]

    failed = await trial.fail("small@a", "small@b")
    assert isinstance(failed.error, RequestRejected)


async def test_replicas_are_asked_before_anybody_is_asked_again() -> None:
    trial = Trial({name: failing("unreachable") for name in "ab"}, max_attempts=4)

    await trial.fail("small@a", "small@b")

    assert trial.asked == ["small@a", "small@b", "small@a", "small@b"]


async def test_a_model_that_is_down_gets_a_fifth_of_the_traffic_as_retries() -> None:
    trial = Trial({"a": failing("unreachable")}, max_attempts=2, retry_ratio=0.2)
    for _ in range(100):
        await trial.fail("small@a")

    assert 100 + 10 + 19 <= len(trial.asked) <= 100 + 10 + 20


async def test_falling_back_to_another_model_costs_no_retry_however_often() -> None:
    trial = Trial({"a": failing("overloaded")}, max_attempts=2, retry_ratio=0.0)
    for _ in range(50):
        assert await trial.ask("small@a", "large@b") == (ANSWER, ["small@a"])


async def test_without_budget_a_replica_is_skipped_and_the_fallback_still_asked() -> None:
    trial = Trial({name: failing("overloaded") for name in "ab"}, retry_ratio=0.0)
    while trial.budget.spend():
        pass

    assert await trial.ask("small@a", "small@b", "large@c") == (ANSWER, ["small@a"])
    assert trial.asked == ["small@a", "large@c"]


@pytest.mark.parametrize(("pauses_before", "longest_s"), [(0, 0.05), (1, 0.1), (2, 0.2)])
async def test_a_target_is_asked_again_after_a_pause_that_doubles(pauses_before: int, longest_s: float) -> None:
    """A pause of up to 100 s fits the deadline and is waited for; a longer one ends the request at once."""
    for pause_s, waits in ((95.0, True), (105.0, False)):
        trial = Trial({"a": failing("unreachable")}, max_attempts=9)
        trial.jitters = [0.0] * pauses_before + [pause_s / longest_s]
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(trial.fail("small@a", within_s=100.0))
            while trial.jitters:
                await asyncio.sleep(0)
            for _ in range(5):
                await asyncio.sleep(0)
            assert asking.done() != waits
            asking.cancel()
        assert len(trial.asked) == pauses_before + 1


async def test_the_deadline_is_everybodys() -> None:
    trial = Trial({name: failing("hang") for name in "ab"})
    with anyio.fail_after(1.0):
        failed = await trial.fail("small@a", "large@b", within_s=0.05)

    assert trial.asked == ["small@a"]
    assert isinstance(failed.error, BackendTimeout)


async def test_a_backend_without_a_place_is_overloaded_and_nobody_knocks() -> None:
    trial = Trial({"a": Script(first_token_delay_s=60.0)}, limits={"a": 1})
    await trial.slots.acquire("a", FLOW, deadline=0.0)
    answer = await trial.open("small@a", "large@b")

    assert answer.target.card.name == "large"
    assert trial.asked == ["large@b"]
    [failed] = answer.failed
    assert isinstance(failed.error, BackendOverloaded)
    await answer.aclose()


async def test_a_role_commits_nothing_and_is_delivered_with_the_first_word() -> None:
    gate = asyncio.Event()
    trial = Trial()

    class Halting(ScriptedBackend):
        async def answer(self, call: Call) -> AsyncGenerator[Event, None]:
            async with aclosing(super().answer(call)) as events:
                async for event in events:
                    yield event
                    if not event.has_content:
                        await gate.wait()

    trial.backends["a"] = Halting("a")
    async with asyncio.TaskGroup() as group:
        opening = group.create_task(trial.open("small@a"))
        while trial.backends["a"].events == 0:
            await asyncio.sleep(0)
        assert not opening.done()
        gate.set()
    answer = opening.result()
    events: list[Event] = [event async for event in answer]
    await answer.aclose()

    assert texts_of(events) == [ANSWER]
    assert [event.has_content for event in events[:2]] == [False, True]
    assert events[0].choices[0].delta is not None
    assert events[0].choices[0].delta.role == "assistant"


@pytest.mark.parametrize("fault", ["midstream_error", "truncate", "garbage", "reset"])
async def test_after_the_first_word_a_failure_ends_the_answer_and_counts(fault: Fault) -> None:
    trial = Trial({"a": failing(fault, after_tokens=2)})
    ejected = []
    for _ in range(5):
        answer = await trial.open("small@a", "large@b")
        seen: list[Event] = []
        with pytest.raises(AnswerBroke) as broke:
            await read(answer, seen)
        await answer.aclose()
        assert "".join(event.choices[0].delta.content or "" for event in seen if event.choices[0].delta) == "This is "
        assert (broke.value.failed.model, broke.value.failed.backend) == ("small", "a")
        ejected.append(broke.value.failed.ejected)

    assert ejected == [False, False, False, False, True]
    assert trial.asked == ["small@a"] * 5
    trial.assert_nothing_left()
    assert await trial.ask("small@a", "large@b") == (ANSWER, [])
    assert trial.asked[-1] == "large@b"


async def test_five_failures_eject_and_a_probe_by_one_request_brings_the_backend_back() -> None:
    trial = Trial({"a": failing("error")}, max_attempts=1)
    for _ in range(5):
        await trial.fail("small@a", "large@b")
    trial.scripts["a"] = Script()

    assert await trial.ask("small@a", "large@b") == (ANSWER, [])
    assert trial.asked[-1] == "large@b"

    trial.clock.now += 5
    probe = await trial.open("small@a", "large@b")
    assert probe.target.card.name == "small"
    await probe.aclose()
    assert await trial.ask("small@a", "large@b") == (ANSWER, [])
    assert trial.asked[-1] == "small@a"


async def test_of_many_requests_that_find_a_probe_due_one_makes_it() -> None:
    trial = Trial({"a": failing("error")}, max_attempts=1)
    for _ in range(5):
        await trial.fail("small@a")
    trial.scripts = {"a": Script(first_token_delay_s=0.05)}
    trial.clock.now += 5.0
    trial.asked.clear()

    async def ask() -> None:
        await (await trial.open("small@a", "small@b")).aclose()

    async with anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(ask)

    assert sorted(trial.asked) == ["small@a", *["small@b"] * 19]
    assert not trial.ejections.is_ejected("a")


async def test_a_probe_that_gets_no_place_lets_the_next_one_probe() -> None:
    trial = Trial({"a": failing("error")}, max_attempts=1, limits={"a": 1})
    for _ in range(5):
        await trial.fail("small@a")
    trial.clock.now += 5.0
    trial.limits["a"] = 0

    await trial.fail("small@a")

    assert trial.ejections.probe_due(["a"]) == 0


async def test_a_probe_whose_client_leaves_while_it_waits_for_a_place_lets_the_next_one_probe() -> None:
    trial = Trial({"a": failing("error")}, max_attempts=1)
    for _ in range(5):
        await trial.fail("small@a")
    trial.clock.now += 5.0
    waiting = asyncio.Event()

    class Full(ImmediateSlots):
        async def acquire(self, backend: str, flow: Flow, *, deadline: float) -> Slot:
            waiting.set()
            await anyio.sleep_forever()

    trial.attempts._slots = Full()
    async with anyio.create_task_group() as group:
        group.start_soon(trial.open, "small@a")
        await waiting.wait()
        assert trial.ejections.probe_due(["a"]) is None
        group.cancel_scope.cancel()

    assert trial.ejections.probe_due(["a"]) == 0


async def test_the_first_word_of_a_stream_tells_how_fast_a_backend_is_and_a_whole_answer_does_not() -> None:
    trial = Trial({"a": Script(first_token_delay_s=0.03, token_delay_s=0.03), "b": Script(first_token_delay_s=0.03)})

    await trial.ask("small@a")
    await trial.ask("small@b", stream=False)

    first_token_s, unknown = trial.first_tokens.among(["a", "b"])
    assert first_token_s is not None
    assert 0.02 < first_token_s < 0.06  # uvloop rounds sleeps to whole milliseconds
    assert unknown is None


@pytest.mark.parametrize(
    ("fault", "slow"), [("error", True), ("overloaded", True), ("unreachable", True), ("reject", False)]
)
async def test_an_attempt_that_fails_counts_as_slow_unless_the_request_was_at_fault(fault: Fault, slow: bool) -> None:
    trial = Trial({"a": failing(fault)}, max_attempts=1)

    await trial.fail("small@a")

    assert trial.first_tokens.of("a") == (1.0 if slow else None)


async def test_a_backend_without_a_place_is_not_slow() -> None:
    trial = Trial(limits={"a": 0})

    await trial.fail("small@a")

    assert trial.first_tokens.of("a") is None


async def test_a_client_that_gave_up_waiting_tells_how_long_it_waited() -> None:
    trial = Trial({"a": Script(first_token_delay_s=60.0)})

    with anyio.move_on_after(0.03):
        await trial.open("small@a")

    waited_s = trial.first_tokens.of("a")
    assert waited_s is not None
    assert 0.02 < waited_s < 1.0


async def test_an_answer_read_to_its_end_breaks_the_row_of_failures() -> None:
    trial = Trial(max_attempts=1)
    for script in (*[failing("error")] * 4, Script(), *[failing("error")] * 4):
        trial.scripts["a"] = script
        with suppress(AttemptsFailed):
            await trial.ask("small@a")

    assert not trial.ejections.is_ejected("a")


async def test_overload_and_bad_requests_never_eject() -> None:
    trial = Trial({"a": failing("overloaded"), "b": failing("reject")}, max_attempts=1)
    for _ in range(20):
        await trial.fail("small@a")
        await trial.fail("small@b")

    assert trial.ejections.order(["a", "b"]) == [0, 1]


async def test_a_probe_whose_client_leaves_lets_the_next_one_probe() -> None:
    trial = Trial({"a": failing("error")}, max_attempts=1)
    for _ in range(5):
        await trial.fail("small@a")
    trial.clock.now += 5
    trial.scripts["a"] = failing("hang")
    async with asyncio.TaskGroup() as group:
        probe = group.create_task(trial.open("small@a"))
        while trial.asked[5:] != ["small@a"]:
            await asyncio.sleep(0)
        assert trial.ejections.is_ejected("a")
        probe.cancel()

    assert not trial.ejections.is_ejected("a")
    trial.assert_nothing_left()


async def test_an_error_that_is_a_bug_gives_the_place_back_and_is_not_hidden() -> None:
    def broken(call: Call) -> Script:
        raise KeyError(call.model)

    trial = Trial({"a": broken}, limits={"a": 1})
    with pytest.raises(KeyError):
        await trial.open("small@a", "large@b")

    trial.assert_nothing_left()


@pytest.mark.parametrize(
    "scripts",
    [
        {},
        {"a": failing("unreachable")},
        {"a": failing("truncate", after_tokens=0)},
        {"a": failing("midstream_error", after_tokens=3)},
        {"a": failing("unreachable"), "b": failing("error")},
    ],
)
@pytest.mark.parametrize("by_scope", [True, False], ids=["by its scope", "by its task"])
async def test_whenever_it_is_cancelled_its_place_and_its_engine_are_free(
    scripts: dict[str, Script], by_scope: bool
) -> None:
    for turns in itertools.count():
        trial = Trial({}, limits={"a": 1, "b": 1})
        for name in "ab":
            trial.backends[name] = Stepping(name, scripts.get(name))
        scope = anyio.CancelScope()

        async def ask(trial: Trial = trial, scope: anyio.CancelScope = scope) -> None:
            with scope, suppress(AnswerBroke, AttemptsFailed):
                await trial.ask("small@a", "large@b")

        async with asyncio.TaskGroup() as group:
            task = group.create_task(ask())
            for _ in range(turns):
                await asyncio.sleep(0)
            finished = task.done()
            (scope.cancel if by_scope else task.cancel)()
        trial.assert_nothing_left()
        if finished:
            break
    assert turns > 4


async def test_the_error_that_is_reported_is_the_last_one_and_knows_whose_it_is() -> None:
    trial = Trial({"a": failing("unreachable"), "b": failing("error")}, max_attempts=2)

    failed = await trial.fail("small@a", "large@b")

    assert isinstance(failed.error, BackendFailed)
    assert [(one.error.model, one.error.backend) for one in failed.failed] == [("small", "a"), ("large", "b")]
