"""Several choices from an engine that gives fewer at a time: one request becomes several calls, then one answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Any

import anyio
import msgspec

from backends.backend import Backend, Call, Load
from backends.catalog import Capability
from backends.chat import ChatRequest, Event, parse_event
from backends.errors import BackendProtocolError
from backends.fold import Unfoldable, unfold

_BUFFERED_EVENTS = 64
"""Events of all calls together that wait for a slow reader, before it slows the engine."""
_HANG_UP_WITHIN_S = 1.0

Json = dict[str, Any]


class FanOut:
    """A `Backend` that answers any `n` through one that takes at most `max_n` choices a call.

    With `one_prompt` a list of prompts is taken apart as well, for an engine that takes one prompt a call; else lists
    pass through untouched, as does what is within `max_n`. Of any other request `at_once` calls run at a time, since
    all of them stand in one place of the backend's limit. Frames come as they arrive, under one id, with the choices
    numbered through. Usage is the sum of what all calls took, prompts included, since that is what was consumed; it is
    missing where any call reported none. A seed goes to each call offset by its first choice, so that equal seeds give
    equal answers and choices still differ. The first call that fails ends all.
    """

    def __init__(self, backend: Backend, max_n: int, one_prompt: bool = False, at_once: int = 4) -> None:
        self._backend = backend
        self._max_n = max_n
        self._one_prompt = one_prompt
        self._at_once = at_once

    @property
    def name(self) -> str:
        return self._backend.name

    @property
    def load(self) -> Load:
        return self._backend.load

    @property
    def capabilities(self) -> frozenset[Capability] | None:
        return self._backend.capabilities

    async def answer(self, call: Call) -> AsyncGenerator[Event, None]:
        """See `Backend.answer`."""
        if self._takes(call.request):
            async with aclosing(self._backend.answer(call)) as events:
                async for event in events:
                    yield event
            return
        calls = self._split(call)
        answers = _Answers(call, len(calls), self._at_once)
        # A task group may not be held open over a yield, so it lives in a task of its own, which this generator owns.
        run = asyncio.get_running_loop().create_task(answers.gather(self._backend, calls))
        try:
            with answers.events as events:
                async for event in events:
                    yield event
            await run
            for event in answers.closing():
                yield event
        finally:
            run.cancel()
            with anyio.move_on_after(_HANG_UP_WITHIN_S, shield=True):
                await asyncio.wait([run])
            if run.done() and not run.cancelled():
                run.exception()  # seen, so that asyncio does not report it as lost

    async def run(self) -> None:
        await self._backend.run()

    async def check(self, *, within_s: float) -> None:
        await self._backend.check(within_s=within_s)

    async def aclose(self) -> None:
        await self._backend.aclose()

    def _takes(self, request: ChatRequest) -> bool:
        """Whether the backend answers this in one call."""
        if request.prompts > 1:
            return not self._one_prompt
        return request.n <= self._max_n

    def _split(self, call: Call) -> dict[int, Call]:
        """The calls to make, by the index of their first choice: prompt after prompt, `n` choices each."""
        request = call.request
        calls = {}
        for number, prompt in enumerate(_prompts(request)):
            for first in range(0, request.n, self._max_n):
                index = number * request.n + first
                changes: Json = {"n": min(self._max_n, request.n - first), **prompt}
                if request.seed is not None:
                    changes["seed"] = request.seed + index
                fields = request.with_fields(**changes)
                part = msgspec.structs.replace(
                    request, fields=fields, n=changes["n"], seed=changes.get("seed"), prompts=1
                )
                calls[index] = msgspec.structs.replace(call, request=part)
        return calls


def _prompts(request: ChatRequest) -> list[Json]:
    """The change that makes a request one of each prompt; one empty change where there is only one."""
    if request.prompts == 1:
        return [{}]
    return [{"prompt": prompt} for prompt in msgspec.json.decode(request.fields["prompt"], type=list[Any])]


class _Answers:
    """The answers of all calls on their way into one."""

    def __init__(self, call: Call, calls: int, at_once: int) -> None:
        self._operation = call.request.operation
        self._stream = call.request.stream
        self._calls = calls
        self._turns = asyncio.Semaphore(at_once)
        self._sender, self.events = anyio.create_memory_object_stream[Event](_BUFFERED_EVENTS)
        self._head: Json = {}
        self._wholes: dict[int, Json] = {}
        self._usages: dict[int, Json] = {}

    async def gather(self, backend: Backend, calls: dict[int, Call]) -> None:
        """Run the calls, and end `events` when they end. Raises the failure that came first."""
        with self._sender:
            try:
                async with asyncio.TaskGroup() as group:
                    for first, call in calls.items():
                        group.create_task(self._take(backend, call, first))
            except BaseExceptionGroup as failures:
                raise failures.exceptions[0] from None

    def closing(self) -> Iterable[Event]:
        """What can be said only when all calls have ended: the whole answer, or a stream's usage."""
        usage = _sum(list(self._usages.values())) if len(self._usages) == self._calls else None
        if self._stream:
            if usage is not None:
                yield parse_event(msgspec.json.encode({**self._head, "choices": [], "usage": usage}))
            return
        parts = [self._wholes[first] for first in sorted(self._wholes)]
        answer = {**parts[0], "choices": [choice for part in parts for choice in part.get("choices") or ()]}
        answer.pop("usage", None)
        if usage is not None:
            answer["usage"] = usage
        yield parse_event(msgspec.json.encode(answer), whole=True)

    async def _take(self, backend: Backend, call: Call, first: int) -> None:
        try:
            async with self._turns, aclosing(backend.answer(call)) as events:
                async for event in events:
                    await self._hand_on(event, first)
        except (Unfoldable, msgspec.DecodeError, RecursionError) as error:
            # It was an event, which is read in part; all of its fields are what no value can stand for.
            message = f"a frame that can not be read: {error}"
            raise BackendProtocolError(message, backend=backend.name, model=call.model) from error

    async def _hand_on(self, event: Event, first: int) -> None:
        if not self._stream:
            self._wholes[first] = self._renumbered(event.raw, first)
        elif event.whole:
            for raw in unfold(event.raw, self._operation, include_usage=True):
                await self._relay(raw, first)
        else:
            await self._relay(event.raw, first)

    async def _relay(self, raw: bytes, first: int) -> None:
        frame = self._renumbered(raw, first)
        if not self._head:
            self._head = {name: frame[name] for name in ("id", "object", "created", "model") if name in frame}
        if frame.pop("usage", None) is None or frame.get("choices"):
            await self._sender.send(parse_event(msgspec.json.encode({**frame, **self._head})))

    def _renumbered(self, raw: bytes, first: int) -> Json:
        answer = msgspec.json.decode(raw, type=Json)
        for choice in answer.get("choices") or ():
            choice["index"] = (choice.get("index") or 0) + first
        if answer.get("usage"):
            self._usages[first] = answer["usage"]
        return answer


def _sum(usages: Sequence[Json]) -> Json:
    """Counts added up field by field, nested ones too; what is no number is the first one's."""
    total: Json = {}
    for usage in usages:
        for name, value in usage.items():
            known = total.get(name)
            if isinstance(value, dict):
                total[name] = _sum([known, value]) if isinstance(known, dict) else value
            elif isinstance(value, int | float) and isinstance(known, int | float):
                total[name] = known + value
            elif known is None:
                total[name] = value
    return total
