"""Which tensors a model takes, as its metadata shows."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.triton.dialect import Dialect, IncompatibleModel, read_dialect

CURRENT = {
    "text_input": "BYTES",
    "max_tokens": "INT32",
    "stop_words": "BYTES",
    "seed": "UINT64",
    "temperature": "FP32",
    "stream": "BOOL",
    "guided_decoding_guide_type": "BYTES",
    "guided_decoding_guide": "BYTES",
    "return_log_probs": "BOOL",
}
OLD = {"text_input": "BYTES", "max_tokens": "UINT32", "random_seed": "UINT64", "min_length": "UINT32"}
LLMAPI = {
    "text_input": "BYTES",
    "streaming": "BOOL",
    "sampling_param_max_tokens": "INT32",
    "sampling_param_seed": "UINT64",
    "image_url": "BYTES",
}


def dialect_of(
    inputs: Mapping[str, str],
    outputs: frozenset[str] = frozenset({"text_output"}),
    max_batch_size: int = 8,
    **parameters: str,
) -> Dialect:
    return read_dialect(
        model="m",
        inputs=inputs,
        outputs=outputs,
        max_batch_size=max_batch_size,
        decoupled=True,
        parameters=parameters,
    )


@pytest.mark.parametrize(("inputs", "kind"), [(CURRENT, "current"), (OLD, "old"), (LLMAPI, "llmapi")])
def test_each_generation_of_tensorrt_llm_is_known_by_its_tensors(inputs: dict[str, str], kind: str) -> None:
    assert dialect_of(inputs).kind == kind


def test_an_image_inside_a_request_is_labelled_as_the_engine_knows_it() -> None:
    png = "data:image/png;base64,iVBORw0KGgo="
    assert dialect_of(CURRENT).image_url(png) == "data:image/jpeg;base64,iVBORw0KGgo="
    assert dialect_of(OLD).image_url("https://images.test/a.png") == "https://images.test/a.png"
    assert dialect_of(LLMAPI).image_url(png) == png


def test_the_same_wish_has_another_name_in_each() -> None:
    assert [dialect_of(inputs).tensor("seed", 1).name for inputs in (CURRENT, OLD, LLMAPI)] == [
        "seed",
        "random_seed",
        "sampling_param_seed",
    ]
    assert dialect_of(OLD).tensor("min_tokens", 3).name == "min_length"


def test_shapes_have_a_batch_dimension_only_where_the_model_batches() -> None:
    assert dialect_of(CURRENT).tensor("stop", ["a", "b"]).shape == (1, 2)
    assert dialect_of(LLMAPI, max_batch_size=0).tensor("prompt", ("x",)).shape == (1,)


@pytest.mark.parametrize(
    ("inputs", "parameter", "value", "content"),
    [
        (CURRENT, "max_tokens", 7, struct.pack("<i", 7)),
        (OLD, "max_tokens", 7, struct.pack("<I", 7)),
        (CURRENT, "seed", 2**63 + 1, struct.pack("<Q", 2**63 + 1)),
        (CURRENT, "temperature", 0.5, struct.pack("<f", 0.5)),
        (CURRENT, "stream", True, b"\1"),
        (CURRENT, "prompt", ("hé",), b"\3\0\0\0h\xc3\xa9"),
        (CURRENT, "stop", ["a", "bc"], b"\1\0\0\0a\2\0\0\0bc"),
    ],
)
def test_a_value_is_packed_as_its_datatype_is(
    inputs: dict[str, str], parameter: Any, value: Any, content: bytes
) -> None:
    assert dialect_of(inputs).tensor(parameter, value).content == content


@given(st.integers())
def test_an_integer_beyond_its_datatype_becomes_the_nearest_in_it(value: int) -> None:
    packed = dialect_of(OLD).tensor("max_tokens", value).content
    assert struct.unpack("<I", packed)[0] == min(max(value, 0), 2**32 - 1)


@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_number_beyond_its_datatype_becomes_the_nearest_in_it(datatype: str, sign: int) -> None:
    """JSON has whole numbers that no float can hold."""
    form = {"FP16": "<e", "FP32": "<f", "FP64": "<d"}[datatype]
    dialect = dialect_of({**CURRENT, "temperature": datatype})
    [packed] = struct.unpack(form, dialect.tensor("temperature", sign * 10**400).content)
    assert math.isfinite(packed)
    assert packed == sign * {"FP16": 65504.0, "FP32": 3.4028234663852886e38, "FP64": 1.7976931348623157e308}[datatype]


def test_a_model_that_is_no_text_generator_is_refused_with_what_it_takes() -> None:
    with pytest.raises(IncompatibleModel, match="'m' has no text_input: it takes INPUT0"):
        dialect_of({"INPUT0": "FP32"})
    with pytest.raises(IncompatibleModel, match="has no text_output: it gives OUTPUT0"):
        dialect_of(CURRENT, frozenset({"OUTPUT0"}))
    with pytest.raises(IncompatibleModel, match="text_input of INT32"):
        dialect_of({"text_input": "INT32"})
    with pytest.raises(IncompatibleModel, match="temperature as BF16"):
        dialect_of({**CURRENT, "temperature": "BF16"})


def test_texts_are_whole_so_far_where_the_model_says_so() -> None:
    assert not dialect_of(CURRENT).cumulative
    assert dialect_of(CURRENT, accumulate_tokens="true").cumulative
    assert dialect_of(CURRENT, accumulate_tokens="${accumulate_tokens}").cumulative is False
    assert dialect_of(LLMAPI).cumulative


def test_what_a_model_can_do_follows_from_its_tensors() -> None:
    assert dialect_of(CURRENT).capabilities == {"json_schema"}
    with_log_probs = dialect_of(CURRENT, frozenset({"text_output", "output_log_probs"}))
    assert with_log_probs.capabilities == {"json_schema", "logprobs"}
    assert dialect_of(OLD).capabilities == set()
    assert dialect_of(LLMAPI).capabilities == {"vision"}
