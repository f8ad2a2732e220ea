"""Children die, hang, refuse to start and refuse to end; the supervisor keeps its promises. All processes are real."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.children import Backoff, ChildEvent, ChildSpec, State
from gateway.processes import AlreadyRunning, claimed, read_status
from tests.processes.world import STAYS, STUBBORN, Clock, eventually, runs, shell, supervised


@pytest.fixture(params=["asyncio", "uvloop"], scope="session")
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """Both event loops: each starts and collects processes in its own way."""
    return "asyncio", {"use_uvloop": request.param == "uvloop"}


async def test_a_killed_child_is_restarted_and_the_others_are_left_alone(runtime: Path) -> None:
    async with supervised([shell("one", STAYS), shell("two", STAYS)], runtime=runtime) as world:
        await world.until("two", "ready")
        first = await world.until("one", "ready")
        two_before = next(status.pid for status in read_status(runtime) if status.name == "two")

        os.kill(first.pid or 0, signal.SIGKILL)
        second = await world.until("one", "ready", times=2)

        one, two = read_status(runtime)
        died = await world.until("one", "died")
        assert died.pid == first.pid
        assert "signal SIGKILL" in died.detail
        assert second.pid not in (None, first.pid)
        assert (one.state, one.pid, one.restarts) == ("ready", second.pid, 1)
        assert (two.state, two.pid, two.restarts) == ("ready", two_before, 0)
    assert world.exit_status == 0


async def test_what_a_dead_child_had_started_is_killed_with_it(runtime: Path) -> None:
    async with supervised([shell("parent", "sleep 60 & echo $!; exit 1", restart=False)], runtime=runtime) as world:
        grandchild = int((await world.until("parent", "said")).detail)
        await world.until("parent", "failed")
        assert await eventually(lambda: not runs(grandchild))


async def test_a_child_that_dies_again_and_again_is_reported_as_failed_and_still_tried(runtime: Path) -> None:
    async with supervised([shell("broken", "exit 3")], [shell("worker", STAYS)], runtime=runtime) as world:
        failed = await world.until("broken", "failed")
        assert "4 times in a row" in failed.detail
        assert "exit status 3" in (await world.until("broken", "died", times=4)).detail
        assert world.order().index(("broken", "failed")) == 8
        assert world.states()["broken"] == "failed"
        await world.until("worker", "ready")  # the next stage does not wait for ever
        await world.until("broken", "died", times=6)
    assert world.exit_status == 0


@pytest.mark.parametrize(("ran_s", "fails"), [(11.0, False), (9.0, True)])
async def test_only_a_child_that_ran_for_a_while_begins_a_new_row_of_deaths(
    runtime: Path, ran_s: float, fails: bool
) -> None:
    clock = Clock()
    backoff = Backoff(first_s=0.01, cap_s=0.02, failed_after=2, settled_after_s=10.0)
    async with supervised([shell("one", STAYS)], runtime=runtime, backoff=backoff, clock=clock) as world:
        for time in (1, 2):
            ready = await world.until("one", "ready", times=time)
            clock.now_s += ran_s
            os.kill(ready.pid or 0, signal.SIGKILL)
        await world.until("one", "ready", times=3)
        assert (("one", "failed") in world.order()) is fails


async def test_a_child_that_is_not_ready_in_time_is_killed_and_that_is_a_death(runtime: Path) -> None:
    async with supervised([shell("slow", "sleep 60", ready_within_s=0.05, restart=False)], runtime=runtime) as world:
        assert "not ready within 0.05 s" in (await world.until("slow", "killed")).detail
        assert "signal SIGKILL" in (await world.until("slow", "died")).detail


async def test_a_program_that_is_not_there_is_reported_and_not_raised(runtime: Path) -> None:
    missing = ChildSpec(name="ghost", command=("/nowhere/ghost",), ready="ready")
    async with supervised([missing], runtime=runtime) as world:
        assert "/nowhere/ghost" in (await world.until("ghost", "died")).detail


async def test_a_report_of_death_ends_with_the_last_line_of_the_log(runtime: Path) -> None:
    log = runtime / "logs" / "child.log"
    script = "echo first >&2; echo the disk is full >&2; exit 1"
    async with supervised([shell("child", script, log_path=log, restart=False)], runtime=runtime) as world:
        assert "exit status 1: the disk is full" in (await world.until("child", "died")).detail


async def test_a_long_log_is_put_aside_at_the_next_start(runtime: Path) -> None:
    log = runtime / "child.log"
    log.write_bytes(b"x" * (9 << 20))
    async with supervised([shell("child", f"echo new >&2; {STAYS}", log_path=log)], runtime=runtime) as world:
        await world.until("child", "ready")
    assert log.read_text() == "new\n"
    assert (runtime / "child.log.1").stat().st_size == 9 << 20


async def test_a_line_too_long_to_relay_harms_nothing(runtime: Path) -> None:
    script = f"head -c 300000 /dev/zero | tr '\\0' x; echo; {STAYS}"
    async with supervised([shell("loud", script)], runtime=runtime) as world:
        await world.until("loud", "ready")


async def test_a_stage_starts_when_the_one_before_is_ready_unless_nobody_awaits_it(runtime: Path) -> None:
    stages = [
        [shell("store", f"sleep 0.2; {STAYS}")],
        [shell("engine", "sleep 60", awaited=False)],
        [shell("worker", STAYS)],
    ]
    async with supervised(*stages, runtime=runtime) as world:
        await world.until("worker", "ready")
        order = world.order()
        assert order.index(("store", "ready")) < order.index(("engine", "starting"))
        assert world.states() == {"store": "ready", "engine": "starting", "worker": "ready"}


async def test_stages_end_in_the_opposite_order_each_while_the_ones_before_it_still_run(runtime: Path) -> None:
    slow_end = "trap 'sleep 0.1; exit 0' TERM; echo ready; while :; do sleep 60 & wait $!; done"
    stages = [[shell("store", slow_end)], [shell("engine", slow_end)], [shell("a", slow_end), shell("b", slow_end)]]
    async with supervised(*stages, runtime=runtime) as world:
        await world.until("a", "ready")
        await world.until("b", "ready")

    ends = [(event.name, states) for event, states in zip(world.events, world.states_at, strict=True)]
    (first, _), (second, at_second), (engine, at_engine), (store, _) = ends[-4:]
    assert {first, second} == {"a", "b"}
    assert (at_second["engine"], at_second["store"]) == ("ready", "ready")
    assert (engine, at_engine["store"], store) == ("engine", "ready", "store")
    assert world.exit_status == 0


async def test_a_child_that_does_not_end_in_its_grace_is_killed_and_the_exit_status_says_so(runtime: Path) -> None:
    async with supervised([shell("stubborn", STUBBORN, stop_grace_s=0.1)], runtime=runtime) as world:
        pid = (await world.until("stubborn", "ready")).pid or 0
    assert world.exit_status == 1
    assert not runs(pid)
    assert [kind for _, kind in world.order()][-2:] == ["killed", "stopped"]


async def test_being_asked_twice_cuts_every_grace_short(runtime: Path) -> None:
    stages = [[shell("store", STUBBORN, stop_grace_s=600.0)], [shell("worker", STUBBORN, stop_grace_s=600.0)]]
    with anyio.fail_after(10):
        async with supervised(*stages, runtime=runtime) as world:
            await world.until("worker", "ready")
            world.supervisor.stop()
            await eventually(lambda: world.states()["worker"] == "stopping")
    assert world.exit_status == 1
    assert world.states() == {}


async def test_a_child_that_waits_for_its_next_try_is_stopped_at_once(runtime: Path) -> None:
    with anyio.fail_after(10):
        async with supervised([shell("broken", "exit 1")], runtime=runtime, backoff=Backoff(first_s=600.0)) as world:
            await world.until("broken", "died")
    assert world.exit_status == 0


async def test_stopping_during_the_start_starts_no_further_stage(runtime: Path) -> None:
    async with supervised([shell("store", "sleep 60")], [shell("worker", STAYS)], runtime=runtime) as world:
        await world.until("store", "starting")
    assert ("worker", "starting") not in world.order()
    assert world.exit_status == 0


async def test_reload_reaches_only_those_who_know_what_it_means(runtime: Path) -> None:
    deaf = shell("deaf", STAYS)
    hears = shell("hears", f"trap 'echo reloaded' HUP; {STAYS}", reloads=True)
    async with supervised([deaf, hears], runtime=runtime) as world:
        before = await world.until("deaf", "ready")
        await world.until("hears", "ready")
        os.kill(os.getpid(), signal.SIGHUP)
        assert (await world.until("hears", "said")).detail == "reloaded"
        assert runs(before.pid or 0), "a signal that it does not handle would have ended it"
        assert ("deaf", "died") not in world.order()


async def test_a_second_supervisor_in_the_same_directory_is_refused(runtime: Path) -> None:
    async with supervised([shell("one", STAYS)], runtime=runtime) as world:
        await world.until("one", "ready")
        with pytest.raises(AlreadyRunning, match="already runs in"), claimed(runtime):
            pass
        assert world.states() == {"one": "ready"}
    with claimed(runtime):
        pass


async def test_a_report_that_fails_ends_no_child_and_is_shown_once(
    runtime: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(event: ChildEvent) -> None:
        raise LookupError(f"no style named {event.name}")

    async with supervised([shell("one", STAYS), shell("two", STAYS)], runtime=runtime, on_event=fail) as world:
        first = await world.until("one", "ready")
        os.kill(first.pid or 0, signal.SIGKILL)
        await world.until("one", "ready", times=2)
        assert world.states()["two"] in ("starting", "ready")
    assert world.exit_status == 0
    assert capfd.readouterr().err.count("LookupError: no style named") == 1


async def test_what_children_inherit_is_let_go_as_soon_as_none_is_started_any_more(runtime: Path) -> None:
    slow_end = "trap 'sleep 0.2; exit 0' TERM; echo ready; while :; do sleep 60 & wait $!; done"
    at: list[tuple[int, dict[str, State]]] = []

    async with supervised(
        [shell("store", STAYS)],
        [shell("worker", slow_end)],
        runtime=runtime,
        on_stopping=lambda: at.append((len(world.events), world.states())),
    ) as world:
        await world.until("worker", "ready")

    assert [states for _, states in at] == [{"store": "ready", "worker": "stopping"}]
    assert ("worker", "stopped") in world.order()[at[0][0] :]


async def test_without_a_supervisor_there_is_no_status(runtime: Path) -> None:
    assert read_status(runtime) == ()


@given(st.integers(1, 60), st.floats(0, 1, exclude_max=True))
def test_waiting_never_gets_shorter_with_deaths_nor_longer_than_the_cap(deaths: int, random: float) -> None:
    backoff = Backoff()
    delay_s = backoff.delay_s(deaths, random)
    assert 0 < delay_s <= backoff.delay_s(deaths + 1, random) <= backoff.cap_s
    assert delay_s >= backoff.delay_s(deaths, 0.0) * (1 - backoff.jitter_ratio)
    if deaths >= backoff.failed_after:
        assert backoff.delay_s(deaths, 0.0) == backoff.cap_s
