from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.templates import ChatTemplate, TemplateFailed, template_fault, template_messages
from tests.calls import make_request

FIXTURES = Path(__file__).parents[1] / "fixtures"

CHATML = """
{%- for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""


def template(source: str, **options: Any) -> ChatTemplate:
    return ChatTemplate(source, now=lambda: datetime(2024, 5, 6, tzinfo=UTC), **options)


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def test_a_conversation_is_rendered_up_to_where_the_model_speaks() -> None:
    conversation = [{"role": "system", "content": "Be brief."}, *user("Hi")]
    assert template(CHATML).render(conversation) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@given(st.text())
def test_what_a_client_writes_is_text_and_never_template(text: str) -> None:
    assert template("{{ messages[0].content }}").render(user(text)) == text
    assert template("{{ messages[0].content }}").render(user("{{ 7 * 7 }}")) == "{{ 7 * 7 }}"


def test_what_tokenizers_give_a_template_is_there() -> None:
    source = "{{ bos_token }}{{ strftime_now('%Y-%m-%d') }}{{ messages[0] | tojson }}{{ eos_token }}"
    rendered = template(source, bos_token="<s>", eos_token="</s>").render(user("<ü & 'q'>"))
    assert rendered == """<s>2024-05-06{"role": "user", "content": "<ü & 'q'>"}</s>"""


def test_training_marks_and_loop_controls_are_understood() -> None:
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    assert template(source).render([*user("a"), *user("b")]) == "a"


def test_a_template_can_refuse_a_conversation_in_its_own_words() -> None:
    with pytest.raises(TemplateFailed, match=r"^roles must alternate$"):
        template("{{ raise_exception('roles must alternate') }}").render(user("x"))


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.nothing.at_all }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10000000) %}x{% endfor %}",
        "{% include 'x' %}",
        "{{ messages[0].content.format.__globals__ }}{{ 1 / 0 }}",
        "{{ ('{0.__class__.__mro__[1].__subclasses__}' | attr('format'))(messages) }}{{ 1 / 0 }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ cycler.__init__.__globals__.os.popen('true') }}",
        "{{ self.__init__.__globals__ }}{{ dict.mro()[-1].__subclasses__() }}",
        "{% set ns = namespace() %}{% set ns.x = messages.clear() %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    ],
)
def test_a_template_that_breaks_or_reaches_out_fails_and_nothing_else(source: str) -> None:
    with pytest.raises(TemplateFailed):
        template(source).render(user("x"))


def test_a_prompt_has_a_largest_size() -> None:
    assert template("{{ messages[0].content }}", max_prompt_bytes=4).render(user("üü")) == "üü"
    with pytest.raises(TemplateFailed, match="4 bytes"):
        template("{{ messages[0].content }}", max_prompt_bytes=4).render(user("üüx"))
    with pytest.raises(TemplateFailed, match="1000 bytes"):
        template("{% for i in range(99999) %}x{% endfor %}", max_prompt_bytes=1000).render(user("x"))


def test_a_source_that_is_no_template_is_refused_at_once_with_its_line() -> None:
    with pytest.raises(ValueError, match="line 2"):
        template("{# fine #}\n{% for %}")


@pytest.mark.parametrize("source", ["{% break %}", "{{ " + "(" * 1500 + "1" + ")" * 1500 + " }}", "{{ x | nothing }}"])
def test_a_source_that_no_compiler_takes_is_no_template_either(source: str) -> None:
    with pytest.raises(ValueError):
        template(source)
    assert template_fault(source)


def test_a_template_has_no_fault() -> None:
    assert template_fault(CHATML) is None


def reference_prompts() -> Iterator[Any]:
    """What Hugging Face's own rendering made of each conversation, per family of models: see fixtures/README.md."""
    conversations = {each["name"]: each for each in json.loads((FIXTURES / "conversations.json").read_text())}
    for path in sorted((FIXTURES / "prompts").glob("*.json")):
        for name, reference in json.loads(path.read_text())["prompts"].items():
            yield pytest.param(path.stem, conversations[name], reference, id=f"{path.stem}: {name}")


@pytest.mark.parametrize(("family", "conversation", "reference"), list(reference_prompts()))
def test_prompts_are_those_of_the_reference(family: str, conversation: Any, reference: dict[str, str]) -> None:
    config = json.loads((FIXTURES / "model_folders" / family / "tokenizer_config.json").read_text())
    chat = template(config["chat_template"], bos_token=config["bos_token"] or "", eos_token=config["eos_token"])
    messages = template_messages(make_request(messages=conversation["messages"]))
    given = {name: conversation[name] for name in ("tools", "extra", "add_generation_prompt") if name in conversation}
    if "prompt" in reference:
        assert chat.render(messages, **given) == reference["prompt"]
    else:
        with pytest.raises(TemplateFailed) as refused:
            chat.render(messages, **given)
        assert reference["refused"] in str(refused.value)


def test_every_family_is_held_to_the_reference() -> None:
    families = {path.name for path in (FIXTURES / "model_folders").iterdir() if path.is_dir()}
    assert families == {path.stem for path in (FIXTURES / "prompts").glob("*.json")}
    assert len(families) == 5


TOOLS = [{"type": "function", "function": {"name": "ping"}}]


def test_a_model_can_have_a_template_of_its_own_for_tools() -> None:
    both = template("plain", tool_source="{{ tools[0].function.name }}")
    assert both.takes_tools
    assert [both.render(user("x"), tools=tools) for tools in (None, [], TOOLS)] == ["plain", "plain", "ping"]


def test_tools_that_a_template_would_drop_are_refused() -> None:
    plain = template(CHATML)
    assert not plain.takes_tools
    assert plain.render(user("x"), tools=[])
    with pytest.raises(TemplateFailed, match="no place for tools"):
        plain.render(user("x"), tools=TOOLS)


def test_a_template_finds_tools_and_documents_undefined_never_but_none() -> None:
    for tools in (None, []):
        assert template("{{ tools }} {{ documents }}").render(user("x"), tools=tools) == "None None"
    assert template("{{ documents[0].title }}").render(user("x"), documents=[{"title": "A"}]) == "A"


def test_the_client_can_set_what_the_template_asks_beyond_the_messages() -> None:
    source = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    assert template(source).render(user("x"), extra={"enable_thinking": False}) == "<think></think>"
    assert template(source).render(user("x")) == ""
    assert template("{{ self_ }}{{ loop }}").render(user("x"), extra={"self": 1, "self_": "a", "loop": "b"}) == "ab"


@pytest.mark.parametrize(
    "name",
    [
        "messages",
        "tools",
        "documents",
        "bos_token",
        "eos_token",
        "unk_token",
        "add_generation_prompt",
        "raise_exception",
        "strftime_now",
        "namespace",
    ],
)
def test_the_client_cannot_set_what_is_ours(name: str) -> None:
    chat = template("{{ unk_token }}", special_tokens={"unk_token": "<unk>"})
    assert chat.render(user("x")) == "<unk>"
    with pytest.raises(TemplateFailed, match=f"^chat_template_kwargs cannot set {name}$"):
        chat.render(user("x"), extra={name: "x", "fine": 1})


def test_json_is_written_with_the_options_that_the_reference_has() -> None:
    source = "{{ messages[0] | tojson(sort_keys=true, separators=(',', ':')) }}{{ 'ü' | tojson(true) }}"
    assert template(source).render(user("x")) == '{"content":"x","role":"user"}"\\u00fc"'
    assert template("{{ [1] | tojson(indent=2) }}").render(user("x")) == "[\n  1\n]"


def normalised(**fields: Any) -> dict[str, Any]:
    [message] = template_messages(make_request(messages=[{"role": "assistant", **fields}]))
    return message


def test_fields_that_nobody_knows_stay_and_null_ones_go() -> None:
    assert normalised(content=None, name="n", x={"y": [None]}, refusal=None, tool_calls=[]) == {
        "role": "assistant",
        "name": "n",
        "x": {"y": [None]},
    }


def test_content_in_parts_becomes_one_text() -> None:
    parts = [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": "x"}},
        {"type": "text", "text": "b"},
    ]
    assert normalised(content=parts)["content"] == "a\nb"


@pytest.mark.parametrize(
    ("written", "object_"),
    [
        ('{"a": [1, 2.5, null]}', {"a": [1, 2.5, None]}),
        ('{"a": 1000000000000000000000000}', {"a": 10**24}),
        ("", {}),
        (" ", {}),
        ('{"a": ', '{"a": '),
        ("[1]", "[1]"),
        ("[" * 100_000, "[" * 100_000),
        ({"a": 1}, {"a": 1}),
    ],
)
def test_arguments_become_the_object_they_are_where_they_are_one(written: Any, object_: Any) -> None:
    call = {"id": "1", "type": "function", "x": 1, "function": {"name": "f", "arguments": written, "y": 2}}
    [told] = normalised(tool_calls=[call])["tool_calls"]
    assert told == {**call, "function": {"name": "f", "arguments": object_, "y": 2}}


def test_a_tool_call_of_another_kind_stays_as_it_is() -> None:
    calls = [{"type": "custom", "custom": {"input": "x"}}, {"function": {"name": "f"}}, "nonsense"]
    assert normalised(tool_calls=calls)["tool_calls"] == calls


def test_a_developer_is_the_system_to_templates() -> None:
    assert normalised(role="developer", content="x") == {"role": "system", "content": "x"}


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_found_by_whatever_name_it_came(name: str) -> None:
    message = normalised(content="x", **{name: "because"})
    assert (message["reasoning_content"], message["thinking"], message[name]) == ("because",) * 3
