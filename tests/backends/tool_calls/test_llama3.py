"""Answers of Llama 3.1, 3.2 and 3.3, as Meta's pages on their prompt formats show them."""

from __future__ import annotations

import pytest

from backends.tool_calls.parser import CallArguments, CallStart, Text, tool_call_parser
from tests.backends.tool_calls.reading import Answer, Call, read

PARIS = '{"name": "get_weather", "parameters": {"city": "Paris"}}'
PARIS_CALL = Call("get_weather", '{"city": "Paris"}')


@pytest.mark.parametrize("before", ["", "<|python_tag|>", "\n", "<|python_tag|> "])
@pytest.mark.parametrize("after", ["", "<|eom_id|>", "<|eot_id|>", "\n<|eot_id|>", "<|eom_id|><|eot_id|>"])
def test_one_call_is_the_whole_answer(before: str, after: str) -> None:
    assert read("llama3", before + PARIS + after) == Answer("", [PARIS_CALL])


@pytest.mark.parametrize("separator", ["; ", ";", "\n", ", ", "", " ;\n", "<|python_tag|>", "; <|python_tag|>"])
def test_several_calls_are_separated_in_several_ways(separator: str) -> None:
    assert read("llama3", separator.join([PARIS] * 3) + "<|eom_id|>") == Answer("", [PARIS_CALL] * 3)


@pytest.mark.parametrize(
    "written",
    [
        '{"type": "function", "name": "f", "parameters": {"n": 1}}',
        '{"type": "function", "function": "f", "parameters": {"n": 1}}',
        '{"function": "f", "parameters": {"n": 1}}',
        '{"name": "f", "arguments": {"n": 1}}',
        '{"parameters": {"n": 1}, "name": "f"}',
    ],
)
def test_other_spellings_of_a_call_are_read(written: str) -> None:
    assert read("llama3", written) == Answer("", [Call("f", '{"n": 1}')])


@pytest.mark.parametrize(
    "written",
    [
        '{"answer": 42, "q": "<|python_tag|>{\\"name\\": \\"f\\"}"}',
        '{"name": "Marie Curie", "born": 1867, "parameters": {}} was a physicist.',
        '{"parameters": {"n": 1}, "name": "no_such_tool"}',
        '{"title": "x", "name": "f", "parameters": {}}',
        "  {not json}",
        "{",
        "{}",
        '{"name": "f", "parameters"',
        f'{{"name": "no_such_tool"}}; {PARIS}',
        f"Sure: {PARIS}",
        "[1, 2, 3]",
        "[get_weather] is a tool",
        "[get_weather",
        "[no_such_tool(a=1), f()]",
        "[f(a)]",
        "[f('x')]",
        "[f(a=b)]",
        "[f(a=g(1))]",
        "[f(a={1: 2})]",
        "[f(a={1, 2})]",
        "[f(a=1]",
        "[f(a='1)]",
        "[f(a=0x10)]",
        "[f(a='\\ud83d')]",
        "[f(*a)]",
        '[f(a="<|python_tag|>f(b=1)"]',
        "<|python_tag|>",
        "<|python_tag|>print(1)",
        '<|python_tag|>wolfram_alpha.call(query="1+1")',
        "<|python_tag|>brave_search.call('x')",
        "<|python_tag|>brave_search.call",
        '<|python_tag|>{"name": "no_such_tool"}',
        "a <|eot_id|> b <|eom_id|>c",
        "<|python_ta",
    ],
)
def test_what_is_no_call_of_an_offered_tool_is_text_as_it_was_written(written: str) -> None:
    assert read("llama3", written) == Answer(written, [])
    assert read("llama3", written + "<|eot_id|>") == Answer(written, [])


def test_text_after_a_call_is_text() -> None:
    assert read("llama3", f"{PARIS}\nThat is it.<|eot_id|>") == Answer("\nThat is it.", [PARIS_CALL])


def test_what_follows_a_call_and_is_none_is_given_back_with_what_separates_it() -> None:
    assert read("llama3", PARIS + '; {"name": "no"}') == Answer('; {"name": "no"}', [PARIS_CALL])
    assert read("llama3", "[f(a=1), f(a=b), f()]") == Answer(", f(a=b), f()]", [Call("f", '{"a": 1}')])
    assert read("llama3", "[f(); f()]") == Answer("; f()]", [Call("f", "{}")])


def test_a_tag_may_follow_text() -> None:
    assert read("llama3", f"I will look. <|python_tag|>{PARIS}") == Answer("I will look. ", [PARIS_CALL])


def test_a_built_in_tool_is_called_as_python() -> None:
    written = '<|python_tag|>brave_search.call(query="current \\"weather\\" in (Paris)")<|eom_id|>'
    assert read("llama3", written).calls == [Call("brave_search", '{"query": "current \\"weather\\" in (Paris)"}')]
    assert read("llama3", "<|python_tag|>f(n=1)").calls == [Call("f", '{"n": 1}')]


def test_code_is_a_call_of_the_code_interpreter_where_it_is_offered() -> None:
    code = 'def is_prime(n):\n    return n == "7"\n\nprint(is_prime(7))  # é'
    written = f"<|python_tag|>{code}<|eom_id|>"
    answer = read("llama3", written, names=["code_interpreter"])
    assert [(call.name, call.value) for call in answer.calls] == [("code_interpreter", {"code": code})]
    assert answer.text == ""
    assert read("llama3", written) == Answer(f"<|python_tag|>{code}", [])


@pytest.mark.parametrize("written", ["<|python_tag|>", '<|python_tag|>wolfram_alpha.call(query="1+1")'])
def test_no_code_and_a_built_in_tool_that_is_not_offered_are_text(written: str) -> None:
    assert read("llama3", written, names=["code_interpreter"]) == Answer(written, [])


def test_code_is_told_as_it_comes() -> None:
    parser = tool_call_parser("llama3", names=["code_interpreter"], fresh_id=lambda: "call_x")
    assert parser.feed("<|python_tag|>") == []
    assert parser.feed("print(1") == [CallStart(0, "call_x", "code_interpreter"), CallArguments(0, '{"code": "print(1')]
    assert parser.feed(")\n<|eom") == [CallArguments(0, ")\\n")]
    assert parser.feed("_id|>") == []
    assert parser.close() == [CallArguments(0, '"}')]


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ("city='Paris', n=2", '{"city": "Paris", "n": 2}'),
        ('city="it\'s"', '{"city": "it\'s"}'),
        (r"s='a\'b\n\x41\u00e9\d\\ \101'", r"""{"s": "a'b\nAé\\d\\ A"}"""),
        ("a=True, b=False, c=None, d=true, e=null", '{"a": true, "b": false, "c": null, "d": true, "e": null}'),
        ("a=[1, 2.50, -3e-7,], b=(1,), c=(), d=(2), e={'k': [{}]}", None),
        ("a=10000000000000000000001", '{"a": 10000000000000000000001}'),
        (" a = 1 , ", '{"a": 1}'),
        ("true=1", '{"true": 1}'),
        ("a=')', b='[', c=\"'\"", '{"a": ")", "b": "[", "c": "\'"}'),
        ("", "{}"),
    ],
)
def test_python_literals_become_json(written: str, arguments: str | None) -> None:
    arguments = arguments or '{"a": [1, 2.50, -3e-7], "b": [1], "c": [], "d": 2, "e": {"k": [{}]}}'
    assert read("llama3", f"[f({written})]<|eot_id|>") == Answer("", [Call("f", arguments)])


def test_a_python_call_is_told_when_it_is_closed() -> None:
    parser = tool_call_parser("llama3", names=["f", "g"], fresh_id=lambda: "call_x")
    assert parser.feed("[f(a=1") == []
    assert parser.feed("), g(") == [CallStart(0, "call_x", "f"), CallArguments(0, '{"a": 1}')]
    assert parser.feed(")]") == [CallStart(1, "call_x", "g"), CallArguments(1, "{}")]


def test_a_bare_call_is_told_once_its_name_and_its_first_brace_are_there() -> None:
    parser = tool_call_parser("llama3", names=["f"], fresh_id=lambda: "call_x")
    assert parser.feed('{"name": "f", "parameters"') == []
    assert parser.feed(': {"a": "b') == [CallStart(0, "call_x", "f"), CallArguments(0, '{"a": "b')]
    assert parser.feed('c"}}') == [CallArguments(0, 'c"}')]


@pytest.mark.parametrize("written", ['{"answer": ', "{a", '{"name": "x"', "[1", "[no_such_tool", "[f,", '{"name": 1'])
def test_an_answer_that_is_no_call_is_held_no_longer_than_needed_to_know(written: str) -> None:
    parser = tool_call_parser("llama3", names=["f"], fresh_id=str)
    assert parser.feed(written[:-1]) == [] or written == "[no_such_tool"
    text = "".join(piece.text for piece in parser.feed(written[-1] + "1 ") if isinstance(piece, Text))
    assert written.endswith(text[:1]) or text.startswith(written[:1])
    assert parser.feed("more") == [Text("more")]


def test_json_that_breaks_within_the_arguments_is_handed_on_to_the_end() -> None:
    answer = read("llama3", '{"name": "f", "parameters": {"a": oops}}; more<|eot_id|>')
    assert answer == Answer("", [Call("f", '{"a": oops}}; more')])


def test_a_model_that_stops_within_its_arguments_does_not_write_its_ending_into_them() -> None:
    answer = read("llama3", '{"name": "f", "parameters": {"a": "b<|eot_id|>c<|eot_id|><|eot_id|>')
    assert answer == Answer("", [Call("f", '{"a": "b<|eot_id|>c')])


def test_an_ending_that_is_not_whole_is_content() -> None:
    assert read("llama3", "a<|eot_id|><|eot_i") == Answer("a<|eot_id|><|eot_i", [])


@pytest.mark.parametrize("forced", [True, False])
def test_a_forced_call_is_the_formats_own(forced: bool) -> None:
    assert read("llama3", PARIS, forced=forced) == Answer("", [PARIS_CALL])
