"""Answers of Mistral's models, as its tokenizers up to v7, v11 and v13 render them."""

from __future__ import annotations

import pytest

from backends.tool_calls.parser import CallArguments, CallStart, Text, tool_call_parser
from tests.backends.tool_calls.reading import Answer, Call, read

PARIS = '{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "abcDEF123"}'
PARIS_CALL = Call("get_weather", '{"city": "Paris"}')


@pytest.mark.parametrize("before", ["", " ", "\n"])
@pytest.mark.parametrize("end", ["]", "]</s>", " ]\n", "", "\n"])
def test_an_array_holds_the_calls(before: str, end: str) -> None:
    assert read("mistral", f"[TOOL_CALLS]{before}[{PARIS}{end}") == Answer("", [PARIS_CALL])
    assert read("mistral", f"[TOOL_CALLS]{before}[ {PARIS} , {PARIS}{end}") == Answer("", [PARIS_CALL] * 2)


def test_one_object_needs_no_array() -> None:
    assert read("mistral", f"[TOOL_CALLS]{PARIS}</s>") == Answer("", [PARIS_CALL])


@pytest.mark.parametrize("between", ["", "[ARGS]", "[CALL_ID]abcDEF123[ARGS]", " ", "[ARGS] "])
def test_a_call_is_its_name_and_its_arguments(between: str) -> None:
    call = f'[TOOL_CALLS]get_weather{between}{{"city": "Paris"}}'
    assert read("mistral", f"{call}</s>") == Answer("", [PARIS_CALL])
    assert read("mistral", f"Sure.{call}{call}") == Answer("Sure.", [PARIS_CALL] * 2)


def test_text_after_calls_is_text() -> None:
    assert read("mistral", '[TOOL_CALLS]f{"a": 1} Done.') == Answer(" Done.", [Call("f", '{"a": 1}')])
    assert read("mistral", f"[TOOL_CALLS][{PARIS}] Done.") == Answer(" Done.", [PARIS_CALL])


@pytest.mark.parametrize(
    "written",
    [
        '[TOOL_CALLS] [{"name": "no_such_tool", "arguments": {"q": "[TOOL_CALLS]f{}"}}]',
        '[TOOL_CALLS]no_such_tool[ARGS]{"q": "[TOOL_CALLS]f{}"}',
        '[TOOL_CALLS]no_tool[CALL_ID]abcDEF123[ARGS]{"q": 1}',
        "[TOOL_CALLS][]",
        "[TOOL_CALLS] [{oops}]",
        "[TOOL_CALLS]get_weather_and_much_more_of_it{}",
        "[TOOL_CALLS]f",
        "[TOOL_CALLS]f[ARGS]",
        "[TOOL_CALLS]f[CALL_ID]" + "x" * 100 + "[ARGS]{}",
        "[TOOL_CALLS]f[ARGS][1]",
        "[TOOL_CALLS]f(a=1)",
        "[TOOL_CALLS]",
        "[TOOL_CALLS",
        "[1] and [TOOL] </s> x",
        PARIS,
    ],
)
def test_what_is_no_call_of_an_offered_tool_is_text_as_it_was_written(written: str) -> None:
    assert read("mistral", f"So: {written}") == Answer(f"So: {written}", [])


def test_a_call_among_some_that_are_none_is_read() -> None:
    other = '{"name": "no_such_tool", "arguments": {}}'
    answer = read("mistral", f"[TOOL_CALLS] [{other}, {PARIS}, {other}]")
    assert answer == Answer(f"[TOOL_CALLS] [{other}, {other}]", [PARIS_CALL])
    answer = read("mistral", '[TOOL_CALLS]no_such{"a": 1}[TOOL_CALLS]f{"a": 1}')
    assert answer == Answer('[TOOL_CALLS]no_such{"a": 1}', [Call("f", '{"a": 1}')])


def test_json_that_breaks_within_the_arguments_is_handed_on_up_to_the_next_marker() -> None:
    answer = read("mistral", '[TOOL_CALLS]f{"a": oops}[TOOL_CALLS]f{"b": 1}')
    assert answer == Answer("", [Call("f", '{"a": oops}'), Call("f", '{"b": 1}')])
    answer = read("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {oops}}, 1]</s>')
    assert answer == Answer("", [Call("f", "{oops}}, 1]")])


def test_a_call_is_told_once_its_name_and_its_first_brace_are_there_and_its_arguments_as_they_come() -> None:
    parser = tool_call_parser("mistral", names=["f"], fresh_id=lambda: "call_x")
    assert parser.feed("Sure. [TOOL_CA") == [Text("Sure. ")]
    assert parser.feed("LLS]f[AR") == []
    assert parser.feed("GS]{") == [CallStart(0, "call_x", "f"), CallArguments(0, "{")]
    assert parser.feed('"a": 1') == [CallArguments(0, '"a": 1')]
    assert parser.feed("}[TOOL_CALLS][{") == [CallArguments(0, "}")]
    assert parser.feed('"name": "f", "arguments": {') == [CallStart(1, "call_x", "f"), CallArguments(1, "{")]


def test_a_forced_call_is_bare_json() -> None:
    assert read("mistral", PARIS, forced=True) == Answer("", [PARIS_CALL])
    assert read("mistral", f" [{PARIS}, {PARIS}]</s>", forced=True) == Answer("", [PARIS_CALL] * 2)
    assert read("mistral", f"[TOOL_CALLS][{PARIS}]", forced=True) == Answer("", [PARIS_CALL])
    assert read("mistral", "[1]", forced=True) == Answer("[1]", [])
