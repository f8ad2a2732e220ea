"""Balancing two replicas, uneven and equal ones: time to first token, throughput and warm prefixes, by policy.

    python -m tests.bench.balancing [--worlds 4] [--seconds 30] [--seed 1]

Two scripted engines with 8 slots each and a queue of their own; of the uneven ones the second is four times slower. An
engine keeps the beginnings it read last (conversations and system prompts) and reads only what it does not have.
Requests arrive at random (Poisson) at 70 % of what both engines can do without warm prefixes: turns of conversations,
which share six long system prompts. Four workers share the engines and know of each other only what the engines say,
read every 0.5 s.

All policies run at the same time, each in several worlds of its own with the same arrivals as the other policies have,
so that whatever else the machine does meets all of them. What is real: the event loop's time, `Attempts`,
`FirstTokenTimes`, `LoadSignals` and `Balancer`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import statistics
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field

import anyio

from backends.attempts import Attempts, Target
from backends.backend import Call, Load
from backends.catalog import Capability, ModelCard
from backends.chat import ChatRequest, Event, parse_event
from backends.health import Ejections, RetryBudget
from backends.latency import FirstTokenTimes
from backends.load_signals import LoadSignals
from backends.slots import Flow, ImmediateSlots
from routing.balance import Balancer, Replicas, affinity_of
from tests.calls import make_request

WORKERS = 4
SLOTS = 8
SPEEDS = {"uneven": (1.0, 0.25), "equal": (1.0, 1.0)}
SYSTEM_S, HISTORY_S, DECODE_S = 0.1, 0.1, 0.8
TURN_S = 0.02
"""What a fast engine takes to read a system prompt and a conversation, to write an answer on average, and to
read what is new, seconds."""
UTILISATION = 0.7
FIRST = "engine-0"
SYSTEM_PROMPTS = [f"You are assistant number {number}. " + "Be of help. " * 120 for number in range(6)]
CONVERSATIONS = 40
TURNS = 8
KEPT_CONVERSATIONS, KEPT_SYSTEM_PROMPTS = 30, 4

TOKEN = parse_event(b'{"choices":[{"index":0,"delta":{"content":"a"}}]}')
END = parse_event(b'{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}')


class Recent:
    """The last `size` things an engine has read."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: OrderedDict[int, None] = OrderedDict()

    def touch(self, thing: int) -> bool:
        """Whether it was still known; it is now."""
        known = thing in self._kept
        self._kept[thing] = None
        self._kept.move_to_end(thing)
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)
        return known


class Engine:
    """An engine that all workers share: slots, a queue, and what it has read lately."""

    def __init__(self, name: str, speed: float) -> None:
        self.name = name
        self.speed = speed
        self.running = 0
        self.waiting: deque[asyncio.Event] = deque()
        self.systems = Recent(KEPT_SYSTEM_PROMPTS)
        self.conversations = Recent(KEPT_CONVERSATIONS)

    async def text(self, *, max_age_s: float) -> bytes:
        """Its metrics, in vLLM's words."""
        return b"vllm:num_requests_waiting %d\nvllm:num_requests_running %d\n" % (len(self.waiting), self.running)

    def read(self, turn: Turn) -> bool:
        """Whether it knows the conversation of a turn."""
        return self.conversations.touch(turn.conversation)

    async def enter(self) -> None:
        if self.running < SLOTS:
            self.running += 1
            return
        turn = asyncio.Event()
        self.waiting.append(turn)
        await turn.wait()

    def leave(self) -> None:
        if self.waiting:
            self.waiting.popleft().set()  # its place goes to the next in line
        else:
            self.running -= 1


@dataclass(frozen=True)
class Turn:
    """One request: which conversation goes on, under which system prompt, how long its answer is."""

    number: int
    worker: int
    conversation: int
    system: int
    length: float

    def request(self) -> ChatRequest:
        messages = [
            {"role": "system", "content": SYSTEM_PROMPTS[self.system]},
            {"role": "user", "content": f"This is conversation {self.conversation}."},
        ]
        return make_request(stream=True, messages=messages)


@dataclass
class Seen:
    """What came of the turns of one policy."""

    first_token_s: list[float] = field(default_factory=list)
    warm_conversations: int = 0
    warm_systems: int = 0
    first_engine: int = 0
    took_s: float = 0.0


class View:
    """A `Backend`: one worker's view of an engine."""

    def __init__(self, engine: Engine, turns: dict[str, Turn], seen: Seen, *, reads_signals: bool) -> None:
        self.engine = engine
        self.in_flight = 0
        self._turns = turns
        self._seen = seen
        self._signals: LoadSignals | None = None
        if reads_signals:
            self._signals = LoadSignals(engine, model=None, in_flight=lambda: self.in_flight)  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        return self.engine.name

    @property
    def load(self) -> Load:
        return Load(in_flight=self.in_flight) if self._signals is None else self._signals.load()

    @property
    def capabilities(self) -> frozenset[Capability] | None:
        return None

    async def answer(self, call: Call) -> AsyncGenerator[Event, None]:
        engine, turn, seen = self.engine, self._turns[call.request_id], self._seen
        self.in_flight += 1
        try:
            await engine.enter()
            try:
                knows_system, knows_history = engine.systems.touch(turn.system), engine.read(turn)
                seen.warm_systems += knows_system
                seen.warm_conversations += knows_history
                seen.first_engine += engine.name == FIRST
                unread_s = (0.0 if knows_system else SYSTEM_S) + (0.0 if knows_history else HISTORY_S)
                await asyncio.sleep((TURN_S + unread_s) / engine.speed)
                yield TOKEN
                await asyncio.sleep(DECODE_S * turn.length / engine.speed)
                yield END
            finally:
                engine.leave()
        finally:
            self.in_flight -= 1

    async def run(self) -> None:
        if self._signals is not None:
            await self._signals.run()

    async def check(self, *, within_s: float) -> None: ...

    async def aclose(self) -> None: ...


class Worker:
    """One gateway worker: its own views, speeds and balancer."""

    def __init__(self, number: int, views: Sequence[View], drawn: random.Random) -> None:
        ejections = Ejections(now=time.monotonic)
        first_tokens = FirstTokenTimes(now=time.monotonic)
        card = ModelCard(name="m", context_window_tokens=8192)
        self.random = drawn
        self.views = views
        self.replicas = Replicas([Target(card=card, backend=view) for view in views], affinity=True)
        self.balancer = Balancer(ejections=ejections, first_tokens=first_tokens, random=drawn.random)
        self.turns = itertools.count(number)
        self.attempts = Attempts(
            ejections=ejections,
            first_tokens=first_tokens,
            budget=RetryBudget(ratio=0.0),
            slots=ImmediateSlots(),
            max_attempts=1,
            jitter=drawn.random,
        )


Order = Callable[[Worker, ChatRequest], list[Target]]


def round_robin(worker: Worker, request: ChatRequest) -> list[Target]:
    return [worker.replicas.targets[next(worker.turns) % len(worker.views)]]


def at_random(worker: Worker, request: ChatRequest) -> list[Target]:
    return [worker.random.choice(worker.replicas.targets)]


def least_in_flight(worker: Worker, request: ChatRequest) -> list[Target]:
    return sorted(worker.replicas.targets, key=lambda target: target.backend.load.in_flight)


def balanced(worker: Worker, request: ChatRequest) -> list[Target]:
    return worker.balancer.order(worker.replicas, None)


def with_affinity(worker: Worker, request: ChatRequest) -> list[Target]:
    return worker.balancer.order(worker.replicas, affinity_of(request, tenant_id="t", model="m"))


POLICIES: dict[str, tuple[Order, bool]] = {
    "round robin": (round_robin, False),
    "random": (at_random, False),
    "least in flight": (least_in_flight, False),
    "balanced, no signals": (balanced, False),
    "balanced, signals": (balanced, True),
    "balanced, signals, affinity": (with_affinity, True),
}
"""How each orders the replicas, and whether it reads what the engines say."""


def arrivals_per_s(speeds: Sequence[float]) -> float:
    return UTILISATION * SLOTS * sum(speeds) / (SYSTEM_S + HISTORY_S + DECODE_S)


def arrivals(seconds: float, per_s: float, drawn: random.Random) -> Iterator[tuple[float, Turn]]:
    """When each turn arrives. Conversations of eight turns; a new one follows on each that ends."""
    at, fresh = 0.0, itertools.count()
    systems = len(SYSTEM_PROMPTS)
    talks = [[next(fresh), drawn.randrange(systems), drawn.randint(1, TURNS)] for _ in range(CONVERSATIONS)]
    for number in itertools.count():
        at += drawn.expovariate(per_s)
        if at >= seconds:
            return
        talk = drawn.choice(talks)
        length = drawn.lognormvariate(-0.125, 0.5)
        yield at, Turn(number, drawn.randrange(WORKERS), talk[0], talk[1], length)
        talk[2] -= 1
        if talk[2] == 0:
            talk[:] = [next(fresh), drawn.randrange(systems), TURNS]


async def play(policy: str, speeds: Sequence[float], plan: Sequence[tuple[float, Turn]], seen: Seen, seed: int) -> None:
    """One policy over one plan, on fresh engines."""
    order, reads_signals = POLICIES[policy]
    engines = [Engine(f"engine-{number}", speed) for number, speed in enumerate(speeds)]
    turns: dict[str, Turn] = {}
    workers = [
        Worker(
            number,
            [View(engine, turns, seen, reads_signals=reads_signals) for engine in engines],
            random.Random(seed + number),
        )
        for number in range(WORKERS)
    ]
    began = time.monotonic()

    async def ask(turn: Turn, due: float) -> None:
        worker, request, request_id = workers[turn.worker], turn.request(), str(turn.number)
        turns[request_id] = turn
        answer = await worker.attempts.open(
            request, order(worker, request), request_id=request_id, flow=Flow(tenant_id="t"), deadline=due + 300.0
        )
        seen.first_token_s.append(time.monotonic() - due)
        async for _ in answer:
            pass
        await answer.aclose()

    async with anyio.create_task_group() as readers:
        for worker in workers:
            for view in worker.views:
                readers.start_soon(view.run)
        async with anyio.create_task_group() as calls:
            for at, turn in plan:
                await anyio.sleep_until(began + at)
                calls.start_soon(ask, turn, began + at)
        readers.cancel_scope.cancel()
    seen.took_s += time.monotonic() - began


async def measure(worlds: int, seconds: float, seed: int) -> dict[tuple[str, str], Seen]:
    """By speeds and policy."""
    found = {(speeds, policy): Seen() for speeds in SPEEDS for policy in POLICIES}
    async with anyio.create_task_group() as group:
        for number, (name, speeds) in itertools.product(range(worlds), SPEEDS.items()):
            plan = list(arrivals(seconds, arrivals_per_s(speeds), random.Random(seed + number)))
            for policy in POLICIES:
                group.start_soon(play, policy, speeds, plan, found[name, policy], seed + number)
    return found


def percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    found = asyncio.run(measure(given.worlds, given.seconds, given.seed))
    for name, speeds in SPEEDS.items():
        requests = len(found[name, "round robin"].first_token_s)
        print(f"{name} replicas: {requests} requests per policy at {arrivals_per_s(speeds):.1f}/s, {WORKERS} workers")
        print(
            f"{'policy':30}{'p50 ms':>8}{'p99 ms':>8}{'per s':>7}{'warm conv.':>12}{'warm system':>12}{'on first':>10}"
        )
        for policy in POLICIES:
            print(f"{policy:30}{row(found[name, policy])}")
        print()


def row(seen: Seen) -> str:
    count = len(seen.first_token_s)
    p50, p99 = (percentile(seen.first_token_s, percent) * 1000 for percent in (50, 99))
    conversations, systems, first = (
        part / count for part in (seen.warm_conversations, seen.warm_systems, seen.first_engine)
    )
    return f"{p50:>8.0f}{p99:>8.0f}{count / seen.took_s:>7.1f}{conversations:>12.0%}{systems:>12.0%}{first:>10.0%}"


if __name__ == "__main__":
    main()
