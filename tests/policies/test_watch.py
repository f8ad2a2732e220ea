"""A policy file that changes while requests run: what is in force, what is refused, and what nobody ever sees."""

from __future__ import annotations

import sys
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.from_thread
import pytest

from policies.mistakes import PolicyError
from policies.routing_policy import Policy
from policies.watch import PolicyWatch, Reload
from tests.policies.policy_text import ENV, GOOD, SECRET, write


class Steps:
    """Time that passes when the test says so: each step lets the watch look at its file once."""

    def __init__(self) -> None:
        self._waiting = anyio.Event()
        self._step = anyio.Event()

    async def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self._waiting.set()
        await self._step.wait()
        self._step = anyio.Event()

    async def pass_by(self, polls: int) -> None:
        """Return when the watch has looked that often and waits again."""
        for _ in range(polls):
            await self._waiting.wait()
            self._waiting = anyio.Event()
            self._step.set()
            await self._waiting.wait()


class World:
    """A watch on one policy file, and all that it told."""

    def __init__(
        self,
        path: Path,
        compiled: Callable[[Policy], str],
        env: Mapping[str, str] = ENV,
        last_good: Path | None = None,
        template_fault: Callable[[str], str | None] = lambda _: None,
        prepare: Callable[[Policy], None] | None = None,
    ) -> None:
        self.path = path
        self.time = Steps()
        self.reloads: list[Reload] = []
        self.retired: list[str] = []
        self.watch = PolicyWatch(
            path,
            env,
            compiled,
            now=lambda: 1000.0 + len(self.reloads),
            last_good=last_good,
            template_fault=template_fault,
            prepare=prepare,
            on_reload=self.reloads.append,
            retire=self.retired.append,
            sleep=self.time.sleep,
        )

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.watch.run)
            yield
            tasks.cancel_scope.cancel()

    @property
    def results(self) -> list[str]:
        return [reload.result for reload in self.reloads]

    @property
    def budget(self) -> float:
        return self.watch.current.policy.file.retries.budget


def text(budget: str) -> str:
    return GOOD.replace("budget: 0.1", f"budget: {budget}")


def name_of(policy: Policy) -> str:
    return f"compiled {policy.version}"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(write(tmp_path, GOOD), name_of)


def in_place(path: Path, content: str) -> None:
    path.write_text(content, encoding="utf-8")


def renamed_over(path: Path, content: str) -> None:
    beside = path.with_suffix(".swp")
    beside.write_text(content, encoding="utf-8")
    beside.rename(path)


def removed_and_made_again(path: Path, content: str) -> None:
    path.unlink()
    path.write_text(content, encoding="utf-8")


@pytest.mark.parametrize("save", [in_place, renamed_over, removed_and_made_again])
async def test_a_saved_change_is_in_force_after_two_looks(world: World, save: Callable[[Path, str], None]) -> None:
    old = world.watch.current
    async with world.running():
        save(world.path, text("0.3"))
        await world.time.pass_by(2)

    new = world.watch.current
    assert world.budget == 0.3
    assert new.compiled == f"compiled {new.policy.version}" != old.compiled
    assert world.retired == [old.compiled]
    assert world.watch.last_reload == Reload(result="loaded", version=new.policy.version, at=1000.0)
    assert world.results == ["loaded"]


async def test_what_takes_its_time_is_prepared_beside_the_loop_and_before_the_policy_is_compiled(
    tmp_path: Path,
) -> None:
    done: list[tuple[str, str, bool]] = []

    def note(what: str, policy: Policy) -> None:
        done.append((what, policy.version, threading.current_thread() is threading.main_thread()))

    def compiled(policy: Policy) -> str:
        note("compiled", policy)
        return name_of(policy)

    world = World(write(tmp_path, GOOD), compiled, prepare=lambda policy: note("prepared", policy))
    done.clear()
    world.path.write_text(text("0.3"), encoding="utf-8")
    version = (await world.watch.reload()).version

    assert done == [("prepared", version, False), ("compiled", version, True)]


async def test_the_swapped_symlink_of_a_config_map_is_seen(tmp_path: Path) -> None:
    for folder, budget in (("..1", "0.1"), ("..2", "0.4")):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, text(budget))
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "policy.yaml").symlink_to("..data/policy.yaml")
    (tmp_path / "tiny.gguf").touch()
    world = World(tmp_path / "policy.yaml", name_of)

    async with world.running():
        (tmp_path / "..data_tmp").symlink_to("..2")
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")
        await world.time.pass_by(2)

    assert world.budget == 0.4


async def test_a_bad_file_changes_nothing_and_is_said_once(world: World) -> None:
    before = world.watch.current
    async with world.running():
        in_place(world.path, text("30").replace("fault: none", "fault: nine"))
        await world.time.pass_by(5)

    failure = world.watch.last_reload
    assert world.watch.current is before
    assert world.results == ["failed"]
    assert not failure.ok
    assert failure.version == before.policy.version
    assert [mistake.line for mistake in failure.mistakes] == [22, 50]
    assert str(world.path) in failure.message
    assert SECRET not in failure.message


async def test_a_bad_file_put_right_again_clears_the_failure(world: World) -> None:
    before = world.watch.current
    async with world.running():
        in_place(world.path, "name: [")
        await world.time.pass_by(2)
        in_place(world.path, GOOD)
        await world.time.pass_by(2)

    assert world.results == ["failed", "unchanged"]
    assert world.watch.last_reload.ok
    assert world.watch.current is before


async def test_a_file_that_vanishes_leaves_its_policy_in_force(world: World) -> None:
    before = world.watch.current
    async with world.running():
        world.path.unlink()
        await world.time.pass_by(3)

    assert world.watch.current is before
    assert world.results == ["failed"]
    assert "no such file" in world.watch.last_reload.message
    assert len(world.watch.last_reload.mistakes) == 1


async def test_a_file_saved_as_it_was_is_no_reload(world: World) -> None:
    async with world.running():
        renamed_over(world.path, GOOD)
        world.path.touch()
        await world.time.pass_by(3)

    assert world.reloads == []


async def test_a_comment_is_a_reload_that_compiles_nothing(tmp_path: Path) -> None:
    compiled: list[str] = []

    def noted(policy: Policy) -> str:
        compiled.append(policy.version)
        return policy.version

    world = World(write(tmp_path, GOOD), noted)
    async with world.running():
        in_place(world.path, "# why\n" + GOOD)
        await world.time.pass_by(2)

    assert world.results == ["unchanged"]
    assert len(compiled) == 1
    assert world.retired == []


async def test_a_file_that_is_still_being_written_is_left_alone(world: World) -> None:
    cut_short = text("0.3").partition("retries:")[0]  # a policy of its own, and not what the operator means
    async with world.running():
        in_place(world.path, cut_short)
        await world.time.pass_by(1)
        in_place(world.path, text("0.3"))
        await world.time.pass_by(1)
        assert world.reloads == []
        await world.time.pass_by(1)

    assert world.results == ["loaded"]
    assert world.budget == 0.3


async def test_what_can_not_be_compiled_leaves_the_old_policy_in_force(tmp_path: Path) -> None:
    def picky(policy: Policy) -> str:
        if policy.file.retries.budget > 0.5:
            raise ZeroDivisionError("no room")
        return name_of(policy)

    world = World(write(tmp_path, GOOD), picky)
    before = world.watch.current
    async with world.running():
        in_place(world.path, text("0.9"))
        await world.time.pass_by(2)

    assert world.watch.current is before
    assert world.retired == []
    assert world.watch.last_reload.result == "failed"
    assert world.watch.last_reload.message.endswith("can not take effect: ZeroDivisionError: no room")


async def test_reload_on_demand_waits_for_no_poll(world: World) -> None:
    in_place(world.path, text("0.2"))

    reload = await world.watch.reload()

    assert reload == world.watch.last_reload
    assert (reload.result, world.budget) == ("loaded", 0.2)
    assert (await world.watch.reload()).result == "unchanged"


async def test_reload_on_demand_tries_again_what_failed_for_something_beside_the_file(world: World) -> None:
    in_place(world.path, GOOD.replace("tiny.gguf", "later.gguf"))
    assert (await world.watch.reload()).result == "failed"

    (world.path.parent / "later.gguf").touch()

    assert (await world.watch.reload()).result == "loaded"


class Env(dict[str, str]):
    """An environment that tells when a policy in the middle of being loaded looks something up."""

    on_lookup: Callable[[], None] | None = None

    def __contains__(self, name: object) -> bool:
        if (told := self.on_lookup) is not None:
            self.on_lookup = None
            told()
        return super().__contains__(name)


async def test_a_change_that_a_cancelled_caller_asked_for_is_still_seen(tmp_path: Path) -> None:
    env = Env(ENV)
    world = World(write(tmp_path, GOOD), name_of, env)
    in_place(world.path, text("0.2"))
    with anyio.CancelScope() as scope:
        env.on_lookup = lambda: anyio.from_thread.run_sync(scope.cancel)
        await world.watch.reload()
    assert scope.cancelled_caught
    assert world.reloads == []

    async with world.running():
        await world.time.pass_by(2)

    assert world.budget == 0.2


async def test_a_slow_reload_does_not_undo_a_newer_one(tmp_path: Path) -> None:
    env = Env(ENV)
    world = World(write(tmp_path, GOOD), name_of, env)
    slow, newer_done = anyio.Event(), threading.Event()

    def be_overtaken() -> None:
        anyio.from_thread.run_sync(slow.set)
        newer_done.wait(timeout=0.2)  # it must not come to pass

    async def reload_newer() -> None:
        await slow.wait()
        in_place(world.path, text("0.3"))
        await world.watch.reload()
        newer_done.set()

    in_place(world.path, text("0.2"))
    env.on_lookup = be_overtaken
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(world.watch.reload)
        tasks.start_soon(reload_newer)

    assert world.budget == 0.3
    assert world.results == ["loaded", "loaded"]


async def test_readers_on_every_thread_see_one_policy_and_what_was_made_of_it(world: World) -> None:
    """Nothing of one policy beside anything of another, at any moment of thirty reloads."""
    done = threading.Event()
    mixed: list[tuple[str, str]] = []
    seen: set[str] = set()

    def read() -> None:
        while not done.is_set():
            now = world.watch.current
            seen.add(now.policy.version)
            if now.compiled != f"compiled {now.policy.version}":
                mixed.append((now.compiled, now.policy.version))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    readers = [threading.Thread(target=read) for _ in range(2)]
    try:
        for reader in readers:
            reader.start()
        for i in range(30):
            in_place(world.path, text("0.2" if i % 2 else "0.3"))
            assert (await world.watch.reload()).result == "loaded"
    finally:
        done.set()
        for reader in readers:
            reader.join()
        sys.setswitchinterval(interval)

    assert mixed == []
    assert len(seen) >= 2


def test_no_policy_at_the_start_is_no_start(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="no such file"):
        World(tmp_path / "none.yaml", name_of)


@pytest.fixture
def last_good(tmp_path: Path) -> Path:
    return tmp_path / "run" / "policy.last-good.yaml"


def refuses_generous(policy: Policy) -> str:
    if policy.file.retries.budget > 0.5:
        raise ZeroDivisionError("no room")
    return name_of(policy)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("name: [", "not YAML"),
        (text("30"), "retries.budget"),
        (text("0.9"), "can not take effect: ZeroDivisionError: no room"),
        (None, "no such file"),
    ],
)
def test_a_start_over_a_broken_file_takes_the_last_good_policy_and_says_so(
    tmp_path: Path, last_good: Path, broken: str | None, reason: str
) -> None:
    path = write(tmp_path, text("0.2"))
    good = World(path, refuses_generous, last_good=last_good).watch.current
    path.unlink()
    if broken is not None:
        in_place(path, broken)

    world = World(path, refuses_generous, last_good=last_good)

    assert world.watch.current == good
    assert world.watch.current.policy.source == str(path)
    failure = world.watch.last_reload
    assert (failure.result, failure.version) == ("failed", good.policy.version)
    assert reason in failure.message
    assert SECRET not in failure.message
    assert world.reloads == [failure]


async def test_a_file_put_right_after_such_a_start_is_in_force_at_once(tmp_path: Path, last_good: Path) -> None:
    path = write(tmp_path, GOOD)
    World(path, name_of, last_good=last_good)
    in_place(path, "name: [")
    world = World(path, name_of, last_good=last_good)
    async with world.running():
        await world.time.pass_by(3)
        assert world.results == ["failed"]
        in_place(path, text("0.3"))
        await world.time.pass_by(2)
    assert world.results == ["failed", "loaded"]
    assert world.budget == 0.3


async def test_every_accepted_content_is_what_a_later_start_falls_back_to(tmp_path: Path, last_good: Path) -> None:
    path = write(tmp_path, GOOD)
    world = World(path, refuses_generous, last_good=last_good)
    assert last_good.read_text(encoding="utf-8") == GOOD
    async with world.running():
        for content, kept in (
            (text("0.3"), text("0.3")),
            ("# why\n" + text("0.3"), "# why\n" + text("0.3")),
            (text("0.9"), "# why\n" + text("0.3")),
            ("name: [", "# why\n" + text("0.3")),
        ):
            in_place(path, content)
            await world.time.pass_by(2)
            assert last_good.read_text(encoding="utf-8") == kept
    assert [file.name for file in last_good.parent.iterdir()] == [last_good.name]
    assert last_good.stat().st_mode & 0o077 == 0
    assert world.watch.unkept == ""


@pytest.mark.parametrize("kept", [None, "name: [", text("0.9")])
def test_without_a_last_good_policy_that_works_the_start_fails_for_the_files_own_reason(
    tmp_path: Path, last_good: Path, kept: str | None
) -> None:
    path = write(tmp_path, text("30"))
    if kept is not None:
        last_good.parent.mkdir()
        in_place(last_good, kept)
    with pytest.raises(PolicyError, match=r"retries\.budget"):
        World(path, refuses_generous, last_good=last_good)
    in_place(path, text("0.9"))
    with pytest.raises(ZeroDivisionError):
        World(path, refuses_generous, last_good=last_good)


async def test_a_copy_that_can_not_be_kept_is_said_and_changes_nothing_else(tmp_path: Path, last_good: Path) -> None:
    last_good.mkdir(parents=True)
    world = World(write(tmp_path, GOOD), name_of, last_good=last_good)
    assert str(last_good) in world.watch.unkept
    in_place(world.path, text("0.3"))
    assert (await world.watch.reload()).result == "loaded"
    assert str(last_good) in world.watch.unkept
    assert list(last_good.parent.iterdir()) == [last_good]

    last_good.rmdir()
    assert (await world.watch.reload()).result == "unchanged"
    assert world.watch.unkept == ""
    assert last_good.read_text(encoding="utf-8") == text("0.3")


async def test_whatever_loading_trips_over_the_watch_goes_on(tmp_path: Path) -> None:
    def fault(template: str) -> str | None:
        if template == "odd":
            raise RecursionError(f"of a {SECRET}")
        return None

    world = World(write(tmp_path, GOOD), name_of, template_fault=fault)
    before = world.watch.current
    async with world.running():
        in_place(world.path, GOOD.replace('"$${not a variable}"', "odd"))
        await world.time.pass_by(2)
        assert world.watch.current is before
        assert world.results == ["failed"]
        assert world.watch.last_reload.message.endswith("can not be loaded: RecursionError")
        assert world.watch.last_reload.mistakes
        in_place(world.path, text("0.3"))
        await world.time.pass_by(2)
    assert world.results == ["failed", "loaded"]


async def test_a_listener_that_fails_does_not_end_the_watch(tmp_path: Path) -> None:
    world = World(write(tmp_path, GOOD), name_of)
    world.watch._retire = lambda _: 1 // 0
    async with world.running():
        in_place(world.path, text("0.3"))
        await world.time.pass_by(3)
        assert world.budget == 0.3
        assert "ZeroDivisionError" in world.watch.last_reload.message
        world.watch._retire = None
        in_place(world.path, text("0.2"))
        await world.time.pass_by(2)
    assert world.budget == 0.2
    assert world.watch.last_reload.ok


async def test_the_real_clock_takes_a_change_within_a_second(tmp_path: Path) -> None:
    changed = anyio.Event()
    watch = PolicyWatch(
        write(tmp_path, GOOD), ENV, name_of, now=lambda: 0.0, on_reload=lambda _: changed.set(), poll_every_s=0.05
    )
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch.run)
        renamed_over(tmp_path / "policy.yaml", text("0.2"))
        with anyio.fail_after(10):
            await changed.wait()
        tasks.cancel_scope.cancel()

    assert watch.current.policy.file.retries.budget == 0.2
