"""What comes back: tensors read, and text that is the same however it was cut into pieces."""

from __future__ import annotations

import struct
from itertools import accumulate

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from backends.triton.dialect import read_dialect
from backends.triton.reading import (
    Deltas,
    PromptEcho,
    StopScanner,
    TokenCount,
    Told,
    UnreadableResponse,
    read_response,
)
from backends.triton.server import Response

DIALECT = read_dialect(
    model="m",
    inputs={"text_input": "BYTES", "streaming": "BOOL", "return_finish_reason": "BOOL"},
    outputs=frozenset({"text_output"}),
    max_batch_size=0,
    decoupled=True,
    parameters={},
)


def told(**tensors: tuple[str, bytes]) -> Told:
    return read_response(Response(tensors), DIALECT)


def text(*texts: bytes) -> tuple[str, bytes]:
    return "BYTES", b"".join(struct.pack("<I", len(each)) + each for each in texts)


def test_every_part_that_we_know_is_read() -> None:
    assert told(
        text_output=text("hé".encode()),
        output_log_probs=("FP32", struct.pack("<2f", -0.5, -1.0)),
        num_input_tokens=("INT32", struct.pack("<i", 7)),
        num_output_tokens=("INT64", struct.pack("<q", 2)),
        finish_reason=text(b"length"),
        kv_cache_reused_blocks=("INT32", b"\1\0\0\0"),
    ) == Told("hé", (-0.5, -1.0), 7, 2, "length")


@pytest.mark.parametrize("unfinished", [b"None", b"", b"not_finished"])
def test_a_finish_reason_that_says_nothing_is_none(unfinished: bytes) -> None:
    assert told(text_output=text(b"x"), finish_reason=text(unfinished)).finish_reason is None


def test_an_answer_without_text_is_an_empty_one() -> None:
    assert told(text_output=("BYTES", b"")).text == ""


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"text_output": ("BYTES", b"\xff\0\0\0x")},
        {"text_output": ("INT32", b"\7\0\0\0")},
        {"text_output": text(b"x"), "output_log_probs": ("FP32", b"\0\0\0")},
        {"text_output": text(b"x"), "output_log_probs": ("FP16", b"\0\0")},
        {"text_output": text(b"x"), "finish_reason": text(b"cancelled")},
    ],
)
def test_what_the_metadata_does_not_promise_is_unreadable(tensors: dict[str, tuple[str, bytes]]) -> None:
    with pytest.raises(UnreadableResponse):
        told(**tensors)


@pytest.mark.parametrize(
    ("counts", "tokens"),
    [([], None), ([1], 1), ([1, 1, 1], 3), ([3, 2, 4], 9), ([1, 2, 3, 4], 4), ([12], 12), ([0, 0], None), ([2, 3], 5)],
)
def test_tokens_are_added_up_unless_they_were_counted_up(counts: list[int], tokens: int | None) -> None:
    count = TokenCount()
    for each in counts:
        count.add(each)
    assert count.tokens == tokens


pieces_of_text = st.lists(st.text("ab\ufffd¶\U0001f600\n<|>end", max_size=6), max_size=12)


@given(pieces_of_text, st.booleans())
@example(["\ufffd"], True)
@example(["a\ufffd", "b"], True)
def test_wholes_so_far_and_pieces_are_the_same_text(pieces: list[str], cumulative: bool) -> None:
    texts = list(accumulate(pieces)) if cumulative else pieces
    deltas = Deltas(cumulative)
    out = "".join(map(deltas.feed, texts))
    assert out + deltas.close(texts[-1] if texts else "") == "".join(pieces)


def test_a_character_that_arrives_in_two_parts_is_shown_once_it_is_whole() -> None:
    deltas = Deltas(True)
    assert [deltas.feed(so_far) for so_far in ("a", "a\ufffd", "a\U0001f600")] == ["a", "", "\U0001f600"]


def test_text_that_changes_what_was_shown_is_unreadable() -> None:
    deltas = Deltas(True)
    deltas.feed("abc")
    with pytest.raises(UnreadableResponse):
        deltas.feed("abX")


@given(pieces_of_text, st.lists(st.text("ab<|>end", min_size=1, max_size=4), max_size=3))
@example(["abc", "X"], ["abcX", "c"])
def test_the_cut_at_a_stop_sequence_does_not_hang_on_how_the_text_arrives(pieces: list[str], stops: list[str]) -> None:
    by_pieces, at_once = StopScanner(stops), StopScanner(stops)
    out = "".join(map(by_pieces.feed, pieces)) + by_pieces.close()
    whole = at_once.feed("".join(pieces)) + at_once.close()
    assert out == whole
    assert by_pieces.stopped == at_once.stopped == any(stop in "".join(pieces) for stop in stops)
    assert "".join(pieces).startswith(out)
    assert not any(stop in out for stop in stops)


def test_only_what_may_begin_a_stop_sequence_is_held_back() -> None:
    scanner = StopScanner(["<|im_end|>"])
    assert [scanner.feed(piece) for piece in ("a<", "|im", "_x", "y<|im_end|>z", "more")] == [
        "a",
        "",
        "<|im_x",
        "y",
        "",
    ]
    assert scanner.close() == ""


@given(pieces_of_text, st.text("ab<", min_size=1, max_size=5), st.booleans())
def test_a_prompt_is_taken_off_where_it_stands(pieces: list[str], prompt: str, echoed: bool) -> None:
    answer = "".join(pieces)
    echo = PromptEcho(prompt)
    out = "".join(map(echo.feed, [prompt, *pieces] if echoed else pieces)) + echo.close()
    assert out == (answer if echoed or not answer.startswith(prompt) else answer[len(prompt) :])
