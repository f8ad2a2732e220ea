"""How one request becomes an answer: which targets are tried, until when, and when a stream is committed.

The *commit point* is the first event with content. Before it every failure is ours to repair: another replica, a
fallback model, or the same one again, within the deadline, the attempt limit and the retry budget. After it the answer
belongs to the client and a failure ends it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence

import anyio
import msgspec

from backends.backend import Backend, Call, Timeouts
from backends.catalog import ModelCard
from backends.chat import ChatRequest, Event
from backends.errors import BackendError, BackendFailed, BackendProtocolError, BackendUnreachable, RequestRejected
from backends.health import Ejections, RetryBudget
from backends.latency import FirstTokenTimes
from backends.slots import Flow, Slot, Slots

CLOSE_WITHIN_S = 1.0
RETRY_AFTER_S = 0.05
"""Wait before the same target is asked again, doubled each time, with full jitter."""


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A model at one of its backends."""

    card: ModelCard
    backend: Backend
    timeouts: Timeouts = Timeouts()


class FailedAttempt(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    backend: str
    error: BackendError
    elapsed_s: float
    ejected: bool
    """Whether this failure ejected the backend."""


class OpenAnswer:
    """A committed answer: `target` gives it, `failed` is what was tried before. Iterate it once, then `aclose` it.

    Iterating raises `AnswerBroke` where the answer fails after it was committed.
    """

    def __init__(
        self,
        target: Target,
        held: Iterable[Event],
        events: AsyncGenerator[Event, None],
        slot: Slot,
        failed: tuple[FailedAttempt, ...],
        started_at: float,
        attempts: Attempts,
    ) -> None:
        self.target = target
        self.failed = failed
        self.started_at = started_at
        """When this attempt began, on the event loop's clock."""
        self._held = deque(held)
        self._events = events
        self._slot = slot
        self._attempts = attempts
        self._ended = False

    def __aiter__(self) -> OpenAnswer:
        return self

    async def __anext__(self) -> Event:
        if self._held:
            return self._held.popleft()
        try:
            return await self._events.__anext__()
        except StopAsyncIteration:
            self._attempts.note_end(self.target)
            raise
        except BackendError as error:
            raise AnswerBroke(self._attempts.note_failure(self.target, error, self.started_at)) from error

    async def aclose(self) -> None:
        self._slot.release()
        if not self._ended:
            await _close(self._events)


class Attempts:
    """Tries targets until one commits. Holds what outlives a request: ejections, first-token times, retries, slots."""

    def __init__(
        self,
        *,
        ejections: Ejections,
        first_tokens: FirstTokenTimes,
        budget: RetryBudget,
        slots: Slots,
        max_attempts: int,
        jitter: Callable[[], float],
    ) -> None:
        self._ejections = ejections
        self._first_tokens = first_tokens
        self._budget = budget
        self._slots = slots
        self._max_attempts = max_attempts
        self._jitter = jitter

    async def open(
        self, request: ChatRequest, targets: Sequence[Target], *, request_id: str, flow: Flow, deadline: float
    ) -> OpenAnswer:
        """The first answer that commits. Raises `AttemptsFailed` where none does."""
        self._budget.earn()
        failed: list[FailedAttempt] = []
        for target in self._plan(targets, failed):
            if not await self._back_off(target, failed, deadline):
                break
            started_at = time.monotonic()
            call = Call(
                request=request,
                model=target.card.name,
                request_id=request_id,
                deadline=deadline,
                timeouts=target.timeouts,
            )
            try:
                return await self._attempt(call, target, flow, tuple(failed), started_at)
            except BackendError as error:
                failed.append(self.note_failure(target, error, started_at))
                if not error.retryable:
                    break
        raise AttemptsFailed(tuple(failed))

    def note_end(self, target: Target) -> None:
        """An answer of `target` came to its end."""
        self._ejections.completed(target.backend.name)

    def note_failure(self, target: Target, error: BackendError, started_at: float) -> FailedAttempt:
        """Hold a failure against its backend, before the commit point or after it."""
        error.backend, error.model = target.backend.name, target.card.name
        return FailedAttempt(
            model=target.card.name,
            backend=target.backend.name,
            error=error,
            elapsed_s=time.monotonic() - started_at,
            ejected=self._ejections.failed(target.backend.name, error),
        )

    def _plan(self, targets: Sequence[Target], failed: Sequence[FailedAttempt]) -> Iterator[Target]:
        """Each target once, ejected ones last; then again those whose failure may pass by itself.

        One that is busy, slow, or has answered nonsense is not asked again for this request: that would not help it,
        and an overloaded engine may have said how long it wants to be left alone. Asking a model again, here or at a
        replica, is a retry and spends the budget; falling back to another model is the route's will and free.
        """
        waiting = deque(targets[index] for index in self._ejections.order([target.backend.name for target in targets]))
        while waiting and len(failed) < self._max_attempts:
            target = waiting.popleft()
            if len(failed) == self._max_attempts - 1:
                target = _other_model(waiting, failed) or target  # the last attempt: not a third dead replica
            is_retry = any(attempt.model == target.card.name for attempt in failed)
            if is_retry and not self._budget.spend():
                continue
            yield target  # `failed` has its failure when this returns
            if isinstance(failed[-1].error, BackendUnreachable | BackendFailed):
                waiting.append(target)

    async def _back_off(self, target: Target, failed: Sequence[FailedAttempt], deadline: float) -> bool:
        """Wait before a target is asked again, longer each time. Whether there is time for another attempt."""
        if not failed:
            return True
        asked = (target.card.name, target.backend.name)
        times = sum((attempt.model, attempt.backend) == asked for attempt in failed)
        pause_s = RETRY_AFTER_S * 2 ** (times - 1) * self._jitter() if times else 0.0
        if time.monotonic() + pause_s >= deadline:
            return False
        await anyio.sleep(pause_s)
        return True

    async def _attempt(
        self,
        call: Call,
        target: Target,
        flow: Flow,
        failed: tuple[FailedAttempt, ...],
        started_at: float,
    ) -> OpenAnswer:
        name = target.backend.name
        self._ejections.began(name)  # before anybody else can: of all who find a probe due, one makes it
        try:
            slot = await self._slots.acquire(name, flow, deadline=call.deadline)
        except BaseException as error:
            if not isinstance(error, BackendError):  # that is noted as a failure
                self._ejections.abandoned(name)
            raise
        asked_at = time.monotonic()
        events = target.backend.answer(call)
        held: list[Event] = []
        try:
            async for event in events:
                held.append(event)
                if event.has_content:
                    self._ejections.committed(name)
                    if not event.whole:
                        self._first_tokens.committed(name, time.monotonic() - asked_at)
                    return OpenAnswer(target, held, events, slot, failed, started_at, self)
            raise BackendProtocolError("the answer ended before it said anything")
        except BaseException as error:
            slot.release()
            self._note_slow(call, name, error, time.monotonic() - asked_at)
            if not isinstance(error, BackendError):
                self._ejections.abandoned(name)
            await _close(events)
            raise

    def _note_slow(self, call: Call, name: str, error: BaseException, elapsed_s: float) -> None:
        """Hold an attempt without a first token against the speed of its backend, unless the request was at fault.

        How long a whole answer was waited for tells nothing: its first byte comes after its last token.
        """
        waited_s = elapsed_s if call.request.stream else 0.0
        if not isinstance(error, BackendError):
            self._first_tokens.abandoned(name, waited_s)
        elif not isinstance(error, RequestRejected):
            self._first_tokens.failed(name, waited_s)


def _other_model(waiting: Iterable[Target], failed: Sequence[FailedAttempt]) -> Target | None:
    """The first target whose model has not been asked; None where the failures are not all of one model."""
    asked = {attempt.model for attempt in failed}
    return next((target for target in waiting if len(asked) == 1 and target.card.name not in asked), None)


class AttemptsFailed(Exception):
    """No target committed. `failed` holds every attempt, `error` the one to report.

    That is the last one's, unless a fallback refused a request that was not meant for it: then it is the first one's,
    which may pass when the client tries again.
    """

    def __init__(self, failed: tuple[FailedAttempt, ...]) -> None:
        first, last = failed[0], failed[-1]
        foreign = isinstance(last.error, RequestRejected) and last.model != first.model
        self.error: BackendError = first.error if foreign else last.error
        self.failed = failed
        super().__init__(str(self.error))


class AnswerBroke(Exception):
    """A committed answer ended in an error: `failed` is the attempt, which nothing can repair any more."""

    def __init__(self, failed: FailedAttempt) -> None:
        super().__init__(str(failed.error))
        self.failed = failed

    @property
    def error(self) -> BackendError:
        return self.failed.error


async def _close(events: AsyncGenerator[Event, None]) -> None:
    with anyio.move_on_after(CLOSE_WITHIN_S, shield=True):
        await events.aclose()
