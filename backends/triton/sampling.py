"""An OpenAI request as parameters of a model: every field is mapped, changes no answer, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec

from backends.chat import ChatRequest
from backends.triton.dialect import Dialect, Parameter, Value

Parameters = dict[Parameter, Value]

CONVERSATION = frozenset(
    {
        "model",
        "messages",
        "prompt",
        "tools",
        "tool_choice",
        "chat_template_kwargs",
        "suffix",
        "echo",
        "reasoning_effort",
    }
)
"""Fields that `prompt` and `backend` read, not this module."""

INERT = frozenset(
    {
        "stream",
        "stream_options",
        "n",  # one choice a call: several are several calls
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prompt_cache_options",
        "parallel_tool_calls",
        "prediction",
        "max_tokens",
        "max_completion_tokens",
    }
)
"""Fields that do not change what is asked of the model, or are read elsewhere."""

_NUMBERS: Mapping[str, tuple[Parameter, float]] = {
    "top_p": ("top_p", 1.0),
    "presence_penalty": ("presence_penalty", 0.0),
    "frequency_penalty": ("frequency_penalty", 0.0),
    "repetition_penalty": ("repetition_penalty", 1.0),
    "length_penalty": ("length_penalty", 1.0),
    "min_tokens": ("min_tokens", 0),
    "top_k": ("top_k", 0),
}
"""Number fields, each with the value that stands for its absence. The last four are extensions that engines share."""

_WHOLE = frozenset({"min_tokens", "top_k"})

_GREEDY_TOP_K = 1

_MOST_WORDS = 64
_LONGEST_WORD_CHARS = 1_000
"""Each response is searched for every stop sequence, on the event loop. OpenAI takes 4."""


class FieldRefused(ValueError):
    """A field asks for what this model cannot do. The message says which and why; `field` is its name."""

    def __init__(self, field: str, why: str, *, code: str = "unsupported_parameter") -> None:
        super().__init__(f"'{field}': {why}")
        self.field = field
        self.code = code


def parameters_of(request: ChatRequest, dialect: Dialect) -> Parameters:
    """What the request's fields ask, besides the prompt, its length and the tools. Raises `FieldRefused`."""
    asked: Parameters = {}
    for field, raw in request.fields.items():
        if field in INERT or field in CONVERSATION:
            continue
        value = msgspec.json.decode(raw)
        if value is not None:
            _read(asked, field, value, request.operation)
    _choose(asked, request.temperature)
    for parameter in asked:
        if not dialect.takes(parameter) and (culprit := _field_of(parameter, request)):
            raise FieldRefused(culprit, "this model's interface has nothing for it")
    return asked


def _read(asked: Parameters, field: str, value: Any, operation: str) -> None:
    if field in _NUMBERS:
        parameter, absent = _NUMBERS[field]
        if field in _WHOLE and value != int(_number(field, value)):
            raise FieldRefused(field, "expected a whole number")
        if (number := _number(field, value)) != absent:
            asked[parameter] = number
    elif reader := _READERS.get(field):
        reader(asked, field, value)
    elif field == "logprobs":
        _log_probs(asked, value, operation)
    elif not _says_nothing(field, value):
        raise FieldRefused(field, "this model has no such parameter; remove it")


def _choose(asked: Parameters, temperature: float | None) -> None:
    """Say how a token is chosen, in words that every release takes alike.

    A temperature of zero is refused by some, and without top_k and top_p TensorRT-LLM always takes the likeliest token,
    whatever the temperature. So the likeliest is asked for as top_k 1, and anything else with a top_p.
    """
    if temperature == 0:
        asked["top_k"] = _GREEDY_TOP_K
        asked.pop("temperature", None)
        asked.pop("top_p", None)
    else:
        asked.setdefault("temperature", 1.0)
        asked.setdefault("top_p", 1.0)


def _temperature(asked: Parameters, field: str, value: Any) -> None:
    asked["temperature"] = _number(field, value)


def _seed(asked: Parameters, field: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise FieldRefused(field, "expected a whole number")
    asked["seed"] = value % 2**63


def _words(parameter: Literal["stop", "bad_words"]) -> Callable[[Parameters, str, Any], None]:
    def read(asked: Parameters, field: str, value: Any) -> None:
        words = [value] if isinstance(value, str) else value
        if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
            raise FieldRefused(field, "expected a text or a list of texts, none of them empty")
        if len(words) > _MOST_WORDS or max(map(len, words), default=0) > _LONGEST_WORD_CHARS:
            most = f"at most {_MOST_WORDS} texts of {_LONGEST_WORD_CHARS:,} characters"
            raise FieldRefused(field, f"expected {most}; send fewer or shorter ones")
        if words:
            asked[parameter] = words

    return read


def _log_probs(asked: Parameters, value: Any, operation: str) -> None:
    """In a chat a flag; of a text completion the number of alternatives, of which there are none here."""
    if operation == "chat":
        if not isinstance(value, bool):
            raise FieldRefused("logprobs", "expected true or false")
        if value:
            asked["log_probs"] = True
    elif value:
        raise FieldRefused("logprobs", "this model gives no alternatives to its tokens; 0 asks for the tokens' own")
    else:
        asked["log_probs"] = True


def _response_format(asked: Parameters, field: str, value: Any) -> None:
    match value:
        case {"type": "text"}:
            return
        case {"type": "json_object"}:
            asked["guide_type"] = "json"
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            guide_by_schema(asked, schema)
        case _:
            raise FieldRefused(field, "expected type text, json_object, or json_schema with a schema")


def guide_by_schema(asked: Parameters, schema: Mapping[str, Any]) -> None:
    """Bind the answer to a JSON schema."""
    asked["guide_type"] = "json_schema"
    asked["guide"] = msgspec.json.encode(schema).decode()


def _guided_json(asked: Parameters, field: str, value: Any) -> None:
    try:
        schema = msgspec.json.decode(value) if isinstance(value, str) else value
    except msgspec.DecodeError:
        schema = None
    if not isinstance(schema, dict):
        raise FieldRefused(field, "expected a JSON schema")
    guide_by_schema(asked, schema)


def _guide(guide_type: str) -> Callable[[Parameters, str, Any], None]:
    def read(asked: Parameters, field: str, value: Any) -> None:
        if not isinstance(value, str):
            raise FieldRefused(field, "expected a text")
        asked["guide_type"], asked["guide"] = guide_type, value

    return read


_READERS: Mapping[str, Callable[[Parameters, str, Any], None]] = {
    "temperature": _temperature,
    "seed": _seed,
    "stop": _words("stop"),
    "bad_words": _words("bad_words"),
    "response_format": _response_format,
    "guided_json": _guided_json,
    "guided_regex": _guide("regex"),
    "guided_grammar": _guide("ebnf_grammar"),
}
"""Fields with a form of their own. `bad_words` is TensorRT-LLM's extension, `guided_…` are vLLM's."""


def _says_nothing(field: str, value: Any) -> bool:
    """Whether a field that has no parameter here asks for what happens anyway."""
    harmless: Mapping[str, tuple[Any, ...]] = {
        "logit_bias": ({},),
        "top_logprobs": (0,),
        "modalities": (["text"],),
        "best_of": (1,),
        "use_beam_search": (False,),
        "ignore_eos": (False,),
        "functions": ([],),
        "function_call": ("none", "auto"),
    }
    return any(value == nothing and type(value) is type(nothing) for nothing in harmless.get(field, ()))


def _number(field: str, value: Any) -> float | int:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FieldRefused(field, "expected a number")
    return value


def _field_of(parameter: Parameter, request: ChatRequest) -> str | None:
    """The client's field behind a parameter that the model does not take; None where it can do without.

    Stop sequences are kept here as well (the answer is cut at them and the model is made to stop), so an engine without
    them loses nothing. A greedy choice cannot be had otherwise.
    """
    if parameter == "stop" or (parameter in ("temperature", "top_p") and parameter not in request.fields):
        return None
    fields = {"guide_type": "response_format", "guide": "response_format", "log_probs": "logprobs"}
    if parameter == "top_k" and "top_k" not in request.fields:
        return "temperature"
    field = fields.get(parameter, parameter)
    if field == "response_format" and field not in request.fields:
        return next(name for name in request.fields if name.startswith("guided_"))
    return field
