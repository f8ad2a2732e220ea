"""The interfaces of language models on Triton, as their vendors' configurations declare them, and scripts to play."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

_REPOSITORY = Path(__file__).with_name("triton_repository")
_LLMS = Path(__file__).parents[1] / "deploy" / "triton" / "cpu"

Tensor = tuple[str, str, str]
"""Name, data type without TYPE_, dimensions without the batch's, as "-1, 3"."""


def _tensors(text: str) -> tuple[Tensor, ...]:
    rows = [row.split(maxsplit=2) for row in text.strip().splitlines()]
    return tuple((name, data_type, dims) for name, data_type, dims in rows)


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a model declares, and how it behaves where that says nothing."""

    required: tuple[Tensor, ...]
    optional: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    max_batch_size: int = 8
    """0: shapes have no batch dimension."""
    decoupled: bool = True
    parameters: Mapping[str, str] = field(default_factory=dict)
    """See tests/triton_repository/model.py."""

    def config(self, name: str) -> str:
        """Return its config.pbtxt."""
        parameters = {"plays": "script", **self.parameters}
        entries = [f'{{ key: "{key}", value: {{ string_value: "{value}" }} }}' for key, value in parameters.items()]
        inputs = [*map(_entry, self.required), *(_entry(tensor, ", optional: true") for tensor in self.optional)]
        return "\n".join(
            [
                f'name: "{name}"',
                'backend: "python"',
                f"max_batch_size: {self.max_batch_size}",
                f"model_transaction_policy {{ decoupled: {str(self.decoupled).lower()} }}",
                "instance_group [ { count: 1, kind: KIND_CPU } ]",
                *(f"parameters: {entry}" for entry in entries),
                f"input [ {', '.join(inputs)} ]",
                f"output [ {', '.join(map(_entry, self.outputs))} ]",
            ]
        )


def _entry(tensor: Tensor, more: str = "") -> str:
    name, data_type, dims = tensor
    return f'{{ name: "{name}", data_type: TYPE_{data_type}, dims: [ {dims} ]{more} }}'


# NVIDIA/TensorRT-LLM, triton_backend/all_models/inflight_batcher_llm/ensemble/config.pbtxt (2a9abd95).
BLS = Dialect(
    required=_tensors("""
        text_input STRING 1
        max_tokens INT32 1
    """),
    optional=_tensors("""
        decoder_text_input STRING 1
        bad_words STRING -1
        stop_words STRING -1
        exclude_input_in_output BOOL 1
        end_id INT32 1
        pad_id INT32 1
        top_k INT32 1
        top_p FP32 1
        temperature FP32 1
        length_penalty FP32 1
        repetition_penalty FP32 1
        min_tokens INT32 1
        presence_penalty FP32 1
        frequency_penalty FP32 1
        seed UINT64 1
        return_log_probs BOOL 1
        return_context_logits BOOL 1
        return_generation_logits BOOL 1
        return_perf_metrics BOOL 1
        return_num_input_tokens BOOL 1
        return_num_output_tokens BOOL 1
        num_return_sequences INT32 1
        beam_width INT32 1
        stream BOOL 1
        prompt_embedding_table FP16 -1, -1
        prompt_vocab_size INT32 1
        prompt_table_extra_id UINT64 1
        embedding_bias_words STRING -1
        embedding_bias_weights FP32 -1
        lora_task_id UINT64 1
        lora_weights FP16 -1, -1
        lora_config INT32 -1, 3
        guided_decoding_guide_type STRING 1
        guided_decoding_guide STRING 1
    """),
    outputs=_tensors("""
        text_output STRING -1
        cum_log_probs FP32 -1
        output_log_probs FP32 -1, -1
        context_logits FP32 -1, -1
        generation_logits FP32 -1, -1, -1
        batch_index INT32 1
        sequence_index INT32 1
        kv_cache_alloc_new_blocks INT32 1
        kv_cache_reused_blocks INT32 1
        kv_cache_alloc_total_blocks INT32 1
        arrival_time_ns INT64 1
        first_scheduled_time_ns INT64 1
        first_token_time_ns INT64 1
        last_token_time_ns INT64 1
        acceptance_rate FP32 1
        total_accepted_draft_tokens INT32 1
        total_draft_tokens INT32 1
        num_input_tokens INT32 1
        num_output_tokens INT32 1
    """),
)

BLS_CUMULATIVE = replace(BLS, parameters={"accumulate_tokens": "true"})
BLS_UNSAID = replace(BLS, parameters={"accumulate": "true"})
"""As with BLS's own parameter `accumulate_tokens`."""

# The same, .../tensorrt_llm_bls/config.pbtxt (0193dbd4), which has these inputs whether the model sees or not.
VISION = replace(
    BLS,
    optional=BLS.optional
    + _tensors("""
        image_input FP16 -1, 3, -1, -1
        image_bytes_input UINT8 -1, -1, -1, -1
        image_url_input STRING 1
        video_bytes_input UINT8 -1, -1, -1, -1
        num_draft_tokens INT32 1
        use_draft_logits BOOL 1
    """),
    parameters={"plays": "echo"},
)

ECHO = replace(BLS, parameters={"plays": "echo"})

# triton-inference-server/tensorrtllm_backend, all_models/inflight_batcher_llm/ensemble/config.pbtxt (fca166cc).
ENSEMBLE_OLD = Dialect(
    required=_tensors("""
        text_input STRING -1
        max_tokens UINT32 -1
    """),
    optional=_tensors("""
        bad_words STRING -1
        stop_words STRING -1
        end_id UINT32 1
        pad_id UINT32 1
        top_k UINT32 1
        top_p FP32 1
        temperature FP32 1
        length_penalty FP32 1
        repetition_penalty FP32 1
        min_length UINT32 1
        presence_penalty FP32 1
        random_seed UINT64 1
        return_log_probs BOOL 1
        beam_width UINT32 1
        stream BOOL 1
        prompt_embedding_table FP16 -1, -1
        prompt_vocab_size UINT32 1
        embedding_bias_words STRING -1
        embedding_bias_weights FP32 -1
    """),
    outputs=_tensors("""
        text_output STRING -1
        cum_log_probs FP32 -1
        output_log_probs FP32 -1, -1
    """),
    parameters={"final": "last"},
)

# NVIDIA/TensorRT-LLM, triton_backend/all_models/llmapi/tensorrt_llm: config.pbtxt (0a710573) and model.py (044a90d2),
# whose text is the whole one so far, and whose reasons are the word "None" until the end.
LLMAPI = Dialect(
    required=_tensors("text_input STRING -1"),
    optional=_tensors("""
        image_url STRING -1
        streaming BOOL 1
        sampling_param_best_of INT32 1
        sampling_param_temperature FP32 1
        sampling_param_top_k INT32 1
        sampling_param_top_p FP32 1
        sampling_param_frequency_penalty FP32 1
        sampling_param_presence_penalty FP32 1
        sampling_param_max_tokens INT32 1
        sampling_param_stop STRING -1
        sampling_param_seed UINT64 1
        sampling_param_exclude_input_from_output BOOL 1
        sampling_param_return_perf_metrics BOOL 1
        return_finish_reason BOOL 1
        return_stop_reason BOOL 1
        return_cumulative_logprob BOOL 1
        stop BOOL 1
        lora_id UINT64 1
        lora_name STRING 1
        lora_path STRING 1
        lora_ckpt_source STRING 1
    """),
    outputs=_tensors("""
        text_output STRING -1
        finish_reason STRING -1
        stop_reason STRING -1
        cumulative_logprob FP32 -1
        kv_cache_reused_block INT32 -1
        kv_cache_missed_block INT32 -1
        kv_cache_alloc_new_blocks INT32 -1
        kv_cache_alloc_total_blocks INT32 -1
        kv_cache_hit_rate FP32 -1
        arrival_time_ns INT64 1
        first_scheduled_time_ns INT64 1
        first_token_time_ns INT64 1
        last_token_time_ns INT64 1
        acceptance_rate FP32 1
        total_accepted_draft_tokens INT32 1
        total_draft_tokens INT32 1
    """),
    max_batch_size=0,
    parameters={"accumulate": "true", "final": "last"},
)

LLMAPI_UNARY = replace(LLMAPI, decoupled=False)
"""As it is shipped: it streams only where its model.yaml says that it is decoupled."""

BROKEN_INTERFACE = Dialect(
    required=(("INPUT0", "FP32", "-1"),),
    optional=(),
    outputs=(("OUTPUT0", "FP32", "1"),),
    decoupled=False,
    parameters={"plays": "sums"},
)
"""No language model at all."""

DIALECTS: Mapping[str, Dialect] = {
    "bls": BLS,
    "bls_cumulative": BLS_CUMULATIVE,
    "bls_unsaid": BLS_UNSAID,
    "ensemble_old": ENSEMBLE_OLD,
    "llmapi": LLMAPI,
    "llmapi_unary": LLMAPI_UNARY,
    "vision": VISION,
    "echo": ECHO,
    "broken_interface": BROKEN_INTERFACE,
}
"""By the name of the scripted model that has it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One response of a stream."""

    text: str = ""
    tokens: int = 1
    log_probs: tuple[float, ...] = ()
    garbage: Literal["no_text", "no_outputs", "two_texts", "no_texts", "not_utf8", "number"] | None = None
    """What is wrong with it: no text_output, nothing, two texts or none in it, bytes that are no UTF-8, a number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What a scripted model does; `str()` is the prompt that makes it do so, bare or inside a chat template's text."""

    pieces: Sequence[str | Piece] = ("Hello", "!")
    first_delay_ms: float = 0.0
    delay_ms: float = 0.0
    """Between two pieces. Cancellation is looked for while it waits, and before every piece."""
    error_after: int | None = None
    """After so many pieces the model answers with `error`; 0: before the first."""
    error: str = "boom"
    code: Literal["INTERNAL", "INVALID_ARG", "UNAVAILABLE", "NOT_FOUND", "UNSUPPORTED", "UNKNOWN"] = "INTERNAL"
    hang_after: int | None = None
    """After so many pieces nothing more comes, until it is cancelled."""
    crash_after: int | None = None
    """After so many pieces the model's process dies."""
    ignores_cancel: bool = False
    finish_reason: str = "stop"
    """What the last response says where the dialect has such an output."""
    stop_reason: str | None = None
    prompt_tokens: int = 7
    counts: Literal["each", "last", "none"] = "each"
    """Which responses carry the token counts that were asked for; TensorRT-LLM's do each."""
    final: Literal["apart", "last"] | None = None
    """Whether the end of the stream is a response of its own, without outputs; None: as the dialect has it."""
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Gauges to show from now on: {"request_metrics": {"waiting": 7}} is nv_trt_llm_request_metrics{...} 7."""

    def __str__(self) -> str:
        script = {name: value for name, value in asdict(self).items() if value is not None}
        script["pieces"] = [_told(piece) for piece in self.pieces]
        return json.dumps({"script": script})


def _told(piece: str | Piece) -> str | dict[str, Any]:
    return piece if isinstance(piece, str) else {name: value for name, value in asdict(piece).items() if value}


def write_scripted(repository: Path) -> None:
    """Make `repository` hold a scripted model of every dialect."""
    for name, dialect in DIALECTS.items():
        write_model(repository, name, dialect)


def write_model(repository: Path, name: str, dialect: Dialect) -> None:
    """Make `repository` hold a scripted model `name`, in the place of one that is there."""
    version = repository / name / "1"
    version.mkdir(parents=True, exist_ok=True)
    shutil.copy(_REPOSITORY / "model.py", version)
    (repository / name / "config.pbtxt").write_text(dialect.config(name))


def write_llms(repository: Path) -> None:
    """Make `repository` hold the two small real models, which need FOREBAY_MODELS."""
    shutil.copytree(_LLMS, repository, dirs_exist_ok=True)
