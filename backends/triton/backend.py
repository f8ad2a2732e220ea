"""`TritonBackend`: one model of a Triton server as a `Backend`, and the watch it keeps over that model."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec

from backends.backend import Call, Load
from backends.call_clock import CallClock
from backends.catalog import Capability
from backends.chat import ChatRequest, Event, Usage, parse_event
from backends.errors import (
    BackendError,
    BackendFailed,
    BackendOverloaded,
    BackendProtocolError,
    BackendRefusedCredentials,
    BackendTimeout,
    BackendUnreachable,
    RequestRejected,
)
from backends.fold import Unfoldable, fold
from backends.load_signals import LoadSignals, MetricsPage
from backends.model_folder import ModelFolder, ModelFolderError, folder_digest, read_model_folder
from backends.templates import ChatTemplate
from backends.tokenizer import Tokenizer
from backends.tool_calls.parser import ToolFormat, tool_call_parser, tool_format_of
from backends.triton.dialect import Dialect, IncompatibleModel, Parameter, Tensor, Value, read_dialect
from backends.triton.prompt import Prompt, Prompter
from backends.triton.reading import PromptEcho, UnreadableResponse, read_response
from backends.triton.sampling import FieldRefused, Parameters, guide_by_schema, parameters_of
from backends.triton.server import TOO_LONG_CODE, Inference, ModelDescription, Response, TritonServer
from backends.triton.telling import Frames, Telling

WATCH_EVERY_S = 2.0
"""How often a model is looked at for having been reloaded: four unary calls, under 2 ms together on loopback."""

ASK_WITHIN_S = 5.0
"""For each of those calls."""

WARM_UP_WITHIN_S = 120.0
"""A first request can have kernels chosen and caches filled before it is answered."""

WARM_UP_PROMPT = "Hello"
WARM_UP_TOKENS = 8
"""Enough responses to see whether their texts go on from each other or repeat."""

DEFAULT_MAX_TOKENS = 2_048
"""What a model may write where neither the client nor the context window says: TensorRT-LLM wants a number."""

_RENDERED_ON_THE_LOOP_BYTES = 32_768
"""Requests below this size are rendered where they are asked for: a thread costs as much as it would save."""

_CONNECTED_BY, _CHECKED_BY = 0.7, 0.9
"""Parts of a check's time: whoever waits no longer than it said is still told what is in the way."""

_DOUBTFUL = (BackendUnreachable, BackendRefusedCredentials, BackendProtocolError)
"""After these the server or the model may not be what it was."""


class TritonModel(msgspec.Struct, frozen=True, kw_only=True):
    """Which model is served, and how its text is to be written and read. Settings of an operator."""

    name: str
    """In Triton's repository."""
    folder: Path | None = None
    """With `tokenizer_config.json` and `tokenizer.json`."""
    chat_template: str | None = None
    """In the place of the folder's."""
    stop: tuple[str, ...] = ()
    tool_format: ToolFormat | None = None
    """None: as the chat template shows."""
    calls_tools: bool = True
    adds_bos: bool = True
    """Whether the engine puts the begin-of-text token before a prompt by itself."""
    remote_images: bool = False
    draft_tokens: int | None = None
    """What a BLS model is told to have drafted at a time; it answers in one piece then."""
    metrics_name: str | None = None
    """What its metrics call it, where that is the model behind it: `tensorrt_llm` for a BLS model or an ensemble."""


class _Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of the model as it is loaded now."""

    description: ModelDescription
    dialect: Dialect
    folder: ModelFolder | None
    folder_digest: str
    template: ChatTemplate | None
    tool_format: ToolFormat | None

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.folder.tokenizer if self.folder is not None else None


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
        self._now = now
        self._watch_every_s = watch_every_s
        self._inferences: set[Inference] = set()
        self._in_flight = 0
        self._turn = anyio.Lock()
        self._loaded: _Loaded | None = None
        self._answered = 0
        self._closed = False
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
        loaded = self._loaded
        if loaded is None:
            return None
        tools: frozenset[Capability] = frozenset({"tools"}) if loaded.tool_format is not None else frozenset()
        return loaded.dialect.capabilities | tools

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
        """See `Backend.run`: looks at the model every `watch_every_s` seconds, and follows its load."""
        async with anyio.create_task_group() as group:
            if self._signals is not None:
                group.start_soon(self._signals.run)
            while True:
                try:
                    await self._look()
                except BackendTimeout:
                    pass  # busy, as far as we know: what is in the way of a question is no other model
                except BackendError:
                    self._loaded = None  # `check` says why, to whoever asks
                await anyio.sleep(self._watch_every_s)

    async def check(self, *, within_s: float) -> None:
        """See `Backend.check`. Names the state of a model that is not ready."""
        began = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(began + _CHECKED_BY * within_s):
                await self._server.connect(began + _CONNECTED_BY * within_s)
                await self._ensure_loaded()
                if not await self._server.is_ready(within_s):
                    raise await self._not_ready()
        except TimeoutError as error:
            raise BackendOverloaded(f"model '{self._model.name}' is being warmed up", backend=self._name) from error

    async def load_model(self, *, within_s: float) -> None:
        """Make Triton load the model, or load it anew; it is ready after a warm-up. Needs explicit model control."""
        await self._server.load(within_s)
        self._loaded = None

    async def unload_model(self, *, within_s: float) -> None:
        """Make Triton unload the model; answers in flight may end. Needs explicit model control."""
        await self._server.unload(within_s)
        self._loaded = None

    async def aclose(self) -> None:
        self._closed = True
        for inference in tuple(self._inferences):
            inference.cut()
        await self._server.aclose()

    def _load_signals(self, page: MetricsPage, note: Callable[[bool, str], None] | None) -> LoadSignals:
        labelled = self._model.metrics_name or self._model.name
        return LoadSignals(page, model=labelled, in_flight=lambda: self._in_flight, note=note)

    # What is known of the model

    async def _known(self, clock: CallClock) -> _Loaded:
        if self._closed:
            raise self._server.unreachable()
        if self._loaded is not None:
            return self._loaded
        # Before any turn is waited for: whoever has it may be waiting for the same connection, by a longer clock.
        await clock.wait(self._server.connect(clock.connect_by))
        return await clock.wait(self._ensure_loaded())

    async def _ensure_loaded(self) -> _Loaded:
        """Look at the model, and warm it up, where that has not been done since it was loaded."""
        async with self._turn:
            loaded = self._loaded
            if loaded is None:
                loaded = self._loaded = await self._prepare()
            return loaded

    def _forget(self, loaded: _Loaded) -> None:
        """The server or the model may not be what it was: look before the next call, unless somebody has since."""
        if self._loaded is loaded:
            self._loaded = None

    async def _prepare(self) -> _Loaded:
        await self._server.connect(asyncio.get_running_loop().time() + ASK_WITHIN_S)
        await self._server.version(ASK_WITHIN_S)
        if not await self._server.is_ready(ASK_WITHIN_S):
            raise await self._not_ready()
        description = await self._server.describe(ASK_WITHIN_S)
        try:
            dialect = _dialect(self._model.name, description)
            folder, digest = await anyio.to_thread.run_sync(self._read_folder)
            template = self._template(folder)
        except (IncompatibleModel, ModelFolderError) as error:
            raise self._protocol_error(str(error)) from error
        loaded = _Loaded(
            description=description,
            dialect=dialect,
            folder=folder,
            folder_digest=digest,
            template=template,
            tool_format=self._tool_format(template),
        )
        dialect = await self._warmed_up(loaded)
        self._answered = await self._server.answered(ASK_WITHIN_S)
        return msgspec.structs.replace(loaded, dialect=dialect)

    def _read_folder(self) -> tuple[ModelFolder | None, str]:
        if self._model.folder is None:
            return None, ""
        digest = folder_digest(self._model.folder)
        return read_model_folder(self._model.folder, now=self._now), digest

    def _template(self, folder: ModelFolder | None) -> ChatTemplate | None:
        if self._model.chat_template is None:
            return folder.template if folder is not None else None
        bos, eos = (folder.bos_token, folder.eos_token) if folder is not None else ("", "")
        return ChatTemplate(self._model.chat_template, now=self._now, bos_token=bos, eos_token=eos)

    def _tool_format(self, template: ChatTemplate | None) -> ToolFormat | None:
        if template is None or not template.takes_tools or not self._model.calls_tools:
            return None
        return self._model.tool_format or tool_format_of(template.source)

    async def _warmed_up(self, loaded: _Loaded) -> Dialect:
        """Have the model answer once, and see whether its texts repeat what came before."""
        asked: Parameters = {"max_tokens": WARM_UP_TOKENS, "top_k": 1}
        tensors = self._tensors(loaded.dialect, WARM_UP_PROMPT, asked)
        inference = self._server.infer(tensors, "warm-up")
        texts = []
        try:
            async with asyncio.timeout(WARM_UP_WITHIN_S):
                while (response := await inference.next()) is not None:
                    texts.append(read_response(response, loaded.dialect).text)
        except TimeoutError as error:
            message = f"the warm-up took longer than {WARM_UP_WITHIN_S:g} s"
            raise BackendTimeout(message, phase="total", backend=self._name, model=self._model.name) from error
        except UnreadableResponse as error:
            raise self._protocol_error(f"the warm-up failed: {error}") from error
        except (BackendFailed, RequestRejected) as error:
            raise BackendFailed(f"the warm-up failed: {error}", backend=self._name, model=self._model.name) from error
        finally:
            inference.hang_up()
        if not texts:
            raise self._protocol_error("the warm-up brought no response")
        return _as_seen(loaded.dialect, texts)

    async def _look(self) -> None:
        """Notice that the model, or its folder, is not the one that was looked at."""
        loaded = self._loaded
        if loaded is None:
            await self._ensure_loaded()
            return
        if not await self._server.is_ready(ASK_WITHIN_S):
            raise await self._not_ready()
        description = await self._server.describe(ASK_WITHIN_S)
        answered = await self._server.answered(ASK_WITHIN_S)
        try:
            digest = await anyio.to_thread.run_sync(folder_digest, self._model.folder) if self._model.folder else ""
        except ModelFolderError as error:
            raise self._protocol_error(str(error)) from error
        if self._loaded is not loaded:
            return
        was_reloaded = answered < self._answered
        self._answered = answered
        if was_reloaded or (description.digest, digest) != (loaded.description.digest, loaded.folder_digest):
            self._loaded = None
            await self._ensure_loaded()

    async def _not_ready(self) -> BackendError:
        state = await self._server.state(ASK_WITHIN_S)
        name = self._model.name
        if state == "UNKNOWN":
            message = f"the server has no model '{name}' in its repository"
            return BackendRefusedCredentials(message, backend=self._name, model=name)
        return BackendOverloaded(f"model '{name}' is {state}", backend=self._name, model=name)

    # What is asked, and what came

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
                self._forget(loaded)
                raise self._protocol_error(str(error)) from error
            except _DOUBTFUL:
                self._forget(loaded)
                raise
            finally:
                self._end(inference)

    async def _begin(self, call: Call, clock: CallClock) -> tuple[_Loaded, _Ask, Inference, Response | None]:
        """Ask the model, and await its first response; once more where it turns out to have been reloaded."""
        is_second = False
        while True:
            loaded = await self._known(clock)
            ask = await self._ask(loaded, call)
            inference = self._server.infer(ask.tensors, call.request_id)
            self._inferences.add(inference)
            try:
                return loaded, ask, inference, await clock.wait(inference.next())
            except BaseException as error:
                self._end(inference)
                if isinstance(error, _DOUBTFUL):
                    self._forget(loaded)
                if is_second or not isinstance(error, BackendProtocolError) or not await self._is_stale(loaded, clock):
                    raise
            is_second = True

    def _end(self, inference: Inference) -> None:
        self._inferences.discard(inference)
        inference.hang_up()

    async def _is_stale(self, loaded: _Loaded, clock: CallClock) -> bool:
        """Whether the model has other tensors by now than it was asked with."""
        description = await clock.wait(self._server.describe(ASK_WITHIN_S))
        return description.digest != loaded.description.digest

    async def _ask(self, loaded: _Loaded, call: Call) -> _Ask:
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
        stops = dict.fromkeys((*_stop(asked), *self._model.stop, *(loaded.folder.stop if loaded.folder else ())))
        asked["stop"] = tuple(stops)
        asked["max_tokens"] = max_tokens
        if prompt.image_urls:
            asked["image_urls"] = prompt.image_urls
        tensors = self._tensors(loaded.dialect, prompt.text, asked)
        return _Ask(tensors=tuple(tensors), prompt=prompt, max_tokens=max_tokens, stops=tuple(stops))

    async def _prompt(self, loaded: _Loaded, request: ChatRequest) -> Prompt:
        prompter = self._prompter(loaded)
        if request.size_bytes < _RENDERED_ON_THE_LOOP_BYTES:
            return prompter.prompt(request)
        return await anyio.to_thread.run_sync(prompter.prompt, request, abandon_on_cancel=True)

    def _prompter(self, loaded: _Loaded) -> Prompter:
        return Prompter(
            template=loaded.template,
            tool_format=loaded.tool_format,
            bos_token=loaded.folder.bos_token if loaded.folder is not None and self._model.adds_bos else None,
            takes_images=loaded.dialect.takes("image_urls"),
            remote_images=self._model.remote_images,
        )

    async def _max_tokens(self, loaded: _Loaded, call: Call, prompt: str) -> int:
        """What the client allows, else what the context window leaves."""
        window = loaded.folder.context_tokens if loaded.folder is not None else None
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

    def _tensors(self, dialect: Dialect, prompt: str, asked: Parameters) -> list[Tensor]:
        """Every parameter that the model takes; what it must be told besides is told here."""
        drafts: Parameters = {} if self._model.draft_tokens is None else {"draft_tokens": self._model.draft_tokens}
        told: dict[Parameter, Value] = {
            "prompt": (prompt,),
            **asked,
            **drafts,
            "stream": self._streams(dialect),
            "exclude_prompt": True,
            "count_prompt": True,
            "count_completion": True,
            "finish_reason": True,
        }
        return [
            dialect.tensor(parameter, value)
            for parameter, value in told.items()
            if dialect.takes(parameter) and value != ()
        ]

    def _streams(self, dialect: Dialect) -> bool:
        return dialect.decoupled and self._model.draft_tokens is None

    def _telling(self, loaded: _Loaded, ask: _Ask, call: Call) -> Telling:
        dialect, prompt = loaded.dialect, ask.prompt
        # A stream never repeats the prompt; an answer in one piece may, whatever it was told. A short one may begin an
        # answer by rights, as no conversation does: there the model is believed.
        is_chat = call.request.operation == "chat"
        repeats = not self._streams(dialect) and (is_chat or not dialect.takes("exclude_prompt"))
        bos = loaded.folder.bos_token if loaded.folder is not None else ""
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

    async def _usage(self, loaded: _Loaded, ask: _Ask, telling: Telling) -> tuple[Usage | None, int | None]:
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

    async def _prompt_tokens(self, loaded: _Loaded, tokenizer: Tokenizer, prompt: str) -> int:
        """Tokens of a prompt, with the one that the engine puts first."""
        own = 1 if loaded.folder is not None and loaded.folder.bos_token and self._model.adds_bos else 0
        return own + await tokenizer.count_tokens(prompt)

    def _whole(self, events: Sequence[Event], call: Call) -> Event:
        """The answer in one piece."""
        try:
            whole = parse_event(fold([event.raw for event in events], call.request.operation), whole=True)
        except Unfoldable as error:
            raise self._protocol_error(str(error)) from error
        return msgspec.structs.replace(whole, usage=events[-1].usage)

    def _protocol_error(self, message: str) -> BackendProtocolError:
        return BackendProtocolError(message, backend=self._name, model=self._model.name)


def _dialect(model: str, description: ModelDescription) -> Dialect:
    return read_dialect(
        model=model,
        inputs=description.inputs,
        single=description.single,
        outputs=description.outputs,
        max_batch_size=description.max_batch_size,
        decoupled=description.decoupled,
        parameters=description.parameters,
    )


def _as_seen(dialect: Dialect, texts: Sequence[str]) -> Dialect:
    """The dialect with what the texts of an answer show, where they show it: each a longer one, or something new."""
    texts = [text.rstrip("\ufffd") for text in texts if text]
    if len(texts) < 3:
        return dialect
    pairs = list(itertools.pairwise(texts))
    goes_on = all(after.startswith(before) and len(after) >= len(before) for before, after in pairs)
    grows = sum(len(after) > len(before) for before, after in pairs) >= 2
    return msgspec.structs.replace(dialect, cumulative=goes_on and (grows or dialect.cumulative))


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
