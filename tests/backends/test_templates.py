from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.templates import ChatTemplate, TemplateFailed, template_fault

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
