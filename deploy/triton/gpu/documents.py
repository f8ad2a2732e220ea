"""What stands beside a model repository: build.sh, start.sh, MODEL_CARD.md and forebay.yaml, all from the variant."""

from __future__ import annotations

import json
import shlex
import textwrap
from dataclasses import dataclass

from memory import ALLOWANCE_GIB, estimate
from repository import Paths
from variant import Base, Variant, Weights


@dataclass(frozen=True)
class Release:
    """A container and the TensorRT-LLM inside it; what NVIDIA's compatibility page and deployment guide pair."""

    tensorrt_llm: str
    triton: str

    @property
    def image(self) -> str:
        return f"nvcr.io/nvidia/tritonserver:{self.triton}-trtllm-python-py3"


# The last container with 1.0, whose engine workflow is whole; later releases take it apart in favour of the LLM API.
ENGINE_RELEASE = Release(tensorrt_llm="1.0.0", triton="25.10")
LLMAPI_RELEASE = Release(tensorrt_llm="1.2.1", triton="26.07")


def release(variant: Variant) -> Release:
    return LLMAPI_RELEASE if variant.runtime == "llmapi" else ENGINE_RELEASE


def client_model(variant: Variant) -> str:
    """The model of the repository that a client names: only NVIDIA's own BLS model knows how to use a draft."""
    if variant.runtime == "llmapi":
        return "tensorrt_llm"
    return "tensorrt_llm_bls" if variant.draft else "forebay"


def build_sh(variant: Variant, paths: Paths) -> str:
    """Download, quantise, build. Every command is shown; `--print` only shows them."""
    pinned, draft, hardware = release(variant), variant.draft, variant.hardware
    commands = _download(variant.base, paths.model)
    if variant.runtime == "engine":
        commands += _engine(variant, variant.base, variant.weights, paths.model, paths.engine, draft=False)
    if draft:
        commands += _download(draft.base, paths.draft_model)
        if variant.runtime == "engine":
            commands += _engine(variant, draft.base, draft.weights, paths.draft_model, paths.draft_engine, draft=True)
    head = f"""\
#!/usr/bin/env bash
# {variant.name}: {_what_is_built(variant)}
# Runs inside {pinned.image} (TensorRT-LLM {pinned.tensorrt_llm}), on the GPUs that will serve.
# `./build.sh --print` only shows the commands.
set -euo pipefail

# {hardware.tensor_parallel} tensor x {hardware.pipeline_parallel} pipeline parallel.
WORLD_SIZE={hardware.gpus}

show() {{ printf '%q ' "$@"; echo; }}
run() {{ show "$@"; "$@"; }}
if [[ ${{1-}} == --print ]]; then
  run() {{ show "$@"; }}
elif [[ $(nvidia-smi --list-gpus | wc -l) -lt $WORLD_SIZE ]]; then
  echo "{variant.name} needs $WORLD_SIZE x {hardware.gpu}; nvidia-smi lists fewer GPUs." >&2; exit 1
fi
"""
    return "\n".join([head, *([_EXAMPLES.format(pinned=pinned)] if variant.runtime == "engine" else []), *commands])


_EXAMPLES = """\
# An engine fits the GPU model and the TensorRT-LLM release that built it, and nothing else.
EXAMPLES=${{TENSORRT_LLM_EXAMPLES:-/app/tensorrt_llm/examples}}
if [[ ${{1-}} != --print && ! -d $EXAMPLES ]]; then
  echo "No TensorRT-LLM examples in $EXAMPLES. Fetch them and name the folder in TENSORRT_LLM_EXAMPLES:" >&2
  echo "  git clone --depth 1 --branch v{pinned.tensorrt_llm} https://github.com/NVIDIA/TensorRT-LLM.git" >&2; exit 1
fi
"""


def start_sh(variant: Variant) -> str:
    """Start Triton and stay with it, so that a container lives as long as its server."""
    coded = "tensorrt_llm" if variant.runtime == "llmapi" else "preprocessing"
    match variant.runtime, variant.draft:
        case "llmapi", _:
            arguments, why = "--world_size=1", "The LLM API starts one worker per GPU itself: Triton is one process."
        case _, None:
            arguments, why = (
                f"--world_size={variant.hardware.gpus}",
                "One Triton process per GPU; the first one answers.",
            )
        case _:
            arguments, why = (
                "--world_size=1 --multi-model",
                "Two engines: Triton is one process and orchestrates the workers of both.",
            )
    return f"""\
#!/usr/bin/env bash
# Starts {variant.name} inside {release(variant).image}.
# {why}
set -euo pipefail

here=$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)
launcher=${{TRITON_LAUNCHER:-/app/scripts/launch_triton_server.py}}
if [[ ! -f $here/model_repository/{coded}/1/model.py ]]; then
  echo "The repository has no model.py yet: render it in the container, with --templates /app/all_models." >&2; exit 1
fi

# gRPC 8001, HTTP 8000, metrics 8002.
python3 "$launcher" {arguments} --model_repo="$here/model_repository"
server=$(pgrep --oldest --exact 'mpirun|prterun')
trap 'kill -TERM "$server"' TERM INT
while kill -0 "$server" 2>/dev/null; do
  sleep 1 & wait "$!" || true
done
"""


def model_card(variant: Variant, paths: Paths) -> str:
    """A card by the fields an operator, a lawyer and a capacity planner ask for."""
    card, hardware, limits = variant.card, variant.hardware, variant.limits
    parallel = f"{hardware.tensor_parallel} tensor x {hardware.pipeline_parallel} pipeline parallel"
    draft = variant.draft
    rows = {
        "Base model": f"[{variant.base.repository}](https://huggingface.co/{variant.base.repository})",
        "Made from it": card.made_from,
        "Weights": f"{variant.weights.format}, {variant.base.parameters_billion} billion parameters",
        "Calibration": variant.weights.calibration,
        "KV cache": variant.kv_cache,
        "Draft model": f"{draft.base.repository}, {draft.tokens} tokens ahead ({draft.method})" if draft else "none",
        "Licence": variant.base.licence + (f"; draft: {draft.base.licence}" if draft else ""),
        "Context window": f"{limits.sequence_tokens:,} tokens, of which at most {limits.output_tokens:,} are answer",
        "Capabilities": ", ".join(variant.capabilities),
        "Tool calls": variant.chat.tool_format,
        "Quality": card.quality,
        "Source": card.source,
        "Hardware": f"{hardware.gpus} x {hardware.gpu} ({parallel})",
        "Software": f"{release(variant).image}, TensorRT-LLM {release(variant).tensorrt_llm}",
    }
    table = "\n".join(f"| {field} | {value} |" for field, value in rows.items())
    notes = "".join(f"- {note}\n" for note in card.notes)
    return f"""\
# {variant.name}

{card.summary}

| | |
| --- | --- |
{table}

## Memory

{_memory(variant)}

## Notes

- Weights and tokenizer are read from `{paths.model}` in the container.
{notes}"""


def _memory(variant: Variant) -> str:
    memory = estimate(variant)
    text = (
        f"By arithmetic, not measured: weights {memory.weights_gib:.1f} GiB, {memory.weights_per_gpu_gib:.1f} GiB on "
        f"each GPU; {memory.kv_bytes_per_token / 1024:.0f} KiB of KV cache per token; {ALLOWANCE_GIB} GiB per GPU "
        f"allowed for the rest. That leaves {memory.kv_pool_gib:.0f} GiB of KV cache for {memory.kv_pool_tokens:,} "
        f"tokens: {memory.full_sequences:.0f} requests at their full length, more when they "
        "are shorter or share a beginning."
    )
    return textwrap.fill(text, 120)


DRAFT_TOKENS = 5
"""As in NVIDIA's guide to draft-target speculation; the best number depends on how often the drafts are accepted."""


def forebay_yaml(variant: Variant, model_folder: str, host: str) -> str:
    """The part of a policy that names this Triton and prices its tokens."""
    chat = variant.chat
    input_price, output_price = variant.cost.usd_per_1m(variant.hardware.gpus)
    stop = f"\n    stop: {json.dumps(list(chat.stop))}" if chat.stop else ""
    drafts = "# Proposed by the draft model at a time; answers then come in one piece."
    draft = f"\n    {drafts}\n    draft_tokens: {DRAFT_TOKENS}" if variant.draft else ""
    template = "\n    chat_template: |-\n" + textwrap.indent(chat.template, " " * 6) if chat.template else ""
    return f"""\
# For a policy of Forebay: {variant.card.summary}
# Merge both parts into yours and check it: `forebay check YOUR.yaml`.

backends:
  {variant.name}:
    kind: triton
    url: grpc://{host}:8001
    model: {client_model(variant)}
    # On the gateway's machine: tokenizer.json and tokenizer_config.json are enough.
    model_folder: {model_folder}
    tool_format: {chat.tool_format}{stop}
    # Whether the engine adds the BOS token; then the rendered prompt does not.
    adds_bos: {str(chat.adds_bos).lower()}{template}
    metrics_url: http://{host}:8002/metrics
    metrics_model: tensorrt_llm{draft}
    # {_why_concurrent(variant)}
    max_concurrent: {variant.concurrent}
    timeouts: {{connect: 500ms, first_token: 30s, idle: 15s, total: 300s}}

models:
  {variant.name}:
    backends: [{variant.name}]
    context_window: {variant.limits.sequence_tokens}
    max_output_tokens: {variant.limits.output_tokens}
    # {_arithmetic(variant)}
    # Price and rate are assumptions: put in your own, the rate as measured over a whole day.
    price: {{input: {input_price:.4f}, output: {output_price:.4f}}}
    capabilities: [{", ".join(variant.capabilities)}]
"""


def _arithmetic(variant: Variant) -> str:
    cost, gpus = variant.cost, variant.hardware.gpus
    hour_usd, hour_tokens = gpus * cost.usd_per_gpu_hour, cost.output_tokens_per_second * 3600 / 1e6
    input_price, output_price = cost.usd_per_1m(gpus)
    return (
        f"An hour costs {gpus} x {cost.usd_per_gpu_hour:.2f} = {hour_usd:.2f} USD and makes "
        f"{cost.output_tokens_per_second:,} x 3,600 = {hour_tokens:.2f}M tokens:\n"
        f"    # output {hour_usd:.2f} / {hour_tokens:.2f} = {output_price:.4f}; a prompt token takes "
        f"{cost.prompt_token_share} of the time: input {input_price:.4f}."
    )


def _why_concurrent(variant: Variant) -> str:
    if variant.runtime == "llmapi":
        return "Per gateway worker."
    return (
        f"Per gateway worker; Triton has {variant.concurrent} instances of this model, each for one request at a time."
    )


def _what_is_built(variant: Variant) -> str:
    if variant.runtime == "llmapi":
        return "the weights from the hub; the LLM API needs no engine."
    return f"{variant.weights.format} weights as TensorRT engines for {variant.hardware.gpus} x {variant.hardware.gpu}."


def _download(base: Base, target: str) -> list[str]:
    return [f"run huggingface-cli download {base.repository} --local-dir {shlex.quote(target)}", ""]


def _engine(variant: Variant, base: Base, weights: Weights, model: str, engine: str, *, draft: bool) -> list[str]:
    checkpoint, limits, hardware = f"{engine}-checkpoint", variant.limits, variant.hardware
    parallel = [f"--tp_size {hardware.tensor_parallel}", f"--pp_size {hardware.pipeline_parallel}"]
    lines = _command(
        *_checkpoint(variant, base, weights), f"--model_dir {model}", f"--output_dir {checkpoint}", *parallel
    )
    flags = ["--gemm_plugin auto", "--kv_cache_type paged", "--use_paged_context_fmha enable"]
    if variant.kv_cache == "fp8":
        flags += ["--use_fp8_context_fmha enable"]
    flags += [f"--max_batch_size {limits.batch}", f"--max_num_tokens {limits.step_tokens}"]
    flags += [f"--max_seq_len {limits.sequence_tokens}", "--max_beam_width 1", f"--workers {hardware.gpus}"]
    if variant.draft and not draft:
        flags += ["--speculative_decoding_mode draft_tokens_external", f"--max_draft_len {variant.draft.tokens}"]
    lines += _command("trtllm-build", f"--checkpoint_dir {checkpoint}", f"--output_dir {engine}", *flags)
    if "json_schema" in variant.capabilities and not draft:
        lines += ["# Guided decoding needs the vocabulary in xgrammar's form."]
        script = 'python3 "$EXAMPLES"/generate_xgrammar_tokenizer_info.py'
        lines += _command(script, f"--model_dir {model}", f"--output_dir {engine}")
    return lines


def _checkpoint(variant: Variant, base: Base, weights: Weights) -> list[str]:
    convert = f'python3 "$EXAMPLES"/models/core/{base.family}/convert_checkpoint.py'
    quantize = 'python3 "$EXAMPLES"/quantization/quantize.py'
    match weights.format:
        case "16bit":
            return [convert, "--dtype auto"]
        case "int4_gptq":
            return [convert, "--dtype float16", "--use_weight_only", "--weight_only_precision int4_gptq", "--per_group"]
        case "int4_awq":
            return [quantize, "--dtype float16", "--qformat int4_awq", "--awq_block_size 128", "--calib_size 512"]
        case _:
            kv_cache = ["--kv_cache_dtype fp8"] if variant.kv_cache == "fp8" else []
            return [quantize, "--dtype auto", f"--qformat {weights.format}", *kv_cache, "--calib_size 512"]


def _command(*words: str) -> list[str]:
    """One word group per line, in the shell's own continuation."""
    return [f"run {words[0]} \\", *(f"  {word} \\" for word in words[1:-1]), f"  {words[-1]}", ""]
