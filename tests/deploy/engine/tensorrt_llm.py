"""Stands in for NVIDIA's engine: makes the tokens 0, 1, 2, ... one every 10 ms, until it is told to `stop`.

A cancellation does not reach it, as none reaches an engine behind another model. The number of tokens that are asked
for chooses what else happens; every request notes in the journal how many it made.
"""

from __future__ import annotations

import json
import os
import threading
import time
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

FAILS, LATE = 777, 888
FINAL = pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self._stopped: set[str] = set()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            if pb.get_input_tensor_by_name(request, "stop") is not None:
                self._stopped.add(request.request_id())
                sender.send(flags=FINAL)
            else:
                threading.Thread(target=self._generate, args=(request, sender)).start()

    def _generate(self, request: Any, sender: Any) -> None:
        asked = int(pb.get_input_tensor_by_name(request, "request_output_len").as_numpy().flat[0])
        if asked == FAILS:
            sender.send(pb.InferenceResponse(error=pb.TritonError("the engine is out of order")), flags=FINAL)
            return
        if asked == LATE:
            time.sleep(1.0)
        made = 0
        while made < asked and request.request_id() not in self._stopped:
            sender.send(pb.InferenceResponse(output_tensors=_tensors(made)))
            made += 1
            time.sleep(0.01)
        with open(os.environ["FOREBAY_TRITON_JOURNAL"], "a") as journal:  # noqa: PTH123
            print(json.dumps({"event": "made", "id": str(asked), "tokens": made}), file=journal)
        sender.send(flags=FINAL)


def _tensors(token: int) -> list[Any]:
    values = {
        "output_ids": np.full((1, 1, 1), token, np.int32),
        "sequence_length": np.ones((1, 1), np.int32),
        "output_log_probs": np.full((1, 1, 1), -0.5, np.float32),
        "num_output_tokens": np.full((1, 1), token + 1, np.int32),
    }
    return [pb.Tensor(name, value) for name, value in values.items()]
