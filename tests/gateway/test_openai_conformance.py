"""What OpenAI's clients rely on beyond the shape of answers: ids, headers, methods, retries, and what a cache may do.

Each docstring cites the checklist id that the test is for. Shapes of answers are in `test_wire`, error bodies in
`test_request_errors` and `test_backend_errors`, the cache's rules in `test_answers_kept`, models in `test_operations`.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import openai
import pytest
from openai import AsyncOpenAI
from openai._constants import DEFAULT_TIMEOUT

from backends.scripted import Script
from policies.admission import Admitted
from policies.ledger import QuotaExceeded
from policies.routing_policy import TimeoutsSpec
from policies.tenant import Tenant
from tests.backends.test_cassettes import acts
from tests.gateway.wire import chunks_of, error_of, metric, policy_with_engine, raw_client
from tests.upstream import Upstream, answers
from tests.world import World, events_of, open_world, text_of

NO_CACHE = {"cache-control": "no-store"}
HELLO: Any = [{"role": "user", "content": "hello"}]
GO_DURATION = re.compile(r"(\d+h)?(\d+m)?(\d+(\.\d+)?s)?(\d+ms)?")


class Limited:
    """An admission that says what it is told to, or refuses with it."""

    def __init__(self, says: Admitted | QuotaExceeded) -> None:
        self.says = says

    async def admit(self, tenant: Tenant) -> Admitted:
        if isinstance(self.says, QuotaExceeded):
            raise self.says
        return self.says


@pytest.fixture(scope="module")
async def engine() -> AsyncGenerator[Upstream, None]:
    async with Upstream() as upstream:
        yield upstream


@pytest.fixture(scope="module")
async def engine_world(engine: Upstream) -> AsyncGenerator[World, None]:
    async with open_world(policy=policy_with_engine(engine.url)) as world:
        yield world


def sdk(world: World, **options: Any) -> AsyncOpenAI:
    return AsyncOpenAI(
        base_url=f"{world.url}/v1",
        api_key=world.key.key,
        **{"max_retries": 0, "_strict_response_validation": True, **options},
    )


@pytest.mark.parametrize(
    "path", ["openai/chat_usage.sse", "vllm/usage_on_every_chunk.sse", "mistral/thinking_parts.sse"]
)
async def test_usage_comes_by_itself_next_to_last_wherever_the_engine_puts_it(
    engine: Upstream, engine_world: World, path: str
) -> None:
    """C1, C2: the last chunk has no choices and the usage, all others none; then `[DONE]`, and nothing else."""
    engine.plays(*acts(path, "cut 1"))
    response = await engine_world.ask(stream=True, stream_options={"include_usage": True}, headers=NO_CACHE)

    *content, last = chunks_of(response)
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] > 0
    assert all(part["choices"] and part.get("usage") is None for part in content)
    assert response.text.endswith("\n\ndata: [DONE]\n\n")
    assert len({(part["id"], part["model"]) for part in (*content, last)}) == 1


async def test_an_engines_heartbeats_and_event_names_stay_between_it_and_us(
    engine: Upstream, engine_world: World
) -> None:
    """C9: comments are legal, and a client gets data frames only."""
    for path in ("openrouter/comments.sse", "deepseek/keep_alive_reasoning.sse", "proxies/crlf_bom_done_spaces.sse"):
        engine.plays(*acts(path, "whole"))
        response = await engine_world.ask(stream=True, headers=NO_CACHE)
        assert re.fullmatch(r"(data: [^\r\n]+\n\n)+", response.text)
        assert events_of(response)[-1] == "[DONE]"


async def test_answers_to_two_schemas_are_never_taken_for_each_other(world: World) -> None:
    """C6, C8: the schema is part of what an answer is kept under, however alike two of them are."""

    def asking_for(schema: dict[str, Any], name: str = "s") -> dict[str, Any]:
        return {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": schema}}

    one = asking_for({"type": "object", "properties": {"a": {"type": "integer"}}})
    other = asking_for({"type": "object", "properties": {"a": {"type": "number"}}})
    for response_format in (one, other, asking_for({}, "t"), asking_for({}, "u"), None):
        fields = {} if response_format is None else {"response_format": response_format}
        verdicts = [(await world.ask("a schema", **fields)).headers["x-forebay-cache"] for _ in range(2)]
        assert verdicts == ["miss", "exact"]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, openai.BadRequestError),
        (413, openai.APIStatusError),
        (422, openai.UnprocessableEntityError),
        (401, openai.InternalServerError),
        (404, openai.InternalServerError),
        (429, openai.InternalServerError),
        (500, openai.InternalServerError),
        (502, openai.InternalServerError),
        (503, openai.InternalServerError),
        (504, openai.InternalServerError),
    ],
)
async def test_each_refusal_of_an_engine_is_an_error_that_the_sdk_understands(
    engine: Upstream, engine_world: World, status: int, kind: type[openai.APIStatusError]
) -> None:
    """C10: what the engine holds against the client keeps its status; what it holds against us is a server error."""
    engine.plays(*answers({"error": {"message": "no", "type": "t", "param": "n", "code": "c"}}, status))
    async with sdk(engine_world) as client:
        with pytest.raises(kind) as raised:
            await client.chat.completions.create(model="small", messages=HELLO, extra_headers=NO_CACHE)
    assert raised.value.request_id
    assert raised.value.response.headers["content-type"] == "application/json"
    if status in (400, 413, 422):
        assert (raised.value.status_code, raised.value.code, raised.value.param) == (status, "c", "n")
    else:
        assert raised.value.status_code in (502, 503, 504)


async def test_a_refusal_of_our_own_key_is_not_worth_asking_again() -> None:
    """C10, C13: `x-should-retry` keeps an SDK from asking what only an operator can put right."""
    async with open_world(small=Script(fault="refused")) as world, sdk(world, max_retries=3) as client:
        with pytest.raises(openai.InternalServerError) as raised:
            await client.chat.completions.create(model="small", messages=HELLO)
        asked = world.small.calls
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(model="small", messages=HELLO)
    assert raised.value.response.headers["x-should-retry"] == "false"
    assert asked == world.small.calls - asked == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_every_answer_says_how_long_it_took_in_whole_milliseconds(stream: bool) -> None:
    """C11: `openai-processing-ms`, of answers, streams, hits and errors."""
    async with open_world(small=Script(first_token_delay_s=0.03)) as world:
        slow = await world.ask(stream=stream)
        hit = await world.ask(stream=stream)
        refused = await world.ask(stream=stream, key="fb-wrong")
    took = [int(response.headers["openai-processing-ms"]) for response in (slow, hit, refused)]
    assert 30 <= took[0] < 5_000
    assert took[1] < took[0]
    assert all(re.fullmatch(r"\d+", response.headers["openai-processing-ms"]) for response in (slow, hit, refused))


async def test_a_clients_own_request_id_is_echoed_on_every_address(world: World) -> None:
    """C11: also where there is nothing, and only where it can do no harm."""
    for method, path in [
        ("GET", "/v1/models"),
        ("GET", "/v1/models/small"),
        ("HEAD", "/v1/models"),
        ("GET", "/v1/models/nope"),
        ("GET", "/v1/nope"),
        ("DELETE", "/v1/models"),
        ("GET", "/v1/chat/completions"),
        ("OPTIONS", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
    ]:
        mine = await world.client.request(method, path, headers=world.headers(**{"x-client-request-id": "mine-1"}))
        harm = await world.client.request(method, path, headers=world.headers(**{"x-client-request-id": "<a>"}))
        assert mine.headers["x-client-request-id"] == "mine-1", path
        assert "x-client-request-id" not in harm.headers
        assert mine.headers["x-request-id"] != harm.headers["x-request-id"]


@pytest.mark.parametrize(
    ("reset_s", "reset"), [(0.012, "12ms"), (1.0, "1000ms"), (360.0, "360000ms"), (0.0001, "1ms"), (0.0, "0ms")]
)
async def test_what_is_left_of_a_rate_is_told_in_openais_words(reset_s: float, reset: str) -> None:
    """C12: integers, and a duration as Go writes it."""
    admission = Limited(Admitted(limit_requests=60, remaining_requests=59, reset_s=reset_s))
    async with open_world(admission=admission) as world:
        responses = [await world.ask(), await world.ask(stream=True)]
        admission.says = Admitted()
        unlimited = await world.ask()
    for response in responses:
        rates = {name: value for name, value in response.headers.items() if name.startswith("x-ratelimit-")}
        assert rates == {
            "x-ratelimit-limit-requests": "60",
            "x-ratelimit-remaining-requests": "59",
            "x-ratelimit-reset-requests": reset,
        }
        assert GO_DURATION.fullmatch(rates["x-ratelimit-reset-requests"])
    assert not any(name.startswith("x-ratelimit-") for name in unlimited.headers)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_rate_that_is_used_up_says_when_to_come_back_and_the_sdk_does(stream: bool) -> None:
    """C13: `retry-after` in seconds, rounded up, and `retry-after-ms`, which the SDK prefers."""
    admission = Limited(QuotaExceeded("60 requests a minute", limit="requests_per_minute", retry_after_s=0.0301))
    async with open_world(admission=admission) as world:
        refused = await world.ask(stream=stream)
        async with sdk(world, max_retries=1) as client:
            with pytest.raises(openai.RateLimitError) as raised:
                await client.chat.completions.create(model="fast", messages=HELLO)
        retried = await metric(world, "forebay_client_retries_total")
    assert refused.status_code == 429
    assert (refused.headers["retry-after"], refused.headers["retry-after-ms"]) == ("1", "31")
    assert "x-should-retry" not in refused.headers
    assert error_of(refused)["type"] == "rate_limit_exceeded"
    assert raised.value.code == "requests_per_minute"
    assert retried == 1


async def test_a_budget_that_is_used_up_is_not_asked_for_again() -> None:
    """C13: waiting does not help against a day's quota, so the SDK is told not to."""
    admission = Limited(QuotaExceeded("the day's tokens are used up", limit="tokens_per_day", retry_after_s=None))
    async with open_world(admission=admission) as world, sdk(world, max_retries=3) as client:
        with pytest.raises(openai.RateLimitError) as raised:
            await client.chat.completions.create(model="fast", messages=HELLO)
        requests = await metric(world, "forebay_requests_total")
    assert raised.value.response.headers["x-should-retry"] == "false"
    assert "retry-after" not in raised.value.response.headers
    assert raised.value.type == "insufficient_quota"
    assert requests == 1


@pytest.mark.parametrize(("count", "counted"), [("1", 1), ("2", 1), ("0", 0), ("", 0), ("00", 0), ("x", 0), ("-1", 0)])
async def test_requests_that_an_sdk_has_made_before_are_counted(world: World, count: str, counted: int) -> None:
    """C14: in one counter without labels, whatever a client writes there."""
    before = await metric(world, "forebay_client_retries_total")
    await world.ask("again", headers={"x-stainless-retry-count": count})
    assert await metric(world, "forebay_client_retries_total") - before == counted


def test_our_times_run_out_before_the_sdks_patience() -> None:
    """C14: so that a client gets an envelope and not a broken connection."""
    assert DEFAULT_TIMEOUT.read is not None
    assert float(TimeoutsSpec().total) < DEFAULT_TIMEOUT.read


async def test_the_sdk_reads_a_stream_of_text_as_leniently_as_openais_own_needs(world: World) -> None:
    """C17: a text's frames have a null `finish_reason` before its end, which the SDK's own type has no place for."""
    async with sdk(world, _strict_response_validation=False) as client:
        stream = await client.completions.create(
            model="fast", prompt="Say it.", stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "This is a scripted answer."
    assert chunks[-1].usage is not None
    assert chunks[-1].choices == []


async def test_a_hit_is_the_answer_it_was_with_its_usage_and_costs_nothing(world: World) -> None:
    """C21: who answered, along which route and from where; the usage is the first answer's."""
    async with sdk(world) as client:
        first, hit, streamed = [
            await client.chat.completions.with_raw_response.create(
                model="fast", messages=[{"role": "user", "content": "hit"}], stream=stream
            )
            for stream in (False, False, True)
        ]
        usage = first.parse().usage
        assert usage == hit.parse().usage
        chunks = [chunk async for chunk in streamed.parse()]
    assert [raw.headers["x-forebay-cache"] for raw in (first, hit, streamed)] == ["miss", "exact", "exact"]
    assert {raw.headers["x-forebay-model"] for raw in (first, hit, streamed)} == {"small"}
    assert {raw.headers["x-forebay-route"] for raw in (first, hit, streamed)} == {"fast"}
    assert float(first.headers["x-forebay-cost-usd"]) > 0
    for raw in (hit, streamed):
        assert float(raw.headers["x-forebay-cost-usd"]) == 0
        assert raw.headers["x-forebay-saved-usd"] == first.headers["x-forebay-cost-usd"]
    assert {chunk.model for chunk in chunks} == {"small"}
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] == ["stop"]


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/chat/completions", "OPTIONS, POST"),
        ("/v1/completions", "OPTIONS, POST"),
        ("/v1/models", "GET, HEAD, OPTIONS"),
        ("/v1/models/small", "GET, HEAD, OPTIONS"),
    ],
)
async def test_options_says_what_may_be_asked_without_a_key(world: World, path: str, allowed: str) -> None:
    """C22."""
    response = await world.client.options(path)
    assert (response.status_code, response.content) == (204, b"")
    assert ", ".join(sorted(response.headers["allow"].split(", "))) == allowed
    refused = await world.client.request("PATCH", path, headers=world.headers())
    assert refused.status_code == 405
    assert set(refused.headers["allow"].split(", ")) == set(allowed.split(", "))


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/small", "/v1/models/nope", "/healthz", "/readyz"])
@pytest.mark.parametrize("with_key", [True, False])
async def test_head_tells_what_get_would_tell_and_no_body(world: World, path: str, with_key: bool) -> None:
    """C22: status, length and type, with a key and without; and the connection goes on."""
    headers = world.headers() if with_key else {}
    got = await world.client.get(path, headers=headers)
    lines = [f"HEAD {path} HTTP/1.1", "host: gateway", *(f"{name}: {value}" for name, value in headers.items())]
    async with raw_client(world) as client:
        await client.write("\r\n".join([*lines, "", ""]).encode())
        head = (await client.read_until(b"\r\n\r\n")).decode()
        await client.ask("after HEAD")
        assert (await client.read_answer())[0] == 200
    assert head.startswith(f"HTTP/1.1 {got.status_code} ")
    for name in ("content-length", "content-type"):
        assert f"{name}: {got.headers[name]}\r\n" in head


EMPTY = b"content-length: 0\r\n\r\n"
HI = b"content-length: 2\r\n\r\nhi"


@pytest.mark.parametrize(
    ("request_line", "rest", "status"),
    [
        (b"POST /v1/nope", HI, 404),
        (b"POST /v1/models", HI, 405),
        (b"PUT /v1/chat/completions", HI, 405),
        (b"GET /v1/chat/completions", EMPTY, 405),
        (b"POST /v1/chat/completions", b"content-encoding: br\r\n" + HI, 415),
        (b"POST /v1/chat/completions", HI, 400),
        (b"POST /v1/chat/completions", b"content-length: 30000\r\n\r\n" + b"x" * 30_000, 413),
    ],
)
async def test_a_connection_goes_on_after_every_kind_of_error(request_line: bytes, rest: bytes, status: int) -> None:
    """C22: whether or not the body was wanted."""
    async with open_world(settings={"max_body_bytes": 20_000}) as world, raw_client(world) as client:
        key = b"authorization: Bearer %s\r\n" % world.key.key.encode()
        await client.write(request_line + b" HTTP/1.1\r\nhost: gateway\r\n" + key + rest)
        answered, body = await client.read_answer()
        assert answered == status
        assert set(msgspec.json.decode(body)) == {"error"}
        await client.ask("goes on")
        assert (await client.read_answer())[0] == 200


async def test_what_must_not_be_kept_is_neither_kept_nor_answered_from_what_is(world: World) -> None:
    """C22: `Cache-Control: no-store`, streamed or not."""
    await world.ask("keep out")
    for stream in (False, True):
        response = await world.ask("keep out", stream=stream, headers=NO_CACHE)
        assert response.headers["x-forebay-cache"] == "bypass"
        assert response.headers["cache-control"] == "private, no-store"
    assert text_of(await world.ask("keep out")) == "This is a scripted answer."
