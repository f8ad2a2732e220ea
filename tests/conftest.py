"""What every test may ask for: the event loop the product runs on, a real Valkey and a real Triton of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import anyio
import pytest

from gateway.demo_models import fetch_all
from gateway.triton_install import Installation, SystemUnsupported, install
from tests.triton import TritonServer
from tests.triton_models import write_llms, write_scripted
from tests.valkey import Valkey

_LOCAL = Path(__file__).parents[1] / ".forebay"
_GRPC_REPORTS_WITHIN_S = 0.2
_NO_TRITON = pytest.StashKey[str]()


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(scope="module")
async def one_loop() -> AsyncIterator[None]:
    """One event loop for a module whose tests speak gRPC.

    gRPC tells a loop of the end of a cancelled call a moment later, and must not find it closed.
    """
    yield
    await anyio.sleep(_GRPC_REPORTS_WITHIN_S)


@pytest.fixture(scope="session")
def valkey() -> Iterator[Valkey]:
    """One Valkey for the whole run, shared: for tests that leave it running and mind only their own keys."""
    with closing(Valkey("--enable-debug-command", "yes")) as server:
        yield server.start()


@pytest.fixture
def clean_valkey(valkey: Valkey) -> Valkey:
    """The shared Valkey, holding no keys and no scripts."""
    valkey.command("FLUSHALL")
    valkey.command("SCRIPT", "FLUSH")
    return valkey


@pytest.fixture
def start_valkey() -> Iterator[Callable[..., Valkey]]:
    """Starts Valkeys that this test alone uses, with its own options: `start_valkey("--maxmemory", "2mb")`."""
    with ExitStack() as servers:
        yield lambda *options: servers.enter_context(closing(Valkey(*options))).start()


@pytest.fixture
def own_valkey(start_valkey: Callable[..., Valkey]) -> Valkey:
    """A Valkey that this test alone uses and may pause, kill and restart."""
    return start_valkey()


@pytest.fixture(scope="session")
def triton_installation(request: pytest.FixtureRequest) -> Installation:
    """Triton, installed once into `.forebay/triton` of the checkout. Skips where the system is too old for it."""
    try:
        return install(_LOCAL / "triton", print)
    except SystemUnsupported as reason:
        request.config.stash[_NO_TRITON] = str(reason)
        pytest.skip(str(reason))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say aloud what was not tested: a quiet run does not show why tests were skipped."""
    if reason := config.stash.get(_NO_TRITON, None):
        terminalreporter.section("NOT TESTED: everything that needs Triton", red=True, bold=True)
        terminalreporter.line(reason)


@pytest.fixture(scope="session")
def shared_triton(triton_installation: Installation) -> Iterator[TritonServer]:
    with closing(TritonServer(triton_installation, write_scripted)) as server:
        yield server.start()


@pytest.fixture
def triton(shared_triton: TritonServer) -> TritonServer:
    """One Triton for the whole run, with a scripted model of every dialect: for tests that leave it as it is.

    This version can crash where a cancellation meets the end of an answer (see `backends.triton.server`): then the
    next test has a new one.
    """
    if shared_triton.process is None or shared_triton.process.poll() is not None:
        shared_triton.start()
    return shared_triton


@pytest.fixture(scope="session")
def triton_llms(triton_installation: Installation) -> Iterator[TritonServer]:
    """One Triton for the whole run with the two small real models, `small_llm` and `large_llm`."""
    fetch_all(_LOCAL / "models", print)
    env = {"FOREBAY_MODELS": str(_LOCAL / "models")}
    with closing(TritonServer(triton_installation, write_llms, env=env)) as server:
        yield server.start()


@pytest.fixture
def start_triton(triton_installation: Installation) -> Iterator[Callable[..., TritonServer]]:
    """Starts Tritons that this test alone uses; without arguments, with all scripted models: `start_triton(write)`."""
    with ExitStack() as servers:
        yield lambda write=write_scripted, **options: servers.enter_context(
            closing(TritonServer(triton_installation, write, **options))
        ).start()
