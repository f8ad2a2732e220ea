"""`/v1/embeddings` through a whole gateway: refused by name, kept and shared like answers, paid for by the prompt."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import anyio
import httpx
import msgspec
import pytest

from backends.chat import ChatRequest
from backends.embeddings import from_base64
from backends.scripted import Script, ScriptedBackend
from cache.exact import Lookup
from cache.semantic import NoSemanticTier
from tests.gateway.wire import error_of, metric
from tests.held import Held
from tests.upstream import Hang, Upstream, answers
from tests.world import POLICY, World, open_world

WITH_VECTORS = POLICY.replace("models:", "  vectors-1: {kind: scripted}\nmodels:").replace(
    "routes:",
    "  vectors: {backends: [vectors-1], task: embeddings, context_window: 256, price: {input: 1000}}\n"
    "routes:\n  embed: {strategy: fixed, model: vectors}",
)


class Vectors:
    """A gateway with a model for embeddings, and the engine behind it."""

    def __init__(self, world: World, engine: Held) -> None:
        self.world = world
        self.engine = engine

    async def embed(
        self, input_: Any = "hello", *, key: str | None = None, headers: dict[str, str] | None = None, **fields: Any
    ) -> httpx.Response:
        return await embed(self.world, input_, key=key, headers=headers or {}, **fields)


async def embed(
    world: World, input_: Any = "hello", *, key: str | None = None, headers: dict[str, str] | None = None, **fields: Any
) -> httpx.Response:
    body = {"model": "vectors", "input": input_, **fields}
    return await world.client.post(
        "/v1/embeddings", content=msgspec.json.encode(body), headers={**world.headers(key), **(headers or {})}
    )


@pytest.fixture(scope="module")
async def one() -> AsyncGenerator[Vectors, None]:
    engine = Held("vectors-1")
    async with open_world(policy=WITH_VECTORS, backends={"vectors-1": engine}) as world:
        yield Vectors(world, engine)


@pytest.fixture
def vectors(one: Vectors) -> Vectors:
    """The module's gateway. Its cache remembers: use a text of your own."""
    one.engine.script = Script()
    return one


def verdict(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.headers["x-forebay-cache"]


@pytest.mark.parametrize("input_", ["form", ["form"], [1, 2, 3], [[1, 2], [3]], ["form", "of", "it"]])
async def test_every_form_of_input_is_answered_in_order(vectors: Vectors, input_: Any) -> None:
    answer = (await vectors.embed(input_)).json()

    count = len(input_) if isinstance(input_, list) and not isinstance(input_[0], int) else 1
    assert [item["index"] for item in answer["data"]] == list(range(count))
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > 0
    assert set(answer["usage"]) == {"prompt_tokens", "total_tokens"}


async def test_token_ids_count_as_tokens_and_not_by_their_digits(vectors: Vectors) -> None:
    full = [100_000 + n for n in range(256)]
    assert verdict(await vectors.embed([full, full])) == "miss"
    refused = await vectors.embed([[7] * 400])
    assert (refused.status_code, error_of(refused)["code"]) == (400, "context_length_exceeded")


async def test_both_encodings_carry_the_same_numbers(vectors: Vectors) -> None:
    floats = (await vectors.embed("encodings", encoding_format="float")).json()["data"][0]["embedding"]
    packed = (await vectors.embed("encodings", encoding_format="base64")).json()["data"][0]["embedding"]
    assert [pytest.approx(n, abs=1e-6) for n in floats] == list(from_base64(packed))


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"input": ""}, "input", "is empty"),
        ({"input": []}, "input", "empty list"),
        ({"input": ["a", ""]}, "input", "at 1"),
        ({"input": ["a", [1]]}, "input", "mixes"),
        ({"input": ["a"] * 2049}, "input", "2048"),
        ({"input": {"text": "a"}}, "input", "expected"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "invalid enum value"),
        ({"input": "a", "dimensions": 0}, "dimensions", ">= 1"),
        ({"input": "a", "stream": True}, "stream", "not streamed"),
        ({}, "input", "missing"),
    ],
)
async def test_what_cannot_be_is_refused_by_name_before_an_engine_is_asked(
    vectors: Vectors, fields: dict[str, Any], param: str, says: str
) -> None:
    calls = vectors.engine.calls
    body = msgspec.json.encode({"model": "vectors", **fields})
    response = await vectors.world.client.post("/v1/embeddings", content=body, headers=vectors.world.headers())

    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, param)
    assert says in error["message"]
    assert vectors.engine.calls == calls


@pytest.mark.parametrize("model", ["small", "fast"])
async def test_a_model_for_chat_is_refused_with_those_that_can(vectors: Vectors, model: str) -> None:
    response = await vectors.embed(model=model)
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (400, "unsupported_by_model", "model")
    assert error["message"] == f"'{model}' is for chat; for embeddings there is: embed, vectors"


@pytest.mark.parametrize("model", ["vectors", "embed"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_a_model_for_embeddings_is_refused_for_chat(vectors: Vectors, model: str, path: str) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": "a"}], "prompt": "a"}
    response = await vectors.world.client.post(path, json=body, headers=vectors.world.headers())
    assert response.status_code == 400
    assert error_of(response)["message"].startswith(f"'{model}' is for embeddings; for chat there is: auto, fast,")


async def test_only_models_that_the_key_may_use_are_named(vectors: Vectors) -> None:
    key = await vectors.world.new_tenant("narrow", allowed_models=frozenset({"small", "embed"}))
    assert error_of(await vectors.embed(model="small", key=key))["message"].endswith("there is: embed")
    assert verdict(await vectors.embed(model="embed", key=key)) == "miss"
    assert (await vectors.embed(model="vectors", key=key)).status_code == 403


async def test_models_say_what_they_are_for(vectors: Vectors) -> None:
    models = (await vectors.world.client.get("/v1/models", headers=vectors.world.headers())).json()["data"]
    tasks = {model["id"]: model["task"] for model in models}
    assert tasks == {
        **dict.fromkeys(("auto", "fast", "smart", "small", "large"), "chat"),
        "embed": "embeddings",
        "vectors": "embeddings",
    }
    one_model = await vectors.world.client.get("/v1/models/vectors", headers=vectors.world.headers())
    assert one_model.json()["task"] == "embeddings"


async def test_a_repeated_request_is_answered_from_the_cache_in_the_same_shape(vectors: Vectors) -> None:
    first = await vectors.embed(["kept", "twice"], model="embed", encoding_format="base64")
    calls = vectors.engine.calls
    again = await vectors.embed(["kept", "twice"], model="embed", encoding_format="base64", user="else")

    assert (verdict(first), verdict(again)) == ("miss", "exact")
    assert vectors.engine.calls == calls
    assert again.json() == first.json()
    assert "id" not in again.json()
    assert again.headers["x-forebay-saved-usd"] == first.headers["x-forebay-cost-usd"]
    assert (again.headers["x-forebay-model"], again.headers["x-forebay-route"]) == ("vectors", "embed")
    assert verdict(await vectors.embed(["kept", "twice"], model="embed", encoding_format="float")) == "miss"
    assert verdict(await vectors.embed(["twice", "kept"], model="embed", encoding_format="base64")) == "miss"
    assert verdict(await vectors.embed(["kept", "twice"], model="embed", dimensions=4)) == "miss"
    no_store = {"cache-control": "no-store"}
    assert verdict(await vectors.embed(["kept", "twice"], model="embed", headers=no_store)) == "bypass"


async def test_it_is_kept_even_where_a_policy_keeps_no_sampled_answer() -> None:
    policy = WITH_VECTORS + "cache: {exact: {max_temperature: 0}}\n"
    async with open_world(policy=policy, backends={"vectors-1": ScriptedBackend("vectors-1")}) as world:
        assert [verdict(await embed(world)) for _ in range(2)] == ["miss", "exact"]


async def test_no_tenant_gets_anothers_vectors(vectors: Vectors) -> None:
    other = await vectors.world.new_tenant("other")
    assert verdict(await vectors.embed("a secret text")) == "miss"
    assert verdict(await vectors.embed("a secret text", key=other)) == "miss"
    assert verdict(await vectors.embed("a secret text", key=other)) == "exact"


class Near(NoSemanticTier):
    """A tier that remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def lookup(self, tenant: Any, request: ChatRequest, scope: Any, *, deadline: float) -> Lookup:
        self.asked.append(f"lookup {request.operation}")
        return await super().lookup(tenant, request, scope, deadline=deadline)

    async def store(self, tenant: Any, request: ChatRequest, scope: Any, entry: Any, *, ttl_s: float) -> str | None:
        self.asked.append(f"store {request.operation}")
        return await super().store(tenant, request, scope, entry, ttl_s=ttl_s)


async def test_what_is_like_a_text_never_has_its_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    near = Near()
    monkeypatch.setattr("gateway.app.NoSemanticTier", lambda: near)
    async with open_world(policy=WITH_VECTORS, backends={"vectors-1": ScriptedBackend("vectors-1")}) as world:
        assert verdict(await embed(world, "a text")) == "miss"
        assert (await world.ask("a text", temperature=0)).status_code == 200
        await world.until(lambda: len(near.asked) == 2)
    assert near.asked == ["lookup chat", "store chat"]


async def test_identical_requests_at_once_share_one_call(vectors: Vectors) -> None:
    vectors.engine.hold()
    calls = vectors.engine.calls
    verdicts: list[str] = []

    async def ask() -> None:
        verdicts.append(verdict(await vectors.embed("shared")))

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(ask)
        await vectors.world.until(lambda: vectors.world.following == 3)
        vectors.engine.release()
    assert vectors.engine.calls == calls + 1
    assert sorted(verdicts) == ["coalesced", "coalesced", "miss"]


async def test_the_prompt_is_paid_for_and_nothing_else(vectors: Vectors) -> None:
    before = await metric(vectors.world, "forebay_tokens_total", model="vectors", kind="completion")
    response = await vectors.embed("priced")
    tokens = response.json()["usage"]["prompt_tokens"]

    assert response.headers["x-forebay-cost-usd"] == f"{tokens * 1_000_000 / 1e9:.9f}"
    assert await metric(vectors.world, "forebay_tokens_total", model="vectors", kind="completion") == before == 0


async def test_a_client_that_leaves_stops_the_engine(vectors: Vectors) -> None:
    vectors.engine.script = Script(fault="hang")
    cancelled = vectors.engine.cancelled
    with anyio.move_on_after(0.2):
        await vectors.embed("left")
    await vectors.world.until(lambda: vectors.engine.cancelled == cancelled + 1)


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        ("overloaded", 503, "backend_overloaded"),
        ("unreachable", 502, "backend_unreachable"),
        ("garbage", 502, "backend_protocol_error"),
        ("reject", 400, "scripted"),
    ],
)
async def test_an_engines_failure_is_told_as_for_chat(vectors: Vectors, fault: Any, status: int, code: str) -> None:
    vectors.engine.script = Script(fault=fault)
    response = await vectors.embed(f"fails: {fault}")
    assert (response.status_code, error_of(response)["code"]) == (status, code)


def over_http(url: str) -> str:
    return WITH_VECTORS.replace("vectors-1: {kind: scripted}", f"vectors-1: {{kind: openai, url: '{url}'}}")


async def test_an_engine_with_ways_of_its_own_is_evened_out_and_its_silence_estimated() -> None:
    async with Upstream() as engine, open_world(policy=over_http(engine.url)) as world:
        engine.plays(*answers({"model": "m", "data": [{"embedding": [0.5, -1.0]}, {"embedding": [2.0, 1.0]}]}))
        response = await embed(world, ["a", "b"], encoding_format="base64")

        answer = response.json()
        assert [list(from_base64(item["embedding"])) for item in answer["data"]] == [[0.5, -1.0], [2.0, 1.0]]
        assert [(item["object"], item["index"]) for item in answer["data"]] == [("embedding", 0), ("embedding", 1)]
        tokens = answer["usage"]["prompt_tokens"]
        assert tokens == answer["usage"]["total_tokens"] > 0
        assert response.headers["x-forebay-cost-usd"] == f"{tokens * 1_000_000 / 1e9:.9f}"
        assert await metric(world, "forebay_usage_estimated_total", model="vectors") == 1
        assert verdict(await embed(world, ["a", "b"], encoding_format="base64")) == "exact"


async def test_vectors_that_are_missing_are_never_passed_off_as_an_answer_nor_kept() -> None:
    async with Upstream() as engine, open_world(policy=over_http(engine.url)) as world:
        engine.plays(*answers({"object": "list", "data": [{"index": 0, "embedding": [0.5]}]}))
        for _ in range(2):
            response = await embed(world, ["a", "b"])
            assert (response.status_code, error_of(response)["code"]) == (502, "backend_protocol_error")
        assert len(engine.requests) >= 2


async def test_an_engine_that_hangs_ends_in_a_time_out() -> None:
    policy = "timeouts: {total: 300ms, first_token: 300ms, idle: 300ms, connect: 300ms}\n"
    async with Upstream() as engine, open_world(policy=over_http(engine.url) + policy) as world:
        engine.plays(Hang())
        response = await embed(world)
        assert response.status_code == 504
        await engine.until_hung_up()


async def test_the_document_describes_it(vectors: Vectors) -> None:
    document = (await vectors.world.client.get("/openapi/openapi.json")).json()
    operation = document["paths"]["/v1/embeddings"]["post"]
    assert set(operation["responses"]["200"]["content"]) == {"application/json"}
    assert {"model", "input"} == set(operation["requestBody"]["content"]["application/json"]["schema"]["required"])
