"""`AnswerReader` by itself: what no cassette shows, and that whatever comes it fails only as it says."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from backends.backend import Call
from backends.chat import Event
from backends.errors import BackendError, BackendFailed, BackendProtocolError
from backends.openai_quirks import AnswerReader
from tests.calls import make_request, whole_of
from tests.upstream import chunk, completion, finish, usage

START = chunk("", role="assistant")


def reader(operation: Any = "chat", **fields: Any) -> AnswerReader:
    request = make_request(operation, **fields)
    call = Call(request=request, model="small", request_id="req-1", deadline=0.0)
    return AnswerReader("a", call, now=lambda: 1_700_000_000.0)


def read(reader: AnswerReader, *frames: Any) -> list[Event]:
    events = [reader.read_frame(msgspec.json.encode(frame)) for frame in frames]
    return [event for event in (*events, reader.closing()) if event is not None]


def tools_of(*pieces: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The calls that pieces make, a frame for each list of them."""
    events = read(reader(), START, *(chunk(tool_calls=piece) for piece in pieces), finish())
    calls = whole_of(events)["choices"][0]["message"]["tool_calls"]
    assert len({call["id"] for call in calls}) == len(calls)
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


def piece(arguments: Any, **fields: Any) -> dict[str, Any]:
    name = {"name": fields.pop("name")} if "name" in fields else {}
    return {**fields, "function": {**name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("pieces", "calls"),
    [
        # One call, told again on each piece.
        ([[piece('{"a":', index=0, id="x", name="f")], [piece("1}", index=0, id="x", name="f")]], [("f", '{"a":1}')]),
        ([[piece('{"a":', id="x", name="f")], [piece("1}", id="x")], [piece("", id="x")]], [("f", '{"a":1}')]),
        ([[piece('{"a":', index=0, id="x", name="f")], [piece("1}", index=0, id="y")]], [("f", '{"a":1}')]),
        ([[piece('{"a":', index=0, id="x", name="f")], [piece("1}", index=0, name="f")]], [("f", '{"a":1}')]),
        ([[piece('{"a":', name="f")], [piece("1}")]], [("f", '{"a":1}')]),
        # Several, however they are told apart.
        ([[piece("{}", index=0, name="f")], [piece("{}", index=0, name="f")]], [("f", "{}"), ("f", "{}")]),
        ([[piece("", index=0, name="f")], [piece("", index=0, name="g")]], [("f", ""), ("g", "")]),
        ([[piece('{"a":1}', name="f"), piece("{}", name="f")]], [("f", '{"a":1}'), ("f", "{}")]),
        ([[piece("", index=1, id="x", name="f")], [piece("{}", index=1)]], [("f", "{}")]),
        (
            [[piece("", index=3, id="x", name="f"), piece("", index=7, id="y", name="g")], [piece("{}", index=7)]],
            [("f", ""), ("g", "{}")],
        ),
        ([[piece("{}", id="x", name="f")], [piece("{}", id="y", name="f")]], [("f", "{}"), ("f", "{}")]),
        # Several with one id.
        (
            [[piece(part, index=n, id="x", name="f")] for part in ("{", "}") for n in (0, 1)],
            [("f", "{}"), ("f", "{}")],
        ),
        # Arguments that are no text.
        ([[piece([1], index=0, name="f")], [piece(2, index=0, name="f")]], [("f", "[1]"), ("f", "2")]),
    ],
)
def test_pieces_of_tool_calls_find_their_call(pieces: list[Any], calls: list[tuple[str, str]]) -> None:
    assert tools_of(*pieces) == calls


def test_an_id_and_a_name_are_told_once() -> None:
    frames = [chunk(tool_calls=[piece(part, index=0, id="x", name="f", type="function")]) for part in ('{"a"', ":1}")]
    *_, again = [msgspec.json.decode(event.raw) for event in read(reader(), START, *frames)]
    assert again["choices"][0]["delta"]["tool_calls"] == [
        {"index": 0, "type": "function", "function": {"arguments": ":1}"}}
    ]


def test_a_choice_that_goes_on_after_its_end_has_not_ended() -> None:
    answer = reader()
    read(answer, START, chunk("One", finish_reason="stop"))
    assert answer.finished == {0}
    read(answer, chunk(" two"))
    assert (answer.begun, answer.finished) == ({0}, set())
    read(answer, chunk(" three.", finish_reason="stop"), chunk(""))
    assert answer.finished == {0}


def test_usage_on_frames_of_choices_is_known_as_it_comes_and_told_at_the_end() -> None:
    counted = [{**chunk(text), "usage": usage(3, n)["usage"]} for n, text in enumerate(("", "a", "b"))]
    events = read(reader(), *counted, finish())
    assert [event.usage and event.usage.completion_tokens for event in events] == [0, 1, 2, None, 2]
    assert [b'"usage":null' in event.raw for event in events] == [True, True, True, False, False]
    assert events[-1].is_usage_only


@pytest.mark.parametrize("whole", [True, False])
def test_nesting_beyond_the_stack_is_the_engines_fault(whole: bool) -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    raw = msgspec.json.encode(completion("Hi") if whole else chunk("Hi"))[:-1] + b',"x":' + deep + b"}"
    with pytest.raises(BackendProtocolError, match="recursion"):
        (reader().read_whole if whole else reader().read_frame)(raw)


@pytest.mark.parametrize("field", ["prompt_tokens", "completion_tokens", "total_tokens"])
def test_usage_below_zero_is_none(field: str) -> None:
    counted = usage(3, 2)
    counted["usage"][field] = -1
    with pytest.raises(BackendProtocolError, match=">= 0"):
        read(reader(), START, finish(), counted)
    with pytest.raises(BackendProtocolError, match=">= 0"):
        reader().read_whole(msgspec.json.encode({**completion("Hi"), "usage": counted["usage"]}))


def test_an_object_that_says_it_is_an_error_is_one_without_a_code() -> None:
    with pytest.raises(BackendFailed, match="out of memory"):
        read(reader(), {"object": "error", "message": "out of memory"})
    with pytest.raises(BackendFailed, match="out of memory"):
        read(reader(), {"type": "error", "message": "out of memory"})


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.just(10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "stop", "eos", "error", "assistant", "f", "{}", "x", "ü"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "type", "text"]), inner, max_size=2)
    ),
    max_leaves=4,
)


def object_of(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with some of the fields, each of which is as it should be or anything at all."""
    return st.fixed_dictionaries({}, optional={name: value | JSON for name, value in fields.items()})


FUNCTIONS = object_of(name=st.sampled_from(["f", "g", ""]), arguments=st.sampled_from(["", "{", "}", "{}"]))
CALLS = st.lists(object_of(index=st.integers(0, 2), id=st.sampled_from(["x", "y", ""]), function=FUNCTIONS), max_size=2)
PARTS = st.lists(object_of(type=st.sampled_from(["text", "thinking"]), text=st.just("t"), thinking=JSON), max_size=2)
SAID = object_of(
    role=st.just("assistant"), content=st.just("c") | PARTS, tool_calls=CALLS, thinking=st.just("t"), refusal=st.none()
)
USAGES = object_of(prompt_tokens=st.integers(0, 9), completion_tokens=st.integers(0, 9), total_tokens=st.integers(0, 9))
CHOICES = st.lists(
    object_of(
        index=st.integers(0, 2),
        delta=SAID,
        message=SAID,
        text=st.just("t"),
        finish_reason=st.sampled_from([None, "", "stop", "eos", "tool_use"]),
        usage=USAGES,
    ),
    max_size=2,
)
FRAMES = object_of(
    id=st.sampled_from(["", "i", "j"]),
    object=st.sampled_from(["", "chat.completion.chunk", "chat.completion", "text_completion"]),
    created=st.integers(0, 9),
    model=st.sampled_from(["", "m"]),
    choices=CHOICES,
    usage=USAGES,
    service_tier=st.just("default"),
    x_groq=object_of(usage=USAGES),
)


@given(st.lists(FRAMES | JSON, max_size=5), st.integers(1, 2))
@example([{"choices": [{"delta": {"tool_calls": [{"function": {"name": [], "arguments": 1}}]}}]}], 1)
def test_whatever_an_engine_sends_is_strictly_readable_or_an_error_by_its_cause(frames: list[Any], n: int) -> None:
    answer = reader(n=n)
    told: set[int] = set()
    ids = set()
    for frame in frames:
        try:
            events = read(answer, frame)
        except BackendError:
            return
        for event in events:
            read_by_sdk = ChatCompletionChunk.model_validate_json(event.raw)
            ids.add(read_by_sdk.id)
            ended = [choice.index for choice in read_by_sdk.choices if choice.finish_reason]
            assert told.isdisjoint(ended)
            told.update(ended)
    assert len(ids) <= 1


@given(FRAMES | JSON)
def test_whatever_an_engine_answers_at_once_is_strictly_readable_or_an_error_by_its_cause(body: Any) -> None:
    for operation, kind in (("chat", ChatCompletion), ("text_completion", Completion)):
        try:
            event = reader(operation).read_whole(msgspec.json.encode(body))
        except BackendError:
            continue
        kind.model_validate_json(event.raw)
        assert all(choice.finish_reason for choice in event.choices)


def test_a_clean_answer_is_left_as_it_is() -> None:
    raw = msgspec.json.encode(completion("Hi"))
    assert reader().read_whole(raw).raw == raw
