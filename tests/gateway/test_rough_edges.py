"""What goes wrong at the seams: streams that break, answers that cannot be kept, reloads under load, who sees what."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import anyio
import httpx
import msgspec
import pytest

from backends.backend import Call, Load
from backends.chat import Event, parse_event
from backends.scripted import Script
from gateway.fleet import Engine, engine_identity
from gateway.pipeline import MAX_ANSWER_BYTES
from policies.routing_policy import LlamaCppBackendSpec
from tests.gateway.wire import metric
from tests.held import Held
from tests.world import POLICY, events_of, open_world, text_of

THREE_REPLICAS = POLICY.replace("backends: [small-1]", "backends: [dead-1, dead-2, dead-3]").replace(
    "  small-1: {kind: scripted}",
    "\n".join(f"  dead-{n}: {{kind: scripted, fault: unreachable}}" for n in (1, 2, 3)),
)


class Odd:
    """An engine whose frames are JSON, but hold a number that no float can."""

    name = "small-1"
    load = Load()

    async def answer(self, call: Call) -> AsyncGenerator[Event, None]:
        for delta, finish in (('{"role":"assistant"}', "null"), ('{"content":"hi"}', "null"), ("{}", '"stop"')):
            choice = f'{{"index":0,"delta":{delta},"finish_reason":{finish}}}'
            yield parse_event(f'{{"id":"a","choices":[{choice}],"x_vendor":1e999}}'.encode())

    async def check(self, *, within_s: float) -> None: ...

    async def aclose(self) -> None: ...


async def test_a_stream_that_breaks_counts_as_a_failure_and_leaves_a_line_with_its_request_id() -> None:
    async with open_world(small=Script(fault="truncate", fault_after_tokens=2)) as world:
        answer = await world.ask(stream=True)

        assert answer.status_code == 200
        assert "error" in events_of(answer)[-1]
        assert await metric(world, "forebay_requests_total", status="502", cache="miss") == 1
        (line,) = world.log.about("no answer")
        assert line["request_id"] == answer.headers["x-request-id"]


async def test_an_answer_that_cannot_be_kept_is_an_answer_all_the_same() -> None:
    async with open_world(backends={"small-1": Odd()}) as world:
        answer = await world.ask(stream=True)

        assert answer.text.endswith("data: [DONE]\n\n")
        assert await metric(world, "forebay_cache_stores_total", outcome="unreadable") == 1


async def test_three_dead_replicas_do_not_hide_a_fallback_that_lives() -> None:
    async with open_world(policy=THREE_REPLICAS) as world:
        answers = [await world.ask(f"question {n}") for n in range(3)]

        assert [answer.headers["x-forebay-model"] for answer in answers] == ["large"] * 3


async def test_a_fallback_that_refuses_does_not_make_the_clients_request_a_bad_one() -> None:
    async with open_world(small=Script(fault="unreachable"), large=Script(fault="reject")) as world:
        assert (await world.ask()).status_code == 502


async def test_places_taken_before_a_reload_count_after_it() -> None:
    limited = POLICY.replace("small-1: {kind: scripted}", "small-1: {kind: scripted, max_concurrent: 1}")
    limited = limited.replace("fallbacks: [large]", "fallbacks: []")
    async with open_world(policy=limited, small=Script(fault="hang")) as world, anyio.create_task_group() as group:
        group.start_soon(world.ask, "the first takes the only place")
        await world.until(lambda: world.small.in_flight == 1)
        world.policy_path.write_text(limited.replace("threshold: 0.5", "threshold: 0.6"))
        assert (await world.gateway.watch.reload()).result == "loaded"

        refused = await world.ask("the second finds none")

        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "backend_overloaded")
        assert world.small.in_flight == 1
        group.cancel_scope.cancel()


async def test_a_backend_whose_settings_changed_starts_with_a_clean_record() -> None:
    broken = POLICY.replace("small-1: {kind: scripted}", "own: {kind: scripted, fault: error}")
    broken = broken.replace("backends: [small-1]", "backends: [own]")
    async with open_world(policy=broken) as world:
        for number in range(6):
            assert (await world.ask(f"question {number}")).headers["x-forebay-model"] == "large"
        assert await metric(world, "forebay_ejections_total", backend="own") == 1

        world.policy_path.write_text(broken.replace("fault: error", "fault: none"))
        await world.gateway.reload()

        assert (await world.ask("mended")).headers["x-forebay-model"] == "small"


@pytest.mark.parametrize("header", ["no-cache", "no-store"])
async def test_who_wants_an_answer_of_its_own_shares_none(header: str) -> None:
    small = Held("small-1")
    small.hold()
    async with open_world(small=small) as world:
        verdicts: list[str] = []

        async def ask() -> None:
            answer = await world.ask("the same", headers={"cache-control": header})
            verdicts.append(answer.headers["x-forebay-cache"])

        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(ask)
            await world.until(lambda: world.following == 3)
            small.release()

        assert "coalesced" not in verdicts
        assert world.small.calls == 3


async def test_a_stream_does_not_wait_for_an_answer_that_comes_as_a_whole() -> None:
    small = Held("small-1")
    small.hold()
    async with open_world(small=small) as world, anyio.create_task_group() as group:
        group.start_soon(world.ask, "the same")
        await world.until(lambda: world.following == 1)
        verdicts: list[str] = []

        async def stream() -> None:
            verdicts.append((await world.ask("the same", stream=True)).headers["x-forebay-cache"])

        group.start_soon(stream)
        await world.until(lambda: world.following == 2)
        small.release()
        await world.until(lambda: verdicts == ["miss"])


async def test_a_missing_temperature_counts_as_one() -> None:
    async with open_world(policy=POLICY + "cache: {exact: {max_temperature: 0}}\n") as world:
        verdicts = [
            (await world.ask("twice", **fields)).headers["x-forebay-cache"]
            for fields in ({}, {}, {"temperature": 0.0}, {"temperature": 0.0})
        ]
        assert verdicts == ["bypass", "bypass", "miss", "exact"]


async def test_a_text_completion_from_the_cache_has_an_id_of_its_kind() -> None:
    async with open_world() as world:
        body = msgspec.json.encode({"model": "fast", "prompt": "hello"})
        answers = [await world.client.post("/v1/completions", content=body, headers=world.headers()) for _ in range(2)]
        assert answers[1].headers["x-forebay-cache"] == "exact"
        assert answers[1].json()["id"].startswith("cmpl-")


async def test_a_backends_own_clocks_leave_the_policys_others_in_force() -> None:
    own = POLICY.replace("small-1: {kind: scripted}", "small-1: {kind: scripted, timeouts: {first_token: 90s}}")
    async with open_world(policy=own + "timeouts: {connect: 5s, idle: 120s, total: 1000s}\n") as world:
        clocks = world.gateway.watch.current.compiled.replicas["small"].targets[0].timeouts

        assert (clocks.connect_s, clocks.first_token_s, clocks.idle_s, clocks.total_s) == (5.0, 90.0, 120.0, 1000.0)


async def test_a_reload_cannot_swap_the_weights_under_an_engine_that_runs(tmp_path: Path) -> None:
    for name in ("one.gguf", "other.gguf"):
        (tmp_path / name).touch()
    local = POLICY.replace(
        "large-1: {kind: scripted}",
        f"large-1: {{kind: scripted}}\n  local: {{kind: llamacpp, weights: {tmp_path}/one.gguf}}",
    ).replace("backends: [large-1]", "backends: [large-1, local]")
    runs = engine_identity(LlamaCppBackendSpec(weights=f"{tmp_path}/one.gguf"))
    assert runs is not None
    engines = msgspec.json.encode({"local": Engine(url="http://127.0.0.1:9/v1", runs=runs)}).decode()
    async with open_world(policy=local, settings={"engines": engines}) as world:
        world.policy_path.write_text(local.replace("one.gguf", "other.gguf"))
        reload = await world.gateway.watch.reload()

        assert reload.result == "failed"
        assert "restart" in reload.message


async def test_details_of_what_is_wrong_are_for_administrators() -> None:
    async with open_world() as world:
        await world.small.aclose()
        world.policy_path.write_text("name: [")
        await world.gateway.reload()
        owner = await world.gateway.store.create_admin_key("viewer")

        anybody = (await world.client.get("/readyz")).json()
        operator = (await world.client.get("/readyz", headers=world.headers(owner.key))).json()

        assert [line.split(":")[0] for line in anybody["degraded"]] == ["policy", "backend small-1"]
        assert str(world.policy_path) not in str(anybody)
        assert str(world.policy_path) in operator["degraded"][0]["detail"]


async def test_load_balancers_may_ask_with_head() -> None:
    async with open_world() as world:
        assert (await world.client.head("/healthz")).status_code == 200


async def test_readiness_is_not_a_way_to_make_us_ask_the_engines_at_will() -> None:
    checks = 0

    class Counting(Odd):
        async def check(self, *, within_s: float) -> None:
            nonlocal checks
            checks += 1

    async with open_world(backends={"small-1": Counting()}) as world:
        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(world.client.get, "/readyz")
        assert checks == 1


async def test_a_question_shared_by_many_is_one_answer_for_all() -> None:
    small = Held("small-1")
    small.hold()
    async with open_world(small=small) as world:
        answers: list[httpx.Response] = []

        async def ask() -> None:
            answers.append(await world.ask("the same"))

        async with anyio.create_task_group() as group:
            for _ in range(8):
                group.start_soon(ask)
            await world.until(lambda: world.following == 8)
            small.release()

        assert world.small.calls == 1
        assert {text_of(answer) for answer in answers} == {"This is a scripted answer."}
        assert sorted(answer.headers["x-forebay-cache"] for answer in answers) == ["coalesced"] * 7 + ["miss"]


async def test_an_image_in_the_body_is_not_taken_for_a_long_prompt() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 200_000}}
    content = [{"type": "text", "text": "What is on it?"}, image]
    async with open_world() as world:
        answer = await world.ask(model="large", messages=[{"role": "user", "content": content}])

        assert answer.status_code == 200
        assert world.large.last is not None
        assert world.large.last.request.has_images


async def test_an_engine_that_never_stops_talking_is_cut_off() -> None:
    megabyte = "x" * 1024 * 1024
    async with open_world(small=Script(tokens=(megabyte,) * 80)) as world:
        answer = await world.ask(stream=True)

        assert MAX_ANSWER_BYTES < len(answer.content) < MAX_ANSWER_BYTES + 4 * len(megabyte)
        assert answer.text.endswith("\n\n")
        assert "error" in answer.text[-300:]
        assert "[DONE]" not in answer.text[-300:]
        assert world.small.in_flight == 0
