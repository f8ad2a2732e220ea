"""Replicas behind a whole gateway: who is asked, and what operators see of it."""

from __future__ import annotations

from typing import Any

from backends.backend import Load
from backends.scripted import ScriptedBackend
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.record import Record
from tests.gateway.wire import metric
from tests.world import POLICY, Lines, World, open_world

REPLICATED = POLICY.replace("  large-1: {kind: scripted}", "  large-1: {kind: scripted}\n  small-2: {kind: scripted}")
REPLICATED = REPLICATED.replace("backends: [small-1]", "backends: [small-1, small-2]")
WITHOUT_AFFINITY = REPLICATED.replace(
    "    context_window: 8192", "    balance: {affinity: false}\n    context_window: 8192"
)
FRESH = {"cache-control": "no-store", "x-forebay-debug": "1"}


class Reporting(ScriptedBackend):
    """A scripted engine that says how busy it is."""

    said: Load | None = None

    @property
    def load(self) -> Load:
        return super().load if self.said is None else self.said


async def converse(world: World, opening: str) -> list[str]:
    """The backends that answer four turns of a conversation."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": opening}]
    asked = []
    for turn in range(4):
        answer = await world.ask(messages=messages, headers=FRESH)
        asked.append(answer.headers["x-forebay-backend"])
        messages += [{"role": "assistant", "content": f"answer {turn}"}, {"role": "user", "content": f"turn {turn}"}]
    return asked


async def test_the_turns_of_a_conversation_are_answered_by_one_replica_and_conversations_by_both() -> None:
    async with open_world(policy=REPLICATED, backends={"small-2": ScriptedBackend("small-2")}) as world:
        asked = [await converse(world, f"conversation {number}") for number in range(12)]

    assert [len(set(backends)) for backends in asked] == [1] * 12
    assert {backends[0] for backends in asked} == {"small-1", "small-2"}


async def test_without_affinity_turns_go_wherever_there_is_least_to_do() -> None:
    async with open_world(policy=WITHOUT_AFFINITY, backends={"small-2": ScriptedBackend("small-2")}) as world:
        asked = [await converse(world, f"conversation {number}") for number in range(6)]

    assert any(len(set(backends)) == 2 for backends in asked)


async def test_a_replica_that_others_keep_busy_is_spared() -> None:
    busy = Reporting("small-2")
    busy.said = Load(queued=20, running=8)
    async with open_world(policy=REPLICATED, backends={"small-2": busy}) as world:
        for number in range(8):
            assert (await world.ask(f"prompt {number}")).status_code == 200

    assert busy.calls == 0


async def test_operators_see_the_load_of_every_backend_and_nobody_else_does() -> None:
    engine = Reporting("small-1")
    engine.said = Load(in_flight=2, queued=3, running=4, kv_cache_ratio=0.5, age_s=0.25, in_flight_then=1)
    async with open_world(backends={"small-1": engine}) as world:
        key = (await world.gateway.store.create_admin_key("viewer", name="looks")).key
        await world.gateway.keys.poll_once()
        seen = (await world.client.get("/readyz", headers=world.headers(key))).json()
        public = (await world.client.get("/readyz")).json()
        gauges = {
            name: await metric(world, f"forebay_backend_{name}", backend="small-1")
            for name in ("in_flight", "queued", "running", "kv_cache_ratio")
        }

    assert seen["loads"]["small-1"] == {
        "in_flight": 2,
        "queued": 3,
        "running": 4,
        "kv_cache_ratio": 0.5,
        "age_s": 0.25,
        "in_flight_then": 1,
    }
    assert seen["loads"]["large-1"]["queued"] is None
    assert "loads" not in public
    assert gauges == {"in_flight": 2, "queued": 3, "running": 4, "kv_cache_ratio": 0.5}


def test_what_is_no_longer_known_of_an_engine_is_no_number() -> None:
    metrics = Metrics("")
    record = Record(metrics, Lines().log())
    record.loads_are({"a": Load(in_flight=1, queued=2), "b": Load(in_flight=3)})
    record.loads_are({"a": Load(in_flight=1)})
    shown = metrics.exposition().decode()

    assert 'forebay_backend_in_flight{backend="a"} 1.0' in shown
    assert 'forebay_backend_in_flight{backend="b"} 0.0' in shown
    assert 'forebay_backend_queued{backend="a"} NaN' in shown
    assert 'forebay_backend_queued{backend="b"}' not in shown
    assert "forebay_backend_running{" not in shown
