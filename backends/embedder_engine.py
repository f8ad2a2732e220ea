"""Our embedding model in a process of its own: `python -m backends.embedder_engine --port N`.

It listens on the loopback interface at once, answers 503 "Loading model" until the model is in memory, then serves
OpenAI's `POST /v1/embeddings` and `GET /v1/models`. It ends, with status 0, on SIGTERM or SIGINT, and when its standard
input reaches the end: the parent keeps the other end of that pipe open for as long as it lives. A model or a port it
cannot use end it with status 1, and standard error says why.

Texts of all requests wait in one bounded queue and are computed in small batches by one thread, a batch of each request
in turn, so that a question does not wait for somebody's two thousand documents. A request that finds no room is
answered 503 with an honest `retry-after`; what a client that left had waiting is never computed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Literal, TypeVar

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from backends.embedder import Embedder, MiniLmEmbedder, TokenizedText, Vectors, fits
from backends.embeddings import MAX_INPUTS, BadInput, Input, each_input, to_base64

MAX_BODY_BYTES = 32 * 1024 * 1024
"""The gateway in front has the smaller limit of its own."""

MAX_QUEUED_TEXTS = 2 * MAX_INPUTS
"""Room for the largest request beside another one: at 14 tokens a text some 15 s of work."""

_TOKENIZE_AT_ONCE = 64
"""Texts that are tokenised between two batches: 5 ms at 70 tokens a text."""

_ENDS_BY = (signal.SIGTERM, signal.SIGINT)

T = TypeVar("T")


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """Where one engine serves, and with how much of the machine."""

    port: int
    threads: int
    """Threads that compute one batch."""


class QueueFull(Exception):
    """There is no room for a request's texts; `retry_after_s` is how long what waits will take."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__("the embedder's queue is full")
        self.retry_after_s = retry_after_s


class Job:
    """One request's texts on their way to vectors. `done` is its result; cancelled, what still waits is dropped."""

    def __init__(self, texts: Sequence[TokenizedText], done: asyncio.Future[list[Vectors]]) -> None:
        self.texts = texts
        self.done = done
        self.vectors: dict[int, Vectors] = {}
        self.waiting = deque(sorted(range(len(texts)), key=lambda index: texts[index].tokens))

    @property
    def next_tokens(self) -> int:
        """The size of the text that is next: the shortest that waits."""
        return self.texts[self.waiting[0]].tokens

    def take(self, index: int, vector: Vectors) -> None:
        self.vectors[index] = vector
        if len(self.vectors) == len(self.texts) and not self.done.done():
            self.done.set_result([self.vectors[place] for place in range(len(self.texts))])


class BatchQueue:
    """Jobs that wait, and the next batch of their texts: one job after the other begins a batch, all may fill it up."""

    def __init__(self) -> None:
        self._jobs: deque[Job] = deque()

    def add(self, job: Job) -> None:
        self._jobs.append(job)

    def next_batch(self) -> list[tuple[Job, int]]:
        """The texts to compute next, each by its job and its place in it; none where nothing waits."""
        self._jobs = deque(job for job in self._jobs if job.waiting and not job.done.done())
        batch: list[tuple[Job, int]] = []
        tokens: list[int] = []
        for job in self._jobs:
            while job.waiting and (not batch or fits([*tokens, job.next_tokens])):
                tokens.append(job.next_tokens)
                batch.append((job, job.waiting.popleft()))
        self._jobs.rotate(-1)
        return batch


class EmbeddingService:
    """The model behind its queue. `run` for as long as it serves; everything else from the same event loop."""

    def __init__(self, load: Callable[[], Embedder], *, max_queued_texts: int = MAX_QUEUED_TEXTS) -> None:
        self._load = load
        self._max_queued_texts = max_queued_texts
        self._embedder: Embedder | None = None
        self._thread = ThreadPoolExecutor(1, "embedder")
        self._queue = BatchQueue()
        self._queued_texts = 0
        self._news = asyncio.Event()
        self._seconds_per_text = 0.005

    @property
    def embedder(self) -> Embedder | None:
        """None until it is loaded."""
        return self._embedder

    @property
    def queued_texts(self) -> int:
        """Texts of requests that are not computed yet."""
        return self._queued_texts

    async def run(self) -> None:
        """Load the model, then compute what waits. Raises what keeps the model from loading or from computing."""
        clock = asyncio.get_running_loop().time
        self._embedder = embedder = await self.in_thread(self._load)
        while True:
            batch = self._queue.next_batch()
            if not batch:
                self._news.clear()
                await self._news.wait()
                continue
            began = clock()
            vectors = await self.in_thread(partial(embedder.embed, [job.texts[index] for job, index in batch]))
            self._seconds_per_text += 0.1 * ((clock() - began) / len(batch) - self._seconds_per_text)
            for (job, index), vector in zip(batch, vectors, strict=True):
                job.take(index, vector)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """The result of `work`, done in the one thread that computes."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    @contextmanager
    def room(self, texts: int) -> Iterator[None]:
        """Room for so many texts while the body runs. Raises `QueueFull`."""
        if self._queued_texts + texts > self._max_queued_texts:
            raise QueueFull(self._queued_texts * self._seconds_per_text)
        self._queued_texts += texts
        try:
            yield
        finally:
            self._queued_texts -= texts

    async def tokenize(self, embedder: Embedder, texts: Sequence[str]) -> list[TokenizedText]:
        tokenized: list[TokenizedText] = []
        for start in range(0, len(texts), _TOKENIZE_AT_ONCE):
            part = texts[start : start + _TOKENIZE_AT_ONCE]
            tokenized += await self.in_thread(partial(_tokenize, embedder, part))
        return tokenized

    async def embed(self, texts: Sequence[TokenizedText]) -> list[Vectors]:
        """A vector for each text. Cancelled, it takes back what still waits."""
        job = Job(texts, asyncio.get_running_loop().create_future())
        self._queue.add(job)
        self._news.set()
        return await job.done  # a cancelled await cancels it, which takes the job out of the queue


def _tokenize(embedder: Embedder, texts: Sequence[str]) -> list[TokenizedText]:
    return [embedder.tokenize(text) for text in texts]


class EmbeddingsBody(msgspec.Struct, frozen=True, kw_only=True):
    input: Input
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    stream: bool | None = None


class Refused(Exception):
    """An answer that is an error, as OpenAI's envelope has it."""

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "unavailable_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.headers = {} if retry_after_s is None else {"retry-after": str(max(1, round(retry_after_s)))}


_bodies = msgspec.json.Decoder(EmbeddingsBody)


class EmbedderApi:
    """OpenAI's embeddings over HTTP."""

    def __init__(self, service: EmbeddingService) -> None:
        self._service = service

    def runner(self) -> web.AppRunner:
        """What serves it, once set up. A client that leaves cancels its handler, which aiohttp would else let run."""
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_refusals])
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/embeddings", self._embeddings)
        return web.AppRunner(app, handler_cancellation=True, access_log=None)

    async def _health(self, request: web.Request) -> web.Response:
        self._loaded()
        return _json({"status": "ok"})

    async def _models(self, request: web.Request) -> web.Response:
        model = {"id": self._loaded().model, "object": "model", "created": 0, "owned_by": "forebay"}
        return _json({"object": "list", "data": [model]})

    async def _embeddings(self, request: web.Request) -> web.Response:
        embedder = self._loaded()
        body = _read(await request.read())
        _check_dimensions(body, embedder)
        given = _texts(body)
        try:
            with self._service.room(len(given)):
                texts = await self._service.tokenize(embedder, given)
                _check_lengths(texts, embedder)
                vectors = await self._service.embed(texts)
        except QueueFull as full:
            raise Refused(503, str(full), code="queue_full", retry_after_s=full.retry_after_s) from None
        tokens = sum(text.tokens for text in texts)
        answer = await self._service.in_thread(partial(_answer, vectors, body, body.model or embedder.model, tokens))
        return web.Response(body=answer, content_type="application/json")

    def _loaded(self) -> Embedder:
        if (embedder := self._service.embedder) is None:
            raise Refused(503, "Loading model", code="loading", retry_after_s=1.0)
        return embedder


def _read(body: bytes) -> EmbeddingsBody:
    try:
        return _bodies.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refused(400, str(error), code="invalid_value") from None


def _texts(body: EmbeddingsBody) -> Sequence[str]:
    try:
        inputs = each_input(body.input)
    except BadInput as bad:
        raise Refused(400, f"'input': {bad}", code="invalid_value", param="input") from None
    texts = [given for given in inputs if isinstance(given, str)]
    if len(texts) < len(inputs):
        message = "'input': this model reads texts, not token ids: its vocabulary is not OpenAI's; send the text itself"
        raise Refused(400, message, code="unsupported_value", param="input")
    return texts


def _check_dimensions(body: EmbeddingsBody, embedder: Embedder) -> None:
    if body.dimensions not in (None, embedder.dimensions):
        message = (
            f"'dimensions': this model's vectors have {embedder.dimensions} dimensions and cannot be shortened to"
            f" {body.dimensions}; leave it out"
        )
        raise Refused(400, message, code="unsupported_value", param="dimensions")
    if body.stream:
        raise Refused(400, "'stream': embeddings are not streamed; leave it out", code="invalid_value", param="stream")


def _check_lengths(texts: Sequence[TokenizedText], embedder: Embedder) -> None:
    """As OpenAI does: a text that the model would see only the beginning of is refused, not cut behind one's back."""
    for place, text in enumerate(texts):
        if text.truncated:
            message = (
                f"'input': the text at {place} has {text.full_tokens} tokens, and this model reads"
                f" {embedder.window_tokens}; send it in parts"
            )
            raise Refused(400, message, code="context_length_exceeded", param="input")


def _answer(vectors: Sequence[Vectors], body: EmbeddingsBody, model: str, tokens: int) -> bytes:
    encoded: list[object] = [
        to_base64(vector.tolist()) if body.encoding_format == "base64" else vector.tolist() for vector in vectors
    ]
    return msgspec.json.encode(
        {
            "object": "list",
            "data": [
                {"object": "embedding", "index": place, "embedding": vector} for place, vector in enumerate(encoded)
            ],
            "model": model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


@web.middleware
async def _refusals(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except Refused as refused:
        return _json(refused.body, refused.status, refused.headers)


def _json(body: object, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), status=status, headers=headers, content_type="application/json")


async def serve(engine: Engine, load: Callable[[], Embedder]) -> None:
    """Serve until a signal or the parent's end. Raises OSError for a port it cannot have, and what `load` raises."""
    ended = asyncio.Event()
    for number in _ENDS_BY:
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    service = EmbeddingService(load)
    runner = EmbedderApi(service).runner()
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", engine.port).start()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    async with asyncio.TaskGroup() as group:
        group.create_task(service.run())
        await ended.wait()
        os._exit(0)  # nothing here is worth saving, and the batch that is being computed would be waited for


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _arguments(argv: Sequence[str]) -> Engine:
    parser = argparse.ArgumentParser(prog="backends.embedder_engine", description="Serve all-MiniLM-L6-v2 on loopback.")
    parser.add_argument("--port", type=int, required=True, help="port on 127.0.0.1")
    parser.add_argument("--threads", type=int, default=1, help="threads that compute one batch")
    return Engine(**vars(parser.parse_args(argv)))


def main(argv: Sequence[str]) -> None:
    engine = _arguments(argv)
    try:
        asyncio.run(serve(engine, lambda: MiniLmEmbedder(engine.threads)))
    except* Exception as errors:  # noqa: BLE001 - whatever keeps it from serving is told, and ends it
        sys.stderr.write(f"the embedder on port {engine.port} failed: {errors.exceptions[0]}\n")
        os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
