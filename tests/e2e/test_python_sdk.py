"""The official Python SDK, as anybody would use it, with its strictest reading of every answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel

from backends.scripted import Script
from tests.world import POLICY, World, open_world

WEATHER: dict[str, object] = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city":"Köln"}'},
}
TIME: dict[str, object] = {
    "id": "call_2",
    "type": "function",
    "function": {"name": "time", "arguments": '{"zone":"UTC"}'},
}
TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
async def one_world() -> AsyncGenerator[World, None]:
    async with open_world() as world:
        yield world


@pytest.fixture(scope="module")
async def one_client(one_world: World) -> AsyncGenerator[AsyncOpenAI, None]:
    async with sdk(one_world) as client:
        yield client


@pytest.fixture
def world(one_world: World) -> World:
    one_world.small.script = one_world.large.script = Script()
    return one_world


@pytest.fixture
def client(world: World, one_client: AsyncOpenAI) -> AsyncOpenAI:
    return one_client


def sdk(world: World, key: str | None = None, **options: Any) -> AsyncOpenAI:
    return AsyncOpenAI(
        base_url=f"{world.url}/v1",
        api_key=key or world.key.key,
        **{"max_retries": 0, "_strict_response_validation": True, **options},
    )


async def test_a_chat_is_answered_and_its_headers_are_to_be_had(client: AsyncOpenAI) -> None:
    raw = await client.chat.completions.with_raw_response.create(model="auto", messages=HELLO)
    completion = raw.parse()

    assert completion.choices[0].message.content == "This is a scripted answer."
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + 5
    assert completion._request_id == raw.headers["x-request-id"]
    assert raw.headers["x-forebay-cache"] == "miss"


@pytest.mark.parametrize("time", ["first", "second"])
async def test_a_stream_is_read_to_its_end(client: AsyncOpenAI, time: str) -> None:
    stream = await client.chat.completions.create(
        model="auto",
        messages=[{"role": "user", "content": "stream"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]

    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "This is a scripted answer."
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5
    assert stream.response.headers["x-forebay-cache"] == ("miss" if time == "first" else "exact")


async def test_the_stream_helper_puts_an_answer_with_tools_together(world: World, client: AsyncOpenAI) -> None:
    world.small.script = Script(tokens=("Looking ", "it up."), tool_calls=(WEATHER, TIME))
    async with client.chat.completions.stream(model="fast", messages=HELLO, tools=TOOLS) as stream:
        kinds = [event.type async for event in stream]
        completion = await stream.get_final_completion()

    choice = completion.choices[0]
    assert kinds.count("tool_calls.function.arguments.done") == 2
    assert "content.done" in kinds
    assert choice.message.content == "Looking it up."
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    assert [call.function.arguments for call in choice.message.tool_calls] == ['{"city":"Köln"}', '{"zone":"UTC"}']


async def test_tools_come_back_whole_and_their_results_are_taken(world: World, client: AsyncOpenAI) -> None:
    world.small.script = Script(tokens=(), tool_calls=(WEATHER,))
    asked = await client.chat.completions.create(model="fast", messages=HELLO, tools=TOOLS, tool_choice="required")
    message = asked.choices[0].message
    result: Any = [message.to_dict(), {"role": "tool", "tool_call_id": "call_1", "content": "12 degrees"}]
    world.small.script = Script()
    answered = await client.chat.completions.create(model="fast", messages=[*HELLO, *result], tools=TOOLS)
    assert message.tool_calls is not None
    assert message.tool_calls[0].id == "call_1"
    assert answered.choices[0].finish_reason == "stop"


class Place(BaseModel):
    city: str


async def test_a_schema_reaches_the_engine_and_its_answer_is_parsed(world: World, client: AsyncOpenAI) -> None:
    world.small.script = Script(tokens=('{"city": ', '"Köln"}'))
    completion = await client.chat.completions.parse(model="fast", messages=HELLO, response_format=Place)

    assert completion.choices[0].message.parsed == Place(city="Köln")
    assert world.small.last is not None
    assert world.small.last.request.wants_json_schema
    assert b'"strict":true' in bytes(world.small.last.request.fields["response_format"])


async def test_log_probabilities_and_several_choices_are_read(world: World, client: AsyncOpenAI) -> None:
    world.small.script = Script(logprobs=True)
    completion = await client.chat.completions.create(
        model="fast", messages=HELLO, n=2, logprobs=True, top_logprobs=2, seed=1
    )
    assert [choice.index for choice in completion.choices] == [0, 1]
    for choice in completion.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert len(choice.logprobs.content) == 5


async def test_text_completions_work_whole_and_streamed(world: World, client: AsyncOpenAI) -> None:
    whole = await client.completions.create(model="fast", prompt="Say it.")
    # The SDK's type demands a finish_reason of every chunk, which OpenAI itself sends in the last one only.
    async with sdk(world, _strict_response_validation=False) as lenient:
        stream = await lenient.completions.create(model="fast", prompt="Say it.", stream=True)
        chunks = [chunk async for chunk in stream]
    assert whole.choices[0].text == "This is a scripted answer."
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_models_are_listed_and_found(client: AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["auto", "fast", "smart", "small", "large"]
    assert (await client.models.retrieve("large")).owned_by == "forebay"


async def test_an_extra_field_and_header_pass(world: World, client: AsyncOpenAI) -> None:
    world.small.script = Script(echo=True)
    completion = await client.chat.completions.create(
        model="fast",
        messages=HELLO,
        extra_body={"x_vendor": {"k": 1}},
        extra_headers={"x-client-request-id": "mine-1"},
    )
    assert '"x_vendor":{"k":1}' in (completion.choices[0].message.content or "")


async def test_errors_are_the_sdks_own_with_code_field_and_request_id(world: World, client: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as not_found:
        await client.chat.completions.create(model="nope", messages=HELLO)
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(model="fast", messages=[])
    with pytest.raises(openai.AuthenticationError) as wrong_key:
        async with sdk(world, "fb-wrong") as stranger:
            await stranger.models.list()
    limited = await world.new_tenant("limited", allowed_models=frozenset({"small"}))
    with pytest.raises(openai.PermissionDeniedError) as denied:
        async with sdk(world, limited) as restricted:
            await restricted.chat.completions.create(model="large", messages=HELLO)
    with pytest.raises(openai.NotFoundError) as unsupported:
        await client.moderations.create(model="small", input="x")

    codes = [raised.value.code for raised in (not_found, bad, wrong_key, denied, unsupported)]
    assert codes == ["model_not_found", "invalid_value", "invalid_api_key", "model_not_allowed", "not_found"]
    assert (not_found.value.param, bad.value.param) == ("model", "messages")
    assert all(raised.value.request_id for raised in (not_found, bad, wrong_key, denied, unsupported))


@pytest.mark.parametrize(
    ("script", "kind", "code"),
    [
        (Script(fault="overloaded"), openai.InternalServerError, "backend_overloaded"),
        (Script(fault="error"), openai.InternalServerError, "backend_failed"),
        (Script(fault="refused"), openai.InternalServerError, "backend_refused_credentials"),
        (Script(fault="reject"), openai.BadRequestError, "scripted"),
    ],
)
async def test_an_engines_failure_is_a_server_error_and_a_refusal_the_clients(
    script: Script, kind: type[openai.APIStatusError], code: str
) -> None:
    async with open_world(small=script) as world, sdk(world) as client:
        with pytest.raises(kind) as raised:
            await client.chat.completions.create(model="small", messages=HELLO)
    assert raised.value.code == code


@pytest.mark.parametrize("fault", ["midstream_error", "truncate", "reset", "hang"])
async def test_a_stream_that_breaks_raises_and_never_reads_as_a_short_answer(fault: Any) -> None:
    script = Script(tokens=("One ", "two ", "three."), fault=fault, fault_after_tokens=2)
    policy = POLICY + "timeouts: {first_token: 200ms, idle: 100ms, total: 5s}\n"
    async with open_world(small=script, policy=policy) as world, sdk(world) as client:
        stream = await client.chat.completions.create(model="fast", messages=HELLO, stream=True)
        read: list[str] = []

        async def read_on() -> None:
            async for chunk in stream:
                read.append(chunk.choices[0].delta.content or "")

        with pytest.raises(openai.APIError) as raised:
            await read_on()
    assert "".join(read) == "One two "
    assert str(raised.value.code).startswith("backend_")


async def test_the_sdk_retries_what_may_succeed_later_and_waits_as_it_is_told() -> None:
    calls = 0

    def full_at_first(call: object) -> Script:
        nonlocal calls
        calls += 1
        return Script(fault="overloaded" if calls == 1 else "none", retry_after_s=0.05)

    async with open_world(small=full_at_first) as world, sdk(world, max_retries=2) as client:
        completion = await client.chat.completions.create(model="small", messages=HELLO)
    assert completion.choices[0].message.content == "This is a scripted answer."
    assert calls == 2


async def test_leaving_a_stream_half_read_frees_the_engine() -> None:
    async with open_world(small=Script(tokens=("word ",) * 10_000, token_delay_s=0.005)) as world, sdk(world) as client:
        async with await client.chat.completions.create(model="fast", messages=HELLO, stream=True) as stream:
            async for chunk in stream:
                if chunk.choices[0].delta.content:
                    break
        await world.until(lambda: world.small.cancelled == 1, within_s=1.0)


async def test_a_client_that_runs_out_of_patience_frees_the_engine() -> None:
    async with open_world(small=Script(first_token_delay_s=60.0)) as world, sdk(world, timeout=0.2) as client:
        with pytest.raises(openai.APITimeoutError):
            await client.chat.completions.create(model="fast", messages=HELLO)
        await world.until(lambda: world.small.cancelled == 1, within_s=1.0)


def test_the_sdk_speaks_through_the_client_that_these_tests_think_of() -> None:
    """Guards the claim that nothing here intercepts its requests: they go over real sockets."""
    assert isinstance(openai.DefaultAsyncHttpxClient(), httpx2.AsyncClient)
