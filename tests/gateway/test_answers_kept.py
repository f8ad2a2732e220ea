"""When an answer comes from the cache, what a client can say about it, and that no tenant ever gets another's."""

from __future__ import annotations

from typing import Any

import anyio
import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.scripted import Script
from policies.ledger import NOTHING
from tests.gateway.wire import chunks_of, demo_tenant_id, metric
from tests.world import POLICY, World, open_world, text_of


def verdict(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.headers["x-forebay-cache"]


async def test_a_repeated_request_is_answered_from_the_cache_and_says_so(world: World) -> None:
    first = await world.ask("kept")
    calls = world.small.calls
    again = await world.ask("kept")

    assert (verdict(first), verdict(again)) == ("miss", "exact")
    assert world.small.calls == calls
    assert int(again.headers["age"]) >= 0
    assert "age" not in first.headers
    assert again.headers["x-forebay-saved-usd"] == first.headers["x-forebay-cost-usd"]
    assert float(again.headers["x-forebay-cost-usd"]) == 0
    assert again.headers["x-forebay-model"] == "small"
    assert again.headers["x-forebay-route"] == "fast"
    assert again.headers["x-forebay-policy"] == first.headers["x-forebay-policy"] == f"world@{_version(world)}"
    assert 0 < float(again.headers["x-forebay-overhead-ms"]) < 1000
    assert {**again.json(), "id": ""} == {**first.json(), "id": ""}
    assert again.json()["id"] != first.json()["id"]


def _version(world: World) -> str:
    return world.gateway.watch.current.policy.version


async def test_the_shape_of_the_request_makes_no_other_answer(world: World) -> None:
    await world.ask("either shape", stream=True)
    assert verdict(await world.ask("either shape")) == "exact"
    assert verdict(await world.ask("either shape", stream=True, stream_options={"include_usage": True})) == "exact"
    assert verdict(await world.ask("either shape", user="else", metadata={"a": "b"})) == "exact"


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.1},
        {"top_p": 0.5},
        {"seed": 2},
        {"stop": ["x"]},
        {"max_tokens": 3},
        {"n": 2},
        {"logprobs": True},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"response_format": {"type": "json_object"}},
        {"x_unknown": 1},
        {"model": "small"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "same"}]},
        {"messages": [{"role": "user", "content": "same "}]},
    ],
)
async def test_whatever_could_change_an_answer_makes_another_one(world: World, changes: dict[str, Any]) -> None:
    await world.ask("same")
    assert verdict(await world.ask("same")) == "exact"
    assert verdict(await world.ask("same", **changes)) == "miss"


async def test_a_client_can_ask_for_a_fresh_answer_which_is_kept_in_the_old_ones_place(world: World) -> None:
    await world.ask("fresh please")
    world.small.script = Script(tokens=("Newer.",))
    fresh = await world.ask("fresh please", headers={"cache-control": "no-cache"})
    again = await world.ask("fresh please")
    assert (verdict(fresh), text_of(fresh)) == ("miss", "Newer.")
    assert (verdict(again), text_of(again)) == ("exact", "Newer.")


async def test_a_client_can_ask_for_nothing_to_be_kept(world: World) -> None:
    header = {"cache-control": "no-store"}
    assert verdict(await world.ask("keep nothing", headers=header)) == "bypass"
    assert verdict(await world.ask("keep nothing", headers=header)) == "bypass"
    assert verdict(await world.ask("keep nothing")) == "miss"
    assert verdict(await world.ask("keep nothing", headers=header)) == "bypass"


async def test_a_client_can_say_how_old_an_answer_may_be(world: World) -> None:
    await world.ask("how old")
    assert verdict(await world.ask("how old", headers={"cache-control": "max-age=3600"})) == "exact"
    assert verdict(await world.ask("how old", headers={"cache-control": "max-age=0"})) == "miss"
    assert verdict(await world.ask("how old", headers={"cache-control": "max-age=nonsense, public"})) == "exact"
    assert verdict(await world.ask("how old", headers={"cache-control": "MAX-AGE=0"})) == "miss"


@pytest.mark.parametrize(
    "script",
    [
        Script(finish_reason="length"),
        Script(finish_reason="content_filter"),
        Script(tokens=(), tool_calls=({"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}},)),
        Script(tokens=("",)),
    ],
    ids=["cut", "filtered", "tool call", "empty"],
)
async def test_what_is_no_complete_ordinary_answer_is_not_kept(world: World, script: Script) -> None:
    world.small.script = script
    prompt = f"not kept: {script.finish_reason} {script.tokens} {len(script.tool_calls)}"
    await world.ask(prompt, stream=True)
    assert verdict(await world.ask(prompt)) == "miss"
    assert verdict(await world.ask(prompt)) == "miss"


async def test_a_policy_can_turn_the_cache_off_and_limit_it() -> None:
    async with open_world(policy=POLICY + "cache: {exact: {enabled: false}}\n") as world:
        assert [verdict(await world.ask()) for _ in range(2)] == ["bypass", "bypass"]
    async with open_world(policy=POLICY + "cache: {exact: {max_temperature: 0.5}}\n") as world:
        assert [verdict(await world.ask(temperature=0.6)) for _ in range(2)] == ["bypass", "bypass"]
        assert [verdict(await world.ask(temperature=0.5)) for _ in range(2)] == ["miss", "exact"]


async def test_a_hit_costs_its_tenant_nothing() -> None:
    async with open_world() as world:
        tenant_id = await demo_tenant_id(world)
        await world.ask()
        settled = world.gateway.ledger.settled(tenant_id)
        assert settled != NOTHING
        for _ in range(5):
            await world.ask(stream=True)
        assert world.gateway.ledger.settled(tenant_id) == settled
        assert await metric(world, "forebay_saved_usd_total", model="small") == pytest.approx(
            5 * settled.cost_nano_usd / 1e9
        )


async def test_an_edit_that_changes_no_answer_keeps_them_and_one_that_does_forgets_them() -> None:
    async with open_world() as world:
        await world.ask()
        for edit, expected in [
            ("timeouts: {total: 200s}\n", "exact"),
            ("cache: {exact: {ttl: 30m}}\n", "exact"),
            ("cache: {epoch: 1}\n", "miss"),
        ]:
            world.policy_path.write_text(POLICY + edit)
            await world.gateway.reload()
            assert verdict(await world.ask()) == expected
        changed = POLICY.replace("fast: {strategy: fixed, model: small", "fast: {strategy: fixed, model: large")
        world.policy_path.write_text(changed)
        await world.gateway.reload()
        assert (await world.ask()).headers["x-forebay-model"] == "large"


async def test_details_are_shown_to_keys_that_may_see_them_and_only_when_they_ask(world: World) -> None:
    may_not = await world.new_tenant("curious", may_debug=False)
    ask = {"x-forebay-debug": "1"}
    shown = await world.ask("debug", model="auto", headers=ask)
    unasked = await world.ask("debug, unasked", model="auto")
    refused = await world.ask("debug", model="auto", headers=ask, key=may_not)

    details = {"x-forebay-reason", "x-forebay-backend", "x-forebay-attempts", "x-forebay-difficulty", "x-forebay-miss"}
    assert details <= set(shown.headers)
    assert shown.headers["x-forebay-reason"] == "below_threshold"
    assert shown.headers["x-forebay-backend"] == "small-1"
    assert shown.headers["x-forebay-miss"] == "absent"
    assert 0 <= float(shown.headers["x-forebay-difficulty"]) < 0.5
    assert details.isdisjoint(unasked.headers)
    assert details.isdisjoint(refused.headers)


@pytest.fixture(scope="module")
async def two_tenants(one_world: World) -> tuple[str, str]:
    """The keys of two tenants of two organisations."""
    return await one_world.new_tenant("first"), await one_world.new_tenant("second")


requests = st.fixed_dictionaries(
    {"prompt": st.text(min_size=1, max_size=20), "stream": st.booleans()},
    optional={
        "model": st.sampled_from(["auto", "fast", "small"]),
        "user": st.text(max_size=5),
        "seed": st.integers(0, 9),
        "metadata": st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
        "prompt_cache_key": st.text(max_size=5),
    },
)


@settings(max_examples=120, deadline=None)
@given(request=requests, impostor=st.sampled_from(["x-tenant", "x-forebay-tenant", "openai-organization", "forwarded"]))
async def test_no_request_of_a_tenant_is_ever_answered_with_anothers_answer(
    one_world: World, two_tenants: tuple[str, str], request: dict[str, Any], impostor: str
) -> None:
    first, second = two_tenants
    one_world.small.script = Script()
    mine = await one_world.ask(**request, key=first)
    mine_again = await one_world.ask(**request, key=first)
    theirs = await one_world.ask(**request, key=second, headers={impostor: "first"})

    assert verdict(mine_again) == "exact"
    # A prompt that Hypothesis has tried before may be the second tenant's own, kept by its own earlier request.
    if verdict(mine) == "miss":
        assert verdict(theirs) == "miss"
        assert _id(theirs) not in (_id(mine), _id(mine_again))


def _id(response: httpx.Response) -> str:
    chunked = response.headers["content-type"].startswith("text/event-stream")
    return str(chunks_of(response)[0]["id"] if chunked else response.json()["id"])


async def test_identical_requests_of_two_tenants_never_share_a_call() -> None:
    async with open_world(small=Script(first_token_delay_s=0.02)) as world:
        keys = [await world.new_tenant("first"), await world.new_tenant("second")]
        for number in range(100):
            verdicts: list[str] = []

            async def ask(key: str, prompt: str, verdicts: list[str]) -> None:
                verdicts.append(verdict(await world.ask(prompt, key=key, stream=len(verdicts) == 1)))

            async with anyio.create_task_group() as group:
                for key in keys:
                    group.start_soon(ask, key, f"pair {number}", verdicts)
            assert verdicts == ["miss", "miss"]
        assert world.small.calls == 200


async def test_two_keys_of_one_tenant_share_its_answers() -> None:
    async with open_world() as world:
        second = await world.gateway.store.create_key(await demo_tenant_id(world))
        await world.gateway.keys.poll_once()
        await world.ask()
        assert verdict(await world.ask(key=second.key)) == "exact"
