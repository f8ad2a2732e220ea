"""The real Triton: serving real and scripted models, ending without a trace."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from gateway.child_specs import free_loopback_port, triton_child
from gateway.triton_install import (
    Installation,
    Ports,
    place,
    shared_memory_of,
    triton_command,
)
from tests.processes.world import supervised
from tests.triton import TritonServer
from tests.triton_models import BLS, DIALECTS, LLMAPI, Piece, Script, replace, write_model

pytestmark = pytest.mark.slow

Start = Callable[..., TritonServer]


class GrpcStream:
    """One request on a gRPC stream of its own, and the responses so far."""

    def __init__(self, address: str, model: str, request_id: str, batched: bool, **tensors: Any) -> None:
        self.responses: list[grpcclient.InferResult] = []
        self.errors: list[InferenceServerException] = []
        self._came = threading.Condition()
        self._client = grpcclient.InferenceServerClient(address)
        self._client.start_stream(self._receive)
        inputs = [_tensor(name, value, batched) for name, value in tensors.items()]
        self._client.async_stream_infer(
            model, inputs, request_id=request_id, enable_empty_final_response=True, timeout=None
        )

    def texts(self) -> list[str]:
        arrays = [response.as_numpy("text_output") for response in self.responses]
        return [array.flat[0].decode() for array in arrays if array is not None]

    def until(self, reached: Callable[[], bool], within_s: float = 20.0) -> None:
        with self._came:
            assert self._came.wait_for(reached, within_s), (self.texts(), self.errors)

    def until_end(self) -> None:
        def ended() -> bool:
            last = self.responses[-1].get_response() if self.responses else None
            return bool(self.errors) or (last is not None and last.parameters["triton_final_response"].bool_param)

        self.until(ended)

    def cancel(self) -> None:
        self._client.stop_stream(cancel_requests=True)

    def close(self) -> None:
        self._client.stop_stream(cancel_requests=True)
        self._client.close()

    def _receive(self, result: grpcclient.InferResult | None, error: InferenceServerException | None) -> None:
        with self._came:
            if error is not None:
                self.errors.append(error)
            else:
                assert result is not None
                self.responses.append(result)
            self._came.notify_all()


def _tensor(name: str, value: Any, batched: bool) -> grpcclient.InferInput:
    kinds: dict[type, Any] = {str: np.object_, bool: np.bool_, int: np.int32, float: np.float32}
    content = value.encode() if isinstance(value, str) else value
    array = np.array([[content]] if batched else [content], dtype=kinds[type(value)])
    tensor = grpcclient.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    tensor.set_data_from_numpy(array)
    return tensor


@contextmanager
def grpc_stream(
    server: TritonServer, model: str, request_id: str = "", *, batched: bool = True, **tensors: Any
) -> Iterator[GrpcStream]:
    stream = GrpcStream(server.grpc_address, model, request_id, batched, **tensors)
    try:
        yield stream
    finally:
        stream.close()


def _gone(pids: list[int], within_s: float = 10.0) -> bool:
    give_up_at = time.monotonic() + within_s
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < give_up_at:
        time.sleep(0.02)
    return not any(psutil.pid_exists(pid) for pid in pids)


def _gauge(server: TritonServer, model: str, request_type: str) -> float:
    start = f'nv_trt_llm_request_metrics{{model="{model}",request_type="{request_type}"'
    return next(float(line.split()[-1]) for line in server.metrics().splitlines() if line.startswith(start))


# Real models


def test_both_real_models_answer_with_text_and_counts(triton_llms: TritonServer) -> None:
    wanted = {"return_num_input_tokens": True, "return_num_output_tokens": True, "return_log_probs": True}
    for model in ("small_llm", "large_llm"):
        assert triton_llms.is_ready(model)
        answer = triton_llms.generate(
            model, text_input="The capital of France is", max_tokens=8, exclude_input_in_output=True, **wanted
        )
        assert answer["text_output"].strip()
        assert answer["num_input_tokens"] in (5, 6)
        assert answer["num_output_tokens"] == len(answer["output_log_probs"]) == 8
        assert answer["cum_log_probs"] == pytest.approx(sum(answer["output_log_probs"]), rel=1e-4)


def test_a_real_model_streams_over_grpc_and_counts_each_response_by_itself(triton_llms: TritonServer) -> None:
    asked = {"text_input": "The capital of France is", "max_tokens": 8}
    with grpc_stream(triton_llms, "small_llm", **asked, stream=True, return_num_output_tokens=True) as stream:
        stream.until_end()
        counts = [response.as_numpy("num_output_tokens").item() for response in stream.responses]
    whole = triton_llms.generate("small_llm", **asked, exclude_input_in_output=True)
    assert "".join(stream.texts()) == whole["text_output"]
    assert len(stream.texts()) > 1
    assert sum(counts) == 8


def test_a_real_model_answers_after_its_prompt_unless_asked_not_to(triton_llms: TritonServer) -> None:
    answer = triton_llms.generate("small_llm", text_input="One, two,", max_tokens=3, return_num_output_tokens=True)
    assert answer["text_output"].startswith("One, two,")
    assert answer["num_output_tokens"] > 3


@pytest.mark.parametrize(
    ("guide_type", "guide", "allowed"),
    [
        ("ebnf_grammar", 'root ::= "yes" | "no"', r"yes|no"),
        ("json_schema", '{"type": "integer"}', r"\s*-?\d+"),
        ("json", "", r"(?s)\s*\{.*\}\s*"),
    ],
)
def test_a_real_model_is_held_to_a_guide(triton_llms: TritonServer, guide_type: str, guide: str, allowed: str) -> None:
    answer = triton_llms.generate(
        "small_llm",
        text_input="Answer: ",
        max_tokens=64,
        exclude_input_in_output=True,
        guided_decoding_guide_type=guide_type,
        guided_decoding_guide=guide,
    )
    assert re.fullmatch(allowed, answer["text_output"])


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"beam_width": 2}, "beam_width"),
        ({"min_tokens": 2}, "min_tokens"),
        ({"bad_words": ["no"]}, "bad_words"),
        ({"return_context_logits": True}, "return_context_logits"),
        ({"guided_decoding_guide_type": "regex", "guided_decoding_guide": "a+"}, "guided_decoding_guide_type"),
        (
            {"guided_decoding_guide_type": "ebnf_grammar", "guided_decoding_guide": "root ::= ("},
            "guided_decoding_guide",
        ),
        ({"text_input": "word " * 3000}, "text_input"),
    ],
)
def test_a_real_model_refuses_what_it_cannot_do_by_the_tensors_name(
    triton_llms: TritonServer, tensors: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=f'"error":"{named}: '):
        triton_llms.generate("small_llm", **{"text_input": "Hello", "max_tokens": 16, **tensors})


def test_a_real_model_stops_in_the_middle_of_a_prompt_when_it_is_cancelled(triton_llms: TritonServer) -> None:
    with grpc_stream(triton_llms, "small_llm", text_input="word " * 1900, max_tokens=8, stream=True) as stream:
        # Ten seconds of work, of which a fraction is done when it is cancelled.
        while _gauge(triton_llms, "small_llm", "context") != 1:
            time.sleep(0.01)
        stream.cancel()
        cancelled_at = time.monotonic()
        while _gauge(triton_llms, "small_llm", "active") != 0:
            assert time.monotonic() < cancelled_at + 5.0
            time.sleep(0.01)
    assert stream.texts() == []


def test_a_real_model_shows_its_queue_and_cache_under_the_names_of_tensorrt_llm(triton_llms: TritonServer) -> None:
    text = triton_llms.metrics()
    for kind in ("active", "max", "scheduled", "context", "waiting"):
        assert f'nv_trt_llm_request_metrics{{model="small_llm",request_type="{kind}",version="1"}}' in text
    for kind in ("max", "free", "used", "fraction", "tokens_per"):
        assert (
            f'nv_trt_llm_kv_cache_block_metrics{{kv_cache_block_type="{kind}",model="small_llm",version="1"}}' in text
        )


# Scripted models


def test_every_dialect_plays_its_script(triton: TritonServer) -> None:
    script = str(Script(pieces=["one ", "two ", "three"]))
    asked = {"text_input": script, "max_tokens": 9, "stream": True}
    texts = {
        model: [event["text_output"] for event in triton.generate_stream(model, **asked)]
        for model in ("bls", "bls_cumulative", "ensemble_old")
    }
    texts["llmapi"] = [
        event["text_output"] for event in triton.generate_stream("llmapi", text_input=script, streaming=True)
    ]
    deltas, wholes = ["one ", "two ", "three"], ["one ", "one two ", "one two three"]
    assert texts == {"bls": deltas, "ensemble_old": deltas, "bls_cumulative": wholes, "llmapi": wholes}
    unary = triton.generate("llmapi_unary", text_input=script, sampling_param_exclude_input_from_output=True)
    assert unary["text_output"] == "one two three"
    assert all(triton.is_ready(model) for model in DIALECTS)


def test_a_script_inside_a_chat_templates_text_is_found(triton: TritonServer) -> None:
    prompt = f"<|im_start|>user\n{Script(pieces=['found'])}<|im_end|>\n<|im_start|>assistant\n"
    assert triton.generate_stream("bls", text_input=prompt, max_tokens=1, stream=True)[0]["text_output"] == "found"


@pytest.mark.parametrize("hang_after", [0, 2])
def test_a_cancelled_request_is_seen_by_the_model_before_the_first_token_and_after(
    triton: TritonServer, hang_after: int
) -> None:
    script = str(Script(pieces=["a", "b", "c"], hang_after=hang_after))
    request_id = f"cancel-{hang_after}"
    with grpc_stream(triton, "bls", request_id, text_input=script, max_tokens=9, stream=True) as stream:
        triton.event("received", request_id=request_id)
        stream.until(lambda: len(stream.responses) == hang_after)
        cancelled_at = time.monotonic()
        stream.cancel()
        seen = triton.event("cancelled", request_id=request_id)
    assert seen["after"] == hang_after
    assert seen["at_s"] - cancelled_at < 1.0


def test_an_error_in_the_middle_ends_the_stream(triton: TritonServer) -> None:
    script = str(Script(pieces=["a", "b"], error_after=1, error="out of blocks"))
    events = triton.generate_stream("bls", text_input=script, max_tokens=9, stream=True)
    assert [event.get("text_output") for event in events] == ["a", None]
    assert events[-1]["error"] == "out of blocks"


def test_a_response_may_carry_several_tokens_their_log_probabilities_and_garbage(triton: TritonServer) -> None:
    script = str(Script(pieces=[Piece("a b", tokens=2, log_probs=(-0.5, -0.25)), Piece("c", garbage="no_text")]))
    wanted = {"return_num_output_tokens": True, "return_log_probs": True}
    first, second = triton.generate_stream("bls", text_input=script, max_tokens=9, stream=True, **wanted)
    assert (first["num_output_tokens"], first["output_log_probs"]) == (2, [-0.5, -0.25])
    assert "text_output" not in second


def test_echo_tells_the_tensors_that_came(triton: TritonServer) -> None:
    with grpc_stream(triton, "echo", text_input="hi", max_tokens=3, temperature=0.5, stream=True) as stream:
        stream.until_end()
    assert '"max_tokens": {"dtype": "int32", "shape": [1, 1], "values": [3]}' in stream.texts()[0]
    assert '"temperature": {"dtype": "float32", "shape": [1, 1], "values": [0.5]}' in stream.texts()[0]


def test_a_model_that_is_no_language_model_is_served_as_well(triton: TritonServer) -> None:
    assert triton.generate("broken_interface", INPUT0=[1.0, 2.5])["OUTPUT0"] == 3.5


def test_a_model_can_come_back_with_another_dialect_and_can_fail_to(start_triton: Start) -> None:
    server = start_triton(lambda repository: write_model(repository, "model", BLS))
    assert server.is_ready("model")

    server.write("model", LLMAPI)
    server.load("model")
    assert server.generate_stream("model", text_input="hi", streaming=True)[-1]["text_output"] == "Hello there!"

    server.unload("model")
    assert not server.is_ready("model")
    assert server.is_live()

    server.write("model", replace(BLS, parameters={"fails": "no weights"}))
    with pytest.raises(ValueError, match="no weights"):
        server.load("model")


# Its processes


def test_sigterm_ends_the_server_and_its_models_and_leaves_no_shared_memory(start_triton: Start) -> None:
    server = start_triton()
    pids = [child.pid for child in server.children()]
    assert len(pids) == len(DIALECTS) + 1
    assert shared_memory_of(server.ports) != []
    assert server.stop() == 0
    assert _gone(pids)
    assert shared_memory_of(server.ports) == []


def test_kill_9_leaves_no_model_behind_even_one_that_hangs_and_the_ports_serve_again(start_triton: Start) -> None:
    server = start_triton()
    pids = [child.pid for child in server.children()]
    with grpc_stream(server, "bls", "hangs", text_input=str(Script(hang_after=0)), max_tokens=1, stream=True):
        server.event("received", request_id="hangs")
        server.kill()
        assert _gone(pids, within_s=0.0)
    assert shared_memory_of(server.ports) == []
    server.start()
    assert server.generate_stream("bls", text_input="hi", max_tokens=1, stream=True)[0]["text_output"] == "Hello"


def test_a_model_whose_process_dies_does_not_take_the_others_down(start_triton: Start) -> None:
    server = start_triton()
    with grpc_stream(server, "bls", text_input=str(Script(crash_after=1)), max_tokens=9, stream=True) as stream:
        stream.until(lambda: bool(stream.errors))
    assert server.generate_stream("bls_cumulative", text_input="hi", max_tokens=1, stream=True)
    assert server.is_live()


async def test_the_supervisor_keeps_a_triton_and_ends_it(triton_installation: Installation, runtime: Path) -> None:
    (runtime / "models").mkdir()
    (runtime / "journal").touch()
    write_model(runtime / "models", "model", BLS)
    ports = Ports(http=free_loopback_port(), grpc=free_loopback_port(), metrics=free_loopback_port())
    child = triton_child(
        "triton",
        installation=triton_installation,
        repository=runtime / "models",
        ports=ports,
        env={"FOREBAY_TRITON_JOURNAL": str(runtime / "journal")},
        log_path=runtime / "triton.log",
    )
    async with supervised([child], runtime=runtime) as world:
        first = await world.until("triton", "ready")
        pids = [process.pid for process in psutil.Process(first.pid).children(recursive=True)]
        os.kill(first.pid or 0, signal.SIGKILL)
        await world.until("triton", "ready", times=2)
    assert world.exit_status == 0
    assert _gone(pids)
    assert shared_memory_of(ports) == []


def test_a_model_is_told_what_it_needs_and_no_secret_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FOREBAY_ROOT_SECRET", "OPENAI_API_KEY", "FOREBAY_STORE_URL"):
        monkeypatch.setenv(name, "canary")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    ports = Ports(http=1, grpc=2, metrics=3)
    command = triton_command(place(tmp_path), repository=tmp_path, ports=ports, env={"FOREBAY_MODELS": "/models"})
    assert "canary" not in command.env.values()
    assert (command.env["CUDA_VISIBLE_DEVICES"], command.env["FOREBAY_MODELS"]) == ("1", "/models")
