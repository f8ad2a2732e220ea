"""Stands in for NVIDIA's tokenizer: every prompt is the tokens 1, 2, 3."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton_python_backend_utils as pb


class TritonPythonModel:
    def execute(self, requests: list[Any]) -> list[Any]:
        return [pb.InferenceResponse(output_tensors=_tensors(request)) for request in requests]


def _tensors(request: Any) -> list[Any]:
    lines = pb.get_input_tensor_by_name(request, "QUERY").as_numpy().shape[0]
    asked = pb.get_input_tensor_by_name(request, "REQUEST_OUTPUT_LEN").as_numpy()
    values = {
        "INPUT_ID": np.array([[1, 2, 3]] * lines, np.int32),
        "REQUEST_INPUT_LEN": np.full((lines, 1), 3, np.int32),
        "DECODER_INPUT_ID": np.zeros((lines, 1), np.int32),
        "REQUEST_DECODER_INPUT_LEN": np.ones((lines, 1), np.int32),
        "REQUEST_OUTPUT_LEN": asked.astype(np.int32),
        "BAD_WORDS_IDS": np.zeros((lines, 2, 1), np.int32),
        "STOP_WORDS_IDS": np.zeros((lines, 2, 1), np.int32),
        "EMBEDDING_BIAS": np.zeros((lines, 1), np.float32),
        "OUT_END_ID": np.full((lines, 1), 2, np.int32),
        "OUT_PAD_ID": np.full((lines, 1), 2, np.int32),
        "OUT_PROMPT_TABLE_EXTRA_IDS": np.zeros((lines, 1), np.uint64),
    }
    return [pb.Tensor(name, value) for name, value in values.items()]
