"""Stands in for NVIDIA's detokenizer: a token is its number. A text of 60 tokens is one it can not write."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton_python_backend_utils as pb


class TritonPythonModel:
    def execute(self, requests: list[Any]) -> list[Any]:
        return [_response(pb.get_input_tensor_by_name(request, "TOKENS_BATCH").as_numpy()) for request in requests]


def _response(tokens: Any) -> Any:
    if tokens.size == 60:
        return pb.InferenceResponse(error=pb.TritonError("no text for these tokens"))
    text = " ".join(map(str, tokens.flat)).encode()
    return pb.InferenceResponse(output_tensors=[pb.Tensor("OUTPUT", np.array([text], dtype=object))])
