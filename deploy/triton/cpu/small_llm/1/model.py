"""llama.cpp behind the tensors of TensorRT-LLM's `tensorrt_llm_bls`, in Triton's Python backend.

Parameters of config.pbtxt: `gguf`, a file of the folder that the environment variable FOREBAY_MODELS names (or a path);
`slots`, answers computed at once; `n_ctx`, context tokens of each; `threads`. What llama.cpp cannot do as asked is
refused with an error that names the tensor.

As in TensorRT-LLM, without `top_k` and `top_p` the likeliest token is taken whatever the temperature; the counts, where
asked for, come with every response and `num_output_tokens` is that response's own; the prompt precedes the answer
unless `exclude_input_in_output` or `stream`. Unlike it, a stop word is not part of the text, and `end_id` and `pad_id`
are ignored: the weights know their own.
"""

import json
import os
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
import xllamacpp

_PROMPT_BATCH_TOKENS = 32
"""A cancellation is seen between two batches. 512 would process prompts by at most a tenth faster."""

_TOKENS_PER_BLOCK = 32
"""llama.cpp knows no blocks; this is how its cells are reported in TensorRT-LLM's metrics."""

_LOOK_EVERY_S = 0.05
"""How often waiting requests are asked whether they are cancelled, and the metrics are brought up to date."""

_WARNINGS = 2

_REFUSED = (
    *("decoder_text_input", "image_input", "image_bytes_input", "image_url_input", "video_bytes_input", "bad_words"),
    *("prompt_embedding_table", "prompt_vocab_size", "prompt_table_extra_id", "num_draft_tokens", "use_draft_logits"),
    *("lora_task_id", "lora_weights", "lora_config", "return_context_logits", "return_generation_logits"),
)
_ONE_ONLY = ("num_return_sequences", "beam_width", "length_penalty")
_SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "seed": "seed",
    "repetition_penalty": "repeat_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
_SEEDS = 1 << 32


class Refused(Exception):
    """The request cannot be served as it is; the message is for the client."""


@dataclass
class Call:
    """One request on its way."""

    request: object
    sender: object
    prompt: str
    body: dict
    stream: bool
    exclude_input: bool
    log_probs: bool
    wants: frozenset
    arrived_ns: int
    scheduled_ns: int = 0
    first_token_ns: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    tokens: int = 0
    text: list = field(default_factory=list)
    values: list = field(default_factory=list)
    error: str = ""

    @property
    def in_context(self):
        return self.first_token_ns == 0

    @property
    def blocks(self):
        return -(-(self.prompt_tokens + self.tokens) // _TOKENS_PER_BLOCK)


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        self.slots = int(parameters["slots"])
        self.context_tokens = int(parameters["n_ctx"])
        weights = Path(os.environ.get("FOREBAY_MODELS", "."), parameters["gguf"])
        if not weights.exists():
            raise pb_utils.TritonModelException(f"{weights} is missing: FOREBAY_MODELS must name the weights' folder")
        self.engine = xllamacpp.Server(_params(weights, self.slots, self.context_tokens, int(parameters["threads"])))
        self.lock = threading.Condition()  # the slots' threads wait on it, and nobody else
        self.waiting = deque()
        self.running = []
        self.ending = threading.Event()
        self.gauges = _Gauges(args["model_name"], args["model_version"])
        work = [threading.Thread(target=self._work, daemon=True) for _ in range(self.slots)]
        self.threads = [*work, threading.Thread(target=self._look_around, daemon=True)]
        for thread in self.threads:
            thread.start()

    def execute(self, requests):
        """Queue them and return at once: their answers are sent by the slots' threads."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                call = _call(request, sender, self.context_tokens)
            except Refused as refusal:
                _fail(sender, str(refusal), pb_utils.TritonError.INVALID_ARG)
                continue
            with self.lock:
                self.waiting.append(call)
                self.lock.notify()

    def finalize(self):
        """Answers under way are cut off: Triton asks only once nobody waits for one."""
        self.ending.set()
        with self.lock:
            self.lock.notify_all()
        for thread in self.threads:
            thread.join()
        self.engine = None

    def _work(self):
        while (call := self._next()) is not None:
            try:
                self._answer(call)
            except Exception as error:  # noqa: BLE001 - whatever it is, the client hears of it
                pb_utils.Logger.log_error(f"llama.cpp: {error!r}")
                _fail(call.sender, str(error), pb_utils.TritonError.INTERNAL)
            finally:
                with self.lock:
                    self.running.remove(call)

    def _next(self):
        with self.lock:
            self.lock.wait_for(lambda: self.waiting or self.ending.is_set())
            if self.ending.is_set():
                return None
            call = self.waiting.popleft()
            call.scheduled_ns = time.monotonic_ns()
            self.running.append(call)
            return call

    def _answer(self, call):
        def heard(chunk):
            self._heard(call, chunk)
            return self.ending.is_set() or bool(call.error) or call.sender.is_cancelled()

        if not call.sender.is_cancelled():
            self.engine.handle_completions(call.body, heard)
        if call.error:
            _fail(call.sender, call.error, pb_utils.TritonError.INVALID_ARG)
        elif call.sender.is_cancelled() or self.ending.is_set():
            _fail(call.sender, "cancelled", pb_utils.TritonError.CANCELLED)
        else:
            _finish(call)

    def _heard(self, call, chunk):
        if "error" in chunk:
            call.error = _with_tensor(chunk["error"])
            return
        if progress := chunk.get("prompt_progress"):
            call.prompt_tokens, call.reused_tokens = progress["total"], progress["cache"]
        if usage := chunk.get("usage"):
            call.prompt_tokens = usage["prompt_tokens"]
        choice = chunk["choices"][0]
        if progress or choice["finish_reason"]:
            return
        call.first_token_ns = call.first_token_ns or time.monotonic_ns()
        call.tokens += 1
        call.text.append(choice["text"])
        if choice["logprobs"]:
            call.values += [token["logprob"] for token in choice["logprobs"]["content"]]
        if call.stream and not call.sender.is_cancelled():
            _send(call, choice["text"], 1, final=False)

    def _look_around(self):
        """Answer the waiting ones that are cancelled, and say how busy the slots are."""
        while not self.ending.wait(_LOOK_EVERY_S):
            with self.lock:
                cancelled = [call for call in self.waiting if call.sender.is_cancelled()]
                for call in cancelled:
                    self.waiting.remove(call)
                waiting, running = len(self.waiting), list(self.running)
            for call in cancelled:
                _fail(call.sender, "cancelled", pb_utils.TritonError.CANCELLED)
            self.gauges.requests(
                active=waiting + len(running),
                max=self.slots,
                scheduled=len(running),
                context=sum(call.in_context for call in running),
                waiting=waiting,
            )
            blocks = self.slots * self.context_tokens // _TOKENS_PER_BLOCK
            used = sum(call.blocks for call in running)
            self.gauges.blocks(
                max=blocks, free=blocks - used, used=used, fraction=used / blocks, tokens_per=_TOKENS_PER_BLOCK
            )


class _Gauges:
    """The gauges of TensorRT-LLM's backend, under their own names. A family that nobody refers to disappears."""

    def __init__(self, model, version):
        self.labels = {"model": model, "version": version}
        self.families = {
            name: pb_utils.MetricFamily(name=f"nv_trt_llm_{name}", description=what, kind=pb_utils.MetricFamily.GAUGE)
            for name, what in (
                ("request_metrics", "TRT LLM request metrics"),
                ("kv_cache_block_metrics", "TRT LLM KV cache block metrics"),
            )
        }
        self.metrics = {}
        self.values = {}

    def requests(self, **values):
        self._set("request_metrics", "request_type", values)

    def blocks(self, **values):
        self._set("kv_cache_block_metrics", "kv_cache_block_type", values)

    def _set(self, family, label, values):
        for kind, value in values.items():
            if (family, kind) not in self.metrics:
                self.metrics[family, kind] = self.families[family].Metric(labels={**self.labels, label: kind})
            if self.values.get((family, kind)) != value:
                self.metrics[family, kind].set(value)
                self.values[family, kind] = value


def _params(weights, slots, context_tokens, threads):
    params = xllamacpp.CommonParams()
    params.model.path = str(weights)
    params.n_parallel = slots
    params.n_ctx = slots * context_tokens
    params.n_batch = params.n_ubatch = _PROMPT_BATCH_TOKENS
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.hostnames, params.port = ["127.0.0.1"], 0  # it cannot be told not to listen
    params.n_gpu_layers = 0
    params.fit_params = params.warmup = params.ui = False
    params.cache_ram_mib = 0
    params.cors_origins = ""
    params.offline = True
    params.verbosity = _WARNINGS
    return params


def _call(request, sender, context_tokens):
    """What the tensors ask for. Raises `Refused`."""
    tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
    for name, value in tensors.items():
        if value.shape[0] != 1:
            raise Refused(f"{name}: one prompt per request, not a batch of {value.shape[0]}")

    def value(name, default=None):
        return tensors[name].flat[0].item() if name in tensors and tensors[name].size else default

    for name in _REFUSED:
        if name in tensors and (tensors[name].dtype != np.bool_ or value(name)):
            raise Refused(f"{name}: llama.cpp does not have it")
    for name in _ONE_ONLY:
        if value(name, 1) != 1:
            raise Refused(f"{name}: llama.cpp has no beams and one answer per request: it must be 1")
    prompt = _text(tensors["text_input"])
    log_probs = bool(value("return_log_probs"))
    wanted = ("return_num_input_tokens", "return_num_output_tokens", "return_perf_metrics")
    return Call(
        request=request,
        sender=sender,
        prompt=prompt,
        body={
            **_sampling(value, context_tokens),
            **_stop_and_bias(tensors),
            **_guide(tensors),
            **_length(value),
            **({"logprobs": 1, "n_probs": 1} if log_probs else {}),
            "prompt": prompt,
            "stream": True,
            "return_progress": True,
            "cache_prompt": True,
        },
        stream=bool(value("stream")),
        exclude_input=bool(value("exclude_input_in_output")) or bool(value("stream")),
        log_probs=log_probs,
        wants=frozenset(name for name in wanted if value(name)),
        arrived_ns=time.monotonic_ns(),
    )


def _sampling(value, context_tokens):
    # repeat_last_n: penalties look at the whole text, as TensorRT-LLM's do. min_p: it has none.
    body = {"repeat_last_n": context_tokens, "min_p": 0.0, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    body |= {ours: value(theirs) for theirs, ours in _SAMPLING.items() if value(theirs) is not None}
    if not value("top_k") and not value("top_p"):
        body["top_k"] = 1
    if "seed" in body:
        body["seed"] %= _SEEDS
    return body


def _length(value):
    max_tokens, min_tokens = value("max_tokens"), value("min_tokens", 0)
    if max_tokens < 1:
        raise Refused("max_tokens: it must be 1 or more")
    if 1 < min_tokens < max_tokens:
        raise Refused("min_tokens: llama.cpp can only ignore the end altogether: it must be max_tokens, or 1 or less")
    return {"n_predict": max_tokens, "ignore_eos": min_tokens > 1}


def _stop_and_bias(tensors):
    body = {}
    if stop := _texts(tensors, "stop_words"):
        body["stop"] = stop
    if words := _texts(tensors, "embedding_bias_words"):
        weights = tensors.get("embedding_bias_weights", np.zeros(0)).flatten().tolist()
        if len(weights) != len(words):
            raise Refused(f"embedding_bias_weights: {len(weights)} of them for {len(words)} embedding_bias_words")
        body["logit_bias"] = [[word, weight] for word, weight in zip(words, weights, strict=True)]
    return body


def _guide(tensors):
    kind = next(iter(_texts(tensors, "guided_decoding_guide_type")), "")
    guide = next(iter(_texts(tensors, "guided_decoding_guide")), "")
    if kind in ("json_schema", "ebnf_grammar") and not guide:
        raise Refused(f"guided_decoding_guide: a guide of type {kind} needs one")
    if kind == "ebnf_grammar":
        return {"grammar": guide}
    if kind == "json":
        return {"json_schema": {"type": "object"}}
    if kind == "json_schema":
        try:
            return {"json_schema": json.loads(guide)}
        except ValueError as error:
            raise Refused(f"guided_decoding_guide: {error}") from error
    if kind:
        raise Refused(f"guided_decoding_guide_type: llama.cpp has json, json_schema and ebnf_grammar, not {kind}")
    return {}


def _with_tensor(error):
    """What llama.cpp objects to, named as the client knows it."""
    if error.get("type") == "exceed_context_size_error":
        return f"text_input: {error['message']}"
    if "grammar" in error["message"] or "schema" in error["message"]:
        return f"guided_decoding_guide: {error['message']}"
    return error["message"]


def _text(tensor):
    return tensor.flat[0].decode()


def _texts(tensors, name):
    return [word.decode() for word in tensors[name].flat if word] if name in tensors else []


def _finish(call):
    """Send the whole text, or the last response of a stream: it has no text, and says that nothing follows."""
    if call.stream:
        _send(call, "", 0, final=True)
    else:
        text = "".join(call.text)
        prompt_tokens = 0 if call.exclude_input else call.prompt_tokens
        _send(call, text if call.exclude_input else call.prompt + text, call.tokens + prompt_tokens, final=True)


def _send(call, text, tokens, *, final):
    outputs = {"text_output": np.array([[text.encode()]], dtype=np.object_)}
    if call.log_probs:
        new = call.values[-1:] if tokens == 1 and call.stream else [] if call.stream else call.values
        outputs["cum_log_probs"] = np.array([[sum(call.values)]], dtype=np.float32)
        outputs["output_log_probs"] = np.array([[new]], dtype=np.float32)
    if "return_num_input_tokens" in call.wants:
        outputs["num_input_tokens"] = np.array([[call.prompt_tokens]], dtype=np.int32)
    if "return_num_output_tokens" in call.wants:
        outputs["num_output_tokens"] = np.array([[tokens]], dtype=np.int32)
    if "return_perf_metrics" in call.wants and final:
        outputs |= _performance(call)
    response = pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in outputs.items()])
    call.sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0)


def _performance(call):
    times = {
        "arrival_time_ns": call.arrived_ns,
        "first_scheduled_time_ns": call.scheduled_ns,
        "first_token_time_ns": call.first_token_ns,
        "last_token_time_ns": time.monotonic_ns(),
    }
    blocks = {
        "kv_cache_alloc_total_blocks": call.blocks,
        "kv_cache_reused_blocks": call.reused_tokens // _TOKENS_PER_BLOCK,
        "kv_cache_alloc_new_blocks": call.blocks - call.reused_tokens // _TOKENS_PER_BLOCK,
    }
    return {
        **{name: np.array([[value]], dtype=np.int64) for name, value in times.items()},
        **{name: np.array([[value]], dtype=np.int32) for name, value in blocks.items()},
    }


def _fail(sender, message, code):
    error = pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
    sender.send(error, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
