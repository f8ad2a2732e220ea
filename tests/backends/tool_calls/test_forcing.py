from __future__ import annotations

import copy
import json
from typing import Any

import jsonschema
import pytest

from backends.tool_calls.parser import ToolFormat, forced_call_schema, tool_format_of
from tests.backends.tool_calls.reading import Answer, Call, read

FORMATS: tuple[ToolFormat, ...] = ("hermes", "llama3", "mistral")
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NOTHING = {"type": "function", "function": {"name": "f"}}
TREE = {
    "type": "function",
    "function": {
        "name": "plant",
        "parameters": {
            "type": "object",
            "properties": {"tree": {"$ref": "#/$defs/tree"}, "again": {"$ref": "#"}},
            "required": ["tree"],
            "$defs": {"tree": {"type": "object", "additionalProperties": {"$ref": "#/$defs/tree"}}},
        },
    },
}


def call(tool_format: ToolFormat, name: str, arguments: Any) -> dict[str, Any]:
    return {"name": name, "parameters" if tool_format == "llama3" else "arguments": arguments}


def fits(schema: dict[str, Any], value: Any) -> bool:
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema).is_valid(value)


@pytest.mark.parametrize("tool_format", FORMATS)
def test_a_required_call_is_one_of_any_offered_tool(tool_format: ToolFormat) -> None:
    schema = forced_call_schema([WEATHER, NOTHING, TREE], name=None, format=tool_format)
    assert fits(schema, call(tool_format, "get_weather", {"city": "Paris"}))
    assert fits(schema, call(tool_format, "f", {"anything": 1}))
    assert fits(schema, call(tool_format, "plant", {"tree": {"oak": {}}, "again": {"tree": {}}}))
    assert not fits(schema, call(tool_format, "get_weather", {}))
    assert not fits(schema, call(tool_format, "f", [1]))
    assert not fits(schema, call(tool_format, "plant", {"tree": {"oak": 1}}))
    assert not fits(schema, call(tool_format, "plant", {"tree": {}, "again": {}}))
    assert not fits(schema, call(tool_format, "no_such_tool", {}))
    assert not fits(schema, {"name": "f"})
    assert not fits(schema, [call(tool_format, "f", {})])


@pytest.mark.parametrize("tool_format", FORMATS)
def test_a_named_call_is_one_of_that_tool(tool_format: ToolFormat) -> None:
    schema = forced_call_schema([WEATHER, NOTHING], name="f", format=tool_format)
    assert fits(schema, call(tool_format, "f", {}))
    assert not fits(schema, call(tool_format, "get_weather", {"city": "Paris"}))
    assert list(schema["properties"]) == list(call(tool_format, "f", {}))


@pytest.mark.parametrize("tool_format", FORMATS)
def test_what_fits_the_schema_is_read_as_that_call(tool_format: ToolFormat) -> None:
    written = json.dumps(call(tool_format, "get_weather", {"city": "Paris"}))
    assert read(tool_format, written, forced=True) == Answer("", [Call("get_weather", '{"city": "Paris"}')])


def test_a_tool_that_is_not_offered_cannot_be_forced() -> None:
    with pytest.raises(ValueError, match="no such tool"):
        forced_call_schema([WEATHER], name="f", format="hermes")
    with pytest.raises(ValueError, match="no tools"):
        forced_call_schema([], name=None, format="hermes")


def test_a_schema_nested_too_deep_is_refused() -> None:
    nested: dict[str, Any] = {}
    for _ in range(5_000):
        nested = {"not": nested}
    with pytest.raises(ValueError, match="nested too deep"):
        forced_call_schema([{"function": {"name": "f", "parameters": nested}}], name=None, format="hermes")


def test_the_tools_are_left_as_they_were() -> None:
    before = copy.deepcopy(TREE)
    forced_call_schema([TREE], name="plant", format="hermes")
    assert before == TREE


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (r'"<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call>"', "hermes"),
        ("<|start_header_id|> ... <tool_call>", "hermes"),
        (r'"<tool_call>\n<function=example_function_name>\n<parameter=x>"', None),
        ("<tool_call>{function-name}<arg_key>{arg-key-1}</arg_key>", None),
        ("""'<|start_header_id|>' + role ... '{"name": function name, "parameters": dictionary}'""", "llama3"),
        ("'<|start_header_id|>' ... 'Respond in the format [func_name1(params_name1=params_value1), ...]'", "llama3"),
        ('"<|python_tag|>" + tool_call.name + ".call("', "llama3"),
        ("{{ '[TOOL_CALLS] [' }}", "mistral"),
        ("'<|start_header_id|>' + message['role'] + '<|end_header_id|>'", None),
        ('"parameters"', None),
        ("{{ '<|im_start|>' + message['role'] }}", None),
        ("", None),
    ],
)
def test_the_format_is_guessed_from_the_chat_template(template: str, expected: ToolFormat | None) -> None:
    assert tool_format_of(template) == expected
