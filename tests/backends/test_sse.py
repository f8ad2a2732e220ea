from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.sse import Frame, FrameTooLarge, SseParser

ENDINGS = st.sampled_from([b"\n", b"\r\n", b"\r"])
LINES = st.text(st.characters(exclude_characters="\r\n", codec="utf-8"), max_size=12).map(str.encode)
FRAMES = st.lists(
    st.builds(
        Frame,
        data=st.lists(LINES, min_size=1, max_size=3).map(b"\n".join),
        event=LINES,
    ),
    max_size=6,
)


def written(frames: list[Frame], ending: bytes, comments: bool) -> bytes:
    lines = []
    for frame in frames:
        if comments:
            lines += [b": keep-alive", b"id: 1", b"retry: 5"]
        if frame.event:
            lines.append(b"event: " + frame.event)
        lines += [b"data: " + line for line in frame.data.split(b"\n")]
        lines.append(b"")
    return b"".join(line + ending for line in lines)


def pieces_of(stream: bytes, cuts: list[int]) -> list[bytes]:
    at = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    return [stream[start:end] for start, end in itertools.pairwise(at)]


def parse(pieces: list[bytes]) -> list[Frame]:
    parser = SseParser()
    return [frame for piece in pieces for frame in parser.feed(piece)]


@given(FRAMES, ENDINGS, st.booleans(), st.booleans(), st.lists(st.integers(0, 10_000), max_size=12))
def test_a_stream_cut_at_any_bytes_is_read_as_it_was_written(
    frames: list[Frame], ending: bytes, comments: bool, bom: bool, cuts: list[int]
) -> None:
    stream = (b"\xef\xbb\xbf" if bom else b"") + written(frames, ending, comments)
    assert parse(pieces_of(stream, cuts)) == frames


@given(FRAMES, ENDINGS)
def test_a_stream_fed_byte_by_byte_is_read_as_it_was_written(frames: list[Frame], ending: bytes) -> None:
    stream = written(frames, ending, comments=True)
    assert parse([bytes([byte]) for byte in stream]) == frames


@given(st.binary(max_size=200), st.lists(st.integers(0, 10_000), max_size=8))
def test_any_bytes_are_read_the_same_however_they_are_cut(stream: bytes, cuts: list[int]) -> None:
    parser, cut_parser = SseParser(), SseParser()
    whole = parser.feed(stream) + parser.close()
    cut = [frame for piece in pieces_of(stream, cuts) for frame in cut_parser.feed(piece)] + cut_parser.close()
    assert cut == whole


def test_data_without_a_space_and_with_more_than_one_is_kept_as_written() -> None:
    assert parse([b"data:a\n\ndata:  b\n\n"]) == [Frame(b"a"), Frame(b" b")]


def test_an_event_name_belongs_to_its_own_frame_only() -> None:
    assert parse([b"event: error\ndata: x\n\ndata: y\n\n"]) == [Frame(b"x", b"error"), Frame(b"y")]
    assert parse([b"event: error\n\ndata: y\n\n"]) == [Frame(b"y")]


def test_a_frame_without_its_blank_line_is_given_at_the_end() -> None:
    parser = SseParser()
    assert parser.feed(b"data: x\ndata: y") == []
    assert parser.close() == [Frame(b"x\ny")]
    assert parser.close() == []


@pytest.mark.parametrize("piece", [b"x" * 10, b"data: 123\n", b": comment"])
def test_a_frame_that_outgrows_its_bound_is_refused_before_it_ends(piece: bytes) -> None:
    parser = SseParser(max_frame_bytes=100)
    pieces = itertools.repeat(piece, 12)
    with pytest.raises(FrameTooLarge):
        list(map(parser.feed, pieces))


def test_frames_within_the_bound_never_add_up() -> None:
    parser = SseParser(max_frame_bytes=100)
    for _ in range(50):
        assert parser.feed(b"data: " + b"x" * 60 + b"\n\n") == [Frame(b"x" * 60)]
        assert [frame for byte in b"data: " + b"x" * 60 + b"\n\n" for frame in parser.feed(bytes([byte]))]


def test_a_last_frame_within_the_bound_is_not_counted_twice() -> None:
    parser = SseParser(max_frame_bytes=100)
    parser.feed(b"data: " + b"x" * 60)
    assert parser.close() == [Frame(b"x" * 60)]


def test_lines_without_data_count_too() -> None:
    parser = SseParser(max_frame_bytes=100)
    with pytest.raises(FrameTooLarge):
        parser.feed(b"data\n" * 30)
