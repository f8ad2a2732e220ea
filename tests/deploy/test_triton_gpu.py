"""Every GPU variant, rendered and read back without a GPU: by Triton's own schema, by bash, and against each other."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from backends.templates import template_fault
from policies.load import load_policy
from policies.routing_policy import TritonBackendSpec

TRITON = Path(__file__).parents[2] / "deploy" / "triton"
RENDER = TRITON / "gpu" / "render.py"
VARIANTS = sorted(path.stem for path in (TRITON / "gpu" / "variants").glob("*.yaml"))
ENGINES = [name for name in VARIANTS if not name.startswith("llmapi-")]
SCRIPTS = ["build.sh", "start.sh"]


def render(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RENDER), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one folder per variant."""
    target = tmp_path_factory.mktemp("rendered")
    for name in VARIANTS:
        done = render(name, "--out", target / name)
        assert done.returncode == 0, done.stderr
    return target


def variant(name: str) -> dict[str, Any]:
    tree = yaml.safe_load((TRITON / "gpu" / "variants" / f"{name}.yaml").read_text())
    assert isinstance(tree, dict)
    return tree


def gpus(name: str) -> int:
    hardware = variant(name)["hardware"]
    return int(hardware.get("tensor_parallel", 1) * hardware.get("pipeline_parallel", 1))


def repository(folder: Path) -> dict[str, Any]:
    """The configs of a model repository by the name they give themselves, each read by Triton's schema."""
    configs = {}
    for path in sorted((folder / "model_repository").glob("*/config.pbtxt")):
        config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
        assert config.name == path.parent.name
        assert (path.parent / "1").is_dir(), "Triton serves no model without a version folder"
        configs[config.name] = config
    return configs


def tensors(fields: Any) -> dict[str, int]:
    """Names and data types; a name given twice would hide one of them."""
    found = {field.name: field.data_type for field in fields}
    assert len(found) == len(fields)
    return found


def parameter(config: Any, key: str) -> str:
    return str(config.parameters[key].string_value)


def test_there_is_a_variant_for_each_way_to_shrink_and_to_spread_a_model():
    formats = {variant(name)["weights"]["format"] for name in VARIANTS}
    assert formats == {"16bit", "fp8", "int8_sq", "int4_awq", "int4_gptq"}
    assert {gpus(name) for name in VARIANTS} >= {1, 2, 4, 8}
    assert {variant(name)["draft"]["method"] for name in VARIANTS if "draft" in variant(name)} == {
        "draft_target",
        "eagle3",
    }


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_variant_is_a_whole_repository(rendered: Path, name: str):
    expected = {"preprocessing", "tensorrt_llm", "postprocessing", "forebay", "tensorrt_llm_bls", "ensemble"}
    drafts = {"tensorrt_llm_draft"} if "draft" in variant(name) else set()
    assert set(repository(rendered / name)) == expected | drafts


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_is_left_to_fill_in(rendered: Path, name: str):
    for path in (rendered / name).rglob("*"):
        if path.suffix in {".pbtxt", ".yaml", ".md"}:
            assert "${" not in path.read_text(), path
    allowed = {"TENSORRT_LLM_EXAMPLES", "TRITON_LAUNCHER", "BASH_SOURCE", "1"}
    for script in SCRIPTS:
        assert set(re.findall(r"\$\{(\w+)", (rendered / name / script).read_text())) <= allowed


@pytest.mark.parametrize("name", ENGINES)
def test_each_step_of_the_ensemble_gets_what_it_needs_in_the_type_it_needs(rendered: Path, name: str):
    models = repository(rendered / name)
    ensemble = models["ensemble"]
    known = tensors(ensemble.input)
    for step in ensemble.ensemble_scheduling.step:
        model = models[step.model_name]
        takes, gives = tensors(model.input), tensors(model.output)
        required = {field.name for field in model.input if not field.optional}
        assert required <= set(step.input_map), f"{step.model_name} lacks an input"
        for theirs, ours in step.input_map.items():
            assert known[ours] == takes[theirs], f"{step.model_name}.{theirs}"
        known |= {ours: gives[theirs] for theirs, ours in step.output_map.items()}
    for output, data_type in tensors(ensemble.output).items():
        assert known[output] == data_type


@pytest.mark.parametrize("name", ENGINES)
def test_every_input_of_the_ensemble_is_used(rendered: Path, name: str):
    ensemble = repository(rendered / name)["ensemble"]
    used = {ours for step in ensemble.ensemble_scheduling.step for ours in step.input_map.values()}
    assert set(tensors(ensemble.input)) <= used


@pytest.mark.parametrize("name", ENGINES)
def test_a_client_meets_the_same_tensors_at_the_bls_model_and_at_the_ensemble(rendered: Path, name: str):
    models = repository(rendered / name)
    bls, ensemble = models["tensorrt_llm_bls"], models["ensemble"]
    assert tensors(bls.output) == tensors(ensemble.output)
    only_bls = tensors(bls.input).keys() - tensors(ensemble.input).keys()
    pictures = {"image_input", "image_bytes_input", "image_url_input", "video_bytes_input"}
    assert only_bls == pictures | {"num_draft_tokens", "use_draft_logits"}
    shared = tensors(ensemble.input)
    assert {tensor: data_type for tensor, data_type in tensors(bls.input).items() if tensor in shared} == shared
    assert {field.name for field in bls.input if not field.optional} == {"text_input", "max_tokens"}
    assert (tensors(models["forebay"].input), tensors(models["forebay"].output)) == (shared, tensors(ensemble.output))


@pytest.mark.parametrize("name", ENGINES)
def test_our_own_model_calls_the_others_as_the_ensemble_does(rendered: Path, name: str):
    ensemble = repository(rendered / name)["ensemble"]
    version = rendered / name / "model_repository" / "forebay" / "1"
    assert json.loads((version / "steps.json").read_text()) == {
        step.model_name: {"inputs": dict(step.input_map), "outputs": dict(step.output_map)}
        for step in ensemble.ensemble_scheduling.step
    }
    compile((version / "model.py").read_text(), "model.py", "exec")


@pytest.mark.parametrize("name", ENGINES)
def test_the_bls_model_names_models_that_exist_and_streams_like_them(rendered: Path, name: str):
    models = repository(rendered / name)
    bls = models["tensorrt_llm_bls"]
    named = {key: parameter(bls, key) for key in bls.parameters if key.endswith("_model_name")}
    assert set(named.values()) <= set(models)
    assert ("tensorrt_llm_draft_model_name" in named) == ("draft" in variant(name))
    assert all(models[each].model_transaction_policy.decoupled for each in [bls.name, "forebay", *named.values()])


@pytest.mark.parametrize("name", ENGINES)
def test_the_model_that_is_called_has_an_instance_for_each_call_the_policy_allows(rendered: Path, name: str):
    backend = policy_part(rendered, name)["backends"][name]
    called = repository(rendered / name)[backend["model"]]
    assert called.name == ("tensorrt_llm_bls" if "draft" in variant(name) else "forebay")
    assert called.instance_group[0].count == backend["max_concurrent"] == variant(name)["concurrent"]


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_reuses_blocks_takes_prompts_in_chunks_and_batches_in_flight(rendered: Path, name: str):
    for model, config in repository(rendered / name).items():
        if config.backend == "tensorrtllm":
            assert parameter(config, "gpt_model_type") == "inflight_fused_batching", model
            for switch in ("enable_kv_cache_reuse", "enable_chunked_context", "exclude_input_in_output"):
                assert parameter(config, switch) == "true"
            # The C++ backend refuses to load without these three, used or not.
            assert {"tokenizer_dir", "guided_decoding_backend", "xgrammar_tokenizer_info_path"} <= set(
                config.parameters
            )
            guided = "json_schema" in variant(name)["capabilities"]
            assert parameter(config, "guided_decoding_backend") == ("xgrammar" if guided else "")


@pytest.mark.parametrize("name", VARIANTS)
def test_the_llm_api_and_the_engines_agree_with_the_policy_on_who_adds_the_bos_token(rendered: Path, name: str):
    backend = policy_part(rendered, name)["backends"][name]
    models = repository(rendered / name)
    if name in ENGINES:
        assert parameter(models["preprocessing"], "add_special_tokens") == str(backend["adds_bos"]).lower()
        assert parameter(models["preprocessing"], "tokenizer_dir") == parameter(
            models["postprocessing"], "tokenizer_dir"
        )
    else:
        assert backend["adds_bos"] is True


@pytest.mark.parametrize("name", VARIANTS)
def test_build_config_and_start_agree_on_the_number_of_gpus(rendered: Path, name: str):
    build, start = ((rendered / name / script).read_text() for script in SCRIPTS)
    assert re.findall(r"^WORLD_SIZE=(\d+)$", build, re.MULTILINE) == [str(gpus(name))]
    started = [int(size) for size in re.findall(r"--world_size=(\d+)", start)]
    if name in ENGINES:
        tensor, pipeline = re.findall(r"--tp_size (\d+)", build), re.findall(r"--pp_size (\d+)", build)
        assert {int(t) * int(p) for t, p in zip(tensor, pipeline, strict=True)} == {gpus(name)}
        assert set(re.findall(r"--workers (\d+)", build)) == {str(gpus(name))}
    else:
        served = yaml.safe_load((rendered / name / "model_repository/tensorrt_llm/1/model.yaml").read_text())
        assert served["tensor_parallel_size"] * served["pipeline_parallel_size"] == gpus(name)
    # An orchestrator and the LLM API start their workers themselves.
    orchestrated = name not in ENGINES or "draft" in variant(name)
    assert started == [1 if orchestrated else gpus(name)]
    assert ("--multi-model" in start) == (name in ENGINES and "draft" in variant(name))


@pytest.mark.parametrize("name", ENGINES)
def test_the_engine_that_is_built_is_the_one_that_is_served(rendered: Path, name: str):
    build, models = (rendered / name / "build.sh").read_text(), repository(rendered / name)
    built = re.findall(r"^run trtllm-build \\\n.*\n  --output_dir (\S+)", build, re.MULTILINE)
    served = [parameter(config, "gpt_model_path") for config in models.values() if config.backend == "tensorrtllm"]
    assert sorted(built) == sorted(served)
    assert f"--max_batch_size {models['tensorrt_llm'].max_batch_size} " in build
    for checkpoint in re.findall(r"--checkpoint_dir (\S+)", build):
        assert f"--output_dir {checkpoint} " in build, "a checkpoint that no step makes"
    if "json_schema" in variant(name)["capabilities"]:
        vocabulary = parameter(models["tensorrt_llm"], "xgrammar_tokenizer_info_path")
        folder = re.findall(r"generate_xgrammar_tokenizer_info.py \\\n.*\n  --output_dir (\S+)", build)
        assert folder == [vocabulary.rpartition("/")[0]]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_llm_api_streams_although_triton_completes_no_config(rendered: Path, name: str):
    """NVIDIA's launcher passes --disable-auto-complete-config, so model.yaml's own `triton_config` is not applied."""
    if name in ENGINES:
        return
    config = repository(rendered / name)["tensorrt_llm"]
    served = yaml.safe_load((rendered / name / "model_repository/tensorrt_llm/1/model.yaml").read_text())
    assert config.model_transaction_policy.decoupled
    assert config.model_transaction_policy.decoupled == served["triton_config"]["decoupled"]
    assert config.max_batch_size == served["triton_config"]["max_batch_size"] == 0


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_are_bash(rendered: Path, name: str, script: str):
    path = rendered / name / script
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    assert path.stat().st_mode & 0o111


@pytest.mark.parametrize("name", VARIANTS)
def test_build_can_show_its_commands_without_running_them(rendered: Path, name: str):
    script = rendered / name / "build.sh"
    # No command of NVIDIA's is on this path: if one ran, the script would fail.
    shown = subprocess.run(["bash", script, "--print"], capture_output=True, text=True, check=False)
    assert (shown.returncode, shown.stderr) == (0, "")
    commands = shown.stdout.splitlines()
    assert len(commands) == len(re.findall(r"^run ", script.read_text(), re.MULTILINE))
    assert commands[0].startswith(f"huggingface-cli download {variant(name)['base']['repository']} ")


@pytest.mark.parametrize("name", VARIANTS)
def test_start_says_what_is_missing_where_the_repository_has_no_code(rendered: Path, name: str):
    done = subprocess.run(["bash", rendered / name / "start.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "--templates" in done.stderr


def policy_part(rendered: Path, name: str) -> dict[str, Any]:
    tree = yaml.safe_load((rendered / name / "forebay.yaml").read_text())
    assert isinstance(tree, dict)
    return tree


@pytest.mark.parametrize("name", VARIANTS)
def test_the_policy_part_names_the_model_that_clients_call(rendered: Path, name: str):
    part = policy_part(rendered, name)
    assert set(part) == {"backends", "models"}
    backend, model = part["backends"][name], part["models"][name]
    assert backend["kind"] == "triton"
    assert backend["model"] in repository(rendered / name)
    assert model["backends"] == [name]
    assert model["capabilities"] == variant(name)["capabilities"]
    assert ("tools" in model["capabilities"]) == (backend["tool_format"] != "none")
    assert model["context_window"] > model["max_output_tokens"]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_policy_part_makes_a_policy(rendered: Path, name: str, tmp_path: Path):
    part = policy_part(rendered, name)
    (tmp_path / "folder").mkdir()
    part["backends"][name]["model_folder"] = "folder"
    policy = tmp_path / "policy.yaml"
    policy.write_text(yaml.safe_dump({"name": "gpu", **part}))
    loaded = load_policy(policy, {}, template_fault)
    assert loaded.warnings == ()
    backend = loaded.file.backends[name]
    assert isinstance(backend, TritonBackendSpec)
    assert (backend.draft_tokens is not None) == (variant(name).get("draft") is not None)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_price_is_what_an_hour_costs_over_what_it_makes(rendered: Path, name: str):
    cost, price = variant(name)["cost"], policy_part(rendered, name)["models"][name]["price"]
    output = gpus(name) * cost["usd_per_gpu_hour"] / (cost["output_tokens_per_second"] * 3600) * 1e6
    assert price["output"] == pytest.approx(output, abs=5e-5)
    assert price["input"] == pytest.approx(output * cost["prompt_token_share"], abs=5e-5)
    # The sum that stands above the price comes to the price.
    text = (rendered / name / "forebay.yaml").read_text()
    hour, tokens, shown = map(float, re.findall(r"output ([\d.]+) / ([\d.]+) = ([\d.]+);", text)[0])
    assert shown == price["output"] == pytest.approx(hour / tokens, rel=1e-3)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_field_of_a_card_says_something(rendered: Path, name: str):
    card = (rendered / name / "MODEL_CARD.md").read_text()
    fields = dict(re.findall(r"^\| ([A-Z][^|]+) \| (.+) \|$", card, re.MULTILINE))
    assert set(fields) == {
        "Base model", "Made from it", "Weights", "Calibration", "KV cache", "Draft model", "Licence", "Context window",
        "Capabilities", "Tool calls", "Quality", "Source", "Hardware", "Software",
    }  # fmt: skip
    assert all(value.strip() for value in fields.values())
    # A figure has a source, and what has no source says that it was not measured.
    assert fields["Source"].startswith("https://") or "Not measured" in fields["Quality"]
    assert "By arithmetic, not measured" in card


@pytest.mark.parametrize("name", VARIANTS)
def test_the_readme_lists_each_variant_with_the_memory_it_needs(rendered: Path, name: str):
    card = " ".join((rendered / name / "MODEL_CARD.md").read_text().split())
    found = re.search(r"([\d.]+) GiB on each GPU; (\d+) KiB .* for ([\d,]+) tokens: (\d+) requests", card)
    assert found
    row = next(
        line for line in (TRITON / "README.md").read_text().splitlines() if f"`{name}`" in line and "KiB" in line
    )
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[3:7] == [f"{found[1]} GiB", f"{found[2]} KiB", found[3], found[4]]


WRONG: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("an unknown key", lambda tree: tree.update(colour="red"), "colour: unknown key"),
    ("a misspelt key", lambda tree: tree["limits"].update(batchs=3), "limits.batchs: unknown key"),
    ("a missing key", lambda tree: tree["base"].pop("layers"), "base.layers: missing"),
    ("a wrong choice", lambda tree: tree["weights"].update(format="fp9"), "weights.format: expected one of"),
    ("text for a number", lambda tree: tree["limits"].update(batch="64"), "limits.batch: expected a positive int"),
    ("true for a number", lambda tree: tree["limits"].update(batch=True), "limits.batch: expected a positive int"),
    ("zero", lambda tree: tree["hardware"].update(tensor_parallel=0), "hardware.tensor_parallel: expected a positive"),
    ("a number for a list", lambda tree: tree["chat"].update(stop=3), "chat.stop: expected a list"),
    ("an unknown capability", lambda tree: tree["capabilities"].append("smell"), "capabilities[3]: expected one of"),
    ("a scalar for a part", lambda tree: tree.update(limits=3), "limits: expected keys and values"),
    ("a name of its own", lambda tree: tree.update(name="x"), "name: a variant is called like its file"),
    ("an FP8 cache without FP8 weights", lambda tree: tree["weights"].update(format="int8_sq"), "kv_cache: "),
    ("heads that do not divide", lambda tree: tree["hardware"].update(tensor_parallel=3), "hardware.tensor_parallel: "),
    (
        "layers that do not divide",
        lambda tree: tree["hardware"].update(pipeline_parallel=5),
        "hardware.pipeline_parallel",
    ),
    ("no room for a prompt", lambda tree: tree["limits"].update(output_tokens=32768), "limits.output_tokens: "),
    ("what the LLM API can not do", lambda tree: tree.update(runtime="llmapi"), "capabilities: the LLM API model has"),
    ("a model that does not fit", lambda tree: tree["base"].update(parameters_billion=70), "limits.sequence_tokens: "),
]


@pytest.mark.parametrize(("edit", "expected"), [pytest.param(edit, text, id=title) for title, edit, text in WRONG])
def test_a_bad_variant_is_refused_with_its_file_and_key(tmp_path: Path, edit: Callable[[Any], object], expected: str):
    tree = variant("llama-3.1-8b-fp8")
    edit(tree)
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump(tree))
    done = render(mine, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert f"{mine}: {expected}" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_unknown_variant_is_refused_with_the_ones_there_are(tmp_path: Path):
    done = render("llama-9", "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "llama-9: no such variant" in done.stderr
    assert all(name in done.stderr for name in VARIANTS)


def test_paths_and_host_are_the_operators(tmp_path: Path):
    done = render(
        "qwen2.5-7b-int4-awq", "--out", tmp_path, "--model-dir", "/w/qwen", "--engine-dir", "/e/qwen",
        "--model-folder", "/tokenizers/qwen", "--host", "gpu-1",
    )  # fmt: skip
    assert done.returncode == 0
    models = repository(tmp_path)
    assert parameter(models["tensorrt_llm"], "gpt_model_path") == "/e/qwen"
    assert parameter(models["preprocessing"], "tokenizer_dir") == "/w/qwen"
    backend = yaml.safe_load((tmp_path / "forebay.yaml").read_text())["backends"]["qwen2.5-7b-int4-awq"]
    assert backend["url"] == "grpc://gpu-1:8001"
    assert backend["metrics_url"] == "http://gpu-1:8002/metrics"
    assert backend["model_folder"] == "/tokenizers/qwen"


@pytest.fixture
def release(rendered: Path, tmp_path: Path) -> Path:
    """A stand-in for all_models of a TensorRT-LLM release: our own configs, a comment, and code of a line each."""
    for folder, name in (("inflight_batcher_llm", "llama-3.1-8b-fp8"), ("llmapi", "llmapi-llama-3.1-8b-fp8")):
        for config in (rendered / name / "model_repository").glob("*/config.pbtxt"):
            target = tmp_path / "all_models" / folder / config.parent.name
            (target / "1" / "lib").mkdir(parents=True)
            (target / "config.pbtxt").write_text("# {a: comment}\n" + config.read_text())
            (target / "1" / "model.py").write_text("print('model')\n")
            (target / "1" / "lib" / "decode.py").write_text("print('decode')\n")
    return tmp_path / "all_models"


@pytest.mark.parametrize(
    ("name", "model"), [("llama-3.1-8b-fp8", "tensorrt_llm_bls"), ("llmapi-llama-3.1-8b-fp8", "tensorrt_llm")]
)
def test_the_code_comes_from_the_release(release: Path, tmp_path: Path, name: str, model: str):
    done = render(name, "--out", tmp_path / "out", "--templates", release)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    code = tmp_path / "out" / "model_repository" / model / "1"
    assert (code / "model.py").read_text() == "print('model')\n"
    assert (code / "lib" / "decode.py").is_file()


DRIFT = [
    ("max_tokens\" data_type: TYPE_INT32", "max_tokens\" data_type: TYPE_UINT32", "max_tokens is TYPE_UINT32"),
    ("name: \"seed\"", "name: \"random_seed\"", "has no seed"),
    ("input [", "input [ { name: \"tenant\" data_type: TYPE_STRING dims: [ 1 ] },", "needs tenant"),
    ("accumulate_tokens", "gather_tokens", "knows no parameter accumulate_tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "expected"), DRIFT)
def test_a_release_that_these_configs_do_not_fit_is_refused(
    release: Path, tmp_path: Path, old: str, new: str, expected: str
):
    theirs = release / "inflight_batcher_llm" / "tensorrt_llm_bls" / "config.pbtxt"
    theirs.write_text(theirs.read_text().replace(old, new, 1))
    done = render("llama-3.1-8b-fp8", "--out", tmp_path / "out", "--templates", release)
    assert done.returncode == 1
    assert f"{theirs}: {expected}" in done.stderr


def test_what_a_release_offers_beyond_is_said(release: Path, tmp_path: Path):
    theirs = release / "inflight_batcher_llm" / "tensorrt_llm_bls" / "config.pbtxt"
    more = 'input [ { name: "priority" data_type: TYPE_FP32 dims: [ 1 ] reshape: { shape: [ ] } optional: true },'
    theirs.write_text(theirs.read_text().replace("input [", more, 1).replace("TYPE_FP32", "${logits_datatype}"))
    done = render("llama-3.1-8b-fp8", "--out", tmp_path / "out", "--templates", release)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "tensorrt_llm_bls: this release also has priority\n"


def test_a_wrong_templates_folder_is_named(tmp_path: Path):
    done = render("llama-3.1-8b-fp8", "--out", tmp_path / "out", "--templates", tmp_path / "nowhere")
    assert done.returncode == 1
    assert "--templates is the folder all_models" in done.stderr


def test_the_list_shows_every_variant():
    done = render("--list")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == VARIANTS
