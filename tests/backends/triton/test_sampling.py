"""Every field of an OpenAI request is mapped, changes no answer, or is refused by its name."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from backends.chat import ChatRequest
from backends.triton.dialect import Dialect, read_dialect
from backends.triton.sampling import CONVERSATION, INERT, FieldRefused, Parameters, parameters_of
from tests.calls import make_request

EVERYTHING = [
    "max_tokens",
    "min_tokens",
    "stop_words",
    "bad_words",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "length_penalty",
    "guided_decoding_guide_type",
    "guided_decoding_guide",
    "return_log_probs",
]
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}}


def dialect(*without: str) -> Dialect:
    names = [name for name in EVERYTHING if name not in without]
    return read_dialect(
        model="m",
        inputs={"text_input": "BYTES", **dict.fromkeys(names, "INT32")},
        outputs=frozenset({"text_output"}),
        max_batch_size=1,
        decoupled=True,
        parameters={},
    )


def asked(operation: Any = "chat", without: tuple[str, ...] = (), **fields: Any) -> Parameters:
    return parameters_of(make_request(operation, **fields), dialect(*without))


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        ({"temperature": 0.7}, {"temperature": 0.7, "top_p": 1.0}),
        ({"top_p": 0.9}, {"temperature": 1.0, "top_p": 0.9}),
        ({"temperature": 0.7, "top_k": 40}, {"temperature": 0.7, "top_p": 1.0, "top_k": 40}),
        ({"seed": 7}, {"seed": 7}),
        ({"seed": -1}, {"seed": 2**63 - 1}),
        ({"stop": "x"}, {"stop": ["x"]}),
        ({"stop": ["x", "y"]}, {"stop": ["x", "y"]}),
        ({"bad_words": ["x"]}, {"bad_words": ["x"]}),
        ({"presence_penalty": 0.5, "frequency_penalty": -0.5}, {"presence_penalty": 0.5, "frequency_penalty": -0.5}),
        ({"repetition_penalty": 1.1, "length_penalty": 2}, {"repetition_penalty": 1.1, "length_penalty": 2}),
        ({"min_tokens": 3}, {"min_tokens": 3}),
        ({"logprobs": True}, {"log_probs": True}),
        ({"response_format": {"type": "json_object"}}, {"guide_type": "json"}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}},
            {"guide_type": "json_schema", "guide": '{"type":"object"}'},
        ),
        ({"guided_json": {"type": "object"}}, {"guide_type": "json_schema", "guide": '{"type":"object"}'}),
        ({"guided_regex": "a+"}, {"guide_type": "regex", "guide": "a+"}),
        ({"guided_grammar": "root ::= x"}, {"guide_type": "ebnf_grammar", "guide": "root ::= x"}),
    ],
)
def test_a_field_becomes_the_models_own_parameter(fields: dict[str, Any], parameters: dict[str, Any]) -> None:
    expected = {"temperature": 1.0, "top_p": 1.0, **parameters}
    assert asked(**fields) == expected


def test_temperature_zero_is_the_likeliest_token_whatever_else_is_asked() -> None:
    assert asked(temperature=0) == {"top_k": 1}
    assert asked(temperature=0.0, top_p=0.5, top_k=50) == {"top_k": 1}


def test_of_a_text_completion_logprobs_0_are_the_tokens_own() -> None:
    assert asked("text_completion", logprobs=0)["log_probs"] is True
    with pytest.raises(FieldRefused, match="'logprobs': this model gives no alternatives"):
        asked("text_completion", logprobs=2)


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "prompt_cache_key": "k"},
        {"logit_bias": {}, "top_logprobs": 0, "modalities": ["text"], "best_of": 1, "logprobs": False},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1, "min_tokens": 0, "top_k": 0},
        {"response_format": {"type": "text"}, "seed": None, "x_unknown": None, "stop": []},
        {"parallel_tool_calls": False, "max_tokens": 3, "max_completion_tokens": 3, "stream": True},
    ],
)
def test_what_changes_no_answer_asks_for_nothing(fields: dict[str, Any]) -> None:
    assert asked(**fields) == {"temperature": 1.0, "top_p": 1.0}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"logit_bias": {"50": 1}}, "logit_bias"),
        ({"top_logprobs": 2, "logprobs": True}, "top_logprobs"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"verbosity": "low"}, "verbosity"),
        ({"x_unknown": 1}, "x_unknown"),
        ({"seed": "a"}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": 3}, "stop"),
        ({"temperature": "hot"}, "temperature"),
        ({"response_format": {"type": "picture"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, "response_format"),
        ({"best_of": 1.0}, "best_of"),
        ({"top_k": 0.5}, "top_k"),
        ({"min_tokens": 1.5}, "min_tokens"),
        ({"guided_json": "no JSON"}, "guided_json"),
        ({"guided_json": 5}, "guided_json"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"stop": "x" * 1_001}, "stop"),
        ({"bad_words": ["x"] * 65}, "bad_words"),
    ],
)
def test_what_the_model_cannot_do_is_refused_by_its_name(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(FieldRefused, match=f"'{field}': ") as refused:
        asked(**fields)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("without", "fields", "field"),
    [
        ("seed", {"seed": 1}, "seed"),
        ("top_p", {"top_p": 0.5}, "top_p"),
        ("presence_penalty", {"presence_penalty": 1}, "presence_penalty"),
        ("guided_decoding_guide", {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
         "response_format"),
        ("guided_decoding_guide_type", {"guided_regex": "a"}, "guided_regex"),
        ("return_log_probs", {"logprobs": True}, "logprobs"),
        ("top_k", {"temperature": 0}, "temperature"),
        ("top_k", {"top_k": 5}, "top_k"),
        ("bad_words", {"bad_words": ["x"]}, "bad_words"),
    ],
)  # fmt: skip
def test_what_this_models_interface_has_nothing_for_is_refused(
    without: str, fields: dict[str, Any], field: str
) -> None:
    with pytest.raises(FieldRefused) as refused:
        asked(without=(without,), **fields)
    assert refused.value.field == field


def test_an_interface_without_stop_words_or_defaults_loses_nothing() -> None:
    """The answer is cut at stop sequences here as well, and what was not asked need not be said."""
    assert asked(without=("stop_words", "temperature", "top_p"), stop="x")["stop"] == ["x"]


OPENAI = [
    "audio",
    "frequency_penalty",
    "function_call",
    "functions",
    "logit_bias",
    "logprobs",
    "max_completion_tokens",
    "max_tokens",
    "messages",
    "metadata",
    "modalities",
    "model",
    "n",
    "parallel_tool_calls",
    "prediction",
    "presence_penalty",
    "prompt_cache_key",
    "reasoning_effort",
    "response_format",
    "safety_identifier",
    "seed",
    "service_tier",
    "stop",
    "store",
    "stream",
    "stream_options",
    "temperature",
    "tool_choice",
    "tools",
    "top_logprobs",
    "top_p",
    "user",
    "verbosity",
    "web_search_options",
]


@pytest.mark.parametrize("field", OPENAI)
def test_no_field_of_openais_api_is_silently_dropped(field: str) -> None:
    """An odd value of it is either of a field that is read elsewhere or changes nothing, or is refused by name."""
    if field in CONVERSATION or field in INERT:
        return
    odd = ChatRequest(operation="chat", model="m", fields={field: msgspec.Raw(b'{"odd": [1]}')})
    with pytest.raises(FieldRefused) as refused:
        parameters_of(odd, dialect())
    assert refused.value.field == field
