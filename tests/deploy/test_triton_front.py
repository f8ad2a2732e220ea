"""The model that Forebay calls, on a real Triton: the repository as it is rendered, with stand-ins for the engine."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc.aio as grpcclient

from tests.triton import TritonServer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_loop")]

HERE = Path(__file__).parent
RENDER = HERE.parents[1] / "deploy" / "triton" / "gpu" / "render.py"
FAILS, LATE = 777, 888


def write(repository: Path) -> None:
    """The small variant as it is rendered: but Python for the engine's backend, and two processes for 32."""
    out = repository.parent / "rendered"
    subprocess.run([sys.executable, RENDER, "llama-3.1-8b-fp8", "--out", out], check=True, capture_output=True)
    for model in ("preprocessing", "tensorrt_llm", "postprocessing", "forebay", "ensemble"):
        folder = Path(shutil.copytree(out / "model_repository" / model, repository / model))
        config = (folder / "config.pbtxt").read_text()
        config = (
            config.replace('"tensorrtllm"', '"python"').replace("count: 32", "count: 2").replace("count: 5", "count: 1")
        )
        (folder / "config.pbtxt").write_text(config)
        if (HERE / "engine" / f"{model}.py").is_file():
            shutil.copyfile(HERE / "engine" / f"{model}.py", folder / "1" / "model.py")


@pytest.fixture(scope="module")
def server(triton_installation: Any) -> Iterator[Any]:
    triton = TritonServer(triton_installation, write)
    try:
        yield triton.start()
    finally:
        triton.close()


def tensor(name: str, value: Any, datatype: str) -> Any:
    array = np.array(value)
    made = grpcclient.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array.astype(object) if datatype == "BYTES" else array)
    return made


async def ask(
    server: Any, tokens: int, *, leave_after: int | None = None, leave_at_s: float | None = None, prompts: int = 1
) -> tuple[list[str], str | None]:
    """The texts of the responses, and the error that ended them. Hangs up after some responses, or after a while."""
    texts: list[str] = []

    async def requests() -> AsyncIterator[dict[str, Any]]:
        inputs = [
            tensor("text_input", [[b"hello"]] * prompts, "BYTES"),
            tensor("max_tokens", np.full((prompts, 1), tokens, np.int32), "INT32"),
            tensor("stream", [[True]] * prompts, "BOOL"),
            tensor("temperature", np.full((prompts, 1), 0.5, np.float32), "FP32"),
        ]
        outputs = [grpcclient.InferRequestedOutput(name) for name in ("text_output", "num_output_tokens")]
        yield {"model_name": "forebay", "inputs": inputs, "outputs": outputs, "request_id": "1"}
        if leave_after is not None:
            await asyncio.Event().wait()

    async with grpcclient.InferenceServerClient(server.grpc_address) as client:
        stream = client.stream_infer(requests())
        if leave_at_s is not None:
            asyncio.get_running_loop().call_later(leave_at_s, stream.cancel)
        try:
            async for result, error in stream:
                if error is not None:
                    return texts, str(error)
                texts.append(result.as_numpy("text_output").flat[0].decode())
                assert result.as_numpy("num_output_tokens").flat[0] == len(texts)
                if len(texts) == leave_after:
                    stream.cancel()
        except asyncio.CancelledError:
            pass
    return texts, None


def made(server: Any, asked: int) -> int:
    """The tokens that the engine made for the request for `asked`; no two tests ask for the same number."""
    return int(server.event("made", request_id=str(asked))["tokens"])


async def test_every_response_holds_the_text_so_far(server: Any):
    assert await ask(server, 4) == (["0", "0 1", "0 1 2", "0 1 2 3"], None)


async def test_a_client_that_hangs_up_stops_the_engine(server: Any):
    texts, _ = await ask(server, 1000, leave_after=5)
    assert len(texts) == 5
    assert made(server, 1000) < 100


async def test_a_client_that_hangs_up_before_the_first_token_stops_the_engine(server: Any):
    assert await ask(server, LATE, leave_after=1000, leave_at_s=0.2) == ([], None)
    assert made(server, LATE) < 2


async def test_an_error_of_the_engine_is_the_clients(server: Any):
    texts, error = await ask(server, FAILS)
    assert texts == []
    assert error is not None
    assert "out of order" in error


async def test_an_answer_that_can_not_be_written_stops_the_engine(server: Any):
    texts, error = await ask(server, 2000)
    assert len(texts) == 59
    assert error is not None
    assert "no text for these tokens" in error
    assert made(server, 2000) < 200


async def test_two_prompts_in_one_request_are_refused(server: Any):
    texts, error = await ask(server, 4, prompts=2)
    assert texts == []
    assert error is not None
    assert "one prompt per request" in error


async def test_more_clients_than_instances_wait_their_turn(server: Any):
    async with asyncio.TaskGroup() as group:
        answers = [group.create_task(ask(server, 10)) for _ in range(6)]
    assert {len(answer.result()[0]) for answer in answers} == {10}


def test_the_repository_is_loaded_whole(server: Any):
    for model in ("preprocessing", "tensorrt_llm", "postprocessing", "forebay", "ensemble"):
        assert server.is_ready(model)
