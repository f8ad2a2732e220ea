"""What operators and machines ask: models, health, readiness, metrics, the OpenAPI document, administration."""

from __future__ import annotations

import re
from typing import Any

import anyio
import jsonschema
import pytest
from openapi_spec_validator import validate

from backends.scripted import Script
from policies.tenant import AdminRole
from tests.gateway.wire import error_of, metric, samples
from tests.held import Held
from tests.valkey import Valkey
from tests.world import POLICY, World, open_world

SLASHED = POLICY.replace("  large:\n", "  org/large-7b:v1:\n").replace("large: large", "large: org/large-7b:v1")
SLASHED = SLASHED.replace("model: large", "model: org/large-7b:v1").replace("[large]", "[org/large-7b:v1]")


async def test_the_models_of_a_key_are_those_it_may_name_routes_first(world: World) -> None:
    limited = await world.new_tenant("two models", allowed_models=frozenset({"small", "auto"}))
    everything = (await world.client.get("/v1/models", headers=world.headers())).json()
    some = (await world.client.get("/v1/models", headers=world.headers(limited))).json()

    assert everything["object"] == "list"
    assert [model["id"] for model in everything["data"]] == ["auto", "fast", "smart", "small", "large"]
    assert all({"id", "object", "created", "owned_by"} <= set(model) for model in everything["data"])
    assert {model["object"] for model in everything["data"]} == {"model"}
    assert everything["data"][-1]["context_window"] == 32768
    assert [model["id"] for model in some["data"]] == ["auto", "small"]


async def test_one_model_is_found_by_its_name_and_hidden_from_a_key_that_may_not_name_it(world: World) -> None:
    limited = await world.new_tenant("one model", allowed_models=frozenset({"small"}))
    found = await world.client.get("/v1/models/large", headers=world.headers())
    hidden = await world.client.get("/v1/models/large", headers=world.headers(limited))
    unknown = await world.client.get("/v1/models/nope", headers=world.headers())

    assert found.json()["id"] == "large"
    assert hidden.status_code == unknown.status_code == 404
    assert error_of(hidden)["code"] == error_of(unknown)["code"] == "model_not_found"


async def test_a_model_name_with_slashes_works_everywhere() -> None:
    async with open_world(policy=SLASHED) as world:
        name = "org/large-7b:v1"
        found = await world.client.get(f"/v1/models/{name}", headers=world.headers())
        encoded = await world.client.get("/v1/models/org%2Flarge-7b%3Av1", headers=world.headers())
        answer = await world.ask(model=name)
    assert found.json()["id"] == encoded.json()["id"] == name
    assert answer.headers["x-forebay-model"] == answer.json()["model"] == name


async def test_it_is_alive_and_ready(world: World) -> None:
    assert (await world.client.get("/healthz")).text == "ok\n"
    ready = await world.client.get("/readyz")
    assert ready.status_code == 200
    report = ready.json()
    assert (report["ready"], report["status"], report["problems"]) == (True, "ready", [])
    assert report["backends"] == {"small-1": "ok", "large-1": "ok"}
    assert report["policy"] == world.gateway.watch.current.policy.label


@pytest.mark.parametrize(("down", "status", "word"), [(1, 200, "degraded"), (2, 503, "unready")])
async def test_it_is_ready_as_long_as_one_engine_answers(down: int, status: int, word: str) -> None:
    async with open_world() as world:
        for backend in [world.small, world.large][:down]:
            await backend.aclose()
        ready = await world.client.get("/readyz")
        alive = await world.client.get("/healthz")

    report = ready.json()
    assert (ready.status_code, report["status"]) == (status, word)
    said = report["problems"] if status == 503 else report["degraded"]
    assert [line.split(":")[0] for line in said] == ["backend small-1", "backend large-1"][:down]
    assert alive.status_code == 200


async def test_a_bad_edit_of_the_policy_changes_nothing_and_is_reported() -> None:
    async with open_world() as world:
        before = world.gateway.watch.current.policy.version
        world.policy_path.write_text(POLICY + "tiemouts: {total: 3s}\n")
        await world.gateway.reload()
        degraded = (await world.client.get("/readyz")).json()
        assert (await world.ask()).headers["x-forebay-policy"] == f"world@{before}"
        assert await metric(world, "forebay_policy_last_reload_ok") == 0

        world.policy_path.write_text(POLICY)
        await world.gateway.reload()
        mended = (await world.client.get("/readyz")).json()
        assert await metric(world, "forebay_policy_last_reload_ok") == 1

    assert degraded["ready"]
    (told,) = degraded["degraded"]
    assert told.startswith("policy: the last reload failed")
    assert before in told
    assert mended["status"] == "ready"
    assert len(world.log.about("policy refused")) == 1


async def test_a_request_lives_under_one_policy_from_start_to_end() -> None:
    small = Held("small-1")
    small.hold()
    async with open_world(small=small) as world:
        before = world.gateway.watch.current.policy.label
        answers = []

        async def ask() -> None:
            answers.append(await world.ask())

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await world.until(lambda: world.following == 1)
            edited = POLICY.replace("model: small, fallbacks: [large]", "model: large, fallbacks: []")
            world.policy_path.write_text(edited)
            await world.gateway.reload()
            after = await world.ask()
            small.release()
    assert answers[0].headers["x-forebay-policy"] == before
    assert answers[0].headers["x-forebay-model"] == "small"
    assert after.headers["x-forebay-policy"] != before
    assert after.headers["x-forebay-model"] == "large"


async def test_a_redis_that_is_away_degrades_but_stops_nothing(own_valkey: Valkey) -> None:
    async with open_world(redis=own_valkey.url) as world:
        assert (await world.client.get("/readyz")).json()["redis"] == {"cache": "ok"}
        own_valkey.kill()
        await world.until(lambda: world.log.about("redis away"))
        report = await world.client.get("/readyz")
        assert (report.status_code, report.json()["status"]) == (200, "degraded")
        assert report.json()["redis"] == {"cache": "open"}
        assert await metric(world, "forebay_redis_up", redis="cache") == 0


async def test_the_metrics_add_up() -> None:
    async with open_world(large=Script(fault="error")) as world:
        for number in range(6):
            await world.ask(f"question {number % 3}", stream=number % 2 == 0)
        used = (await world.ask("question 0")).json()["usage"]
        await world.ask("never kept", headers={"cache-control": "no-store"})
        await world.ask(model="nope")
        await world.ask(key="fb-nonsense")
        await world.ask(model="large")

        async def count(**labels: str) -> float:
            return await metric(world, "forebay_requests_total", **labels)

        assert await count() == 11
        assert await count(status="200") == 8
        assert await count(cache="miss") == 3
        assert await count(cache="exact") == 4
        assert await count(cache="bypass") == 1
        assert await count(status="404") == await count(status="401") == await count(status="502") == 1
        assert await metric(world, "forebay_flights_total", outcome="answered") == world.small.calls == 4
        assert await metric(world, "forebay_flights_total", outcome="failed") == 1
        assert await metric(world, "forebay_attempts_failed_total", cause="BackendFailed") == world.large.calls
        assert await metric(world, "forebay_cache_stores_total", outcome="stored") == 3
        assert await metric(world, "forebay_tokens_total", model="small", kind="completion") == 4 * 5
        assert await metric(world, "forebay_request_duration_seconds_count", cache="exact") == 4
        assert used["completion_tokens"] == 5
        tenant, _ = await world.gateway.store.ensure_demo_tenant()
        settled = world.gateway.ledger.settled(tenant.id)
        assert await metric(world, "forebay_cost_usd_total") == pytest.approx(settled.cost_nano_usd / 1e9)
        assert settled.tokens == await metric(world, "forebay_tokens_total", kind="prompt") + 20


async def test_no_client_can_make_a_new_series(world: World) -> None:
    async def series() -> set[tuple[str, tuple[tuple[str, str], ...]]]:
        return {(name, tuple(sorted(labels.items()))) for name, labels, _ in await samples(world)}

    for _ in range(2):
        await _be_a_nuisance(world, "first")
    before = await series()
    for number in range(20):
        await _be_a_nuisance(world, f"{number}")
    grown = await series() - before

    assert grown == set()
    labels = {name: value for _, pairs in before for name, value in pairs}
    assert "tenant" not in labels
    assert "nuisance" not in str(before)


async def _be_a_nuisance(world: World, name: str) -> None:
    odd = f'nuisance-{name}"\n\\{{}}'
    await world.ask("series", model=odd, user=odd)
    await world.ask("series", headers={"x-client-request-id": f"nuisance-{name}", "user-agent": f"nuisance-{name}"})
    for path in (f"/v1/nuisance-{name}", f"/v1/models/nuisance-{name}", f"/nuisance-{name}/v1/chat/completions"):
        await world.client.post(path, headers=world.headers())
        await world.client.get(path, headers=world.headers())
    for path in ("/v1/chat/completions/", "/v1/chat/completions//", f"/v1/chat/completions?nuisance={name}"):
        await world.client.post(path, content=b"{}", headers=world.headers())
    await world.client.request("BREW", "/v1/chat/completions", headers=world.headers())


async def test_a_scrape_is_what_prometheus_reads(world: World) -> None:
    response = await world.client.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    names = {name for name, _, _ in await samples(world)}
    assert names
    assert all(re.match(r"forebay_[a-z_]+$", name) for name in names), names
    assert "forebay_build_info" in names


async def test_the_openapi_document_is_valid_and_has_the_hot_routes(world: World) -> None:
    document = (await world.client.get("/openapi/openapi.json")).json()
    validate(document)

    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/readyz", "/admin/v1/policy"} <= set(
        document["paths"]
    )
    body: Any = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"][
        "schema"
    ]
    jsonschema.validate(world.body(temperature=1, stream=True, x_vendor=1), body)
    with pytest.raises(jsonschema.ValidationError, match="messages"):
        jsonschema.validate({"model": "fast"}, body)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(world.body(temperature=3), body)


ROLES: list[AdminRole] = ["viewer", "operator", "owner"]


@pytest.mark.parametrize("role", ROLES)
async def test_an_admin_key_does_what_its_role_may_and_no_more(world: World, role: AdminRole) -> None:
    key = (await world.gateway.store.create_admin_key(role, name=f"the {role}")).key
    await world.gateway.keys.poll_once()
    headers = world.headers(key)

    who = await world.client.get("/admin/v1/whoami", headers=headers)
    policy = await world.client.get("/admin/v1/policy", headers=headers)
    reload = await world.client.post("/admin/v1/policy/reload", headers=headers)
    keys = await world.client.get("/admin/v1/keys", headers=headers)

    assert (who.json()["role"], who.json()["name"]) == (role, f"the {role}")
    assert policy.json()["name"] == "world"
    assert {record["role"] for record in keys.json()} >= {"inference", role}
    assert key not in keys.text
    assert world.key.key not in keys.text
    if role == "viewer":
        assert reload.status_code == 403
        assert error_of(reload)["code"] == "role_required"
    else:
        assert reload.json()["last_reload"]["result"] == "unchanged"


@pytest.mark.parametrize("path", ["/admin/v1/whoami", "/admin/v1/policy", "/admin/v1/keys"])
async def test_administration_takes_no_key_for_inference_nor_none(world: World, path: str) -> None:
    for headers in ({}, world.headers("fb-nonsense"), world.headers()):
        response = await world.client.get(path, headers=headers)
        assert response.status_code == 401
        error_of(response)


async def test_inference_takes_no_admin_key(world: World) -> None:
    key = (await world.gateway.store.create_admin_key("owner")).key
    await world.gateway.keys.poll_once()
    for response in (
        await world.ask(key=key),
        await world.client.get("/v1/models", headers=world.headers(key)),
    ):
        assert response.status_code == 401
        assert "admin key" in error_of(response)["message"]


async def test_the_log_holds_neither_prompts_nor_keys() -> None:
    async with open_world(small=Script(fault="error"), large=Script(fault="error")) as world:
        await world.ask("my secret prompt")
        await world.ask("my secret prompt", stream=True)
        world.policy_path.write_text("nonsense")
        await world.gateway.reload()
    assert world.log
    assert "secret prompt" not in str(world.log)
    assert world.key.key not in str(world.log)
