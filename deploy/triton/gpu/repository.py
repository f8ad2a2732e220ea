"""A Triton model repository for a variant: config.pbtxt of our own, model.py from NVIDIA's release (`forebay`: ours).

Our own config.pbtxt, rather than NVIDIA's templates with values filled in: it can be read and checked without a GPU
container, and no `${...}` is ever left for a backend to stumble over. The price is that a release may move on, so with
`--templates` every tensor and parameter is compared with that release's config.pbtxt, and a difference is refused.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from memory import KV_SHARE
from variant import Variant

# Of preprocessing and postprocessing; NVIDIA's advice in docs/model_config.md.
TOKENIZER_INSTANCES = 5
# How long a hung-up client keeps its place on the GPU, at most; NVIDIA's default is 100.
CANCELLATION_CHECK_MS = 20

_TENSOR = re.compile(
    r"(?P<type>[A-Z]+[0-9]*)\[(?P<dims>[-0-9, ]+)\](?P<optional>\?)?(?P<scalar> scalar)?(?P<ragged> ragged)?"
)
_BLOCK = re.compile(r"\{((?:[^{}]|\{[^{}]*\})*)\}")
_NAMED = re.compile(r'name:\s*"(\w+)"\s*,?\s*data_type:\s*(\S+?),?\s')


class BadTemplates(Exception):
    """NVIDIA's files are not where they were said to be, or not of a release that these configs fit."""


@dataclass(frozen=True)
class Paths:
    """Inside the container that serves."""

    model: str
    engine: str

    @property
    def draft_model(self) -> str:
        return f"{self.model}-draft"

    @property
    def draft_engine(self) -> str:
        return f"{self.engine}-draft"


@dataclass(frozen=True)
class Model:
    """One folder of the repository. `template`: where NVIDIA keeps the same model, below all_models; empty for ours."""

    name: str
    template: str
    config: str
    copies_code: bool


def models(variant: Variant, paths: Paths) -> list[Model]:
    """The folders of `variant`'s repository, in the order a request meets them."""
    interface = yaml.safe_load((Path(__file__).parent / "interface.yaml").read_text())
    if variant.runtime == "llmapi":
        config = _config("tensorrt_llm", interface["llmapi"], batch=0, decoupled=True)
        return [Model("tensorrt_llm", "llmapi/tensorrt_llm", config, copies_code=True)]
    interface["forebay"] = {"backend": "python"} | {side: interface["ensemble"][side] for side in ("inputs", "outputs")}
    names = ["preprocessing", "tensorrt_llm", "postprocessing", "forebay", "tensorrt_llm_bls", "ensemble"]
    if variant.draft:
        names.insert(2, "tensorrt_llm_draft")
    return [_engine_model(name, interface, variant, paths) for name in names]


def write(variant: Variant, paths: Paths, target: Path, templates: Path | None) -> list[str]:
    """The repository in `target`. Returns, as sentences, what the release in `templates` has beyond it."""
    notes: list[str] = []
    for model in models(variant, paths):
        version = target / model.name / "1"
        version.mkdir(parents=True, exist_ok=True)
        (target / model.name / "config.pbtxt").write_text(model.config)
        if templates and model.template:
            notes += check(model, templates)
            if model.copies_code:
                _copy_code(templates / model.template / "1", version)
    if variant.runtime == "llmapi":
        (target / "tensorrt_llm" / "1" / "model.yaml").write_text(_model_yaml(variant, paths))
    else:
        _write_front(target / "forebay" / "1")
    return notes


def check(model: Model, templates: Path) -> list[str]:
    """Compare with the release's own config. Raises BadTemplates: another type, or a tensor that either side needs."""
    path = templates / model.template / "config.pbtxt"
    try:
        theirs = path.read_text()
    except OSError as error:
        raise BadTemplates(f"{path}: {error.strerror}: --templates is the folder all_models of a release") from error
    ours, here = dict(_tensors(model.config)), dict(_tensors(theirs))
    for tensor, (dtype, _) in ours.items():
        if tensor not in here:
            raise BadTemplates(f"{path}: has no {tensor}, which interface.yaml declares")
        if here[tensor][0] not in (dtype, "") and not here[tensor][0].startswith("$"):
            raise BadTemplates(f"{path}: {tensor} is {here[tensor][0]}, in interface.yaml {dtype}")
    if needed := sorted(tensor for tensor, (_, needs) in here.items() if needs and tensor not in ours):
        raise BadTemplates(f"{path}: needs {', '.join(needed)}, which interface.yaml lacks")
    if unknown := sorted(_parameters(model.config) - _parameters(theirs)):
        raise BadTemplates(f"{path}: knows no parameter {', '.join(unknown)}")
    return [f"{model.name}: this release also has {tensor}" for tensor in here if tensor not in ours]


def _engine_model(name: str, interface: dict[str, Any], variant: Variant, paths: Paths) -> Model:
    kind = "tensorrt_llm" if name == "tensorrt_llm_draft" else name
    config = _config(
        name,
        interface[kind],
        batch=variant.limits.batch,
        decoupled=kind in ("tensorrt_llm", "tensorrt_llm_bls", "forebay"),
        batches=kind in ("preprocessing", "tensorrt_llm", "postprocessing"),
        instances=_instances(name, variant),
        parameters=_parameters_of(name, variant, paths),
    )
    code = name in ("preprocessing", "postprocessing", "tensorrt_llm_bls")
    return Model(name, "" if name == "forebay" else f"inflight_batcher_llm/{kind}", config, copies_code=code)


def _instances(name: str, variant: Variant) -> int:
    """Processes. A model that a client calls works on one request per instance, from the first token to the last."""
    match name:
        case "ensemble":
            return 0
        case "preprocessing" | "postprocessing":
            return TOKENIZER_INSTANCES
        case "forebay" if not variant.draft:
            return variant.concurrent
        case "tensorrt_llm_bls" if variant.draft:
            return variant.concurrent
        case _:
            return 1


def _write_front(version: Path) -> None:
    """Our own model, and the ensemble's wiring, by which it calls the others."""
    here = Path(__file__).parent
    interface = yaml.safe_load((here / "interface.yaml").read_text())
    shutil.copyfile(here / "front" / "model.py", version / "model.py")
    (version / "steps.json").write_text(json.dumps(interface["ensemble"]["steps"], indent=1))


def _parameters_of(name: str, variant: Variant, paths: Paths) -> dict[str, str]:
    match name:
        case "preprocessing":
            return {
                "tokenizer_dir": paths.model,
                # Who adds the BOS token: the chat template, unless the variant says the engine does.
                "add_special_tokens": _bool(variant.chat.adds_bos),
                "multimodal_model_path": "",
                "gpt_model_path": paths.engine,
            }
        case "postprocessing":
            return {"tokenizer_dir": paths.model, "skip_special_tokens": "true"}
        case "tensorrt_llm_bls":
            draft = {"tensorrt_llm_draft_model_name": "tensorrt_llm_draft"} if variant.draft else {}
            # Every response holds the whole text so far: a character of several tokens is never cut.
            return {"accumulate_tokens": "true", "tensorrt_llm_model_name": "tensorrt_llm"} | draft
        case "forebay":
            # As the BLS model says it: what Forebay reads of it. The model itself always answers so.
            return {"accumulate_tokens": "true"}
        case "ensemble":
            return {}
        case _:
            return _engine_parameters(variant, paths, draft=name == "tensorrt_llm_draft")


def _engine_parameters(variant: Variant, paths: Paths, *, draft: bool) -> dict[str, str]:
    guided = "json_schema" in variant.capabilities
    parameters = {
        "gpt_model_type": "inflight_fused_batching",
        "gpt_model_path": paths.draft_engine if draft else paths.engine,
        "max_beam_width": "1",
        # A request that has begun is never paused for another one.
        "batch_scheduler_policy": "guaranteed_no_evict",
        "kv_cache_free_gpu_mem_fraction": str(KV_SHARE),
        "enable_kv_cache_reuse": "true",
        "enable_chunked_context": "true",
        "exclude_input_in_output": "true",
        "normalize_log_probs": "false",
        "cancellation_check_period_ms": str(CANCELLATION_CHECK_MS),
        "stats_check_period_ms": "100",
        "FORCE_CPU_ONLY_INPUT_TENSORS": "no",
        "executor_worker_path": "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker",
        # The backend reads these three whether they are used or not.
        "tokenizer_dir": "",
        "guided_decoding_backend": "xgrammar" if guided else "",
        "xgrammar_tokenizer_info_path": f"{paths.engine}/xgrammar_tokenizer_info.json" if guided else "",
    }
    if variant.draft:
        parameters["gpu_device_ids"] = ",".join(str(gpu) for gpu in range(variant.hardware.gpus))
        parameters["kv_cache_free_gpu_mem_fraction"] = "0.4"
    if variant.limits.kv_cache_tokens is not None:
        parameters["max_tokens_in_paged_kv_cache"] = str(variant.limits.kv_cache_tokens)
    return parameters


def _config(
    name: str,
    interface: dict[str, Any],
    *,
    batch: int,
    decoupled: bool = False,
    batches: bool = False,
    instances: int = 1,
    parameters: dict[str, str] | None = None,
) -> str:
    lines = [f'name: "{name}"', f"max_batch_size: {batch}"]
    lines += [f'{key}: "{interface[key]}"' for key in ("backend", "platform") if key in interface]
    if decoupled:
        lines += ["model_transaction_policy { decoupled: true }"]
    if batches:
        lines += [f"dynamic_batching {{ preferred_batch_size: [ {batch} ] max_queue_delay_microseconds: 0 }}"]
    if instances:
        lines += [f"instance_group [ {{ count: {instances} kind: KIND_CPU }} ]"]
    lines += _section("input", interface["inputs"]) + _section("output", interface["outputs"])
    for key, value in (parameters or {}).items():
        lines += [f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}']
    return "\n".join([*lines, *_steps(interface.get("steps", {}))]) + "\n"


def _section(name: str, tensors: dict[str, str]) -> list[str]:
    return [f"{name} [", ",\n".join(f"  {{ {_tensor(name, spec)} }}" for name, spec in tensors.items()), "]"]


def _tensor(name: str, spec: str) -> str:
    parts = _TENSOR.fullmatch(spec)
    if parts is None:
        raise ValueError(f"interface.yaml: {name}: not a tensor: {spec}")
    text = f'name: "{name}" data_type: TYPE_{parts["type"]} dims: [ {parts["dims"]} ]'
    text += " reshape { shape: [ ] }" if parts["scalar"] else ""
    text += " optional: true" if parts["optional"] else ""
    return text + (" allow_ragged_batch: true" if parts["ragged"] else "")


def _steps(steps: dict[str, Any]) -> list[str]:
    if not steps:
        return []
    lines = ["ensemble_scheduling {"]
    for model, maps in steps.items():
        lines += ["  step {", f'    model_name: "{model}" model_version: -1']
        for direction in ("input", "output"):
            pairs = maps[f"{direction}s"].items()
            lines += [f'    {direction}_map {{ key: "{tensor}" value: "{name}" }}' for tensor, name in pairs]
        lines += ["  }"]
    return [*lines, "}"]


def _model_yaml(variant: Variant, paths: Paths) -> str:
    limits, hardware = variant.limits, variant.hardware
    tree: dict[str, Any] = {
        "model": paths.model,
        "backend": "pytorch",
        "tensor_parallel_size": hardware.tensor_parallel,
        "pipeline_parallel_size": hardware.pipeline_parallel,
        "max_batch_size": limits.batch,
        "max_num_tokens": limits.step_tokens,
        "max_seq_len": limits.sequence_tokens,
        "enable_chunked_prefill": True,
        "kv_cache_config": {"enable_block_reuse": True, "free_gpu_memory_fraction": KV_SHARE},
    }
    if variant.draft:
        speculative = {"decoding_type": "Eagle", "max_draft_len": variant.draft.tokens}
        tree["speculative_config"] = speculative | {"speculative_model_dir": paths.draft_model}
    triton = {"max_batch_size": 0, "decoupled": True, "cancellation_check_period_ms": CANCELLATION_CHECK_MS}
    return yaml.safe_dump(tree | {"triton_config": triton}, sort_keys=False)


def _copy_code(source: Path, target: Path) -> None:
    if not (source / "model.py").is_file():
        raise BadTemplates(f"{source}/model.py: not found: --templates is the folder all_models of a release")
    for code in source.rglob("*.py"):
        copy = target / code.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(code, copy)


def _tensors(config: str) -> Iterator[tuple[str, tuple[str, bool]]]:
    """Each tensor of a config.pbtxt: its type, and whether a request must bring it."""
    inputs, _, outputs = re.sub(r"(?m)^\s*#.*$", "", config).partition("\noutput")
    for section, required in ((inputs, True), (outputs.partition("\nensemble_scheduling")[0], False)):
        for block in _BLOCK.findall(section):
            if found := _NAMED.search(block + " "):
                yield found[1], (found[2], required and "optional: true" not in block)


def _parameters(config: str) -> set[str]:
    return set(re.findall(r'key:\s*"(\w+)"', config.partition("ensemble_scheduling")[0]))


def _bool(value: bool) -> str:
    return "true" if value else "false"
