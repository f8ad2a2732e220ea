"""A stream and the completion it adds up to are one answer in two shapes."""

from __future__ import annotations

import contextlib
import json
import tracemalloc
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from backends.chat import Operation, parse_event
from backends.fold import Unfoldable, fold, unfold

Json = dict[str, Any]

TEXT = st.text(st.characters(codec="utf-8"), max_size=10)
NUMBERS = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("pqrs"), inner, max_size=3),
    max_leaves=6,
)
UNKNOWN = st.dictionaries(st.sampled_from(["x_one", "x_two", "x_three"]), VALUES, max_size=2)
LOGPROB = st.fixed_dictionaries({"token": TEXT, "logprob": NUMBERS, "bytes": st.none() | st.just([104, 105])})
LOGPROBS = st.none() | st.fixed_dictionaries(
    {"content": st.lists(LOGPROB, max_size=3)}, optional={"refusal": st.lists(LOGPROB, max_size=1) | st.none()}
)
TOOL_CALL = st.fixed_dictionaries(
    {"id": TEXT, "type": st.just("function"), "function": st.fixed_dictionaries({"name": TEXT, "arguments": TEXT})},
    optional={"x_note": TEXT},
)
MESSAGE = st.builds(
    lambda known, unknown: {**known, **unknown},
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": st.none() | TEXT},
        optional={
            "reasoning_content": TEXT,
            "reasoning": st.none() | TEXT,
            "refusal": st.none() | TEXT,
            "annotations": st.lists(VALUES, max_size=2),
            "tool_calls": st.lists(TOOL_CALL, min_size=1, max_size=3),
        },
    ),
    UNKNOWN,
)
FINISH = st.sampled_from(["stop", "length", "tool_calls"])
USAGE = st.fixed_dictionaries({"prompt_tokens": st.integers(0, 99), "completion_tokens": st.integers(0, 99)})


def completions(operation: Operation) -> st.SearchStrategy[Json]:
    said: Json = {"message": MESSAGE} if operation == "chat" else {"text": TEXT}
    logprobs = (
        LOGPROBS if operation == "chat" else st.none() | st.just({"tokens": ["a", "b"], "token_logprobs": [-1.5, 0]})
    )
    choice = st.builds(
        lambda known, unknown: {**known, **unknown},
        st.fixed_dictionaries({**said, "finish_reason": FINISH}, optional={"logprobs": logprobs}),
        UNKNOWN,
    )
    return st.builds(
        lambda head, unknown, choices: {
            **head,
            **unknown,
            "choices": [{"index": index, **choice} for index, choice in enumerate(choices)],
        },
        st.fixed_dictionaries(
            {
                "id": TEXT,
                "object": st.just("chat.completion" if operation == "chat" else "text_completion"),
                "created": st.integers(0, 2**40),
                "model": TEXT,
            },
            optional={"usage": USAGE, "system_fingerprint": st.none() | TEXT},
        ),
        UNKNOWN,
        st.lists(choice, min_size=1, max_size=3),
    )


OPERATIONS: tuple[Operation, ...] = ("chat", "text_completion")
ANSWERS = st.sampled_from(OPERATIONS).flatmap(lambda operation: st.tuples(st.just(operation), completions(operation)))


def encode(value: object) -> bytes:
    return msgspec.json.encode(value)


def decode(raw: bytes) -> Json:
    return msgspec.json.decode(raw, type=Json)


@given(ANSWERS)
def test_what_is_unfolded_and_folded_is_the_same_completion(answer: tuple[Operation, Json]) -> None:
    operation, completion = answer
    assert decode(fold(unfold(encode(completion), operation, include_usage=True), operation)) == completion


@given(ANSWERS)
def test_without_include_usage_nothing_but_the_usage_is_missing(answer: tuple[Operation, Json]) -> None:
    operation, completion = answer
    frames = unfold(encode(completion), operation, include_usage=False)
    completion.pop("usage", None)
    assert decode(fold(frames, operation)) == completion
    assert all(b'"usage"' not in frame for frame in frames)


def cut_strings(frame: Json, cut: int) -> list[Json]:
    """The frame as two, the strings that its delta continues cut in the middle."""
    if len(frame["choices"]) != 1:
        return [frame]
    [choice] = frame["choices"]
    said = choice.get("delta", {"text": choice.get("text")})
    strings = {name: text for name, text in said.items() if isinstance(text, str) and name != "role"}
    first = {**said, **{name: text[:cut] for name, text in strings.items()}}
    second = {name: text[cut:] for name, text in strings.items()}
    if "delta" in choice:
        later: Json = {"index": choice["index"], "delta": second}
        return [{**frame, "choices": [{**choice, "delta": first}]}, {"choices": [later]}]
    return [{**frame, "choices": [{**choice, **first}]}, {"choices": [{"index": choice["index"], **second}]}]


@given(ANSWERS, st.integers(0, 5), st.randoms(use_true_random=False))
def test_a_stream_cut_elsewhere_and_interleaved_otherwise_is_the_same_completion(
    answer: tuple[Operation, Json], cut: int, random: Any
) -> None:
    operation, completion = answer
    frames = [decode(raw) for raw in unfold(encode(completion), operation, include_usage=True)]
    pieces = [piece for frame in frames for piece in cut_strings(frame, cut)]
    queues: dict[object, list[Json]] = {}
    for piece in pieces:
        queues.setdefault(piece["choices"][0]["index"] if piece["choices"] else None, []).append(piece)
    usage = queues.pop(None, [])
    mixed = []
    while waiting := [queue for queue in queues.values() if queue]:
        mixed.append(random.choice(waiting).pop(0))
    assert decode(fold([encode(piece) for piece in mixed + usage], operation)) == completion


@given(completions("chat"))
def test_a_replay_has_the_shape_that_clients_expect(completion: Json) -> None:
    events = [parse_event(raw) for raw in unfold(encode(completion), "chat", include_usage=True)]
    frames = [decode(event.raw) for event in events]
    assert all(frame["object"] == "chat.completion.chunk" for frame in frames)
    assert len({frame["id"] for frame in frames}) == 1
    if "usage" in completion:
        assert events[-1].is_usage_only
        assert all(frame["usage"] is None for frame in frames[:-1])
    for choice in completion["choices"]:
        own = [c for event in events for c in event.choices if c.index == choice["index"]]
        assert own[0].delta is not None
        assert own[0].delta.role == "assistant"
        assert [c.finish_reason for c in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]


def chunk(**choice: Any) -> bytes:
    return encode({"id": "c", "object": "chat.completion.chunk", "choices": [{"index": 0, **choice}]})


def folded_message(*deltas: Json) -> Json:
    answer = decode(fold([chunk(delta=delta) for delta in deltas], "chat"))
    message: Json = answer["choices"][0]["message"]
    return message


def test_tool_calls_are_put_together_by_their_index() -> None:
    message = folded_message(
        {"tool_calls": [{"index": 1, "id": "b", "type": "function", "function": {"name": "g", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x"'}}]},
        {
            "tool_calls": [
                {"index": 1, "id": "b", "function": {"arguments": "{}"}},
                {"index": 0, "function": {"arguments": ":1}"}},
            ]
        },
    )
    assert {call["id"]: call["function"] for call in message["tool_calls"]} == {
        "a": {"name": "f", "arguments": '{"x":1}'},
        "b": {"name": "g", "arguments": "{}"},
    }
    assert [call["id"] for call in message["tool_calls"]] == ["a", "b"]


def test_tool_calls_without_an_index_are_told_apart_by_their_id() -> None:
    message = folded_message(
        {"tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{"}}]},
        {"tool_calls": [{"function": {"arguments": "}"}}]},
        {"tool_calls": [{"id": "b", "function": {"name": "g", "arguments": "{}"}}]},
    )
    assert [call["function"]["arguments"] for call in message["tool_calls"]] == ["{}", "{}"]


def test_lists_are_extended_frame_by_frame() -> None:
    pieces = [chunk(delta={"x_list": [n]}, logprobs={"content": [{"token": str(n)}]}) for n in range(3)]
    [choice] = decode(fold(pieces, "chat"))["choices"]
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == ["0", "1", "2"]
    assert choice["message"]["x_list"] == [0, 1, 2]


def test_an_answer_without_a_word_still_has_a_role_and_a_content() -> None:
    assert folded_message({}) == {"role": "assistant", "content": None}


def test_usage_that_grows_from_frame_to_frame_counts_as_it_was_last() -> None:
    frames = [encode({"choices": [], "usage": {"completion_tokens": count}}) for count in (1, 2)]
    assert decode(fold([*frames, encode({"choices": [], "usage": None})], "chat"))["usage"] == {"completion_tokens": 2}


def test_odd_tool_calls_do_no_harm() -> None:
    assert folded_message({"tool_calls": "x"}, {"tool_calls": "y"})["tool_calls"] == "xy"


DELTAS = st.none() | st.fixed_dictionaries(
    {},
    optional={
        "role": st.just("assistant"),
        "content": st.none() | TEXT,
        "reasoning_content": TEXT,
        "tool_calls": st.lists(st.fixed_dictionaries({"index": st.integers(0, 1), "id": TEXT}), max_size=2),
        "x_list": st.lists(TEXT, max_size=2),
    },
)
PLAIN_PIECE: Json = {"index": 0, "delta": {"content": "a"}, "logprobs": None, "finish_reason": None}
PLAIN_FRAME: Json = {
    "id": "a",
    "object": "chat.completion.chunk",
    "created": 1,
    "model": "m",
    "system_fingerprint": "f",
    "service_tier": None,
    "obfuscation": "x",
    "usage": None,
}
PIECE_EDITS = st.one_of(
    st.just(("index", 1)),
    st.tuples(st.just("delta"), DELTAS),
    st.tuples(st.just("text"), st.none() | TEXT),
    st.tuples(st.just("logprobs"), LOGPROBS | st.just({})),
    st.tuples(st.just("finish_reason"), FINISH),
    st.tuples(st.just("x_note"), VALUES),
    st.tuples(st.sampled_from(["index", "delta", "logprobs", "finish_reason"]), st.just(...)),
)
FRAME_EDITS = st.one_of(
    st.sampled_from([("id", "b"), ("created", 2), ("created", 1.5), ("model", None), ("system_fingerprint", "g")]),
    st.sampled_from([("system_fingerprint", None), ("service_tier", "default"), ("object", "other")]),
    st.tuples(st.just("obfuscation"), TEXT),
    st.tuples(st.just("usage"), USAGE),
    st.tuples(st.just("x_more"), VALUES),
    st.tuples(st.sampled_from(sorted(PLAIN_FRAME)), st.just(...)),
)


def edited(plain: Json, edits: list[tuple[str, Any]]) -> Json:
    """With fields changed, or left out where the edit is `...`."""
    changed = {**plain, **dict(edits)}
    return {name: value for name, value in changed.items() if value is not ...}


PIECES = st.lists(PIECE_EDITS, max_size=2).map(lambda edits: edited(PLAIN_PIECE, edits))
FRAMES = st.builds(
    lambda pieces, edits: edited({**PLAIN_FRAME, "choices": pieces}, edits),
    st.none() | PIECES.map(lambda piece: [piece]) | PIECES.map(lambda piece: [piece]) | st.lists(PIECES, max_size=2),
    st.lists(FRAME_EDITS, max_size=1),
)


@settings(max_examples=200)
@given(st.lists(FRAMES, max_size=6), st.sampled_from(OPERATIONS))
def test_frames_that_only_go_on_are_folded_like_any_other(frames: list[Json], operation: Operation) -> None:
    check_against_reading_in_full(frames, operation)


@pytest.mark.parametrize("before", [..., None])
@pytest.mark.parametrize("name", PLAIN_FRAME)
def test_a_field_that_comes_late_in_a_stream_is_not_lost(name: str, before: Any) -> None:
    late = {**PLAIN_FRAME, "service_tier": "default", "choices": [PLAIN_PIECE]}
    check_against_reading_in_full([edited(late, [(name, before)]), late, late], "chat")


@pytest.mark.parametrize("name", PLAIN_PIECE)
def test_a_field_of_a_choice_that_comes_late_is_not_lost(name: str) -> None:
    early, late = ({**PLAIN_FRAME, "choices": [piece]} for piece in (edited(PLAIN_PIECE, [(name, ...)]), PLAIN_PIECE))
    check_against_reading_in_full([early, late, late], "chat")


def check_against_reading_in_full(frames: list[Json], operation: Operation) -> None:
    """A field that nobody knows makes every frame one that is read in full."""
    marked = [{**frame, "choices": mark(frame["choices"]), "x_mark": True} for frame in frames]
    folded = decode(fold([encode(frame) for frame in marked], operation))
    folded.pop("x_mark", None)
    for choice in folded["choices"]:
        del choice["x_mark"]
    assert decode(fold([encode(frame) for frame in frames], operation)) == folded


def mark(choices: list[Json] | None) -> list[Json] | None:
    return choices and [{**choice, "x_mark": True} for choice in choices]


def test_of_a_long_stream_only_the_pieces_are_kept() -> None:
    frames = [chunk(delta={"content": f"{number} "}, logprobs=None, finish_reason=None) for number in range(2000)]
    tracemalloc.start()
    try:
        fold(frames, "chat")
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 500 * len(frames)


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["choices", "index", "delta", "message", "text", "logprobs", "tool_calls", "id", "function", "usage"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@given(st.lists(st.dictionaries(st.just("choices"), ODD).map(json.dumps).map(str.encode) | st.binary(max_size=8)))
@example([b'{"choices":[{"index":[]}]}'])
@example([b'{"choices":[{"index":"a"},{"index":1}]}'])
@example([b'{"choices":[{"delta":[1]}]}'])
@example([b'{"choices":[{"delta":{"tool_calls":[{"index":{}}]}}]}'])
@example([b'{"choices":[{"delta":{"tool_calls":[{"id":[1]}]}}]}'])
@example([b'{"choices":[{"index":0}],"x":1e999}'])
@example([b'{"choices":[{"index":0}],"x":' + b"[" * 5000 + b"]" * 5000 + b"}"])
@example([b'{"choices":[{"delta":{"x":%s1%s}}]}' % (b'{"a":' * 400, b"}" * 400)] * 2)
@example([b'{"choices":[{"index":0,"delta":{"content":"\xff"}}]}'])
@example([b'{"choices":[{"message":[1]}]}'])
@example([b'{"choices":7}'])
def test_whatever_does_not_fold_or_unfold_is_said_so_by_one_name(frames: list[bytes]) -> None:
    for operation in OPERATIONS:
        with contextlib.suppress(Unfoldable):
            assert decode(fold(frames, operation))["object"]
        for frame in frames:
            with contextlib.suppress(Unfoldable):
                unfold(frame, operation, include_usage=True)


@pytest.mark.parametrize(
    "frame",
    [
        b'{"choices":[{"delta":{"tool_calls":[{"index":[0]}]}}]}',
        b'{"choices":[{"index":0}],"x_odd":1e999}',
        b'{"choices":[{"index":"first"}]}',
        b"[]",
        b"{",
    ],
)
def test_odd_frames_do_not_fold(frame: bytes) -> None:
    with pytest.raises(Unfoldable):
        fold([chunk(delta={"content": "a"}), frame], "chat")
