"""The seam to an engine: `Backend`, and the clocks a call runs against."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

import msgspec

from backends.catalog import Capability
from backends.chat import ChatRequest, Event


class Timeouts(msgspec.Struct, frozen=True, kw_only=True):
    """How long each phase of a call may take, in seconds; all of them run inside the call's deadline."""

    connect_s: float = 1.0
    first_token_s: float = 30.0
    idle_s: float = 30.0
    total_s: float = 300.0


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt: a request, the model it goes to by our name, and until when it may take."""

    request: ChatRequest
    model: str
    """The *request model*: the card's name. A backend maps it to what its engine calls it."""
    request_id: str
    deadline: float
    """On the event loop's clock (`loop.time()`), seconds."""
    timeouts: Timeouts = Timeouts()


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """How busy a backend is, as far as Forebay knows. None where nothing is known."""

    in_flight: int = 0
    """Calls of this worker, now."""
    queued: int | None = None
    """Requests of everybody that wait inside the engine."""
    running: int | None = None
    """Requests of everybody that the engine works on."""
    kv_cache_ratio: float | None = None
    """How full the engine's KV cache is, 0 to 1."""
    age_s: float = 0.0
    """How old what the engine said is; `in_flight` is always of now."""
    in_flight_then: int = 0
    """Calls of this worker when the engine said it: those among its counts that are our own."""


class Backend(Protocol):
    """Answers a request as a sequence of events. The contract, proven by `tests/contract/test_backends.py`:

    - `answer` yields one `whole` event, or chunks of a stream that ends with every choice's finish_reason. A stream is
      yielded only for a request with `stream` set; usage is asked for and comes on some event where the engine can.
    - Every failure is a `BackendError`, before the first event or after any: an answer that breaks off, an error event
      inside a 200, a frame that is not JSON. Nothing that did not parse is yielded. A stream that ends without a
      finish_reason for a choice that began raises `BackendProtocolError`.
    - `deadline` and every phase of `timeouts` hold. The first-token clock of an answer that is not streamed is the
      deadline itself, since its first byte comes after its last token.
    - It is consumed by one task under `contextlib.aclosing`. Closing it, or cancelling the task in it, hangs up on the
      engine at once: before the first token, in the middle, streaming or not.
    """

    @property
    def name(self) -> str: ...

    @property
    def load(self) -> Load: ...

    @property
    def capabilities(self) -> frozenset[Capability] | None:
        """What the engine says its model can do; None where it does not say."""

    def answer(self, call: Call) -> AsyncGenerator[Event, None]: ...

    async def run(self) -> None:
        """Keep up what is known of the engine (its load, its model) for as long as the backend is in use.

        Its owner runs it in the background and cancels it. A backend that is not run answers all the same; it may
        learn later of what changed.
        """

    async def check(self, *, within_s: float) -> None:
        """Return when the engine can take requests now; raise a `BackendError` that says why it can not."""

    async def aclose(self) -> None:
        """Let go of connections. Calls in flight fail with `BackendUnreachable`."""
