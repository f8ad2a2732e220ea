from __future__ import annotations

import asyncio
from pathlib import Path

import anyio
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, processors

from backends.tokenizer import Tokenizer
from tests.backends import tiny_tokenizers

SPECIAL = ["<|im_end|>", "</s>"]


@pytest.fixture(scope="module", params=["byte_level", "byte_fallback"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    train = getattr(tiny_tokenizers, request.param)
    trained: Path = train(tmp_path_factory.mktemp(request.param) / "tokenizer.json", SPECIAL)
    return trained


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.from_file(path)


TEXTS = st.text() | st.lists(st.sampled_from([*SPECIAL, "fox", " ", "▁", "日本", "é", "e\u0301", "👩‍👩‍👧", "€"])).map(
    "".join
)


@given(text=TEXTS)
def test_the_texts_of_the_tokens_are_the_text_and_as_many_as_are_counted(tokenizer: Tokenizer, text: str) -> None:
    pieces = tokenizer.split(text)
    assert "".join(pieces) == text
    assert len(pieces) == tokenizer.count(text)


@given(text=TEXTS)
def test_each_token_has_the_text_that_the_library_says_it_covers(path: Path, tokenizer: Tokenizer, text: str) -> None:
    told = 0
    for piece, (_, end) in zip(tokenizer.split(text), _offsets(path, text), strict=True):
        told += len(piece)
        assert told == end


def _offsets(path: Path, text: str) -> list[tuple[int, int]]:
    untrimmed = tokenizers.Tokenizer.from_file(str(path))
    untrimmed.post_processor = processors.Sequence([])
    offsets = untrimmed.encode(text, add_special_tokens=False).offsets
    return [(int(start), int(end)) for start, end in offsets]


def test_white_space_belongs_to_the_token_that_covers_it(tokenizer: Tokenizer) -> None:
    assert tokenizer.split(" fox  fox ")[0].startswith(" ")
    assert [piece for piece in tokenizer.split("x \nx") if piece.isspace()] == [" ", "\n"]


def test_a_character_of_several_tokens_belongs_to_the_first(tokenizer: Tokenizer) -> None:
    assert tokenizer.split("x€")[-3:] == ["€", "", ""]


def test_the_name_of_a_special_token_in_a_text_is_that_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.split("fox<|im_end|>")[-1] == "<|im_end|>"
    assert tokenizer.count("<|im_end|></s>") == 2


def test_ids_and_names_of_tokens_are_found_and_others_are_not(tokenizer: Tokenizer) -> None:
    id_ = tokenizer.id_of("</s>")
    assert id_ is not None
    assert tokenizer.token_of(id_) == "</s>"
    assert tokenizer.id_of("no such token") is None
    assert [tokenizer.token_of(number) for number in (-1, 10**6, 2**40)] == [None, None, None]


def test_what_the_tokenizer_would_add_cut_off_or_fill_up_is_not_counted(path: Path, tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    changed = tmp_path / "tokenizer.json"
    tokenizer.save(str(changed))
    text = "The quick brown fox"
    assert Tokenizer.from_file(changed).split(text) == Tokenizer.from_file(path).split(text)
    assert Tokenizer.from_file(changed).count(text) == Tokenizer.from_file(path).count(text)


def test_text_that_no_token_covers_stays_with_its_neighbour() -> None:
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.normalizer = normalizers.Strip()
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = Tokenizer(words)
    assert tokenizer.split("  a  b  ") == ["  a", "  b  "]
    assert tokenizer.split("   ") == ["   "]
    assert tokenizer.split("") == []
    assert tokenizer.count("   ") == 0


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"model": {"type": "BPE", "vocab": 1}}'])
def test_what_is_no_tokenizer_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"^not a tokenizer: "):
        Tokenizer.from_json(content)


async def test_it_is_loaded_and_counts_alike_in_a_thread(path: Path, tokenizer: Tokenizer) -> None:
    loaded = await Tokenizer.load(path)
    for text in ("fox", "The quick brown fox. " * 200):
        assert await loaded.count_tokens(text) == tokenizer.count(text)
    with pytest.raises(FileNotFoundError):
        await Tokenizer.load(path.parent / "nothing.json")


async def test_a_long_text_holds_up_neither_the_loop_nor_a_caller_that_leaves(tokenizer: Tokenizer) -> None:
    text = "The quick brown fox. " * 50_000
    ticks = 0
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        long = group.create_task(tokenizer.count_tokens(text))
        while not long.done():
            ticks += 1
            await asyncio.sleep(0.001)
    assert ticks > 20

    with anyio.move_on_after(0.01) as scope:
        await tokenizer.count_tokens(text)
    assert scope.cancelled_caught
