"""What an OpenAI client relies on, field by field: answers of both operations, whole and streamed."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.scripted import Script
from tests.gateway.wire import chunks_of, demo_tenant_id, policy_with_engine, raw_client, streamed_text
from tests.upstream import Head, Send, Upstream, answers, chunk, completion, event, finish, sse, usage
from tests.world import POLICY, World, events_of, open_world, text_of

FRAMES = re.compile(r"(data: [^\n]+\n\n)+")
WEATHER_CALL: dict[str, object] = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city":"Köln"}'},
}
TIME_CALL: dict[str, object] = {
    "id": "call_2",
    "type": "function",
    "function": {"name": "time", "arguments": '{"zone":"東京"}'},
}


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("verdict", ["miss", "exact"])
async def test_a_stream_opens_with_the_role_ends_each_choice_once_and_closes_with_done(
    world: World, n: int, verdict: str
) -> None:
    prompt = f"shape of {n} choices, {verdict}"
    if verdict == "exact":
        await world.ask(prompt, n=n)
    response = await world.ask(prompt, n=n, stream=True)

    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["x-forebay-cache"] == verdict
    assert FRAMES.fullmatch(response.text)
    chunks = chunks_of(response)
    assert {(part["id"], part["model"], part["object"]) for part in chunks} == {
        (chunks[0]["id"], "small", "chat.completion.chunk")
    }
    choices = [choice for part in chunks for choice in part["choices"]]
    for index in range(n):
        mine = [choice for choice in choices if choice["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == ["stop"]
        assert streamed_text(chunks, index) == "This is a scripted answer."


@pytest.mark.parametrize("verdict", ["miss", "exact"])
async def test_usage_comes_in_one_last_chunk_for_a_client_that_asks_and_in_none_for_one_that_does_not(
    world: World, verdict: str
) -> None:
    async def ask(kind: str, **fields: Any) -> list[dict[str, Any]]:
        prompt = f"usage, {kind}, {verdict}"
        if verdict == "exact":
            await world.ask(prompt)
        return chunks_of(await world.ask(prompt, stream=True, **fields))

    *content, last = await ask("asked for", stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + 5
    assert all(part["choices"] and not part.get("usage") for part in content)

    quiet = await ask("not asked for")
    assert all(part["choices"] and "usage" not in part for part in quiet)


async def test_usage_is_asked_of_the_engine_and_settled_though_the_client_never_sees_it() -> None:
    async with Upstream() as upstream:
        upstream.plays(*sse(chunk("", role="assistant"), chunk("Hi."), finish(), usage(300, 7)))
        async with open_world(policy=policy_with_engine(upstream.url)) as world:
            response = await world.ask(stream=True, stream_options={"include_obfuscation": False})
            settled = world.gateway.ledger.settled(await demo_tenant_id(world))

    assert upstream.requests[0].json["stream_options"] == {"include_usage": True, "include_obfuscation": False}
    assert all("usage" not in part for part in chunks_of(response))
    assert settled.tokens == 307


async def test_several_choices_are_complete_whether_streamed_or_not(world: World) -> None:
    whole = await world.ask("three choices", n=3)
    streamed = chunks_of(await world.ask("three other choices", n=3, stream=True))

    assert [choice["index"] for choice in whole.json()["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in whole.json()["choices"]} == {"This is a scripted answer."}
    assert {streamed_text(streamed, index) for index in range(3)} == {"This is a scripted answer."}
    assert whole.json()["usage"]["completion_tokens"] == 15


@pytest.mark.parametrize("stream", [False, True])
async def test_parallel_tool_calls_arrive_whole(world: World, stream: bool) -> None:
    world.small.script = Script(tokens=(), tool_calls=(WEATHER_CALL, TIME_CALL))
    answer = await world.ask(f"tools, streamed: {stream}", stream=stream, tools=[{"type": "function"}])
    if stream:
        assert _tool_calls(chunks_of(answer)) == [WEATHER_CALL, TIME_CALL]
    else:
        assert answer.json()["choices"][0]["message"]["tool_calls"] == [WEATHER_CALL, TIME_CALL]
    assert answer.text.count('"finish_reason":"tool_calls"') == 1


def split(draw: st.DrawFn, text: Any) -> list[Any]:
    """`text` (characters or bytes) cut in up to five places."""
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=5)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


# Drawn before the test runs: what Hypothesis raises inside a coroutine would end the loop that runs it.
@st.composite
def split_streams(draw: st.DrawFn) -> list[bytes]:
    """A stream of two tool calls whose arguments are cut anywhere, and it again into pieces of bytes."""
    frames = [chunk(role="assistant")]
    for index, call in enumerate([WEATHER_CALL, TIME_CALL]):
        function: Any = call["function"]
        opening = {**call, "index": index, "function": {"name": function["name"], "arguments": ""}}
        frames.append(chunk(tool_calls=[opening]))
        for part in split(draw, function["arguments"]):
            frames.append(chunk(tool_calls=[{"index": index, "function": {"arguments": part}}]))
    frames.append(chunk(finish_reason="tool_calls"))
    stream = b"".join([b"data: " + msgspec.json.encode(frame) + b"\n\n" for frame in frames])
    return [piece for piece in split(draw, stream) if piece]


@pytest.fixture(scope="module")
async def engine() -> Any:
    async with Upstream() as upstream:
        yield upstream


@pytest.fixture(scope="module")
async def engine_world(engine: Upstream) -> Any:
    async with open_world(policy=policy_with_engine(engine.url)) as world:
        yield world


@settings(max_examples=40, deadline=None)
@given(pieces=split_streams())
async def test_tool_calls_survive_being_cut_anywhere_in_arguments_and_in_bytes(
    engine: Upstream, engine_world: World, pieces: list[bytes]
) -> None:
    engine.plays(Head(), *[Send(piece) for piece in pieces], Send(b"data: [DONE]\n\n"))

    response = await engine_world.ask(stream=True, headers={"cache-control": "no-store"})

    calls = _tool_calls(chunks_of(response))
    functions: list[Any] = [call["function"] for call in calls]
    assert calls == [WEATHER_CALL, TIME_CALL]
    assert [msgspec.json.decode(function["arguments"]) for function in functions] == [
        {"city": "Köln"},
        {"zone": "東京"},
    ]


def _tool_calls(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tool calls put together as the SDKs do it: by index, name once, arguments joined."""
    calls: dict[int, dict[str, Any]] = {}
    for part in chunks:
        for choice in part["choices"]:
            for piece in choice["delta"].get("tool_calls") or ():
                if piece["index"] not in calls:
                    fields = {name: value for name, value in piece.items() if name != "index"}
                    calls[piece["index"]] = {**fields, "function": {**piece["function"]}}
                else:
                    calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
    return [calls[index] for index in sorted(calls)]


CARRIED: dict[str, Any] = {
    "audio": {"voice": "alloy", "format": "wav"},
    "frequency_penalty": 0.5,
    "function_call": "auto",
    "functions": [{"name": "f", "parameters": {"type": "object", "x-own": [1, 2]}}],
    "logit_bias": {"50256": -100},
    "logprobs": True,
    "max_completion_tokens": 77,
    "max_tokens": 78,
    "metadata": {"team": "blue"},
    "modalities": ["text"],
    "moderation": {"mode": "off"},
    "n": 2,
    "parallel_tool_calls": False,
    "prediction": {"type": "content", "content": "x"},
    "presence_penalty": -0.25,
    "prompt_cache_key": "k",
    "reasoning_effort": "high",
    "response_format": {"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": {"a": 1.0}}},
    "safety_identifier": "sid",
    "seed": 7,
    "service_tier": "flex",
    "stop": ["\n", "END"],
    "store": False,
    "temperature": 0.3,
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "tools": [{"type": "function", "function": {"name": "f", "strict": True}}, {"type": "custom", "custom": {}}],
    "top_logprobs": 3,
    "top_p": 0.9,
    "user": "u-1",
    "verbosity": "low",
    "web_search_options": {},
    "x_vendor": {"deep": [None, 1e-7, 12345678901234567890, "\u2028", {"é": "日本"}]},
}


@pytest.mark.parametrize("stream", [False, True])
async def test_every_field_reaches_the_engine_as_it_was_sent(
    engine: Upstream, engine_world: World, stream: bool
) -> None:
    engine.plays(*(sse(chunk("x", role="assistant"), finish()) if stream else answers(completion("x"))))
    await engine_world.ask("all fields", stream=stream, headers={"cache-control": "no-store"}, **CARRIED)

    arrived = engine.requests[-1].json
    assert {name: arrived[name] for name in CARRIED} == CARRIED
    assert arrived["messages"] == [{"role": "user", "content": "all fields"}]
    assert set(arrived) - set(CARRIED) - {"messages", "stream"} == (
        {"model", "stream_options"} if stream else {"model"}
    )


async def test_the_engine_is_asked_for_the_model_of_the_card_and_its_own_name_is_what_the_answer_says(
    engine: Upstream, engine_world: World
) -> None:
    engine.plays(*answers(completion("x")))
    response = await engine_world.ask("which model", headers={"cache-control": "no-store"})

    assert engine.requests[-1].json["model"] == "small"
    assert engine.requests[-1].headers["x-request-id"] == response.headers["x-request-id"]
    assert response.json()["model"] == "upstream-model"
    assert response.headers["x-forebay-model"] == "small"
    assert response.headers["x-forebay-route"] == "fast"


async def test_no_header_of_a_client_reaches_the_engine(engine: Upstream, engine_world: World) -> None:
    engine.plays(*answers(completion("x")))
    await engine_world.ask(headers={"cache-control": "no-store", "x-tenant": "somebody-else", "cookie": "a=b"})

    names = set(engine.requests[-1].headers)
    assert names.isdisjoint({"authorization", "x-tenant", "cookie", "cache-control"})


async def test_a_frame_is_relayed_byte_for_byte(engine: Upstream, engine_world: World) -> None:
    odd = event({**chunk("Zürich \u2028", role="assistant"), "x": [1.50, 12345678901234567890], "é": "\u00e9"})
    engine.plays(*sse(odd, finish()))
    response = await engine_world.ask(stream=True, headers={"cache-control": "no-store"})

    assert response.content.startswith(odd)


async def test_log_probabilities_come_where_they_are_asked_for(world: World) -> None:
    world.small.script = Script(logprobs=True)
    whole = (await world.ask("logprobs", logprobs=True, top_logprobs=0)).json()["choices"][0]
    streamed = chunks_of(await world.ask("logprobs, streamed", logprobs=True, stream=True))

    tokens = [entry["token"] for entry in whole["logprobs"]["content"]]
    assert "".join(tokens) == whole["message"]["content"]
    assert set(whole["logprobs"]["content"][0]) >= {"token", "logprob", "bytes", "top_logprobs"}
    assert sum(len((part["choices"][0]["logprobs"] or {}).get("content", ())) for part in streamed) == len(tokens)


async def test_an_answer_kept_without_log_probabilities_is_never_given_to_one_who_asks_for_them(world: World) -> None:
    await world.ask("no logprobs")
    world.small.script = Script(logprobs=True)
    response = await world.ask("no logprobs", logprobs=True)

    assert response.headers["x-forebay-cache"] == "miss"
    assert response.json()["choices"][0]["logprobs"]["content"]


async def test_a_kept_answer_with_tools_and_reasoning_is_replayed_in_either_shape() -> None:
    script = Script(reasoning=("Let ", "me."), tool_calls=(WEATHER_CALL,))
    async with open_world(small=script, policy=POLICY + "cache: {exact: {store_tool_calls: true}}\n") as world:
        first = (await world.ask()).json()
        again = await world.ask()
        streamed = await world.ask(stream=True)

    assert again.headers["x-forebay-cache"] == streamed.headers["x-forebay-cache"] == "exact"
    assert again.json()["choices"] == first["choices"]
    assert again.json()["usage"] == first["usage"]
    assert again.json()["id"] != first["id"]
    assert _tool_calls(chunks_of(streamed)) == [WEATHER_CALL]
    reasoning = [part["choices"][0]["delta"].get("reasoning_content") or "" for part in chunks_of(streamed)]
    assert "".join(reasoning) == "Let me."


async def test_text_completions_are_answered_whole_and_streamed(world: World) -> None:
    async def complete(**fields: Any) -> Any:
        body = {"model": "fast", "prompt": "Say it.", **fields}
        return await world.client.post("/v1/completions", json=body, headers=world.headers())

    whole = (await complete()).json()
    streamed = chunks_of(await complete(stream=True, stream_options={"include_usage": True}, max_tokens=3))

    assert whole["object"] == "text_completion"
    assert whole["choices"][0]["text"] == "This is a scripted answer."
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert {part["object"] for part in streamed} == {"text_completion"}
    assert streamed_text(streamed) == "This is a "
    assert [c["finish_reason"] for part in streamed for c in part["choices"] if c["finish_reason"]] == ["length"]
    assert streamed[-1]["usage"]["completion_tokens"] == 3


async def test_a_list_of_prompts_is_carried_with_all_the_choices_that_it_makes(
    engine: Upstream, engine_world: World
) -> None:
    choices = [{"index": index, "text": f"text {index}", "finish_reason": "stop"} for index in range(4)]
    engine.plays(*answers({**completion("x"), "object": "text_completion", "choices": choices}))
    body = {"model": "fast", "prompt": ["one", "two"], "n": 2}
    response = await engine_world.client.post("/v1/completions", json=body, headers=engine_world.headers())

    assert engine.requests[-1].path == "/v1/completions"
    assert engine.requests[-1].json["prompt"] == ["one", "two"]
    assert response.json()["choices"] == choices


async def test_a_route_answers_with_the_model_that_the_request_is_hard_enough_for(world: World) -> None:
    easy = await world.ask("Hi there", model="auto")
    hard = await world.ask(
        "Prove that the algorithm terminates, step by step. " * 60 + "```def f(): ...```", model="auto"
    )
    named = await world.ask("Hi there", model="large")

    assert (easy.json()["model"], easy.headers["x-forebay-route"]) == ("small", "auto")
    assert hard.json()["model"] == "large"
    assert "x-forebay-route" not in named.headers
    assert named.json()["model"] == "large"


async def test_a_connection_is_kept_after_answers_and_errors_alike(world: World) -> None:
    async with raw_client(world) as client:
        await client.send(b"{")
        assert (await client.read_answer())[0] == 400
        await client.ask(key="fb-wrong")
        assert (await client.read_answer())[0] == 401
        await client.ask("kept alive")
        status, body = await client.read_answer()
        assert status == 200
        await client.ask("kept alive", stream=True)
        assert b"[DONE]" in await client.read_until(b"0\r\n\r\n")
        await client.ask("kept alive")
        assert (await client.read_answer())[0] == 200
    assert msgspec.json.decode(body)["object"] == "chat.completion"


async def test_requests_sent_ahead_on_one_connection_are_answered_in_order(world: World) -> None:
    async with raw_client(world) as client:
        for seed in range(5):
            await client.ask("pipelined", seed=seed, max_tokens=seed + 1)
        answered = [msgspec.json.decode((await client.read_answer())[1]) for _ in range(5)]
    assert [answer["usage"]["completion_tokens"] for answer in answered] == [1, 2, 3, 4, 5]


async def test_an_answer_says_what_it_cost_and_a_stream_of_it_is_the_same_answer(world: World) -> None:
    whole = await world.ask("cost")
    streamed = await world.ask("cost", stream=True)

    used = whole.json()["usage"]
    assert float(whole.headers["x-forebay-cost-usd"]) == pytest.approx(
        (used["prompt_tokens"] * 0.10 + used["completion_tokens"] * 0.40) / 1e6, abs=1e-9
    )
    assert streamed_text(chunks_of(streamed)) == text_of(whole)
    assert events_of(streamed)[-1] == "[DONE]"
