"""A whole gateway in front of engines over HTTP: how it reaches them, and what their quirks look like to a client."""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from tests.backends.test_cassettes import ANSWERS, TIME, WEATHER, acts
from tests.certificates import Authority
from tests.gateway.wire import chunks_of, demo_tenant_id, error_of, policy_with_engine
from tests.upstream import Head, Send, Upstream, answers, chunk, completion, event
from tests.world import World, events_of, open_world, text_of

NO_CACHE = {"cache-control": "no-store"}
CHATS = [cassette for cassette in ANSWERS if not cassette.text_completion]
HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
async def engine() -> AsyncGenerator[Upstream, None]:
    async with Upstream() as upstream:
        yield upstream


@pytest.fixture(scope="module")
async def world(engine: Upstream) -> AsyncGenerator[World, None]:
    """The small model is the engine's, without retries and with nobody to fall back on."""
    policy = policy_with_engine(engine.url) + "retries: {max_attempts: 1, budget: 0}\n"
    async with open_world(policy=policy) as world:
        yield world


@pytest.fixture(scope="module")
async def sdk(world: World) -> AsyncGenerator[AsyncOpenAI, None]:
    async with AsyncOpenAI(
        base_url=f"{world.url}/v1",
        api_key=world.key.key,
        max_retries=0,
        default_headers=NO_CACHE,
        _strict_response_validation=True,
    ) as client:
        yield client


@pytest.mark.parametrize("cassette", [c for c in CHATS if c.stream], ids=lambda c: c.path)
async def test_the_strict_sdk_reads_every_engines_stream(engine: Upstream, sdk: AsyncOpenAI, cassette: Any) -> None:
    engine.plays(*acts(cassette.path, "cut 1"))
    asked: Any = {"stream_options": {"include_usage": True, **cassette.request.get("stream_options", {})}}
    if "tool_choice" in cassette.request:
        asked["tool_choice"] = {"type": "function", "function": {"name": "weather"}}
    stream = await sdk.chat.completions.create(model="small", messages=HELLO, stream=True, **asked)
    chunks = [chunk async for chunk in stream]

    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == (cassette.text or "")
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == [cassette.reason]
    if cassette.usage is not None:
        assert chunks[-1].usage is not None
        assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == cassette.usage


@pytest.mark.parametrize(
    "path", ["ollama/parallel_tools.sse", "sglang/tool_index_stuck.sse", "mistral/tools_without_index.sse"]
)
async def test_the_sdks_stream_helper_puts_every_engines_tool_calls_together(
    engine: Upstream, sdk: AsyncOpenAI, path: str
) -> None:
    engine.plays(*acts(path, "cut 2"))
    async with sdk.chat.completions.stream(model="small", messages=HELLO) as stream:
        message = (await stream.get_final_completion()).choices[0].message
    calls = message.tool_calls or []
    assert message.role == "assistant"
    assert [(call.function.name, call.function.arguments) for call in calls] == [WEATHER, TIME]


@pytest.mark.parametrize(
    "cassette", [c for c in ANSWERS if not c.stream and "text" not in c.path], ids=lambda c: c.path
)
async def test_the_strict_sdk_reads_every_engines_whole_answer(
    engine: Upstream, sdk: AsyncOpenAI, cassette: Any
) -> None:
    engine.plays(*acts(cassette.path, "cut 1"))
    answer = await sdk.chat.completions.create(model="small", messages=HELLO)
    assert answer.choices[0].message.content == cassette.text
    assert answer.choices[0].finish_reason == cassette.reason


@pytest.mark.parametrize("path", ["vllm/usage_on_every_chunk.sse", "groq/x_groq_usage.sse", "llamacpp/chat.sse"])
async def test_usage_is_settled_and_hidden_from_who_did_not_ask_wherever_an_engine_puts_it(
    engine: Upstream, world: World, path: str
) -> None:
    tenant_id = await demo_tenant_id(world)
    before = world.gateway.ledger.settled(tenant_id).tokens
    engine.plays(*acts(path, "whole"))
    chunks = chunks_of(await world.ask(stream=True, headers=NO_CACHE))

    assert not any(part.get("usage") for part in chunks)
    assert all(part["choices"] for part in chunks)
    expected = next(cassette for cassette in ANSWERS if cassette.path == path)
    assert world.gateway.ledger.settled(tenant_id).tokens - before == sum(expected.usage or ())


ROLE = b": PROCESSING\n\n" + event(chunk("", role="assistant"))
RATE_LIMITED = {"error": {"message": "slow down", "type": "tokens", "code": "rate_limit_exceeded"}}

FIRST_ERRORS: list[tuple[bytes, int, str | None]] = [
    (event(RATE_LIMITED), 503, "backend_overloaded"),
    (event({"error": {"code": 429, "message": "m"}}), 503, "backend_overloaded"),
    (event({"error": {"code": 503, "message": "m", "type": "unavailable_error"}}), 503, "backend_overloaded"),
    (event({"error": "m", "error_type": "overloaded"}), 503, "backend_overloaded"),
    (b'event: error\ndata: {"message": "m", "type": "overloaded_error"}\n\n', 503, "backend_overloaded"),
    (b'error: {"code":503,"message":"m","type":"unavailable_error"}\n\n', 503, "backend_overloaded"),
    (b'data: [{"error":{"code":429,"message":"m","status":"RESOURCE_EXHAUSTED"}}]\n\n', 503, "backend_overloaded"),
    (event({"success": False, "errors": [{"code": 429, "message": "m"}]}), 503, "backend_overloaded"),
    (event({"error": {"message": "m", "type": "BadRequestError", "code": 400, "param": "p"}}), 400, None),
    (event({"object": "error", "message": "m", "type": "BadRequestError", "param": "p", "code": 400}), 400, None),
    (event({"error": {"message": "m", "code": "context_length_exceeded"}}), 400, "context_length_exceeded"),
    (event({"detail": "m"}), 502, "backend_failed"),
    (event({"error": {"message": "m", "type": "server_error"}}), 502, "backend_failed"),
    (event({"error": "boom"}), 502, "backend_failed"),
    (b"event: error\ndata: plain words\n\n", 502, "backend_failed"),
    (event({"error": {"message": "m", "code": 504}}), 504, "backend_timeout"),
    (event({"error": {"message": "bad sk-own", "code": "invalid_api_key"}}), 502, "backend_refused_credentials"),
    (b'{"error": {"message": "m", "code": 429}}', 503, "backend_overloaded"),
    (b"<html>Bad Gateway</html>", 502, "backend_protocol_error"),
    (event({**chunk(), "choices": [{"index": 0, "delta": {}, "finish_reason": "error"}]}), 502, "backend_failed"),
]
IN_STREAM = [row for row in FIRST_ERRORS if row[0][:1] not in (b"{", b"<")]
"""Those that a stream can go on with."""


@pytest.mark.parametrize(
    ("before", "frame", "status", "code"),
    [(b"", *row) for row in FIRST_ERRORS] + [(ROLE, *row) for row in IN_STREAM],
)
async def test_an_error_before_the_first_content_of_a_200_has_its_real_status(
    engine: Upstream, world: World, before: bytes, frame: bytes, status: int, code: str | None
) -> None:
    engine.plays(Head(headers={"Content-Type": "text/event-stream", "Retry-After": "7"}), Send(before + frame))
    response = await world.ask(model="small", stream=True, headers=NO_CACHE)

    assert response.status_code == status
    assert error_of(response)["code"] == code
    assert "sk-own" not in response.text
    if status == 503:
        assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("7", "7000")
    if status == 400:
        assert error_of(response)["message"] == "m"


@pytest.mark.parametrize(
    ("frame", "status", "code"), [row for row in FIRST_ERRORS if not row[0].startswith((b"{", b"<"))]
)
async def test_an_error_after_the_first_content_ends_the_stream_as_an_error(
    engine: Upstream, world: World, frame: bytes, status: int, code: str | None
) -> None:
    engine.plays(Head(), Send(event(chunk("Hel", role="assistant")) + frame))
    response = await world.ask(model="small", stream=True, headers=NO_CACHE)

    *_, last = events_of(response)
    assert response.status_code == 200
    assert last["error"]["code"] == code
    assert "[DONE]" not in response.text


async def test_an_error_inside_a_200_is_one_for_the_sdk_too(engine: Upstream, sdk: AsyncOpenAI) -> None:
    engine.plays(*acts("openrouter/error_first.sse", "whole"))
    with pytest.raises(openai.InternalServerError) as failure:
        await sdk.chat.completions.create(model="small", messages=HELLO, stream=True)
    assert failure.value.status_code == 503
    assert failure.value.response.headers["retry-after"] == "7"

    engine.plays(*acts("openrouter/error_mid_stream.sse", "whole"))
    stream = await sdk.chat.completions.create(model="small", messages=HELLO, stream=True)
    with pytest.raises(openai.APIError, match="failed to answer"):
        async for _ in stream:
            pass


def policy_with_settings(url: str, settings: str) -> str:
    return policy_with_engine(url).replace(f"url: '{url}'", f"url: '{url}', {settings}")


async def test_a_policy_says_how_an_engine_is_asked() -> None:
    async with Upstream() as upstream:
        settings = "model: deployment-1, api_key: own-key, api_key_header: api-key, query: {api-version: '2024-10-21'},"
        settings += " headers: {x-team: blue}, max_connections: 1"
        upstream.plays(*answers(completion("Hi")))
        async with open_world(policy=policy_with_settings(upstream.url, settings)) as world:
            response = await world.ask()
    [asked] = upstream.requests
    assert text_of(response) == "Hi"
    assert asked.path == "/v1/chat/completions?api-version=2024-10-21"
    assert asked.json["model"] == "deployment-1"
    assert (asked.headers["api-key"], asked.headers["x-team"]) == ("own-key", "blue")
    assert "authorization" not in asked.headers


async def test_a_policy_says_whom_to_trust_and_who_we_are(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    server = authority.server("engine.internal")
    server.verify_mode = ssl.CERT_REQUIRED
    server.load_verify_locations(authority.path)
    ours = authority.issue("gateway")
    settings = f"tls: {{ca: '{authority.path}', certificate: '{ours}', key: '{ours}', server_name: engine.internal}}"
    async with Upstream(server) as upstream:
        upstream.plays(*answers(completion("Hi")))
        async with open_world(policy=policy_with_settings(upstream.url, settings)) as world:
            assert text_of(await world.ask(model="small")) == "Hi"
        wrong = settings.replace("engine.internal", "other.internal")
        async with open_world(policy=policy_with_settings(upstream.url, wrong)) as world:
            refused = await world.ask(model="small")
    assert error_of(refused)["code"] == "backend_unreachable"
    assert len(upstream.requests) == 1


async def test_a_file_for_tls_that_can_not_be_used_refuses_the_policy_by_its_name(tmp_path: Path) -> None:
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    good, foreign = authority.issue("gateway"), other.issue("foreign")
    (tmp_path / "empty.pem").touch()
    url = "https://127.0.0.1:1/v1"
    bad = {
        f"ca: '{tmp_path}/empty.pem'": "backend 'engine-1': tls.ca: ",
        f"certificate: '{good}', key: '{foreign}'": "backend 'engine-1': tls.key: ",
    }
    for settings, message in bad.items():
        with pytest.raises(ValueError, match=message):
            async with open_world(policy=policy_with_settings(url, f"tls: {{{settings}}}")):
                pass
    async with open_world() as world:
        for settings, message in bad.items():
            world.policy_path.write_text(policy_with_settings(url, f"tls: {{{settings}}}"))
            await world.gateway.reload()
            assert world.gateway.watch.last_reload.result == "failed"
            assert message in world.gateway.watch.last_reload.message
        assert text_of(await world.ask())
