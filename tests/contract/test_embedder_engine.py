"""Our embedder as a process of its own, with the real model; and its queue, over a model that waits to be told."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx
import numpy as np
import pytest
from aiohttp import web

from backends.embedder import MAX_BATCH_TEXTS, MiniLmEmbedder, TokenizedText, Vectors
from backends.embedder_engine import BatchQueue, EmbedderApi, EmbeddingService, Job
from backends.embeddings import from_base64
from backends.errors import BackendOverloaded, BackendUnreachable, RequestRejected
from backends.openai_http import OpenAIBackend
from tests.calls import collect, make_call, whole_of
from tests.engines import embedder_server


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    with embedder_server() as url:
        yield url


@pytest.fixture
async def client(engine: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=engine, timeout=30) as client:
        yield client


async def ask(client: httpx.AsyncClient, input_: Any, **fields: Any) -> dict[str, Any]:
    response = await client.post("/embeddings", json={"model": "minilm", "input": input_, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def test_a_text_is_answered_as_openai_would(client: httpx.AsyncClient) -> None:
    answer = await ask(client, "How do I reset my password?")

    assert {**answer, "data": 0} == {
        "object": "list",
        "data": 0,
        "model": "minilm",
        "usage": {"prompt_tokens": 9, "total_tokens": 9},
    }
    [item] = answer["data"]
    assert {**item, "embedding": 0} == {"object": "embedding", "index": 0, "embedding": 0}
    assert len(item["embedding"]) == 384


async def test_texts_come_back_in_order_whatever_their_lengths_and_both_encodings_carry_the_same_numbers(
    client: httpx.AsyncClient,
) -> None:
    texts = ["word " * n + "end" for n in (200, 1, 50, 3, 90, 2, 2, 7, 120, 5, 4, 11)]
    floats, packed = await ask(client, texts), await ask(client, texts, encoding_format="base64")

    model = MiniLmEmbedder()
    own = model.embed([model.tokenize(text) for text in texts])
    assert [item["index"] for item in floats["data"]] == list(range(len(texts)))
    assert [item["embedding"] for item in floats["data"]] == own.tolist()
    assert [list(from_base64(item["embedding"])) for item in packed["data"]] == own.tolist()
    assert floats["usage"]["prompt_tokens"] == sum(model.tokenize(text).tokens for text in texts)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"input": [1, 2, 3]}, "input", "token ids"),
        ({"input": [[1, 2], [3]]}, "input", "token ids"),
        ({"input": ""}, "input", "is empty"),
        ({"input": []}, "input", "empty list"),
        ({"input": ["a", ""]}, "input", "at 1"),
        ({"input": ["a", 1]}, "input", "mixes"),
        ({"input": ["a"] * 2049}, "input", "2048"),
        ({"input": "word " * 300}, "input", "302 tokens"),
        ({"input": "a", "dimensions": 128}, "dimensions", "384"),
        ({"input": "a", "stream": True}, "stream", "not streamed"),
    ],
)
async def test_what_it_cannot_do_is_refused_by_name(
    engine: str, client: httpx.AsyncClient, fields: dict[str, Any], param: str, says: str
) -> None:
    response = await client.post("/embeddings", json={"model": "m", **fields})
    error = response.json()["error"]

    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert says in error["message"]


async def test_its_own_dimensions_may_be_asked_for(client: httpx.AsyncClient) -> None:
    assert len((await ask(client, "a", dimensions=384))["data"]) == 1


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"input": {}}', b'{"input":"a","encoding_format":"int8"}'])
async def test_a_body_that_is_none_is_refused(client: httpx.AsyncClient, body: bytes) -> None:
    assert (await client.post("/embeddings", content=body)).status_code == 400


async def test_it_lists_its_model(client: httpx.AsyncClient) -> None:
    [model] = (await client.get("/models")).json()["data"]
    assert model["id"] == "all-MiniLM-L6-v2-int8"


async def test_as_a_backend_it_answers_and_its_refusals_are_the_clients(engine: str) -> None:
    backend = OpenAIBackend("a", engine)
    await backend.check(within_s=5.0)
    [event] = await collect(backend, make_call("embeddings", input=["a", "b"], encoding_format="base64"))
    assert event.usage is not None
    assert (event.usage.prompt_tokens, event.usage.estimated) == (6, False)
    assert len(from_base64(whole_of([event])["data"][1]["embedding"])) == 384

    with pytest.raises(RequestRejected) as refused:
        await collect(backend, make_call("embeddings", input="a", dimensions=12))
    assert (refused.value.status, refused.value.param) == (400, "dimensions")
    await backend.aclose()


async def test_while_its_model_loads_it_is_overloaded_and_then_it_answers() -> None:
    with embedder_server(ready=False) as url:
        backend = OpenAIBackend("a", url)
        seen: set[type[Exception]] = set()
        with anyio.fail_after(60):
            while True:
                try:
                    await backend.check(within_s=1.0)
                    break
                except (BackendUnreachable, BackendOverloaded) as error:
                    seen.add(type(error))
                    await anyio.sleep(0.005)
        assert BackendOverloaded in seen
        assert len(whole_of(await collect(backend, make_call("embeddings", within_s=30)))["data"]) == 1
        await backend.aclose()


class Told:
    """An embedder that computes when it is told to, and keeps what it was asked. A text's vector is its length."""

    model = "told"
    dimensions = 1
    window_tokens = 256

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.may_compute = threading.Semaphore(0)

    def tokenize(self, text: str) -> TokenizedText:
        return TokenizedText(ids=[0] * len(text), full_tokens=len(text))

    def embed(self, texts: Sequence[TokenizedText]) -> Vectors:
        self.batches.append([text.tokens for text in texts])
        assert self.may_compute.acquire(timeout=10)
        return np.array([[text.tokens] for text in texts], np.float32)


@asynccontextmanager
async def told_engine(
    embedder: Told, *, max_queued_texts: int = 20
) -> AsyncIterator[tuple[httpx.AsyncClient, EmbeddingService]]:
    service = EmbeddingService(lambda: embedder, max_queued_texts=max_queued_texts)
    runner = EmbedderApi(service).runner()
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    async with anyio.create_task_group() as group:
        group.start_soon(service.run)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{runner.addresses[0][1]}/v1", timeout=10) as client:
            await until(lambda: service.embedder)
            try:
                yield client, service
            finally:
                embedder.may_compute.release(100)
                group.cancel_scope.cancel()
                with anyio.CancelScope(shield=True):
                    await runner.cleanup()


async def until(holds: Any) -> None:
    with anyio.fail_after(5):
        while not holds():
            await anyio.sleep(0.002)


async def test_a_full_queue_is_refused_at_once_with_a_time_and_takes_more_when_it_is_empty() -> None:
    embedder = Told()
    async with told_engine(embedder) as (client, _), anyio.create_task_group() as group:
        group.start_soon(ask, client, ["a"] * 20)
        await until(lambda: embedder.batches)

        full = await client.post("/embeddings", json={"input": "b"})
        assert (full.status_code, full.json()["error"]["code"]) == (503, "queue_full")
        assert int(full.headers["retry-after"]) >= 1

        embedder.may_compute.release(100)
        while (again := await client.post("/embeddings", json={"input": "b"})).status_code == 503:
            await anyio.sleep(0.01)
        assert again.json()["data"][0]["embedding"] == [1.0]


async def test_what_a_client_that_left_had_waiting_is_not_computed() -> None:
    embedder = Told()
    async with told_engine(embedder) as (client, service):
        with anyio.move_on_after(5) as leaves:
            async with anyio.create_task_group() as group:
                group.start_soon(ask, client, ["a" * 200] * 3)
                await until(lambda: embedder.batches)
                leaves.cancel()
        await until(lambda: service.queued_texts == 0)
        embedder.may_compute.release(100)
        await ask(client, "b")
    assert embedder.batches == [[200], [1]]


async def test_a_question_does_not_wait_for_all_of_somebodys_documents() -> None:
    embedder = Told()
    async with told_engine(embedder) as (client, service), anyio.create_task_group() as group:
        group.start_soon(ask, client, ["d" * 200] * 10)
        await until(lambda: embedder.batches)
        group.start_soon(ask, client, "q")
        await until(lambda: service.queued_texts == 11)
        embedder.may_compute.release(100)
    assert [1] in embedder.batches[:4]


def job(*tokens: int) -> Job:
    texts = [TokenizedText(ids=[0] * n, full_tokens=n) for n in tokens]
    return Job(texts, asyncio.get_running_loop().create_future())


async def test_small_questions_of_many_share_a_batch_and_a_long_one_has_its_own() -> None:
    queue = BatchQueue()
    for tokens in (10, 11, 200, 9, 10):
        queue.add(job(tokens))
    found = []
    while batch := queue.next_batch():
        found.append([own.texts[index].tokens for own, index in batch])
    assert found == [[10, 11, 9, 10], [200]]


async def test_jobs_take_turns_and_none_waits_for_ever() -> None:
    queue = BatchQueue()
    for _ in range(2):
        queue.add(job(*[200] * 3))
    first, _ = queue._jobs
    turns: list[str] = []
    while batch := queue.next_batch():
        turns += ["first" if own is first else "second" for own, _ in batch]
    assert turns == ["first", "second"] * 3


async def test_a_batch_is_never_larger_than_it_may_be() -> None:
    queue = BatchQueue()
    for _ in range(5):
        queue.add(job(*[10] * 5))
    sizes = []
    while batch := queue.next_batch():
        sizes.append(len(batch))
    assert sum(sizes) == 25
    assert max(sizes) == MAX_BATCH_TEXTS
