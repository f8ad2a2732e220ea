"""`TritonBackend`: one model of a Triton server as a `Backend`, and the watch it keeps over that model."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from datetime import UTC, datetime

import anyio
import anyio.to_thread
import msgspec

from backends.backend import Call, Load
from backends.call_clock import CallClock
from backends.catalog import Capability
from backends.chat import ChatRequest, Event, Usage, parse_event
from backends.errors import (
    BackendError,
    BackendProtocolError,
    BackendRefusedCredentials,
    BackendUnreachable,
    RequestRejected,
)
from backends.fold import Unfoldable, fold
from backends.load_signals import LoadSignals, MetricsPage
from backends.tokenizer import Tokenizer
from backends.tool_calls.parser import tool_call_parser
from backends.triton.dialect import Tensor
from backends.triton.model import WATCH_EVERY_S, LoadedModel, ModelWatch, TritonModel
from backends.triton.prompt import Prompt, Prompter
from backends.triton.reading import PromptEcho, UnreadableResponse, read_response
from backends.triton.sampling import FieldRefused, Parameters, guide_by_schema, parameters_of
from backends.triton.server import TOO_LONG_CODE, Inference, Response, TritonServer
from backends.triton.telling import Frames, Telling

DEFAULT_MAX_TOKENS = 2_048
"""What a model may write where neither the client nor the context window says: TensorRT-LLM wants a number."""

_RENDERED_ON_THE_LOOP_BYTES = 32_768
"""Requests below this size are rendered where they are asked for: a thread costs as much as it would save."""

_DOUBTFUL = (BackendUnreachable, BackendRefusedCredentials, BackendProtocolError)
"""After these the server or the model may not be what it was."""


class _Ask(msgspec.Struct, frozen=True, kw_only=True):
    """One request, in the model's terms."""

    tensors: tuple[Tensor, ...]
    prompt: Prompt
    max_tokens: int
    stops: tuple[str, ...]


class TritonBackend:
    """A `Backend` for `model` at the Triton server `server`.

    The model counts as ready once it has answered a warm-up request, and is looked at again when it was reloaded: its
    tensors, its chat template and its tokenizer may be others then. That happens before the first call at the latest,
    and as long as `run` runs without being asked. `metrics` is the server's page of Prometheus metrics; `metrics_note`
    is told whether it can be read.

    An answer is always asked for as a stream where the model can: between two responses is where an engine notices that
    a client has left. For `n` above 1, or several prompts, put a `FanOut` in front of it. `wall_clock` gives Unix time.
    """

    def __init__(
        self,
        name: str,
        server: TritonServer,
        model: TritonModel,
        *,
        metrics: MetricsPage | None = None,
        metrics_note: Callable[[bool, str], None] | None = None,
        wall_clock: Callable[[], float] = time.time,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        watch_every_s: float = WATCH_EVERY_S,
    ) -> None:
        self._name = name
        self._server = server
        self._model = model
        self._wall_clock = wall_clock
        self._inferences: set[Inference] = set()
        self._in_flight = 0
        self._watch = ModelWatch(server, model, backend=name, now=now, every_s=watch_every_s)
        self._signals = None if metrics is None else self._load_signals(metrics, metrics_note)

    @property
    def name(self) -> str:
        return self._name

    @property
    def load(self) -> Load:
        return Load(in_flight=self._in_flight) if self._signals is None else self._signals.load()

    @property
    def capabilities(self) -> frozenset[Capability] | None:
        """See `Backend.capabilities`; None until the model has been seen."""
        loaded = self._watch.loaded
        return None if loaded is None else loaded.capabilities

    async def answer(self, call: Call) -> AsyncGenerator[Event, None]:
        """See `Backend.answer`."""
        self._in_flight += 1
        try:
            async with aclosing(self._stream(call)) as events:
                if call.request.stream:
                    async for event in events:
                        yield event
                else:
                    yield self._whole([event async for event in events], call)
        except BackendError as error:
            error.backend, error.model = self._name, call.model
            if isinstance(error, RequestRejected) and error.code == TOO_LONG_CODE:
                error.param = _said_in(call.request)
            raise
        finally:
            self._in_flight -= 1

    async def run(self) -> None:
        """See `Backend.run`: keeps watch over the model, and follows its load."""
        async with anyio.create_task_group() as group:
            if self._signals is not None:
                group.start_soon(self._signals.run)
            await self._watch.run()

    async def check(self, *, within_s: float) -> None:
        """See `Backend.check`. Names the state of a model that is not ready."""
        await self._watch.check(within_s)

    async def load_model(self, *, within_s: float) -> None:
        """Make Triton load the model, or load it anew; it is ready after a warm-up. Needs explicit model control."""
        await self._server.load(within_s)
        self._watch.forget()

    async def unload_model(self, *, within_s: float) -> None:
        """Make Triton unload the model; answers in flight may end. Needs explicit model control."""
        await self._server.unload(within_s)
        self._watch.forget()

    async def aclose(self) -> None:
        for inference in tuple(self._inferences):
            inference.cut()
        await self._server.aclose()

    def _load_signals(self, page: MetricsPage, note: Callable[[bool, str], None] | None) -> LoadSignals:
        labelled = self._model.metrics_name or self._model.name
        return LoadSignals(page, model=labelled, in_flight=lambda: self._in_flight, note=note)

    async def _stream(self, call: Call) -> AsyncGenerator[Event, None]:
        """The answer as the events of a stream, whatever the client asked for."""
        with CallClock(call, self._name) as clock:
            loaded, ask, inference, response = await self._begin(call, clock)
            telling = self._telling(loaded, ask, call)
            try:
                while response is not None:
                    for event in telling.tell(read_response(response, loaded.dialect)):
                        yield event
                        if event.has_content:
                            clock.began()
                    if telling.is_over:
                        self._end(inference)  # before anything that waits: the model has nothing more to say
                        break
                    response = await clock.wait(inference.next())
                if not telling.is_complete:
                    raise self._protocol_error("the answer broke off before its end")
                usage, completion_tokens = await self._usage(loaded, ask, telling)
                for event in telling.close(completion_tokens, usage):
                    yield event
            except UnreadableResponse as error:
                self._watch.forget(loaded)
                raise self._protocol_error(str(error)) from error
            except _DOUBTFUL:
                self._watch.forget(loaded)
                raise
            finally:
                self._end(inference)

    async def _begin(self, call: Call, clock: CallClock) -> tuple[LoadedModel, _Ask, Inference, Response | None]:
        """Ask the model, and await its first response; once more where it turns out to have been reloaded."""
        is_second = False
        while True:
            loaded = await self._watch.known(clock)
            ask = await self._ask(loaded, call)
            inference = self._server.infer(ask.tensors, call.request_id)
            self._inferences.add(inference)
            try:
                return loaded, ask, inference, await clock.wait(inference.next())
            except BaseException as error:
                self._end(inference)
                if isinstance(error, _DOUBTFUL):
                    self._watch.forget(loaded)
                if (
                    is_second
                    or not isinstance(error, BackendProtocolError)
                    or not await self._watch.is_stale(loaded, clock)
                ):
                    raise
            is_second = True

    def _end(self, inference: Inference) -> None:
        self._inferences.discard(inference)
        inference.hang_up()

    async def _ask(self, loaded: LoadedModel, call: Call) -> _Ask:
        """The request in the model's terms. Raises `RequestRejected` naming the field that it cannot have."""
        request = call.request
        try:
            asked = parameters_of(request, loaded.dialect)
            prompt = await self._prompt(loaded, request)
            if prompt.forced_schema is not None:
                if not loaded.dialect.takes("guide"):
                    raise FieldRefused("tool_choice", "this model cannot be made to call a tool; let it choose")
                guide_by_schema(asked, prompt.forced_schema)
            max_tokens = await self._max_tokens(loaded, call, prompt.text)
            if len(prompt.image_urls) > 1 and loaded.dialect.takes_one("image_urls"):
                raise FieldRefused("messages", f"this model takes one image a request, not {len(prompt.image_urls)}")
        except FieldRefused as error:
            raise _rejected(str(error), param=error.field, code=error.code) from error
        except (msgspec.DecodeError, RecursionError) as error:
            # The door reads some fields only; nobody has looked at what is in the others.
            why = "nested too deeply" if isinstance(error, RecursionError) else f"not valid JSON: {error}"
            raise _rejected(f"the request is {why}", param=None, code="invalid_json") from error
        stops = dict.fromkeys((*_stop(asked), *loaded.stops))
        asked["stop"] = tuple(stops)
        asked["max_tokens"] = max_tokens
        if prompt.image_urls:
            asked["image_urls"] = tuple(map(loaded.dialect.image_url, prompt.image_urls))
        tensors = tuple(loaded.tensors(prompt.text, asked))
        return _Ask(tensors=tensors, prompt=prompt, max_tokens=max_tokens, stops=tuple(stops))

    async def _prompt(self, loaded: LoadedModel, request: ChatRequest) -> Prompt:
        prompter = self._prompter(loaded)
        if request.size_bytes < _RENDERED_ON_THE_LOOP_BYTES:
            return prompter.prompt(request)
        return await anyio.to_thread.run_sync(prompter.prompt, request, abandon_on_cancel=True)

    def _prompter(self, loaded: LoadedModel) -> Prompter:
        return Prompter(
            template=loaded.template,
            tool_format=loaded.tool_format,
            bos_token=loaded.bos_token if loaded.adds_bos else None,
            takes_images=loaded.dialect.takes("image_urls"),
            remote_images=self._model.remote_images,
        )

    async def _max_tokens(self, loaded: LoadedModel, call: Call, prompt: str) -> int:
        """What the client allows, else what the context window leaves."""
        window = loaded.context_tokens
        wanted = call.request.max_tokens
        if wanted == 0:
            raise FieldRefused("max_tokens", "this model writes at least one token")
        if window is None or loaded.tokenizer is None:
            return wanted or DEFAULT_MAX_TOKENS
        # A prompt has no more tokens than bytes: most need not be counted to be known to leave room for what is wanted.
        if wanted is not None and len(prompt.encode()) + wanted < window:
            return wanted
        left = window - await self._prompt_tokens(loaded, loaded.tokenizer, prompt)
        if left <= 0:
            raise FieldRefused(
                _said_in(call.request),
                f"the prompt takes {window - left} of the {window} tokens of this model's context window; shorten it",
                code=TOO_LONG_CODE,
            )
        return min(wanted or DEFAULT_MAX_TOKENS, left)

    def _telling(self, loaded: LoadedModel, ask: _Ask, call: Call) -> Telling:
        dialect, prompt = loaded.dialect, ask.prompt
        # A stream never repeats the prompt; an answer in one piece may, whatever it was told. A short one may begin an
        # answer by rights, as no conversation does: there the model is believed.
        is_chat = call.request.operation == "chat"
        repeats = not loaded.streams and (is_chat or not dialect.takes("exclude_prompt"))
        bos = loaded.bos_token
        parser = None
        if prompt.tool_names and loaded.tool_format is not None:
            parser = tool_call_parser(
                loaded.tool_format,
                names=prompt.tool_names,
                fresh_id=_fresh_call_id,
                forced=prompt.forced_schema is not None,
            )
        return Telling(
            Frames(call, int(self._wall_clock())),
            cumulative=dialect.cumulative,
            says_finish_reason=dialect.takes("finish_reason"),
            echo=PromptEcho(f"{bos}{prompt.text}", f"{bos} {prompt.text}", prompt.text) if repeats else None,
            stops=ask.stops,
            parser=parser,
            wants_log_probs=call.request.wants_logprobs or _wants_own_logprobs(call),
            tokenizer=loaded.tokenizer,
            max_tokens=ask.max_tokens,
            one_call=_raw(call, "parallel_tool_calls") == b"false",
        )

    async def _usage(self, loaded: LoadedModel, ask: _Ask, telling: Telling) -> tuple[Usage | None, int | None]:
        """What the answer took, and its completion tokens: as the engine told, else as its tokenizer counts."""
        completion, prompt = telling.completion_tokens, telling.prompt_tokens
        if completion is not None and prompt is not None:
            return Usage(prompt_tokens=prompt, completion_tokens=completion), completion
        tokenizer = loaded.tokenizer
        if tokenizer is None:
            return None, completion
        if completion is None:
            completion = await tokenizer.count_tokens("".join(telling.text))
        if prompt is None:
            prompt = await self._prompt_tokens(loaded, tokenizer, ask.prompt.text)
        return Usage(prompt_tokens=prompt, completion_tokens=completion, estimated=True), completion

    async def _prompt_tokens(self, loaded: LoadedModel, tokenizer: Tokenizer, prompt: str) -> int:
        """Tokens of a prompt, with the one that the engine puts first."""
        return int(loaded.adds_bos) + await tokenizer.count_tokens(prompt)

    def _whole(self, events: Sequence[Event], call: Call) -> Event:
        """The answer in one piece."""
        try:
            whole = parse_event(fold([event.raw for event in events], call.request.operation), whole=True)
        except Unfoldable as error:
            raise self._protocol_error(str(error)) from error
        return msgspec.structs.replace(whole, usage=events[-1].usage)

    def _protocol_error(self, message: str) -> BackendProtocolError:
        return BackendProtocolError(message, backend=self._name, model=self._model.name)


def _stop(asked: Parameters) -> tuple[str, ...]:
    stop = asked.get("stop", ())
    return tuple(map(str, stop)) if isinstance(stop, list | tuple) else ()


def _wants_own_logprobs(call: Call) -> bool:
    """Whether a text completion asks for `logprobs: 0`, the tokens' own without alternatives."""
    return call.request.operation == "text_completion" and _raw(call, "logprobs") == b"0"


def _said_in(request: ChatRequest) -> str:
    """The field that holds what the model is to read."""
    return "messages" if request.operation == "chat" else "prompt"


def _raw(call: Call, field: str) -> bytes:
    return bytes(call.request.fields.get(field, b""))


def _rejected(message: str, *, param: str | None, code: str) -> RequestRejected:
    return RequestRejected(message, param=param, code=code, error_type="invalid_request_error")


def _fresh_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"
