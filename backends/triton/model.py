"""What is known of a model as it is loaded now, and the watch over it: looked at, warmed up, looked at again."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec

from backends.call_clock import CallClock
from backends.catalog import Capability
from backends.errors import (
    BackendError,
    BackendFailed,
    BackendOverloaded,
    BackendProtocolError,
    BackendRefusedCredentials,
    BackendTimeout,
    RequestRejected,
)
from backends.model_folder import ModelFolder, ModelFolderError, folder_digest, read_model_folder
from backends.templates import ChatTemplate
from backends.tokenizer import Tokenizer
from backends.tool_calls.parser import ToolFormat, tool_format_of
from backends.triton.dialect import Dialect, IncompatibleModel, Parameter, Tensor, Value, read_dialect
from backends.triton.reading import UnreadableResponse, read_response
from backends.triton.sampling import Parameters
from backends.triton.server import ModelDescription, TritonServer

WATCH_EVERY_S = 2.0
"""How often a model is looked at for having been reloaded: four unary calls, under 2 ms together on loopback."""

ASK_WITHIN_S = 5.0
"""For each of those calls."""

WARM_UP_WITHIN_S = 120.0
"""A first request can have kernels chosen and caches filled before it is answered."""

WARM_UP_PROMPT = "Hello"
WARM_UP_TOKENS = 8
"""Enough responses to see whether their texts go on from each other or repeat."""

_CONNECTED_BY, _CHECKED_BY = 0.7, 0.9
"""Parts of a check's time: whoever waits no longer than it said is still told what is in the way."""


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


class LoadedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model that has been looked at and has answered once."""

    model: TritonModel
    description: ModelDescription
    dialect: Dialect
    folder: ModelFolder | None
    folder_digest: str
    template: ChatTemplate | None
    tool_format: ToolFormat | None

    @property
    def capabilities(self) -> frozenset[Capability]:
        tools: frozenset[Capability] = frozenset({"tools"}) if self.tool_format is not None else frozenset()
        return self.dialect.capabilities | tools

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.folder.tokenizer if self.folder is not None else None

    @property
    def context_tokens(self) -> int | None:
        return self.folder.context_tokens if self.folder is not None else None

    @property
    def bos_token(self) -> str:
        """Empty where the model has none, or nobody said."""
        return self.folder.bos_token if self.folder is not None else ""

    @property
    def adds_bos(self) -> bool:
        """Whether the engine puts a token of its own before a prompt."""
        return self.model.adds_bos and self.bos_token != ""

    @property
    def stops(self) -> tuple[str, ...]:
        """What ends an answer, whatever the client says."""
        return (*self.model.stop, *(self.folder.stop if self.folder is not None else ()))

    @property
    def streams(self) -> bool:
        """Whether an answer comes in pieces."""
        return self.dialect.decoupled and self.model.draft_tokens is None

    def tensors(self, prompt: str, asked: Parameters) -> list[Tensor]:
        """Every parameter that the model takes; what it must be told besides is told here."""
        drafts: Parameters = {} if self.model.draft_tokens is None else {"draft_tokens": self.model.draft_tokens}
        told: dict[Parameter, Value] = {
            "prompt": (prompt,),
            **asked,
            **drafts,
            "stream": self.streams,
            "exclude_prompt": True,
            "count_prompt": True,
            "count_completion": True,
            "finish_reason": True,
        }
        return [
            self.dialect.tensor(parameter, value)
            for parameter, value in told.items()
            if self.dialect.takes(parameter) and value != ()
        ]


class ModelWatch:
    """Knows one model of a server, for as long as it stays what it was.

    A model is known once it has answered a warm-up request, and no longer once it was reloaded, its folder changed or
    `forget` was called; then it is looked at again, by `run` or by the next who asks for it.
    """

    def __init__(
        self,
        server: TritonServer,
        model: TritonModel,
        *,
        backend: str,
        now: Callable[[], datetime],
        every_s: float,
    ) -> None:
        self._server = server
        self._model = model
        self._backend = backend
        self._now = now
        self._every_s = every_s
        self._turn = anyio.Lock()
        self._loaded: LoadedModel | None = None
        self._answered = 0
        self._began_warm_up = False

    @property
    def loaded(self) -> LoadedModel | None:
        """The model, if it is known now."""
        return self._loaded

    async def run(self) -> None:
        """Look at the model again and again, until cancelled."""
        while True:
            try:
                await self._look()
            except BackendTimeout:
                pass  # busy, as far as we know: what is in the way of a question is no other model
            except BackendError:
                self._loaded = None  # `check` says why, to whoever asks
            await anyio.sleep(self._every_s)

    async def check(self, within_s: float) -> None:
        """Return when the model can take requests now; raise why it can not."""
        began = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(began + _CHECKED_BY * within_s):
                await self._server.connect(began + _CONNECTED_BY * within_s)
                await self._ensure_loaded()
                if not await self._server.is_ready(within_s):
                    raise await self._not_ready()
        except TimeoutError as error:
            name = self._model.name
            if self._loaded is None and self._began_warm_up:
                raise BackendOverloaded(f"model '{name}' is being warmed up", backend=self._backend) from error
            message = f"the server did not answer for model '{name}' within {within_s:g} s"
            raise BackendTimeout(message, phase="total", backend=self._backend, model=name) from error

    async def known(self, clock: CallClock) -> LoadedModel:
        """The model, looked at first where it is not known, by the clocks of the call that needs it."""
        if self._loaded is not None:
            return self._loaded
        # Before any turn is waited for: whoever has it may be waiting for the same connection, by a longer clock.
        await clock.wait(self._server.connect(clock.connect_by))
        return await clock.wait(self._ensure_loaded())

    def forget(self, loaded: LoadedModel | None = None) -> None:
        """Look before the next call. With `loaded`, only if that is what is known: somebody may have looked since."""
        if loaded is None or self._loaded is loaded:
            self._loaded = None

    async def is_stale(self, loaded: LoadedModel, clock: CallClock) -> bool:
        """Whether the model has other tensors by now."""
        description = await clock.wait(self._server.describe(ASK_WITHIN_S))
        return description.digest != loaded.description.digest

    async def _ensure_loaded(self) -> LoadedModel:
        """Look at the model, and warm it up, where that has not been done since it was loaded."""
        async with self._turn:
            loaded = self._loaded
            if loaded is None:
                loaded = self._loaded = await self._prepare()
            return loaded

    async def _prepare(self) -> LoadedModel:
        self._began_warm_up = False
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
        loaded = LoadedModel(
            model=self._model,
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

    async def _warmed_up(self, loaded: LoadedModel) -> Dialect:
        """Have the model answer once, and see whether its texts repeat what came before."""
        asked: Parameters = {"max_tokens": WARM_UP_TOKENS, "top_k": 1}
        inference = self._server.infer(loaded.tensors(WARM_UP_PROMPT, asked), "warm-up")
        texts = []
        self._began_warm_up = True
        try:
            async with asyncio.timeout(WARM_UP_WITHIN_S):
                while (response := await inference.next()) is not None:
                    texts.append(read_response(response, loaded.dialect).text)
        except TimeoutError as error:
            message = f"the warm-up took longer than {WARM_UP_WITHIN_S:g} s"
            raise BackendTimeout(message, phase="total", backend=self._backend, model=self._model.name) from error
        except UnreadableResponse as error:
            raise self._protocol_error(f"the warm-up failed: {error}") from error
        except (BackendFailed, RequestRejected) as error:
            raise BackendFailed(
                f"the warm-up failed: {error}", backend=self._backend, model=self._model.name
            ) from error
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
            return BackendRefusedCredentials(message, backend=self._backend, model=name)
        return BackendOverloaded(f"model '{name}' is {state}", backend=self._backend, model=name)

    def _protocol_error(self, message: str) -> BackendProtocolError:
        return BackendProtocolError(message, backend=self._backend, model=self._model.name)


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
