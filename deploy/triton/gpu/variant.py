"""A variant file: one model, how its weights are stored, on which GPUs, for whom. Read strictly, refused by name.

Every figure that a rendered file shows is written there or computed from it. Units are in the names.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

Format = Literal["16bit", "fp8", "int8_sq", "int4_awq", "int4_gptq"]
Capability = Literal["tools", "json_schema", "logprobs", "vision"]


class BadVariant(Exception):
    """A variant file that can not be rendered; the message names the file and the key."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """The weights as they are published."""

    repository: str
    licence: str
    # Where TensorRT-LLM keeps the script that converts them: examples/models/core/<family>.
    family: Literal["llama", "qwen"]
    parameters_billion: float
    vocabulary: int
    hidden: int
    tied_embeddings: bool
    layers: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, kw_only=True)
class Weights:
    format: Format
    # What was shown to the model to find the scales; none where nothing had to be found.
    calibration: str = "none"


@dataclass(frozen=True, kw_only=True)
class Limits:
    # Prompt and answer of one request together.
    sequence_tokens: int
    output_tokens: int
    # Requests in one step of the engine, and tokens in one step: a longer prompt is taken in chunks of this size.
    batch: int
    step_tokens: int
    # A fixed size for the KV cache; without it, 90 % of what the weights leave.
    kv_cache_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Hardware:
    gpu: str
    # What nvidia-smi shows as usable, not what the box says.
    gpu_memory_gib: float
    tensor_parallel: int = 1
    pipeline_parallel: int = 1

    @property
    def gpus(self) -> int:
        """The world size: one process per GPU."""
        return self.tensor_parallel * self.pipeline_parallel


@dataclass(frozen=True, kw_only=True)
class Cost:
    usd_per_gpu_hour: float
    # Sustained over the hour that is paid for, idle minutes included. An assumption until it is measured.
    output_tokens_per_second: int
    # The GPU time of a prompt token as a share of that of an output token.
    prompt_token_share: float

    def usd_per_1m(self, gpus: int) -> tuple[float, float]:
        """(input, output) prices: what an hour costs over what an hour makes."""
        output = gpus * self.usd_per_gpu_hour / (self.output_tokens_per_second * 3600) * 1_000_000
        return output * self.prompt_token_share, output


@dataclass(frozen=True, kw_only=True)
class Chat:
    adds_bos: bool
    tool_format: Literal["hermes", "llama3", "mistral", "none"]
    stop: tuple[str, ...] = ()
    # For a base model, which brings none.
    template: str | None = None


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A small model that proposes tokens for the large one to check."""

    base: Base
    weights: Weights
    tokens: int
    method: Literal["draft_target", "eagle3"]


@dataclass(frozen=True, kw_only=True)
class Card:
    summary: str
    # From which model, by which method: quantised, pruned, distilled.
    made_from: str
    quality: str
    source: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Variant:
    # `engine`: TensorRT engines behind the BLS model. `llmapi`: TensorRT-LLM's PyTorch backend, nothing to build.
    runtime: Literal["engine", "llmapi"]
    base: Base
    weights: Weights
    kv_cache: Literal["16bit", "fp8"]
    limits: Limits
    hardware: Hardware
    concurrent: int
    cost: Cost
    chat: Chat
    capabilities: tuple[Capability, ...]
    card: Card
    draft: Draft | None = None
    name: str = ""


def read(path: Path) -> Variant:
    """The variant in `path`, called like its file. Raises BadVariant: a key unknown, missing, wrong or contradicted."""
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise BadVariant(f"{path}: {error}") from error
    if isinstance(tree, dict) and "name" in tree:
        raise BadVariant(f"{path}: name: a variant is called like its file")
    variant = dataclasses.replace(typing.cast("Variant", _struct(tree, Variant, path, "")), name=path.stem)
    for key, wrong in _contradictions(variant):
        raise BadVariant(f"{path}: {key}: {wrong}")
    return variant


def _struct(tree: Any, kind: type, path: Path, key: str) -> Any:
    if not isinstance(tree, dict):
        raise BadVariant(f"{path}: {key or 'the file'}: expected keys and values, not {tree!r}")
    dot = f"{key}." if key else ""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in tree:
        if name not in fields:
            raise BadVariant(f"{path}: {dot}{name}: unknown key (known: {', '.join(fields)})")
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in tree:
            raise BadVariant(f"{path}: {dot}{name}: missing")
    kinds = typing.get_type_hints(kind)
    return kind(**{name: _value(given, kinds[name], path, dot + name) for name, given in tree.items()})


def _value(given: Any, kind: Any, path: Path, key: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _struct(given, typing.cast("type", kind), path, key)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if given is None else _value(given, arguments[0], path, key)
    if origin is tuple and isinstance(given, list):
        return tuple(_value(each, arguments[0], path, f"{key}[{index}]") for index, each in enumerate(given))
    if origin is Literal:
        fits, expected = given in arguments, f"one of {', '.join(arguments)}"
    elif kind in (int, float):
        number = isinstance(given, (int, kind)) and not isinstance(given, bool)
        fits, expected = number and given > 0, f"a positive {kind.__name__}"
    else:
        fits, expected = isinstance(given, origin or kind) and given != "", "a list" if origin else f"a {kind.__name__}"
    if not fits:
        raise BadVariant(f"{path}: {key}: expected {expected}, not {given!r}")
    return given


def _contradictions(variant: Variant) -> typing.Iterator[tuple[str, str]]:
    """What each field allows and all together do not; the rules are TensorRT-LLM's."""
    hardware, limits = variant.hardware, variant.limits
    if variant.kv_cache == "fp8" and variant.weights.format != "fp8":
        yield "kv_cache", "an FP8 KV cache with block reuse needs FP8 weights (paged context FMHA)"
    if variant.base.kv_heads % hardware.tensor_parallel:
        yield "hardware.tensor_parallel", f"does not divide the {variant.base.kv_heads} KV heads"
    if variant.base.layers % hardware.pipeline_parallel:
        yield "hardware.pipeline_parallel", f"does not divide the {variant.base.layers} layers"
    if limits.output_tokens >= limits.sequence_tokens:
        yield "limits.output_tokens", "leaves no room for a prompt in limits.sequence_tokens"
    if variant.runtime == "llmapi" and (wrong := set(variant.capabilities) & {"json_schema", "logprobs"}):
        yield "capabilities", f"the LLM API model has no tensor for {', '.join(sorted(wrong))}"
    if variant.draft and (variant.draft.method == "eagle3") != (variant.runtime == "llmapi"):
        yield "draft.method", "draft_target goes with runtime engine, eagle3 with llmapi"
    if variant.draft and variant.runtime == "engine" and limits.kv_cache_tokens is None:
        yield "limits.kv_cache_tokens", "missing: two models on one GPU need a fixed size each"
