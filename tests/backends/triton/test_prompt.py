"""What a client says about tools, images and prompts becomes a prompt, or is refused by its field."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from backends.templates import ChatTemplate
from backends.triton.prompt import Prompt, Prompter
from backends.triton.sampling import FieldRefused
from tests.calls import make_request

TEMPLATE = "{{ messages | tojson }}{{ tools }}{{ mood }}"
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}


def prompt_of(operation: Any = "chat", **fields: Any) -> Prompt:
    prompter = Prompter(
        template=ChatTemplate(TEMPLATE, now=lambda: datetime.now(UTC)),
        tool_format="hermes",
        bos_token=None,
        takes_images=True,
        remote_images=False,
    )
    return prompter.prompt(make_request(operation, **fields))


def says(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"properties": schema}
    return schema


@pytest.mark.parametrize(
    ("tool", "why"),
    [
        ({"type": "function"}, "needs a name"),
        ({"type": "function", "function": None}, "needs a name"),
        ({"type": "function", "function": {}}, "needs a name"),
        ({"type": "function", "function": {"name": 5}}, "needs a name"),
        ({"type": "function", "function": {"name": ["f"]}}, "needs a name"),
        ({"type": "function", "function": {"name": ""}}, "needs a name"),
        ({"type": "function", "function": {"name": "f", "parameters": "x"}}, "no JSON schema"),
        ({"type": "custom", "custom": {"name": "f"}}, "functions only"),
        ("f", "functions only"),
    ],
)
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_what_is_no_function_is_refused_as_a_tool(tool: Any, why: str, choice: str) -> None:
    with pytest.raises(FieldRefused, match=why) as refused:
        prompt_of(tools=[tool], tool_choice=choice)
    assert refused.value.field == "tools"


def test_parameters_nested_too_deep_to_demand_a_call_of_are_refused() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": nested(600)}}]
    with pytest.raises(FieldRefused, match="nested too deep") as refused:
        prompt_of(tools=tools, tool_choice="required")
    assert refused.value.field == "tools"


def test_a_call_cannot_be_demanded_where_there_are_no_tools() -> None:
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):
        with pytest.raises(FieldRefused) as refused:
            prompt_of(tool_choice=choice)
        assert refused.value.field == "tool_choice"
    for choice in ("none", "auto", None):
        assert prompt_of(tool_choice=choice).tool_names == frozenset()


@pytest.mark.parametrize(
    "part", [{"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}}, {"type": "file", "file": {}}]
)
def test_content_that_would_be_lost_on_the_way_to_the_model_is_refused(part: dict[str, Any]) -> None:
    with pytest.raises(FieldRefused, match=part["type"]) as refused:
        prompt_of(messages=says({"type": "text", "text": "What is this?"}, part))
    assert refused.value.field == "messages"


def test_a_conversation_with_images_is_otherwise_shown_as_any_other() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"n": 1}'}}
    messages = [
        {"role": "developer", "content": "Be brief.", "name": None},
        *says({"type": "text", "text": "See:"}, IMAGE),
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    prompt = prompt_of(messages=messages)
    assert prompt.text.startswith(
        '[{"role": "system", "content": "Be brief."}, '
        '{"role": "user", "content": [{"type": "text", "text": "See:"}, {"type": "image"}]}, '
    )
    assert '"arguments": {"n": 1}' in prompt.text
    assert len(prompt.image_urls) == 1


def test_a_list_of_one_text_is_a_prompt() -> None:
    assert prompt_of("text_completion", prompt=["Once"]).text == "Once"
    for tokens in ([1, 2], [[1, 2]], []):
        with pytest.raises(FieldRefused) as refused:
            prompt_of("text_completion", prompt=tokens)
        assert refused.value.field == "prompt"


def test_a_variable_that_is_not_the_clients_to_set_is_refused_where_it_set_it() -> None:
    assert prompt_of(chat_template_kwargs={"mood": "glad"}).text.endswith("glad")
    with pytest.raises(FieldRefused, match="messages, tools") as refused:
        prompt_of(chat_template_kwargs={"tools": [], "messages": []})
    assert refused.value.field == "chat_template_kwargs"
