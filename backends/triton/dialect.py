"""Which tensors a model takes and gives. TensorRT-LLM's interface has changed twice; metadata tells which it is.

- *current*: the ensemble and BLS models of TensorRT-LLM since 0.17 (`seed`, `min_tokens`, INT32).
- *old*: the same before that (`random_seed`, `min_length`, UINT32), without token counts.
- *llmapi*: the LLM-API model (`sampling_param_*`), without a batch dimension; its text is always the whole so far.

After the `config.pbtxt` files of NVIDIA/TensorRT-LLM `triton_backend/all_models/{inflight_batcher_llm,llmapi}` and of
triton-inference-server/tensorrtllm_backend.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import msgspec

from backends.catalog import Capability

Kind = Literal["current", "old", "llmapi"]

Value = bool | int | float | str | Sequence[str]
"""What a tensor of ours may hold."""

Parameter = Literal[
    "prompt",
    "max_tokens",
    "min_tokens",
    "stop",
    "bad_words",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "length_penalty",
    "guide_type",
    "guide",
    "image_urls",
    "draft_tokens",
    "stream",
    "exclude_prompt",
    "log_probs",
    "count_prompt",
    "count_completion",
    "finish_reason",
]
"""Our word for what a request asks, whatever the tensor is called."""

_CURRENT: dict[Parameter, str] = {
    "prompt": "text_input",
    "max_tokens": "max_tokens",
    "min_tokens": "min_tokens",
    "stop": "stop_words",
    "bad_words": "bad_words",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "seed": "seed",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "repetition_penalty": "repetition_penalty",
    "length_penalty": "length_penalty",
    "guide_type": "guided_decoding_guide_type",
    "guide": "guided_decoding_guide",
    "image_urls": "image_url_input",
    "draft_tokens": "num_draft_tokens",
    "stream": "stream",
    "exclude_prompt": "exclude_input_in_output",
    "log_probs": "return_log_probs",
    "count_prompt": "return_num_input_tokens",
    "count_completion": "return_num_output_tokens",
}

_NAMES: dict[Kind, dict[Parameter, str]] = {
    "current": _CURRENT,
    "old": {**_CURRENT, "seed": "random_seed", "min_tokens": "min_length"},
    "llmapi": {
        "prompt": "text_input",
        "max_tokens": "sampling_param_max_tokens",
        "stop": "sampling_param_stop",
        "temperature": "sampling_param_temperature",
        "top_p": "sampling_param_top_p",
        "top_k": "sampling_param_top_k",
        "seed": "sampling_param_seed",
        "presence_penalty": "sampling_param_presence_penalty",
        "frequency_penalty": "sampling_param_frequency_penalty",
        "image_urls": "image_url",
        "stream": "streaming",
        "exclude_prompt": "sampling_param_exclude_input_from_output",
        "finish_reason": "return_finish_reason",
    },
}

_INTEGERS = {
    "INT8": ("<b", -(2**7), 2**7 - 1),
    "INT16": ("<h", -(2**15), 2**15 - 1),
    "INT32": ("<i", -(2**31), 2**31 - 1),
    "INT64": ("<q", -(2**63), 2**63 - 1),
    "UINT8": ("<B", 0, 2**8 - 1),
    "UINT16": ("<H", 0, 2**16 - 1),
    "UINT32": ("<I", 0, 2**32 - 1),
    "UINT64": ("<Q", 0, 2**64 - 1),
}
"""Per Triton datatype: how a value is packed, and its range."""

_FLOATS = {
    "FP16": ("<e", 65_504.0),
    "FP32": ("<f", (2 - 2**-23) * 2.0**127),
    "FP64": ("<d", sys.float_info.max),
}
"""Per Triton datatype: how a value is packed, and the largest."""


class IncompatibleModel(ValueError):
    """The model is no text generator that we know how to ask; the message says what is missing."""


class Tensor(msgspec.Struct, frozen=True):
    """One input, ready for the wire."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    content: bytes
    """Little-endian values, or texts of 4 bytes of length and UTF-8 each."""


class Dialect(msgspec.Struct, frozen=True, kw_only=True):
    """How one model, as it is loaded now, is asked and understood."""

    kind: Kind
    inputs: Mapping[str, str]
    """Datatype by name."""
    single: frozenset[str] = frozenset()
    """Those that hold one value."""
    outputs: frozenset[str]
    batched: bool
    """Whether shapes begin with a batch dimension of 1."""
    decoupled: bool
    """Whether one request can have several responses: without, a stream is not to be had."""
    cumulative: bool
    """Whether each response repeats the text so far, instead of going on from it."""

    def takes(self, parameter: Parameter) -> bool:
        return self._name(parameter) in self.inputs

    def takes_one(self, parameter: Parameter) -> bool:
        """Whether several values cannot be said."""
        return self._name(parameter) in self.single

    def tensor(self, parameter: Parameter, value: Value) -> Tensor:
        """The tensor that says `value`; a number outside its datatype's range becomes the nearest in it."""
        name = self._name(parameter)
        if name is None or name not in self.inputs:
            raise LookupError(f"this model has no tensor for {parameter}")
        datatype = self.inputs[name]
        values: Sequence[bool | int | float | str]
        values = (value,) if isinstance(value, bool | int | float | str) else value
        shape = (1, len(values)) if self.batched else (len(values),)
        return Tensor(name, datatype, shape, b"".join(map(_packer(name, datatype), values)))

    def image_url(self, url: str) -> str:
        """An image's URL as the model understands it.

        The preprocessing model of TensorRT-LLM takes a data URL for one only where it says JPEG, and would ask the
        network for any other; what the image is, it reads from the bytes.
        """
        if self.kind == "llmapi" or not url.startswith("data:"):
            return url
        return f"data:image/jpeg;base64,{url.partition(',')[2]}"

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What the tensors allow. Tools are a matter of the chat template, which is not the model's to say."""
        able: dict[Capability, bool] = {
            "json_schema": self.takes("guide_type") and self.takes("guide"),
            "logprobs": self.takes("log_probs") and "output_log_probs" in self.outputs,
            "vision": self.takes("image_urls"),
        }
        return frozenset(name for name, is_able in able.items() if is_able)

    def _name(self, parameter: Parameter) -> str | None:
        return _NAMES[self.kind].get(parameter)


def read_dialect(
    *,
    model: str,
    inputs: Mapping[str, str],
    outputs: frozenset[str],
    max_batch_size: int,
    decoupled: bool,
    parameters: Mapping[str, str],
    single: frozenset[str] = frozenset(),
) -> Dialect:
    """The dialect that a model's metadata and configuration show. Raises `IncompatibleModel`.

    `parameters` are those of its `config.pbtxt`; `accumulate_tokens` of the BLS model says what its text is.
    """
    for name, tensors, side in (("text_input", inputs, "takes"), ("text_output", outputs, "gives")):
        if name not in tensors:
            there = ", ".join(sorted(tensors)) or "nothing"
            raise IncompatibleModel(f"model '{model}' has no {name}: it {side} {there}")
    if inputs["text_input"] != "BYTES":
        raise IncompatibleModel(f"model '{model}' takes a text_input of {inputs['text_input']}, not of text")
    kind = _kind(inputs)
    for name in _NAMES[kind].values():
        if name in inputs and not _is_known(inputs[name]):
            raise IncompatibleModel(f"model '{model}' takes {name} as {inputs[name]}, which is not supported")
    return Dialect(
        kind=kind,
        inputs=dict(inputs),
        single=single,
        outputs=outputs,
        batched=max_batch_size > 0,
        decoupled=decoupled,
        cumulative=kind == "llmapi" or parameters.get("accumulate_tokens", "").lower() in ("1", "true"),
    )


def _kind(inputs: Mapping[str, str]) -> Kind:
    if "sampling_param_max_tokens" in inputs or "streaming" in inputs:
        return "llmapi"
    if {"random_seed", "min_length"} & inputs.keys() or inputs.get("max_tokens") == "UINT32":
        return "old"
    return "current"


def _is_known(datatype: str) -> bool:
    return datatype in ("BYTES", "BOOL") or datatype in _INTEGERS or datatype in _FLOATS


def _packer(name: str, datatype: str) -> Callable[[bool | int | float | str], bytes]:
    if datatype == "BYTES":
        return _pack_text
    if datatype == "BOOL":
        return lambda value: b"\1" if value else b"\0"
    if datatype in _FLOATS:
        form, largest = _FLOATS[datatype]
        # Clamped before it is a float: JSON has whole numbers that none can hold.
        return lambda value: struct.pack(form, float(min(max(_number(value), -largest), largest)))
    if datatype in _INTEGERS:
        form, least, most = _INTEGERS[datatype]
        return lambda value: struct.pack(form, min(max(int(value), least), most))
    raise IncompatibleModel(f"tensor {name} is of {datatype}, which is not supported")


def _number(value: bool | float | str) -> float:
    return float(value) if isinstance(value, str) else value


def _pack_text(value: bool | float | str) -> bytes:
    text = str(value).encode()
    return len(text).to_bytes(4, "little") + text
