"""What a client sees of an engine in trouble: another engine's answer where that is possible, else an honest error."""

from __future__ import annotations

import math
from typing import Any

import pytest

from backends.scripted import Fault, Script
from policies.ledger import NOTHING
from tests.gateway.wire import (
    chunks_of,
    demo_tenant_id,
    error_of,
    metric,
    policy_with_engine,
    raw_client,
    streamed_text,
)
from tests.upstream import Upstream, answers, chunk, finish, sse
from tests.world import POLICY, World, events_of, open_world, text_of

QUICK = POLICY.replace(
    "small-1: {kind: scripted}",
    "small-1: {kind: scripted, timeouts: {connect: 50ms, first_token: 50ms, idle: 50ms, total: 100ms}}",
)
"""The small model's engine is given up on long before the request is."""
TOKENS = ("One ", "two ", "three.")


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        ("unreachable", 502, "backend_unreachable"),
        ("reset", 502, "backend_unreachable"),
        ("overloaded", 503, "backend_overloaded"),
        ("error", 502, "backend_failed"),
        ("refused", 502, "backend_refused_credentials"),
        ("reject", 400, "scripted"),
        ("truncate", 502, "backend_protocol_error"),
        ("garbage", 502, "backend_protocol_error"),
        ("hang", 504, "backend_timeout"),
    ],
)
async def test_each_failure_of_the_only_engine_has_a_status_of_its_own(fault: Fault, status: int, code: str) -> None:
    async with open_world(small=Script(fault=fault), policy=QUICK) as world:
        responses = [await world.ask(model="small", stream=stream) for stream in (False, True)]
        await _nothing_is_left(world)

    for response in responses:
        assert response.status_code == status
        error = error_of(response)
        assert error["code"] == code
        assert error["type"] == ("invalid_request_error" if status == 400 else "server_error")
        if fault != "reject":
            assert "scripted" not in error["message"], "an engine's words may name its hosts and keys"
    assert len(world.log.about("no answer")) == (0 if fault == "reject" else 2)


async def _nothing_is_left(world: World) -> None:
    """No call, no reservation and nothing counted for an answer that never began."""
    assert world.small.in_flight == world.large.in_flight == 0
    tenant_id = await demo_tenant_id(world)
    assert world.gateway.ledger.live(tenant_id) == ()
    assert world.gateway.ledger.counter(tenant_id) == world.gateway.ledger.settled(tenant_id) == NOTHING


@pytest.mark.parametrize("retry_after_s", [7.2, None])
async def test_an_engines_own_word_on_when_to_come_back_is_passed_on(retry_after_s: float | None) -> None:
    async with open_world(small=Script(fault="overloaded", retry_after_s=retry_after_s)) as world:
        response = await world.ask(model="small")
    assert response.status_code == 503
    assert response.headers.get("retry-after") == (None if retry_after_s is None else str(math.ceil(retry_after_s)))
    assert response.headers.get("retry-after-ms") == (None if retry_after_s is None else "7200")


async def test_an_engine_that_refuses_our_key_is_never_the_clients_401() -> None:
    async with Upstream() as upstream:
        upstream.plays(
            *answers({"error": {"message": "Incorrect API key provided: sk-own", "code": "invalid_api_key"}}, 401)
        )
        async with open_world(policy=policy_with_engine(upstream.url)) as world:
            response = await world.ask(model="small")
    assert response.status_code == 502
    assert "sk-own" not in response.text
    assert error_of(response)["code"] == "backend_refused_credentials"


async def test_a_request_the_engine_rejects_comes_back_with_its_code_and_field() -> None:
    refusal = {
        "error": {"message": "'minItems' is not permitted.", "type": "invalid_request_error", "param": "tools[0]"}
    }
    async with Upstream() as upstream:
        upstream.plays(*answers({"error": {**refusal["error"], "code": "unsupported_schema"}}, 400))
        async with open_world(policy=policy_with_engine(upstream.url)) as world:
            response = await world.ask()

    assert response.status_code == 400
    assert error_of(response) == {**refusal["error"], "code": "unsupported_schema"}
    assert len(upstream.requests) == 1, "what one engine calls wrong is not tried on another"
    assert world.large.calls == 0


async def test_an_engine_that_nobody_listens_for_is_unreachable() -> None:
    async with Upstream() as upstream:
        url = upstream.url
    async with open_world(policy=policy_with_engine(url)) as world:
        alone = await world.ask(model="small")
        helped = await world.ask()
    assert error_of(alone)["code"] == "backend_unreachable"
    assert helped.headers["x-forebay-model"] == "large"


@pytest.mark.parametrize("fault", ["unreachable", "overloaded", "error", "refused", "hang", "garbage"])
async def test_the_fallback_answers_as_if_nothing_had_happened(fault: Fault) -> None:
    async with open_world(small=Script(fault=fault), policy=QUICK) as world:
        whole = await world.ask("whole", headers={"x-forebay-debug": "1"})
        streamed = await world.ask("streamed", stream=True, headers={"x-forebay-debug": "1"})

    assert text_of(whole) == streamed_text(chunks_of(streamed)) == "This is a scripted answer."
    for response in (whole, streamed):
        assert response.headers["x-forebay-model"] == "large"
        assert int(response.headers["x-forebay-attempts"]) >= 2


@pytest.mark.parametrize("fault", ["midstream_error", "truncate", "reset", "hang"])
async def test_a_stream_that_breaks_ends_in_an_error_event_and_no_done(fault: Fault) -> None:
    script = Script(tokens=TOKENS, fault=fault, fault_after_tokens=2)
    async with open_world(small=script, policy=QUICK) as world:
        responses = [await world.ask(stream=True), await world.ask(stream=True)]
        tenant_id = await demo_tenant_id(world)
        settled = world.gateway.ledger.settled(tenant_id)
        assert world.gateway.ledger.live(tenant_id) == ()

    for response in responses:
        *chunks, last = events_of(response)
        assert response.status_code == 200
        assert streamed_text(chunks) == "One two "
        assert set(last) == {"error"}
        assert set(last["error"]) == {"message", "type", "param", "code"}
        assert "[DONE]" not in response.text
        assert response.headers["x-forebay-cache"] == "miss", "half an answer is never kept"
    assert world.small.calls == 2
    assert world.large.calls == 0, "after the first token nothing is retried"
    assert settled.tokens > 0


async def test_an_answer_that_breaks_off_before_its_end_is_an_error_where_it_was_not_to_be_streamed() -> None:
    script = Script(tokens=TOKENS, fault="midstream_error", fault_after_tokens=2)
    async with open_world(small=script) as world:
        alone = await world.ask(model="small")
        helped = await world.ask()
    assert error_of(alone)["code"] == "backend_failed"
    assert text_of(helped) == "This is a scripted answer."


async def test_only_what_comes_before_the_first_token_is_retried() -> None:
    calls = 0

    def fails_once(call: Any) -> Script:
        nonlocal calls
        calls += 1
        return Script(fault="error" if calls == 1 else "none")

    async with open_world(small=fails_once) as world:
        response = await world.ask(model="small", stream=True, headers={"x-forebay-debug": "1"})
        failed = await metric(world, "forebay_attempts_failed_total", backend="small-1", cause="BackendFailed")
    assert streamed_text(chunks_of(response)) == "This is a scripted answer."
    assert response.headers["x-forebay-attempts"] == "2"
    assert failed == 1


async def test_an_error_event_before_the_first_token_of_a_200_stream_gets_its_real_status() -> None:
    async with Upstream() as upstream:
        upstream.plays(*sse(b'data: {"error":{"message":"full","type":"overloaded_error"}}\n\n', done=False))
        async with open_world(policy=policy_with_engine(upstream.url)) as world:
            response = await world.ask(model="small", stream=True)
    assert response.status_code == 503
    assert error_of(response)["code"] == "backend_overloaded"


async def test_an_engine_that_goes_silent_in_its_frames_never_reads_as_a_short_answer() -> None:
    async with Upstream() as upstream:
        upstream.plays(*sse(chunk("", role="assistant"), chunk("Half an"), done=False))
        async with open_world(policy=policy_with_engine(upstream.url)) as world:
            response = await world.ask(stream=True)
        upstream.plays(*sse(chunk("", role="assistant"), chunk("All of it."), finish(), done=False))
        async with open_world(policy=policy_with_engine(upstream.url)) as world:
            whole = await world.ask(stream=True)
    assert "error" in events_of(response)[-1]
    assert streamed_text(chunks_of(whole)) == "All of it."


@pytest.mark.parametrize(
    "slow",
    [
        Script(first_token_delay_s=30.0),
        Script(tokens=TOKENS * 200, token_delay_s=0.02),
    ],
    ids=["before the first token", "in the middle"],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_the_time_of_a_request_is_bounded(slow: Script, stream: bool) -> None:
    policy = POLICY + "timeouts: {first_token: 150ms, idle: 150ms, total: 150ms}\n"
    async with open_world(small=slow, large=slow, policy=policy) as world:
        response = await world.ask(stream=stream)
        await world.until(lambda: world.small.in_flight + world.large.in_flight == 0)
        assert world.gateway.ledger.live(await demo_tenant_id(world)) == ()

    if stream and slow.token_delay_s:
        assert response.status_code == 200
        assert events_of(response)[-1]["error"]["code"] in ("backend_timeout", "deadline_passed")
    else:
        assert response.status_code == 504
        assert error_of(response)["code"] in ("backend_timeout", "deadline_passed")
    assert response.elapsed.total_seconds() < 5


async def test_a_failing_engine_is_left_alone_and_comes_last() -> None:
    async with open_world(small=Script(fault="error")) as world:
        for _ in range(8):
            assert (await world.ask(headers={"cache-control": "no-store"})).status_code == 200
        asked = world.small.calls
        for _ in range(5):
            await world.ask(headers={"cache-control": "no-store"})
        assert world.small.calls == asked
        ejections = await metric(world, "forebay_ejections_total", backend="small-1")
    assert ejections == 1
    assert len(world.log.about("backend ejected")) == 1


async def test_no_more_calls_are_made_at_once_than_the_policy_says() -> None:
    policy = POLICY.replace("small-1: {kind: scripted}", "small-1: {kind: scripted, max_concurrent: 1}")
    async with open_world(small=Script(first_token_delay_s=30.0), policy=policy) as world, raw_client(world) as client:
        await client.ask("first")
        await world.until(lambda: world.small.in_flight == 1)
        refused = await world.ask("second", model="small")
        helped = await world.ask("second")
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"
    assert helped.headers["x-forebay-model"] == "large"


async def test_what_an_engine_did_not_count_is_estimated_within_what_was_reserved() -> None:
    async with open_world(small=Script(tokens=("word ",) * 50, reports_usage=False)) as world:
        response = await world.ask(max_tokens=60)
        tenant_id = await demo_tenant_id(world)
        settled = world.gateway.ledger.settled(tenant_id)
        estimated = await metric(world, "forebay_usage_estimated_total", model="small")
    assert response.status_code == 200
    assert estimated == 1
    assert 50 < settled.tokens <= 60 + 100
