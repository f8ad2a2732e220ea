"""A language model that plays what its prompt says (`tests/triton_models.py`: Script), inside the real Triton.

It speaks whatever interface its config.pbtxt declares, and notes what happened to each request in the file that the
environment variable FOREBAY_TRITON_JOURNAL names, one JSON object a line. Parameters of config.pbtxt: `plays`: script,
echo, sums or nothing; `accumulate_tokens`, as TensorRT-LLM's BLS model has it, or `accumulate`, which nobody else knows
of: whether each text is the whole one so far; `final`: whether the end comes with the `last` response or `apart` from
it; `fails`: why it cannot be loaded; `loads_for_s`: how long loading takes.
"""

import hashlib
import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

_POLL_S = 0.002
"""How often a request that waits asks whether it is cancelled, times the number of requests: asking is not free."""

_SHOWN_VALUES = 64
_DTYPES = {"TYPE_STRING": np.object_, "TYPE_INT32": np.int32, "TYPE_FP32": np.float32}
_GAUGES = {"request_metrics": "request_type", "kv_cache_block_metrics": "kv_cache_block_type"}


class Cancelled(Exception):
    """The client has gone."""


class Failed(Exception):
    """The script wants an error here."""


class TritonPythonModel:
    def initialize(self, args):
        self.config = json.loads(args["model_config"])
        self.name, self.version = args["model_name"], args["model_version"]
        self.parameters = {key: value["string_value"] for key, value in self.config["parameters"].items()}
        self.outputs = {output["name"]: output["data_type"] for output in self.config["output"]}
        self.batched = self.config["max_batch_size"] > 0
        self.decoupled = self.config.get("model_transaction_policy", {}).get("decoupled", False)
        self.ending = threading.Event()
        self.threads = set()
        self.families = {}
        self.metrics = {}
        time.sleep(float(self.parameters.get("loads_for_s", "0")))
        if why := self.parameters.get("fails"):
            self.note("refused", why=why)
            raise pb_utils.TritonModelException(why)
        self.note("loaded")

    def execute(self, requests):
        for request in requests:
            thread = threading.Thread(target=self._serve, args=(request, request.get_response_sender()), daemon=True)
            self.threads.add(thread)
            thread.start()

    def finalize(self):
        self.ending.set()
        for thread in list(self.threads):
            thread.join()
        self.note("unloaded")

    def note(self, event, request_id="", **more):
        line = {"event": event, "model": self.name, "id": request_id, "at_s": time.monotonic(), **more}
        # In one write each, since several models write to it.
        with Path(os.environ["FOREBAY_TRITON_JOURNAL"]).open("ab", buffering=0) as journal:
            journal.write(json.dumps(line).encode() + b"\n")

    def _serve(self, request, sender):
        request_id = request.request_id()
        tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        self.note("received", request_id, tensors=_shown(tensors))
        turn = _Turn(self, sender, tensors)
        try:
            turn.play()
            self.note("finished", request_id, after=turn.sent)
        except Cancelled:
            self.note("cancelled", request_id, after=turn.sent)
            _fail(sender, "cancelled by the client", "CANCELLED")
        except Failed as failure:
            self.note("failed", request_id, after=turn.sent)
            _fail(sender, *failure.args)
        except Exception as error:  # noqa: BLE001 - a mistake in a script is for its author to see
            self.note("broke", request_id, why=repr(error))
            _fail(sender, f"the scripted model broke: {error!r}", "INTERNAL")
        finally:
            self.threads.discard(threading.current_thread())

    def publish(self, gauges):
        """Show `gauges`, as {"request_metrics": {"waiting": 7}}, under TensorRT-LLM's names."""
        for family, values in gauges.items():
            if family not in self.families:
                self.families[family] = pb_utils.MetricFamily(
                    name=f"nv_trt_llm_{family}", description=f"TRT LLM {family}", kind=pb_utils.MetricFamily.GAUGE
                )
            for kind, value in values.items():
                if (family, kind) not in self.metrics:
                    labels = {"model": self.name, "version": self.version, _GAUGES[family]: kind}
                    self.metrics[family, kind] = self.families[family].Metric(labels=labels)
                self.metrics[family, kind].set(value)


class _Turn:
    """One request played."""

    def __init__(self, model, sender, tensors):
        self.model = model
        self.sender = sender
        self.tensors = tensors
        self.prompt = tensors["text_input"].flat[0].decode() if "text_input" in tensors else ""
        self.script = _script(self.prompt)
        self.streams = bool(self._value("stream", False) or self._value("streaming", False))
        self.sent = 0
        self.text = ""
        self.log_probs = []
        self.tokens = 0

    def play(self):
        plays = self.model.parameters.get("plays", "script")
        if plays == "sums":
            total = np.sum(self.tensors["INPUT0"], axis=-1, keepdims=True)
            self._send({"OUTPUT0": total.astype(np.float32)}, final=True)
            return
        if self.streams and not self.model.decoupled:
            raise Failed("Streaming is only supported in decoupled mode.", "INTERNAL")
        if self.model.batched and self.tensors["text_input"].shape[0] != 1:
            raise Failed("expected batch size 1", "INVALID_ARG")
        self.model.publish(self.script.get("metrics", {}))
        if plays == "echo":
            self.script = {"pieces": [json.dumps(_shown(self.tensors))]}
        self._play()

    def _play(self):
        pieces = [piece if isinstance(piece, dict) else {"text": piece} for piece in self.script["pieces"]]
        apart = self._script_or_parameter("final", "apart") == "apart"
        for number, piece in enumerate(pieces):
            self._misbehave(number)
            self._wait(self.script.get("first_delay_ms" if number == 0 else "delay_ms", 0) / 1000)
            self._take(piece)
            last = number == len(pieces) - 1
            if self.streams:
                self._respond(piece, last=last, final=last and not apart)
        self._misbehave(len(pieces))
        if not self.streams:
            self._respond({**(pieces[-1] if pieces else {}), "tokens": self.tokens}, last=True, final=True)
        elif apart or not pieces:
            self.sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _take(self, piece):
        self.text += piece.get("text", "")
        self.tokens += piece.get("tokens", 1)
        self.log_probs += piece.get("log_probs", [])

    def _misbehave(self, number):
        """Do what the script wants to happen before piece `number`."""
        if self.script.get("crash_after") == number:
            os._exit(1)
        if self.script.get("error_after") == number:
            raise Failed(self.script.get("error", "boom"), self.script.get("code", "INTERNAL"))
        if self.script.get("hang_after") == number:
            self._wait(float("inf"))

    def _wait(self, seconds):
        until = time.monotonic() + seconds
        while True:
            if self.model.ending.is_set():
                raise Failed("the model is unloaded", "UNAVAILABLE")
            if not self.script.get("ignores_cancel") and self.sender.is_cancelled():
                raise Cancelled
            left = until - time.monotonic()
            if left <= 0:
                return
            self.model.ending.wait(min(left, _POLL_S * max(1, len(self.model.threads))))

    def _respond(self, piece, *, last, final):
        outputs = self._outputs(piece, last)
        garbage = piece.get("garbage")
        if garbage == "no_text":
            del outputs["text_output"]
        elif garbage == "no_outputs":
            outputs = {}
        elif garbage == "two_texts":
            outputs["text_output"] = self._shaped([self._text(piece).encode()] * 2, "TYPE_STRING")
        elif garbage == "no_texts":
            outputs["text_output"] = self._shaped([], "TYPE_STRING")
        elif garbage == "not_utf8":
            outputs["text_output"] = self._shaped([b"\xff\xfe"], "TYPE_STRING")
        elif garbage == "number":
            outputs["text_output"] = self._shaped([7], "TYPE_INT32")
        self._send(outputs, final=final)

    def _outputs(self, piece, last):
        new = [*piece.get("log_probs", [])] if self.streams else self.log_probs
        counts = self.script.get("counts", "each")
        counted = counts == "each" or (counts == "last" and last)
        reason = self.script.get("finish_reason", "stop") if last else None
        outputs = {"text_output": [self._text(piece).encode()]}
        if self._value("return_log_probs", False):
            outputs |= {"cum_log_probs": [sum(self.log_probs)], "output_log_probs": [new]}
        if counted and self._value("return_num_input_tokens", False):
            outputs["num_input_tokens"] = [self.script.get("prompt_tokens", 7)]
        if counted and self._value("return_num_output_tokens", False):
            outputs["num_output_tokens"] = [piece.get("tokens", 1) + self._prompt_tokens_shown()]
        if self._value("return_finish_reason", False):
            outputs["finish_reason"] = [str(reason).encode()]
        if self._value("return_stop_reason", False):
            outputs["stop_reason"] = [str(self.script.get("stop_reason") if last else None).encode()]
        if self._value("return_cumulative_logprob", False):
            outputs["cumulative_logprob"] = [sum(self.log_probs)]
        offered = self.model.outputs
        return {name: self._shaped(value, offered[name]) for name, value in outputs.items() if name in offered}

    def _text(self, piece):
        if not self.streams:
            return (self.prompt if self._shows_prompt() else "") + self.text
        accumulates = "true" in (self.model.parameters.get(name) for name in ("accumulate_tokens", "accumulate"))
        return self.text if accumulates else piece.get("text", "")

    def _shows_prompt(self):
        if self.streams:
            return False
        names = ("exclude_input_in_output", "sampling_param_exclude_input_from_output")
        return not any(self._value(name, False) for name in names)

    def _prompt_tokens_shown(self):
        return self.script.get("prompt_tokens", 7) if self._shows_prompt() else 0

    def _send(self, outputs, *, final):
        if not self.script.get("ignores_cancel") and self.sender.is_cancelled():
            raise Cancelled
        response = pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in outputs.items()])
        self.sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0)
        self.sent += 1

    def _shaped(self, value, data_type):
        return np.array([value] if self.model.batched else value, dtype=_DTYPES[data_type])

    def _value(self, name, default):
        return self.tensors[name].flat[0].item() if name in self.tensors else default

    def _script_or_parameter(self, name, default):
        return self.script.get(name, self.model.parameters.get(name, default))


def _script(prompt):
    """The script in `prompt`, which may stand inside a chat template's text; else a greeting."""
    start = prompt.find('{"script": ')
    return (
        json.JSONDecoder().raw_decode(prompt, start)[0]["script"]
        if start >= 0
        else {"pieces": ["Hello", " there", "!"]}
    )


def _shown(tensors):
    return {name: _shown_tensor(value) for name, value in tensors.items()}


def _shown_tensor(value):
    numbers = value.dtype != np.object_
    shown = {"dtype": str(value.dtype) if numbers else "bytes", "shape": list(value.shape)}
    if value.size > _SHOWN_VALUES:
        return {**shown, "sha256": hashlib.sha256(value.tobytes()).hexdigest()}
    values = value.flatten().tolist()
    return {**shown, "values": values if numbers else [word.decode(errors="replace") for word in values]}


def _fail(sender, message, code):
    error = pb_utils.TritonError(message, getattr(pb_utils.TritonError, code))
    sender.send(pb_utils.InferenceResponse(error=error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
