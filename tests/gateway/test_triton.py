"""A whole gateway in front of a real Triton, as OpenAI's own client sees it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from tests.triton import TritonServer
from tests.triton_models import Piece, Script
from tests.world import World, open_world

TEMPLATE = """
{%- if tools %}<tools>{{ tools | tojson }}</tools>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}<|im_start|>assistant
"""
POLICY = """
name: triton
backends:
  bls: {kind: triton, url: "grpc://%(address)s", model: bls, tool_format: hermes, chat_template: %(template)s}
  llmapi: {kind: triton, url: "grpc://%(address)s", model: llmapi, chat_template: "{{ messages[0].content }}"}
  vision: {kind: triton, url: "grpc://%(address)s", model: vision, chat_template: "x"}
models:
  bls: {backends: [bls], context_window: 100000, capabilities: [tools, json_schema, logprobs]}
  llmapi: {backends: [llmapi], context_window: 100000, capabilities: [tools, vision]}
  vision: {backends: [vision], context_window: 100000, capabilities: [vision]}
retries: {max_attempts: 1, budget: 0}
"""
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'


@pytest.fixture
async def world(triton: TritonServer) -> AsyncGenerator[World, None]:
    async with open_world(policy=POLICY % {"address": triton.grpc_address, "template": json.dumps(TEMPLATE)}) as world:
        yield world


@pytest.fixture
async def sdk(world: World) -> AsyncGenerator[AsyncOpenAI, None]:
    async with AsyncOpenAI(
        base_url=f"{world.url}/v1",
        api_key=world.key.key,
        max_retries=0,
        default_headers={"cache-control": "no-store"},
        _strict_response_validation=True,
    ) as client:
        yield client


def says(*pieces: str | Piece, **more: Any) -> Any:
    return [{"role": "user", "content": str(Script(pieces=pieces, **more))}]


async def test_the_strict_sdk_reads_streams_of_several_choices_with_tools_and_log_probabilities(
    sdk: AsyncOpenAI,
) -> None:
    messages = says(Piece("On it. ", log_probs=(-0.5,)), CALL[:20], CALL[20:], CALL)
    stream = await sdk.chat.completions.create(
        model="bls", messages=messages, n=2, seed=1, tools=[TOOL], logprobs=True, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = [chunk async for chunk in stream]
    for index in range(2):
        choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        calls = [call for choice in choices for call in choice.delta.tool_calls or ()]
        arguments = {0: "", 1: ""}
        for call in calls:
            arguments[call.index] += (call.function and call.function.arguments) or ""
        assert [json.loads(each) for each in arguments.values()] == [{"city": "Rome"}] * 2
        assert "".join(choice.delta.content or "" for choice in choices).strip() == "On it."
        tokens = [entry.token for c in choices if c.logprobs for entry in c.logprobs.content or ()]
        assert tokens == ["On it. "]
        assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["tool_calls"]
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens == 8


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("tools", {"tools": [{"type": "function"}]}),
        ("tools", {"tools": [{"type": "function", "function": {"name": ["f"]}}], "tool_choice": "required"}),
        ("guided_json", {"guided_json": "no JSON"}),
        ("stop", {"stop": [str(number) for number in range(1000)]}),
        ("chat_template_kwargs", {"chat_template_kwargs": {"messages": []}}),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}),
        (None, {"presence_penalty": 1e300}),
        (None, {"frequency_penalty": 10**400}),
    ],
)
async def test_odd_input_is_the_clients_fault_by_its_field_or_harmless(
    world: World, param: str | None, fields: dict[str, Any]
) -> None:
    response = await world.ask("x", **{"model": "bls", **fields})
    assert response.status_code == (200 if param is None else 400)
    if param is not None:
        assert response.json()["error"]["param"] == param


async def test_a_list_of_prompts_is_answered_prompt_by_prompt(sdk: AsyncOpenAI) -> None:
    prompts = [str(Script(pieces=[text])) for text in ("A", "B")]
    answer = await sdk.completions.create(model="bls", prompt=prompts)
    assert [choice.text for choice in answer.choices] == ["A", "B"]
    answer = await sdk.completions.create(model="bls", prompt=prompts[:1])
    assert [choice.text for choice in answer.choices] == ["A"]


async def test_a_client_that_leaves_stops_every_model_that_answers_it(triton: TritonServer, sdk: AsyncOpenAI) -> None:
    headers = {"x-request-id": "left-the-gateway"}
    before = len(triton.events("cancelled"))
    stream = await sdk.chat.completions.create(
        model="bls", messages=says(*["x"] * 1000, delay_ms=5), n=2, stream=True, extra_headers=headers
    )
    await anext(aiter(stream))
    await stream.close()
    async with asyncio.timeout(5):
        while len(triton.events("cancelled")) < before + 2:
            await asyncio.sleep(0.02)


async def test_what_the_policy_promises_and_the_engine_lacks_is_said(world: World) -> None:
    async with asyncio.timeout(10):
        while "model llmapi: backend llmapi has no tools" not in (await _health(world))["degraded"]:
            await asyncio.sleep(0.05)
    health = await _health(world)
    assert health["ready"]
    assert not [trouble for trouble in health["degraded"] if "model bls" in trouble]


async def _health(world: World) -> dict[str, Any]:
    health: dict[str, Any] = (await world.client.get("/readyz")).json()
    return health


async def test_what_is_the_clients_fault_is_not_held_against_the_engine(world: World, sdk: AsyncOpenAI) -> None:
    image: Any = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    for _ in range(6):
        with pytest.raises(openai.BadRequestError, match="one image"):
            await sdk.chat.completions.create(model="vision", messages=[{"role": "user", "content": [image, image]}])
    assert await sdk.chat.completions.create(model="vision", messages=[{"role": "user", "content": [image]}])
