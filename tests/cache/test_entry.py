"""What is kept comes back as it was or not at all; what must not be kept is refused with its reason."""

from __future__ import annotations

import zlib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.chat import Operation, Usage
from cache.entry import ENTRY_VERSION, Entry, dump_entry, load_entry, why_not_stored
from policies.cache_policy import ExactCachePolicy
from tests.cache.entries import completion, entry

COUNTS = st.integers(0, 2**63)
ENTRIES = st.builds(
    Entry,
    operation=st.sampled_from(["chat", "text_completion", "embeddings"]),
    model=st.text(),
    completion=st.binary(),
    usage=st.builds(
        Usage,
        prompt_tokens=COUNTS,
        completion_tokens=COUNTS,
        cached_tokens=COUNTS,
        reasoning_tokens=COUNTS,
        estimated=st.booleans(),
    ),
    cost_nano_usd=COUNTS,
    created_at=st.floats(allow_nan=False, allow_infinity=False),
)


@given(ENTRIES)
def test_an_entry_comes_back_as_it_was(kept: Entry) -> None:
    assert load_entry(dump_entry(kept)) == kept


@given(st.binary())
def test_bytes_that_are_no_entry_are_none(stored: bytes) -> None:
    assert load_entry(stored) is None


@given(st.data())
def test_an_entry_that_was_changed_in_any_place_is_none(data: st.DataObject) -> None:
    stored = bytearray(dump_entry(entry()))
    match data.draw(st.sampled_from(["flip", "cut", "grow"])):
        case "flip":
            stored[data.draw(st.integers(0, len(stored) - 1))] ^= data.draw(st.integers(1, 255))
        case "cut":
            del stored[data.draw(st.integers(0, len(stored) - 1)) :]
        case _:
            stored += data.draw(st.binary(min_size=1, max_size=9))

    assert load_entry(bytes(stored)) is None


@pytest.mark.parametrize(
    "packed",
    [
        msgspec.msgpack.encode([ENTRY_VERSION]),
        msgspec.msgpack.encode({"version": ENTRY_VERSION}),
        msgspec.msgpack.encode([ENTRY_VERSION, "images", "m", b"", {}, 0, 0.0]),
        msgspec.msgpack.encode([ENTRY_VERSION, "chat", b"\xff", b"", {}, 0, 0.0]),
        b"\x97\x01\xa4chat\xa1\xff\xc4\x00\x80\x00\xcb" + bytes(8),
        b"",
    ],
)
def test_what_is_whole_but_no_entry_of_ours_is_none(packed: bytes) -> None:
    assert load_entry(zlib.crc32(packed).to_bytes(4, "big") + packed) is None


def test_an_entry_of_another_version_is_none() -> None:
    assert load_entry(dump_entry(entry(version=ENTRY_VERSION + 1))) is None


CALL = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
CALLS: dict[str, Any] = {
    "finish_reason": "tool_calls",
    "message": {"role": "assistant", "content": None, "tool_calls": CALL},
}


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ({}, None),
        ({"finish_reason": "length"}, "finish_reason_length"),
        ({"finish_reason": "content_filter"}, "finish_reason_content_filter"),
        ({"finish_reason": None}, "finish_reason_missing"),
        ({"finish_reason": ""}, "finish_reason_missing"),
        (CALLS, "tool_calls"),
        ({"message": {"role": "assistant", "content": None, "refusal": "I will not."}}, "refusal"),
        ({"message": {"role": "assistant", "content": ""}}, "empty"),
        ({"message": {"role": "assistant"}}, "empty"),
        ({"message": {"role": "assistant", "content": "", "reasoning_content": "hm"}}, None),
    ],
)
def test_only_a_complete_and_ordinary_answer_is_kept(choice: dict[str, Any], reason: str | None) -> None:
    assert why_not_stored(completion(**choice), ExactCachePolicy()) == reason


@pytest.mark.parametrize(
    ("operation", "choice", "reason"),
    [("text_completion", {}, None), ("text_completion", {"text": ""}, "empty"), ("chat", CALLS, None)],
)
def test_what_a_policy_or_an_operation_makes_of_an_answer(
    operation: Operation, choice: dict[str, Any], reason: str | None
) -> None:
    assert why_not_stored(completion(operation, **choice), ExactCachePolicy(store_tool_calls=True)) == reason


def test_embeddings_have_no_choices_and_are_kept_up_to_the_same_size() -> None:
    answer = b'{"object":"list","data":[{"object":"embedding","index":0,"embedding":[1.0]}]}'

    assert why_not_stored(answer, ExactCachePolicy(), "embeddings") is None
    assert why_not_stored(answer, ExactCachePolicy(max_entry_bytes=20), "embeddings") == "too_large"
    assert why_not_stored(answer[:-1], ExactCachePolicy(), "embeddings") == "unreadable"


@pytest.mark.parametrize("odd", [b"1e400", b"[" * 5000 + b"]" * 5000])
def test_an_answer_that_a_replay_could_not_take_apart_is_not_kept(odd: bytes) -> None:
    assert why_not_stored(completion()[:-1] + b',"x_odd":' + odd + b"}", ExactCachePolicy()) == "unreadable"


def test_one_choice_that_was_cut_is_enough_to_keep_none() -> None:
    answer = msgspec.json.decode(completion(), type=dict[str, Any])
    answer["choices"].append({**answer["choices"][0], "index": 1, "finish_reason": "length"})

    assert why_not_stored(msgspec.json.encode(answer), ExactCachePolicy()) == "finish_reason_length"
    assert why_not_stored(b'{"choices":[]}', ExactCachePolicy()) == "no_choices"


def test_an_answer_may_be_as_large_as_the_policy_says_and_no_larger() -> None:
    answer = completion()

    assert why_not_stored(answer, ExactCachePolicy(max_entry_bytes=len(answer))) is None
    assert why_not_stored(answer, ExactCachePolicy(max_entry_bytes=len(answer) - 1)) == "too_large"
