"""What Forebay calls on an engine: prompt in, text out, and a client that hangs up stops the engine.

NVIDIA's `tensorrt_llm_bls` and `ensemble` answer the same requests, but a cancellation ends with them: the engine goes
on to the last token of an answer that nobody reads. Here a second thread watches for it and sends the engine the stop
request that it knows (`stop`, under the same request id).

One request at a time per instance, from the first token to the last, like `tensorrt_llm_bls`. Every response holds the
whole text so far, so that a character made of several tokens is never cut.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections import deque
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

WATCH_EVERY_S = 0.02
FINAL = pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        # The ensemble's own wiring: which tensor of which model is which tensor of the answer.
        steps = json.loads((Path(__file__).parent / "steps.json").read_text())
        self._before, self._engine = steps["preprocessing"], steps["tensorrt_llm"]
        self._after = steps["postprocessing"]
        self._watched: tuple[str, Any] | None = None
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._answer(request, sender)
            except Exception as error:  # noqa: BLE001  # whatever it is, the client must hear of it and of the end
                sender.send(pb.InferenceResponse(error=pb.TritonError(str(error))))
            sender.send(flags=FINAL)

    def finalize(self) -> None:
        self._ended.set()
        self._watcher.join()

    def _answer(self, request: Any, sender: Any) -> None:
        if sender.is_cancelled():
            return
        tensors = {tensor.name(): tensor for tensor in request.inputs()}
        if tensors["text_input"].as_numpy().shape[0] != 1:
            raise pb.TritonModelException("text_input: one prompt per request")
        wanted = set(request.requested_output_names())
        tensors |= self._run("preprocessing", self._before, tensors)
        request_id = uuid.uuid4().hex
        self._watched = (request_id, sender)
        try:
            so_far: list[Any] = []
            with closing(self._generate(request_id, tensors, wanted)) as generated:
                for made in generated:
                    answer = [self._text(so_far, made), *(made[name] for name in made if name in wanted)]
                    sender.send(pb.InferenceResponse(output_tensors=answer))
        finally:
            self._watched = None

    def _generate(self, request_id: str, tensors: dict[str, Any], wanted: set[str]) -> Any:
        wanted = wanted | {"_TOKENS_BATCH", "_SEQUENCE_LENGTH"}
        names = {theirs: ours for theirs, ours in self._engine["outputs"].items() if ours in wanted}
        inputs = _renamed(tensors, self._engine["inputs"])
        responses = _call("tensorrt_llm", inputs, list(names), request_id).exec(decoupled=True)
        failed = None
        try:
            for response in responses:
                if response.has_error():
                    failed = response.error().message()
                elif made := {names[each.name()]: each for each in response.output_tensors()}:
                    yield {ours: _called(ours, tensor) for ours, tensor in made.items()}
        finally:
            # Left early or not: responses that nobody takes would keep Triton from ever unloading the engine.
            if left := next(responses, None):
                self._stop(request_id)
                failed = failed or (left.error().message() if left.has_error() else None)
                deque(responses, maxlen=0)
        if failed:
            raise pb.TritonModelException(failed)

    def _text(self, so_far: list[Any], made: dict[str, Any]) -> Any:
        length = int(made["_SEQUENCE_LENGTH"].as_numpy()[0][0])
        so_far.append(made["_TOKENS_BATCH"].as_numpy()[:, :, :length])
        tokens = np.concatenate(so_far, axis=2)
        lengths = np.array([[tokens.shape[2]]], dtype=np.int32)
        given = {"_TOKENS_BATCH": pb.Tensor("_TOKENS_BATCH", tokens)}
        given["_SEQUENCE_LENGTH"] = pb.Tensor("_SEQUENCE_LENGTH", lengths)
        return self._run("postprocessing", self._after, given)["text_output"]

    def _run(self, model: str, step: dict[str, dict[str, str]], tensors: dict[str, Any]) -> dict[str, Any]:
        names = step["outputs"]
        response = _call(model, _renamed(tensors, step["inputs"]), list(names)).exec()
        if response.has_error():
            raise pb.TritonModelException(response.error().message())
        return {names[each.name()]: _called(names[each.name()], each) for each in response.output_tensors()}

    def _watch(self) -> None:
        while not self._ended.wait(WATCH_EVERY_S):
            watched = self._watched
            if watched and watched[1].is_cancelled():
                self._stop(watched[0])
                # The engine needs a step to end; until then there is nothing more to say.
                while self._watched is watched:
                    time.sleep(WATCH_EVERY_S)

    def _stop(self, request_id: str) -> None:
        one = np.array([[1]], dtype=np.int32)
        inputs = [pb.Tensor(name, one) for name in ("input_ids", "input_lengths", "request_output_len")]
        inputs.append(pb.Tensor("stop", np.array([[True]])))
        for _ in _call("tensorrt_llm", inputs, [], request_id).exec(decoupled=True):
            pass


def _call(model: str, inputs: list[Any], outputs: list[str], request_id: str = "") -> Any:
    return pb.InferenceRequest(model_name=model, request_id=request_id, inputs=inputs, requested_output_names=outputs)


def _renamed(tensors: dict[str, Any], names: dict[str, str]) -> list[Any]:
    return [_called(theirs, tensors[ours]) for theirs, ours in names.items() if ours in tensors]


def _called(name: str, tensor: Any) -> Any:
    return tensor if tensor.name() == name else pb.Tensor(name, tensor.as_numpy())
