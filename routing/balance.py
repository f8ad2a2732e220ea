"""Which replica of a model is asked first: the one that holds the conversation's head, unless it is busier than most.

Two rules, both fast enough for every request:

- *Power of two choices*: of two replicas drawn at random the cheaper one is taken. Workers that know of each other only
  what the engines said half a second ago would all run to the one cheapest replica; to the cheaper of two they do not
  (M. Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", IEEE TPDS 12(10), 2001).
- *Consistent hashing with bounded loads*: a conversation goes to the replica that its head hashes to, where the engine
  finds the prompt's beginning in its KV cache; a replica that has its share and a quarter more is passed over
  (V. Mirrokni, M. Thorup, M. Zadimoghaddam, arXiv:1608.01350).
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b

import msgspec

from backends.attempts import Target
from backends.backend import Load
from backends.chat import ChatRequest
from backends.health import Ejections
from backends.latency import FirstTokenTimes

BOUND = 1.25
"""How far above its share of all calls a replica may go for affinity's sake. Mirrokni et al. call it c and show that
1 + ε costs O(1/ε²) moves per call that comes or goes; KubeAI serves vLLM with the same 125 %."""

OTHERS_WEIGHT = 0.5
"""What a call that others sent counts as, since many that were counted have ended and unknown ones came in their place.
Two uneven replicas, four workers, readings of 0.5 s, p99 of the time to the first token for a weight of 0 / 0.5 / 1:
0.12 / 0.25 / 0.50 s where a call takes 0.1 s, 0.81 / 0.93 / 0.95 s where it takes 1 s, 5.7 / 2.4 / 3.8 s for 4 s."""

KV_FULL_FROM = 0.8
"""From here on a KV cache counts as filling up, and a full one doubles the cost: an engine that runs out preempts.
The saturation threshold of the Gateway API inference extension."""

LONG_SYSTEM_CHARS = 1024
"""From here on, some 250 tokens, a system prompt is worth being found in the KV cache by itself."""

_SYSTEM_CHARS = 4096
_FIRST_CHARS = 1024
_POINTS = 128
"""Of each replica on the ring: shares differ by about a tenth, which the bound evens out."""
_SYSTEM_ROLES = ("system", "developer")


class Affinity(msgspec.Struct, frozen=True):
    """Where a request wants to go, as two positions on the ring."""

    home: int
    """Of its system prompt where that is long, else of its conversation."""
    conversation: int
    """Of its system prompt and its first message, which all of its turns share: where it goes when its home is full.
    Conversations with one system prompt then part ways, and each still has one place."""


def affinity_of(request: ChatRequest, *, tenant_id: str, model: str) -> Affinity | None:
    """The affinity of a request: equal for all turns of a conversation, and never shared between tenants or models.

    None where it has no beginning to be found again: embeddings, several prompts at once, prompts of token ids.
    """
    system, first = _head(request)
    if not system and not first:
        return None
    hashed = blake2b(f"{tenant_id}\0{model}\0{system[:_SYSTEM_CHARS]}".encode("utf-8", "replace"), digest_size=8)
    home = _position(hashed.digest())
    hashed.update(b"\0" + first[:_FIRST_CHARS].encode("utf-8", "replace"))
    conversation = _position(hashed.digest())
    return Affinity(home if len(system) >= LONG_SYSTEM_CHARS else conversation, conversation)


def _head(request: ChatRequest) -> tuple[str, str]:
    """The system prompt and the message that follows it; of a text completion its prompt stands for the latter."""
    if request.prompt is not None:
        return "", request.prompt
    system: list[str] = []
    for message in request.messages:
        if message.role not in _SYSTEM_ROLES:
            return "\n".join(system), message.text
        system.append(message.text)
    return "\n".join(system), ""


def _position(digest: bytes) -> int:
    return int.from_bytes(digest, "big")


class Replicas:
    """The targets of one model, in the policy's order, and the ring they stand on for affinity.

    A replica's points depend on its name alone: one that comes or goes moves only what it takes or leaves.
    """

    def __init__(self, targets: Sequence[Target], *, affinity: bool) -> None:
        self.targets = tuple(targets)
        self.names = tuple(target.backend.name for target in targets)
        self.everyone = tuple(range(len(self.targets)))
        self.affinity = affinity and len(self.targets) > 1
        points = [(point, index) for index, name in enumerate(self.names) for point in _points(name)]
        points.sort()
        self._points = [point for point, _ in points]
        self._owners = [index for _, index in points]

    def walk(self, position: int) -> Iterator[int]:
        """The indices of the replicas, each once, as they follow on the ring from `position` on."""
        start = bisect(self._points, position)
        seen: set[int] = set()
        for step in range(len(self._owners)):
            owner = self._owners[(start + step) % len(self._owners)]
            if owner not in seen:
                seen.add(owner)
                yield owner


def _points(name: str) -> Iterator[int]:
    for number in range(_POINTS // 8):
        digest = blake2b(f"{number}\0{name}".encode()).digest()
        yield from (_position(digest[at : at + 8]) for at in range(0, 64, 8))


class Balancer:
    """Orders the replicas of a model for a request. `random` gives numbers in [0, 1).

    The cost of a replica is what it would mean to be asked there, in no unit: the calls under way and this one, times
    the square root of its average time to the first token, times up to two where its KV cache is nearly full.

    - Calls under way are our own now, and half of those of others as the engine counted them last (`queued` and
      `running`, less what was ours then): an old reading misses what others have sent since, but never what we have.
    - Of the time to the first token the square root, since it holds the waiting already that the calls stand for: with
      replicas of uneven speed and few slots the time itself sent too much to the fast ones. Where none is known, the
      mean of the others' stands in.
    """

    def __init__(self, *, ejections: Ejections, first_tokens: FirstTokenTimes, random: Callable[[], float]) -> None:
        self._ejections = ejections
        self._first_tokens = first_tokens
        self._random = random

    def order(self, replicas: Replicas, affinity: Affinity | None) -> list[Target]:
        """Every replica once: one that is due a probe, the choice, the others, at last those that are ejected.

        The others follow in the policy's order from behind the choice on, so that retries spread as well. Where all are
        ejected, the choice is made among all of them.
        """
        targets = replicas.targets
        if len(targets) == 1:
            return [targets[0]]
        names, everyone = replicas.names, replicas.everyone
        probe = self._ejections.probe_due(names)
        barred = self._ejections.among(names)
        able: Sequence[int] = everyone
        if barred or probe is not None:
            able = [index for index in everyone if index != probe and index not in barred]
            able = able or [index for index in everyone if index != probe]
        chosen = (
            self._cheaper_of_two(replicas, able) if affinity is None else self._next_with_room(replicas, able, affinity)
        )
        order = [chosen, *everyone[chosen + 1 :], *everyone[:chosen]]
        if barred:
            order.sort(key=barred.__contains__)
        if probe is not None:
            order.sort(key=probe.__ne__)
        return [targets[index] for index in order]

    def _cheaper_of_two(self, replicas: Replicas, able: Sequence[int]) -> int:
        count = len(able)
        if count == 1:
            return able[0]
        one, other = int(self._random() * count), int(self._random() * (count - 1))
        pair = (able[one], able[other + (other >= one)])
        calls, weights = self._state(replicas, pair)
        return pair[(calls[1] + 1) * weights[1] < (calls[0] + 1) * weights[0]]

    def _next_with_room(self, replicas: Replicas, able: Sequence[int], affinity: Affinity) -> int:
        """The first replica that has room for one more call, from the request's home on, then from its conversation's.

        The share of a replica, of all calls and this one, is that of its speed (one over the time to the first token)
        in the speed of all; its bound is `BOUND` times that, rounded up, so that there is always one below its bound.
        Shares by the square root, as in the cost, let affinity fill a slow replica: a p99 of 1.28 s instead of 0.92 s.
        """
        home = next(index for index in replicas.walk(affinity.home) if index in able)
        if calls_under_way(replicas.targets[home].backend.load) == 0:
            return home  # no bound is below one
        calls, weights = self._state(replicas, able)
        slowness = [weight * weight for weight in weights]
        level = BOUND * (sum(calls) + 1) / sum(1.0 / slow for slow in slowness)
        room = {index for index, n, slow in zip(able, calls, slowness, strict=True) if n < math.ceil(level / slow)}
        if home in room:
            return home
        return next((index for index in replicas.walk(affinity.conversation) if index in room), home)

    def _state(self, replicas: Replicas, of: Sequence[int]) -> tuple[list[float], list[float]]:
        """The calls under way at each of these replicas, and what a call there weighs."""
        targets = replicas.targets
        loads = [targets[index].backend.load for index in of]
        weights = _weights(self._first_tokens.among([replicas.names[index] for index in of]))
        for position, load in enumerate(loads):
            if load.kv_cache_ratio is not None and load.kv_cache_ratio > KV_FULL_FROM:
                weights[position] *= 1.0 + (load.kv_cache_ratio - KV_FULL_FROM) / (1.0 - KV_FULL_FROM)
        return [calls_under_way(load) for load in loads], weights


def _weights(first_token_s: Sequence[float | None]) -> list[float]:
    """The square roots of the times, the mean of them in the place of what is not known."""
    known = [math.sqrt(time_s) for time_s in first_token_s if time_s is not None]
    if len(known) == len(first_token_s):
        return known
    mean = sum(known) / len(known) if known else 1.0
    return [mean if time_s is None else math.sqrt(time_s) for time_s in first_token_s]


def calls_under_way(load: Load) -> float:
    """The calls of everybody that a backend has, as far as we know; those of others at `OTHERS_WEIGHT`."""
    others = (load.queued or 0) + (load.running or 0) - load.in_flight_then
    return load.in_flight + OTHERS_WEIGHT * others if others > 0 else load.in_flight
