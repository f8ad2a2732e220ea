"""Answers of Qwen 2.5, Qwen 3 and Hermes, as their chat templates ask for them."""

from __future__ import annotations

import json

import pytest

from backends.tool_calls.parser import MAX_HELD_CHARS, CallArguments, CallStart, Text, tool_call_parser
from tests.backends.tool_calls.reading import Answer, Call, pieces_of, put_together, read

PARIS = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
PARIS_CALL = Call("get_weather", '{"city": "Paris"}')


def test_one_call_is_the_whole_answer() -> None:
    assert read("hermes", f"<tool_call>\n{PARIS}\n</tool_call>") == Answer("", [PARIS_CALL])


def test_text_stands_before_between_and_after_calls() -> None:
    written = f"Let me look.\n<tool_call>\n{PARIS}\n</tool_call>\nAnd now:<tool_call>\n{PARIS}\n</tool_call>\n\nDone."
    assert read("hermes", written) == Answer("Let me look.\n\nAnd now:\n\nDone.", [PARIS_CALL, PARIS_CALL])


def test_white_space_around_calls_is_not_content() -> None:
    written = f"\n\n<tool_call>\n{PARIS}\n</tool_call>\n<tool_call>\n{PARIS}\n</tool_call>\n<|im_end|>"
    assert read("hermes", written) == Answer("", [PARIS_CALL, PARIS_CALL])
    assert read("hermes", f"\n\n<tool_call>{PARIS}</tool_call>Done.") == Answer("Done.", [PARIS_CALL])


def test_white_space_alone_is_content_where_there_is_no_call() -> None:
    assert read("hermes", " \n") == Answer(" \n", [])


def test_a_thought_is_text_and_the_call_in_it_is_none() -> None:
    thought = f"<think>\nI could write <tool_call>{PARIS}</tool_call>.\n</think>\n\n"
    assert read("hermes", f"{thought}<tool_call>\n{PARIS}\n</tool_call>") == Answer(thought, [PARIS_CALL])


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ('{"arguments": {"n": 1.50}, "name": "f"}', '{"n": 1.50}'),
        ('{"name": "f", "parameters": {"n": 1}}', '{"n": 1}'),
        (r'{"name": "f", "arguments": "{\"s\": \"\\u00e9\\n\"}"}', r'{"s": "\u00e9\n"}'),
        (r'{"arguments": "\n{\"s\": \"\ud83d\ude00\"}", "name": "f"}', '{"s": "😀"}'),
        (r'{"name": "f", "arguments": "{\"s\": \"\ud83d\"}"}', r'{"s": "\ud83d"}'),
        ('{"name": "f"}', "{}"),
        ('{"name": "f", "arguments": null}', "{}"),
        ('{"name": "f", "arguments": ""}', "{}"),
        ('{"name": "f", "arguments": "null"}', "{}"),
        ('{"name": "f", "arguments": { }}', "{ }"),
        ('{"id": 7, "name": "f", "arguments": {"name": "g"}, "note": [{}]}', '{"name": "g"}'),
        ('{"name": "f", "arguments": {"a": 1}, "parameters": {"a": 2}, "name": "g"}', '{"a": 1}'),
        ('{"name": "f", "arguments": {"s": "</tool_call> \\" <tool_call>"}}', '{"s": "</tool_call> \\" <tool_call>"}'),
        ('{"name": "f", "arguments": {"s": "two\nlines"}}', '{"s": "two\nlines"}'),
        ('{"n\\u0061me": "\\u0066", "arguments": {}}', "{}"),
    ],
)
def test_arguments_are_the_json_that_the_model_wrote(written: str, arguments: str) -> None:
    assert read("hermes", f"<tool_call>{written}</tool_call>") == Answer("", [Call("f", arguments)])


@pytest.mark.parametrize("end", ["", "\n", "\n</tool", "\n<|im_end|>", f"<tool_call>{PARIS}"])
def test_a_missing_closing_tag_is_forgiven(end: str) -> None:
    answer = read("hermes", f"<tool_call>\n{PARIS}{end}")
    assert answer.calls == [PARIS_CALL] * (1 + end.count("Paris"))
    assert answer.text == ("\n</tool" if "</" in end else "")


@pytest.mark.parametrize(
    "written",
    [
        '<tool_call>\n{"name": "no_such_tool", "arguments": {"q": "</tool_call><tool_call>"}}\n</tool_call>',
        '<tool_call>{"arguments": {"q": [1, 2]}, "name": "no_such_tool"}</tool_call>',
        "<tool_call>\nget_weather Paris\n</tool_call>",
        "<tool_call>\n{'name': 'f', 'arguments': {}}\n</tool_call>",
        '<tool_call>{"name": f, "arguments": {}}</tool_call>',
        '<tool_call>{"name": ["f"], "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "Paris"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": tru}</tool_call>',
        '<tool_call>{"name": "f" "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {"a" 1}, "name": "f"}</tool_call>',
        '<tool_call>{"arguments": {"a": 1,}, "name": "f"}</tool_call>',
        '<tool_call>{"name": "f", "arguments":',
        '<tool_call>{"arguments": {}}</tool_call>',
        "<tool_call>{}</tool_call>",
        "<tool_call>[]</tool_call>",
        "<tool_call>",
        "a </tool_call> < <t <tool_cal",
    ],
)
def test_what_is_no_call_of_an_offered_tool_is_text_as_it_was_written(written: str) -> None:
    assert read("hermes", f"So: {written}") == Answer(f"So: {written}", [])


def test_a_call_after_one_that_is_none_is_read() -> None:
    nonsense = '<tool_call>{"name": "no_such_tool", "arguments": {}}</tool_call> and <tool_call>{oops '
    assert read("hermes", f"{nonsense}<tool_call>{PARIS}</tool_call>") == Answer(nonsense, [PARIS_CALL])


def test_json_that_breaks_within_the_arguments_is_handed_on_up_to_the_closing_tag() -> None:
    written = '<tool_call>{"name": "f", "arguments": {"a": oops, "b": 1}}\n</tool_call> Sorry.'
    assert read("hermes", written) == Answer(" Sorry.", [Call("f", '{"a": oops, "b": 1}}\n')])
    written = '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>", oops</tool_call>'
    assert read("hermes", written) == Answer("", [Call("f", '{"a": "</tool_call>", oops')])
    written = r'<tool_call>{"name": "f", "arguments": "{\"a\": \q}"}</tool_call>'
    assert read("hermes", written) == Answer("", [Call("f", r'{"a": \q}"}')])


def test_json_that_breaks_after_the_arguments_leaves_them_whole_and_the_rest_is_text() -> None:
    written = '<tool_call>{"name": "f", "arguments": {"a": 1}}}\n</tool_call><tool_call>' + PARIS
    assert read("hermes", written) == Answer("}\n", [Call("f", '{"a": 1}'), PARIS_CALL])
    written = '<tool_call>{"name": "f", "arguments": {"a": 1}, oops}</tool_call>'
    assert read("hermes", written) == Answer("oops}", [Call("f", '{"a": 1}')])


def test_an_answer_that_ends_within_the_arguments_keeps_what_there_was() -> None:
    assert read("hermes", '<tool_call>{"name": "f", "arguments": {"a": "b') == Answer("", [Call("f", '{"a": "b')])
    assert read("hermes", '<tool_call>{"name": "f", "arguments": {"a": "\\') == Answer("", [Call("f", '{"a": "\\')])


def test_a_call_is_told_once_its_name_and_its_first_brace_are_there_and_its_arguments_as_they_come() -> None:
    parser = tool_call_parser("hermes", names=["f"], fresh_id=lambda: "call_x")
    assert parser.feed("Sure. <tool") == [Text("Sure. ")]
    assert parser.feed('_call>\n{"name": "f", "argu') == []
    assert not parser.found
    assert parser.feed('ments": {') == [CallStart(0, "call_x", "f"), CallArguments(0, "{")]
    assert parser.found
    assert parser.feed('"city": "Par') == [CallArguments(0, '"city": "Par')]
    assert parser.feed("is\\") == [CallArguments(0, "is")]
    assert parser.feed('n"') == [CallArguments(0, '\\n"')]
    assert parser.feed("}}") == [CallArguments(0, "}")]
    assert parser.feed("\n</tool_call>") == []
    assert parser.close() == []


def test_arguments_before_the_name_are_told_once_the_name_is_there() -> None:
    parser = tool_call_parser("hermes", names=["f"], fresh_id=lambda: "call_x")
    assert parser.feed('<tool_call>{"arguments": {"a": 1}, "name": "f') == []
    assert parser.feed('"') == [CallStart(0, "call_x", "f"), CallArguments(0, '{"a": 1}')]


def test_arguments_in_a_string_are_told_as_they_come() -> None:
    parser = tool_call_parser("hermes", names=["f"], fresh_id=lambda: "call_x")
    assert parser.feed('<tool_call>{"name": "f", "arguments": "{\\"a') == [
        CallStart(0, "call_x", "f"),
        CallArguments(0, '{"a'),
    ]
    assert parser.feed('\\": \\"\\ud83d') == [CallArguments(0, '": "')]
    assert parser.feed("\\ude00") == [CallArguments(0, "😀")]


def test_a_name_that_is_not_offered_releases_the_text_at_once() -> None:
    parser = tool_call_parser("hermes", names=["f"], fresh_id=str)
    assert parser.feed('<tool_call>{"name": "other') == []
    assert parser.feed('", "argu') == [Text('<tool_call>{"name": "other", "argu')]


def test_what_may_be_a_call_is_held_up_to_a_bound() -> None:
    written = '<tool_call>{"arguments": {"a": "' + "x" * MAX_HELD_CHARS
    pieces = pieces_of("hermes", [written, '"}, "name": "f"}</tool_call>'])
    assert put_together(pieces) == Answer(written + '"}, "name": "f"}</tool_call>', [])
    assert pieces[0] == Text(written)


def test_what_is_a_call_from_its_beginning_is_not_held() -> None:
    inner = '{"a": "' + "x" * MAX_HELD_CHARS + '"}'
    written = f'<tool_call>{{"name": "f", "arguments": {json.dumps(inner)}}}</tool_call>'
    assert put_together(pieces_of("hermes", [written])) == Answer("", [Call("f", inner)])


def test_a_forced_call_is_bare_json() -> None:
    assert read("hermes", PARIS, forced=True) == Answer("", [PARIS_CALL])
    assert read("hermes", f"\n{PARIS}\n", forced=True) == Answer("", [PARIS_CALL])
    assert read("hermes", f"<tool_call>{PARIS}</tool_call>", forced=True) == Answer("", [PARIS_CALL])
    assert read("hermes", '{"a": 1}', forced=True) == Answer('{"a": 1}', [])
    assert read("hermes", PARIS) == Answer(PARIS, [])
