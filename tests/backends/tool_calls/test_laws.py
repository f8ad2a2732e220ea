from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from backends.tool_calls.parser import CallStart, Text, ToolFormat, tool_call_parser
from tests.backends.tool_calls.reading import NAMES, Answer, Call, cut, pieces_of, put_together

FORMATS: tuple[ToolFormat, ...] = ("hermes", "llama3", "mistral")
MARKERS = ("<tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "</s>")
CUTS = st.lists(st.integers(0, 10_000), max_size=12)

FRAGMENTS = st.sampled_from(
    [
        *(
            "<tool_call>",
            "</tool_call>",
            "<think>",
            "</think>",
            "<|im_end|>",
            "<|python_tag|>",
            "<|eot_id|>",
            "<|eom_id|>",
        ),
        *(
            "[TOOL_CALLS]",
            "[ARGS]",
            "[CALL_ID]",
            "</s>",
            "{",
            "}",
            "[",
            "]",
            "(",
            ")",
            ",",
            ":",
            ";",
            '"',
            "'",
            "\\",
            "=",
            "\n",
        ),
        *(
            '"name"',
            '"arguments"',
            '"parameters"',
            '"function"',
            '"f"',
            '"other"',
            "null",
            "1",
            "-",
            "true",
            " ",
            "f",
            "other",
        ),
        *(
            '{"name": "f", "arguments": {',
            '{"name": "f", "parameters": "{\\"a\\": ',
            '{"arguments": {"a": [1]}, "name": ',
        ),
        *(
            "f(a='x')",
            "f.call(",
            "[f(",
            '\\"',
            "\\u00e9",
            "\\ud83d",
            "\\ude00",
            "\\n",
            "é",
            "😀",
            "<",
            "<|",
            "[TOOL",
            "nope(",
        ),
        *('{"name": "other", ', '"parameters": {"q": "', '"a": 1'),
    ]
)
SOUP = st.lists(FRAGMENTS, max_size=14).map("".join)
"""Text made of what parsers look for, in any order."""

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
HARD_TEXT = st.sampled_from(
    ["</tool_call>", "<tool_call>", '"}]', "\\", "[TOOL_CALLS]", "<|eot_id|>", "<|python_tag|>", "'", "\n", "😀", ");"]
)
ARGUMENTS = st.dictionaries(st.text(max_size=6) | HARD_TEXT, JSON | HARD_TEXT, max_size=4)
KEYWORDS = st.dictionaries(st.from_regex(r"[a-z_][a-z0-9_]{0,5}", fullmatch=True), JSON | HARD_TEXT, max_size=4)
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="<[{"), min_size=1, max_size=12).map(
    lambda text: "." + text + "."
)


def written_json(value: Any, spaced: bool, ascii_only: bool) -> str:
    return json.dumps(value, ensure_ascii=ascii_only, separators=None if spaced else (",", ":"))


def python_call(name: str, keywords: dict[str, Any]) -> str:
    return f"{name}({', '.join(f'{keyword}={value!r}' for keyword, value in keywords.items())})"


@st.composite
def objects(draw: st.DrawFn, key: str) -> tuple[str, Call]:
    """A call's JSON object in one of the ways that models write it, and the call."""
    name = draw(st.sampled_from(NAMES))
    arguments = written_json(draw(ARGUMENTS), draw(st.booleans()), draw(st.booleans()))
    quoted = draw(st.booleans())
    before = draw(st.sampled_from(["", " \n"]))
    inner = json.dumps(before + arguments, ensure_ascii=draw(st.booleans())) if quoted else arguments
    members = [f'"name": "{name}"', f'"{key}": {inner}']
    if draw(st.booleans()):
        members.reverse()
    space = draw(st.sampled_from(["", " ", "\n  "]))
    return "{" + space + ("," + space).join(members) + space + "}", Call(name, arguments)


@st.composite
def hermes_answers(draw: st.DrawFn) -> tuple[str, Answer]:
    written, text, calls = "", "", []
    if draw(st.booleans()):
        written = text = "<think>\nIs <tool_call> needed? " + draw(WORDS) + "</think>\n\n"
    for _ in range(draw(st.integers(0, 3))):
        if draw(st.booleans()):
            words = draw(st.sampled_from(["", "\n"])) + draw(WORDS)
            written += words
            text += words
        elif calls:
            written += draw(st.sampled_from(["", "\n", " \n\n"]))
        call_text, call = draw(objects(draw(st.sampled_from(["arguments", "parameters"]))))
        written += f"<tool_call>\n{call_text}\n</tool_call>"
        calls.append(call)
    return written, Answer(text, calls)


@st.composite
def llama3_answers(draw: st.DrawFn) -> tuple[str, Answer]:
    if draw(st.booleans()):
        drawn = [draw(objects("parameters")) for _ in range(draw(st.integers(1, 3)))]
        body = draw(st.sampled_from(["; ", ";", "\n", ", "])).join(text for text, _ in drawn)
        calls = [call for _, call in drawn]
    else:
        keywords = [(draw(st.sampled_from(NAMES)), draw(KEYWORDS)) for _ in range(draw(st.integers(1, 3)))]
        body = f"[{', '.join(python_call(name, given) for name, given in keywords)}]"
        calls = [Call(name, json.dumps(given, ensure_ascii=False)) for name, given in keywords]
    tag = draw(st.sampled_from(["", "<|python_tag|>"]))
    return tag + body + draw(st.sampled_from(["", "<|eom_id|>", "<|eot_id|>"])), Answer("", calls)


@st.composite
def mistral_answers(draw: st.DrawFn) -> tuple[str, Answer]:
    text = draw(st.just("") | WORDS)
    if draw(st.booleans()):
        drawn = [draw(objects("arguments")) for _ in range(draw(st.integers(1, 3)))]
        body = f"[TOOL_CALLS]{draw(st.sampled_from(['', ' ']))}[{', '.join(written for written, _ in drawn)}]"
        calls = [call for _, call in drawn]
    else:
        calls = [
            Call(draw(st.sampled_from(NAMES)), written_json(draw(ARGUMENTS), True, draw(st.booleans())))
            for _ in range(draw(st.integers(1, 3)))
        ]
        between = draw(st.sampled_from(["", "[ARGS]", "[CALL_ID]abcDEF123[ARGS]"]))
        body = "".join(f"[TOOL_CALLS]{call.name}{between}{call.arguments}" for call in calls)
    return text + body + draw(st.sampled_from(["", "</s>"])), Answer(text, calls)


def same_calls(read: Answer, expected: Answer) -> None:
    assert read.text == expected.text
    assert [call.name for call in read.calls] == [call.name for call in expected.calls]
    assert [call.value for call in read.calls] == [call.value for call in expected.calls]


@pytest.mark.parametrize("tool_format", FORMATS)
@given(text=SOUP, cuts=CUTS, forced=st.booleans())
@example(text='<tool_call>{"name": "f", "arguments": " {\\"a\\": \\"x ', cuts=[49], forced=False)
def test_however_the_text_is_cut_the_answer_is_the_same(
    tool_format: ToolFormat, text: str, cuts: list[int], forced: bool
) -> None:
    whole = put_together(pieces_of(tool_format, [text], forced=forced))
    assert put_together(pieces_of(tool_format, cut(text, cuts), forced=forced)) == whole
    assert put_together(pieces_of(tool_format, text, forced=forced)) == whole


@pytest.mark.parametrize("tool_format", FORMATS)
@given(text=SOUP, forced=st.booleans())
def test_where_no_tool_is_offered_everything_but_a_last_ending_marker_comes_out_as_it_went_in(
    tool_format: ToolFormat, text: str, forced: bool
) -> None:
    answer = put_together(pieces_of(tool_format, [text], names=(), forced=forced))
    rest = text.removeprefix(answer.text)
    assert answer.text + rest == text
    for marker in ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "</s>"):
        rest = rest.replace(marker, "")
    assert not rest
    assert not answer.calls


@pytest.mark.parametrize("tool_format", FORMATS)
@given(text=st.text(), cuts=CUTS)
def test_text_without_markers_comes_out_as_it_went_in(tool_format: ToolFormat, text: str, cuts: list[int]) -> None:
    assume(not any(marker in text for marker in MARKERS))
    assert put_together(pieces_of(tool_format, cut(text, cuts))) == Answer(text, [])


@pytest.mark.parametrize("tool_format", FORMATS)
@given(words=st.lists(st.text(st.characters(exclude_characters="<[{"), min_size=1), min_size=1))
def test_text_is_handed_on_at_once(tool_format: ToolFormat, words: list[str]) -> None:
    parser = tool_call_parser(tool_format, names=NAMES, fresh_id=str)
    parser.feed("I")
    for word in words:
        assert parser.feed(word) == [Text(word)]
    assert parser.close() == []


@given(answer=hermes_answers(), cuts=CUTS)
def test_hermes_answers_are_read_as_they_were_meant(answer: tuple[str, Answer], cuts: list[int]) -> None:
    written, meant = answer
    same_calls(put_together(pieces_of("hermes", cut(written, cuts))), meant)


@given(answer=llama3_answers(), cuts=CUTS)
def test_llama3_answers_are_read_as_they_were_meant(answer: tuple[str, Answer], cuts: list[int]) -> None:
    written, meant = answer
    same_calls(put_together(pieces_of("llama3", cut(written, cuts))), meant)


@given(answer=mistral_answers(), cuts=CUTS)
def test_mistral_answers_are_read_as_they_were_meant(answer: tuple[str, Answer], cuts: list[int]) -> None:
    written, meant = answer
    same_calls(put_together(pieces_of("mistral", cut(written, cuts))), meant)


@pytest.mark.parametrize("tool_format", FORMATS)
@given(drawn=objects("arguments"))
def test_a_forced_call_is_read_as_bare_json(tool_format: ToolFormat, drawn: tuple[str, Call]) -> None:
    written, call = drawn
    same_calls(put_together(pieces_of(tool_format, written, forced=True)), Answer("", [call]))


@given(drawn=objects("arguments"), end=st.integers(0, 10_000))
def test_an_answer_cut_off_at_its_bound_keeps_what_was_there(drawn: tuple[str, Call], end: int) -> None:
    """Either nothing is known of a call and all is text, or what there is of its arguments is the beginning of them."""
    written, call = drawn
    written = f"<tool_call>{written}</tool_call>"
    answer = put_together(pieces_of("hermes", written[: end % len(written)]))
    if answer.calls:
        assert answer.text.strip() in "</tool_call>"
        assert answer.calls[0].name == call.name
        if call.arguments in written:  # not in a string, where an escape may be cut in two
            assert call.arguments.startswith(answer.calls[0].arguments)
    else:
        assert answer.text == written[: end % len(written)]


ONE_MEGABYTE = 1_000_000


@pytest.mark.parametrize(
    ("tool_format", "before", "after"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "', '"}}</tool_call>'),
        ("hermes", '<tool_call>{"arguments": {"a": "', '"}, "name": "f"}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"', '\\"}"}</tool_call>'),
        ("hermes", '<tool_call>{"name": "other", "arguments": {"a": "', '"}}</tool_call>'),
        ("llama3", '{"name": "f", "parameters": {"a": "', '"}}'),
        ("llama3", "[f(a='", "')]"),
        ("llama3", '{"other": "', '"}'),
        ("mistral", '[TOOL_CALLS]f{"a": "', '"}'),
    ],
)
@pytest.mark.parametrize("body", ["x", "\\n", "é ", "<tool_call", " "])
def test_a_megabyte_in_small_pieces_costs_linear_time(
    tool_format: ToolFormat, before: str, after: str, body: str
) -> None:
    def cpu_s(chars: int) -> float:
        fed = cut(before + body * (chars // len(body)) + after, range(0, chars, 100))
        begins = time.process_time()
        pieces_of(tool_format, fed)
        return time.process_time() - begins

    assert cpu_s(ONE_MEGABYTE) < 10 * 5 * cpu_s(ONE_MEGABYTE // 10) + 0.05
    assert any(isinstance(piece, CallStart | Text) for piece in pieces_of(tool_format, [before, after]))
