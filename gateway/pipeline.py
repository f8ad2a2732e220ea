"""One request, from admission to answer. Read `run` for the way of a request, `_fly` for the way of an upstream call.

    authenticate → admit → exact cache → join an identical flight → semantic cache → route → reserve
                 → wait for a backend slot → call → settle → store → answer

(Authentication happens before the body is read, in the face; slots are taken attempt by attempt, in
`backends.attempts`.) The upstream call is a *flight*: it belongs to the worker, so that a client that leaves takes it
down only when nobody else listens. Streaming or not is one path: events flow, and a face writes or folds them.

No ASGI type, no metric name and no SQL appear below. What happened is told to a `Recorder`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

import anyio
import anyio.to_thread
import msgspec

from backends.attempts import AnswerBroke, AttemptsFailed, FailedAttempt, OpenAnswer
from backends.catalog import TASKS, ModelCard
from backends.chat import ChatRequest, Event, Operation, Usage
from backends.errors import BackendProtocolError, BackendTimeout
from backends.fold import fold
from backends.slots import Flow
from backends.tokens import BytesPerToken
from cache.entry import Entry, why_not_stored
from cache.exact import ExactCache, Hit, Lookup, Miss
from cache.inflight import Flight, Flights, Follower
from cache.key import AnswerScope, canonical_request, exact_key
from cache.replay import Replay
from cache.semantic import SemanticTier
from gateway.answer import Answer, CacheVerdict, Head
from gateway.context import RequestContext
from gateway.errors import DeadlinePassed, ModelNotAllowed, WrongTask
from gateway.snapshot import UnknownModel
from policies.admission import Admission, Admitted
from policies.cache_policy import ExactCachePolicy
from policies.ledger import Amounts, Ledger, QuotaExceeded, Reservation
from policies.tenant import Tenant
from routing.cost import OutputLengths, estimate
from routing.decision import Decision

DEFAULT_TEMPERATURE = 1.0
"""What OpenAI's API takes a missing temperature for, and most engines after it."""

COUNT_WITHIN_S = 1.0
"""How long counting the tokens of an answer without usage may take, before they are guessed from its frames."""

FOLD_INLINE_FRAMES = 2_000
"""Longer answers are folded in a thread, after their end was sent."""

MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""What an engine may send for one request before it counts as gone wild: a flight keeps its answer in memory."""

SETTLE_WITHIN_S = 2.0
"""How long giving a reservation back may take after its request is gone."""


class Recorder(Protocol):
    """Is told what happened, and turns it into metrics and logs."""

    def attempt_failed(self, failed: FailedAttempt) -> None: ...

    def flight_ended(
        self,
        context: RequestContext,
        model: str,
        head: Head | None,
        usage: Usage,
        cost_nano_usd: int,
        outcome: str,
    ) -> None:
        """A flight is over. `outcome`: answered, failed, abandoned (nobody listened), denied."""

    def stored(self, reason: str | None) -> None:
        """An answer was kept (None), or was not and why."""

    def settle_failed(self, request_id: str, error: BaseException | None) -> None: ...


class Pipeline:
    """The one way of a request through the house."""

    def __init__(
        self,
        *,
        admission: Admission,
        exact: ExactCache,
        flights: Flights[Head],
        semantic: SemanticTier,
        ledger: Ledger,
        bytes_per_token: BytesPerToken,
        output_lengths: OutputLengths,
        count_tokens: Callable[[str], Awaitable[int]],
        recorder: Recorder,
        clock: Callable[[], float],
        now: Callable[[], float],
        jitter: Callable[[], float],
        fresh_id: Callable[[Operation], str],
    ) -> None:
        self._admission = admission
        self._exact = exact
        self._flights = flights
        self._semantic = semantic
        self._ledger = ledger
        self._bytes_per_token = bytes_per_token
        self._output_lengths = output_lengths
        self._count_tokens = count_tokens
        self._recorder = recorder
        self._clock = clock
        self._now = now
        self._jitter = jitter
        self._fresh_id = fresh_id
        self._live: dict[str, Reservation] = {}

    async def run(self, context: RequestContext, request: ChatRequest) -> Answer:
        """The answer to a request, once it is committed. Its source must be left when it has been read.

        Raises the errors that `gateway.errors` renders: of the request, the quota, the backends, the deadline.
        """
        scope = self._resolve(context, request)
        policy = context.snapshot.policy.file.cache.exact
        bypass = self._bypass(context, request, policy)
        key = None if bypass else exact_key(context.tenant, canonical_request(request), scope)

        lookup = self._exact.lookup(context.tenant, key, within_s=policy.lookup_timeout) if key else None
        admitted = await self._admission.admit(context.tenant)
        found: Lookup = await lookup if lookup is not None else Miss(reason=bypass or "absent")
        if isinstance(found, Hit):
            found = self._fresh_enough(context, found)
        if isinstance(found, Hit):
            return self._replay(context, request, found, "exact", admitted)

        flight_keys = self._flight_keys(context, request, key)
        while True:
            follower = self._join(flight_keys)
            verdict: CacheVerdict = "coalesced"
            if follower is None:
                near = await self._look_near(context, request, scope, bypass)
                if isinstance(near, Hit):
                    return self._replay(context, request, near, "semantic", admitted)
                follower = self._join(flight_keys)
            if follower is None:
                verdict = "bypass" if bypass else "miss"
                follower = self._flights.open(
                    flight_keys[0] if flight_keys else None,
                    lambda flight: self._fly(flight, context, request, scope, key),
                )
            try:
                async with asyncio.timeout_at(context.deadline):
                    head = await follower.head()
            except BaseException as error:
                follower.leave()
                if verdict == "coalesced" and _is_openers_own(error):
                    continue  # it was the opener's quota or time that ran out: the next in line opens
                if isinstance(error, TimeoutError):
                    raise DeadlinePassed from error
                raise
            return Answer(
                source=follower,
                cache=verdict,
                admitted=admitted,
                model=head.model,
                route=head.decision.route,
                overhead_s=self._overhead_s(context, head),
                head=head,
                miss_reason=found.reason,
            )

    async def _fly(
        self,
        flight: Flight[Head],
        context: RequestContext,
        request: ChatRequest,
        scope: AnswerScope,
        key: str | None,
    ) -> None:
        """Route, reserve, call, settle, store: one upstream call on behalf of everybody who follows `flight`."""
        snapshot = context.snapshot
        learned = (context.tenant.id, request.model)
        prompt_tokens = self._bytes_per_token.estimate(learned, request.size_bytes)
        decision = snapshot.router.route(request, prompt_tokens=prompt_tokens)
        claim = self._claim(context.tenant, request, decision, prompt_tokens)
        try:
            reservation = await self._ledger.reserve(context.tenant, context.request_id, claim)
        except QuotaExceeded:
            self._recorder.flight_ended(context, decision.model.name, None, Usage(), 0, "denied")
            raise
        self._live[context.request_id] = reservation
        taken = _Taken(prompt_tokens, self._count_tokens)
        head: Head | None = None
        outcome = "abandoned"
        try:
            answer = await snapshot.attempts.open(
                request,
                snapshot.targets(decision.candidates, request, context.tenant.id),
                request_id=context.request_id,
                flow=Flow(tenant_id=context.tenant.id, tokens=claim.tokens),
                deadline=context.deadline,
            )
            try:
                async for event in answer:
                    taken.add(event)
                    if head is None:
                        head = self._head(answer, decision, event)
                        flight.commit(head)
                    await flight.publish(event)
                    if flight.published_bytes > MAX_ANSWER_BYTES:
                        raise BackendProtocolError(
                            f"the answer is larger than {MAX_ANSWER_BYTES} bytes",
                            backend=head.backend,
                            model=head.model,
                        )
            finally:
                await answer.aclose()
            outcome = "answered"
        except AttemptsFailed as failure:
            outcome = "failed"
            for failed in failure.failed:
                self._recorder.attempt_failed(failed)
            raise
        except AnswerBroke as broke:
            outcome = "failed"
            self._recorder.attempt_failed(broke.failed)
            raise
        except Exception:
            outcome = "failed"
            raise
        finally:
            card = decision.model if head is None else snapshot.models[head.model]
            usage = await self._settle(context, reservation, card, head, taken, outcome)
        if not usage.estimated:
            self._bytes_per_token.learn(learned, request.size_bytes, usage.prompt_tokens)
        await self._store(flight, context, request, scope, key, head, usage, taken)

    def _resolve(self, context: RequestContext, request: ChatRequest) -> AnswerScope:
        scope = context.snapshot.scopes.get(request.model)
        if scope is None:
            known = tuple(name for name in context.snapshot.policy.names if context.tenant.may_use(name))
            raise UnknownModel(request.model, known)
        if not context.tenant.may_use(request.model):
            raise ModelNotAllowed(f"this key may not use '{request.model}'", param="model")
        self._check_task(context, request)
        return scope

    def _check_task(self, context: RequestContext, request: ChatRequest) -> None:
        tasks = context.snapshot.tasks
        wanted = TASKS[request.operation]
        if tasks[request.model] != wanted:
            able = [name for name, task in tasks.items() if task == wanted and context.tenant.may_use(name)]
            raise WrongTask(
                f"'{request.model}' is for {tasks[request.model]}; for {wanted} there is: {', '.join(able) or 'none'}",
                param="model",
            )

    def _flight_keys(self, context: RequestContext, request: ChatRequest, key: str | None) -> tuple[str, ...]:
        """The flights this request may join, the first of them its own kind.

        Who wants a fresh answer shares none. Who streams must not wait for an answer that comes as a whole; the other
        way round a stream is simply read to its end.
        """
        if key is None or context.cache_control.no_cache:
            return ()
        streamed = f"{key}:stream"
        return (streamed,) if request.stream else (f"{key}:whole", streamed)

    def _join(self, flight_keys: tuple[str, ...]) -> Follower[Head] | None:
        for flight_key in flight_keys:
            if (follower := self._flights.join(flight_key)) is not None:
                return follower
        return None

    def _bypass(self, context: RequestContext, request: ChatRequest, policy: ExactCachePolicy) -> str | None:
        """Why this request neither shares an answer nor keeps one; None where it may."""
        if not policy.enabled:
            return "disabled"
        if context.cache_control.no_store:
            return "no_store"
        if (DEFAULT_TEMPERATURE if request.temperature is None else request.temperature) > policy.max_temperature:
            return "temperature"
        return None

    def _fresh_enough(self, context: RequestContext, hit: Hit) -> Lookup:
        control = context.cache_control
        if control.no_cache:
            return Miss(reason="no_cache")
        if control.max_age_s is not None and hit.age_s > control.max_age_s:
            return Miss(reason="stale")
        return hit

    def _replay(
        self, context: RequestContext, request: ChatRequest, hit: Hit, verdict: CacheVerdict, admitted: Admitted
    ) -> Answer:
        return Answer(
            source=Replay(hit.entry, request, self._fresh_id(request.operation)),
            cache=verdict,
            admitted=admitted,
            model=hit.entry.model,
            route=request.model if request.model not in context.snapshot.models else None,
            overhead_s=self._clock() - context.started_at,
            age_s=hit.age_s,
            saved_nano_usd=hit.entry.cost_nano_usd,
        )

    async def _look_near(
        self, context: RequestContext, request: ChatRequest, scope: AnswerScope, bypass: str | None
    ) -> Lookup:
        if bypass or context.cache_control.no_cache:
            return Miss(reason=bypass or "no_cache")
        if request.operation == "embeddings":
            return Miss(reason="embeddings")  # a vector stands for its own text, never for one that is like it
        return await self._semantic.lookup(context.tenant, request, scope, deadline=context.deadline)

    def _claim(self, tenant: Tenant, request: ChatRequest, decision: Decision, prompt_tokens: int) -> Amounts:
        """The most that any candidate may take: a fallback must not cost more than was reserved."""
        claims = [
            estimate(card, request, tenant_id=tenant.id, prompt_tokens=prompt_tokens, lengths=self._output_lengths)
            for card in decision.candidates
        ]
        return Amounts(
            tokens=max(claim.tokens for claim in claims), cost_nano_usd=max(claim.cost_nano_usd for claim in claims)
        )

    def _head(self, answer: OpenAnswer, decision: Decision, event: Event) -> Head:
        for failed in answer.failed:
            self._recorder.attempt_failed(failed)
        card = answer.target.card
        known = event.usage if event.whole else None
        return Head(
            model=card.name,
            backend=answer.target.backend.name,
            decision=decision,
            failed=answer.failed,
            asked_at=answer.started_at,
            committed_at=self._clock(),
            cost_nano_usd=card.price.cost_nano_usd(known) if known is not None else None,
            usage=known,
        )

    def _overhead_s(self, context: RequestContext, head: Head) -> float:
        """Time since the request began, less the time its flight waited for the engine."""
        waited_s = head.committed_at - max(head.asked_at, context.started_at)
        return max(0.0, self._clock() - context.started_at - max(0.0, waited_s))

    async def _settle(
        self,
        context: RequestContext,
        reservation: Reservation,
        card: ModelCard,
        head: Head | None,
        taken: _Taken,
        outcome: str,
    ) -> Usage:
        """End the reservation, whatever happened to the call: with what it took, or with nothing where it failed.

        A call that nobody waited for has most likely had its prompt read: that much is settled, marked estimated, so
        that asking and hanging up is not free.
        """
        usage = Usage()
        cost_nano_usd = 0
        settled = False
        error: BaseException | None = None
        with anyio.move_on_after(SETTLE_WITHIN_S, shield=True):
            try:
                if head is not None or outcome == "abandoned":
                    usage = await taken.usage(complete=outcome == "answered", at_most_tokens=reservation.amounts.tokens)
                    cost_nano_usd = card.price.cost_nano_usd(usage)
                    reservation = self._live.get(context.request_id, reservation)
                    await self._ledger.settle(
                        reservation, Amounts(tokens=usage.total_tokens, cost_nano_usd=cost_nano_usd)
                    )
                else:
                    await self._ledger.release(reservation)
                settled = True
            except Exception as raised:  # noqa: BLE001 - an answer that was given stands; the lease is reconciled
                error = raised
            finally:
                self._live.pop(context.request_id, None)
                if not settled:
                    self._recorder.settle_failed(context.request_id, error)
                self._recorder.flight_ended(context, card.name, head, usage, cost_nano_usd, outcome)
        return usage

    async def _store(
        self,
        flight: Flight[Head],
        context: RequestContext,
        request: ChatRequest,
        scope: AnswerScope,
        key: str | None,
        head: Head | None,
        usage: Usage,
        taken: _Taken,
    ) -> None:
        """Keep the answer where it may be kept. The answer ends as soon as the entry is on its way, not later."""
        if key is None or head is None:
            return
        policy = context.snapshot.policy.file.cache.exact
        if taken.frames > FOLD_INLINE_FRAMES:
            flight.land()
        completion, reason = await self._completion(request, taken, policy)
        if reason is not None:
            self._recorder.stored(reason)
            return
        entry = Entry(
            operation=request.operation,
            model=head.model,
            completion=completion,
            usage=usage,
            cost_nano_usd=context.snapshot.models[head.model].price.cost_nano_usd(usage),
            created_at=self._now(),
        )
        ttl_s = policy.ttl * (1.0 - policy.ttl_jitter * self._jitter())
        kept = self._exact.store(context.tenant, key, entry, ttl_s=ttl_s)
        flight.land()
        self._recorder.stored(await kept)
        if request.operation != "embeddings":
            await self._semantic.store(context.tenant, request, scope, entry, ttl_s=ttl_s)

    async def _completion(
        self, request: ChatRequest, taken: _Taken, policy: ExactCachePolicy
    ) -> tuple[bytes, str | None]:
        """The answer as one completion, and why it may not be kept."""
        try:
            if taken.frames > FOLD_INLINE_FRAMES:
                completion = await anyio.to_thread.run_sync(taken.completion, request)
            else:
                completion = taken.completion(request)
            return completion, why_not_stored(completion, policy, request.operation)
        except Exception:  # noqa: BLE001 - the answer was given and stands, whatever keeps it from being kept
            return b"", "unreadable"

    def abort(self) -> None:
        """End every flight now: its followers are told that the gateway is shutting down."""
        self._flights.abort_all()

    async def renew_leases(self) -> None:
        """Prolong every live reservation, for as long as the worker runs."""
        while True:
            await anyio.sleep(self._ledger.lease_s / 3)
            for request_id, reservation in list(self._live.items()):
                renewed = await self._ledger.renew(reservation)
                if request_id in self._live:
                    self._live[request_id] = renewed


def _is_openers_own(error: BaseException) -> bool:
    """Whether a flight ended before its commit for a reason that another opener need not share."""
    if isinstance(error, AttemptsFailed):
        return isinstance(error.error, BackendTimeout)
    return isinstance(error, QuotaExceeded)


class _Taken:
    """What came out of an engine so far: events, and the usage they told or imply."""

    def __init__(self, prompt_tokens: int, count_tokens: Callable[[str], Awaitable[int]]) -> None:
        self._count_tokens = count_tokens
        self._prompt_tokens = prompt_tokens
        self._told: Usage | None = None
        self._frames: list[bytes] = []
        self._whole: bytes | None = None
        self._text: list[str] = []
        self._contentful = 0

    def add(self, event: Event) -> None:
        if event.usage is not None:
            self._told = event.usage
        if event.whole:
            self._whole = event.raw
        else:
            self._frames.append(event.raw)
        for choice in event.choices:
            piece = choice.delta or choice.message
            text = choice.text or (piece and (piece.content or piece.reasoning_content or piece.reasoning))
            if text:
                self._text.append(text)
            if piece and piece.tool_calls:
                self._text.extend(bytes(call).decode() for call in piece.tool_calls)
            if text or (piece and piece.tool_calls):
                self._contentful += 1

    async def usage(self, *, complete: bool, at_most_tokens: int) -> Usage:
        """What the engine told; else an estimate, counted where the answer is complete and guessed where it was cut.

        An estimate never exceeds `at_most_tokens`, which is what was reserved.
        """
        if self._told is not None:
            if self._told.estimated and self._told.prompt_tokens > at_most_tokens:
                return msgspec.structs.replace(self._told, prompt_tokens=at_most_tokens)
            return self._told
        prompt = min(self._prompt_tokens, at_most_tokens)
        # The best guess without counting is the number of frames with text: engines send about a token in each.
        completion = self._contentful
        if complete:
            with anyio.move_on_after(COUNT_WITHIN_S):
                completion = await self._count_tokens("".join(self._text))
        return Usage(prompt_tokens=prompt, completion_tokens=min(completion, at_most_tokens - prompt), estimated=True)

    @property
    def frames(self) -> int:
        return len(self._frames)

    def completion(self, request: ChatRequest) -> bytes:
        """The whole answer as one completion."""
        return self._whole if self._whole is not None else fold(self._frames, request.operation)
