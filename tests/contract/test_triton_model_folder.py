"""A Triton model whose own files say how it reads a conversation, on the real server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from backends.errors import BackendProtocolError, RequestRejected
from backends.tokenizer import Tokenizer
from backends.triton.backend import TritonBackend
from backends.triton.model import TritonModel
from backends.triton.server import TritonServer as Connection
from tests.backends import tiny_tokenizers
from tests.calls import collect, make_call, whole_of
from tests.triton import TritonServer
from tests.triton_models import Piece, Script

pytestmark = pytest.mark.usefixtures("one_loop")

TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}<assistant>"
PIECES = ("The quick ", "brown fox")


def write_folder(folder: Path, template: str = TEMPLATE, **more: Any) -> Path:
    config = {"chat_template": template, "bos_token": "<s>", "eos_token": "<|im_end|>", **more}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    return tiny_tokenizers.byte_level(path, ["<s>", "<|im_end|>"]).read_bytes()


@pytest.fixture
def folder(tmp_path: Path, tokenizer_json: bytes) -> Path:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json)
    return write_folder(tmp_path)


@pytest.fixture
async def make(triton: TritonServer) -> AsyncIterator[Any]:
    made: list[TritonBackend] = []

    def backend(name: str, **settings: Any) -> TritonBackend:
        connection = Connection(f"grpc://{triton.grpc_address}", backend="a", model=name)
        made.append(TritonBackend("a", connection, TritonModel(name=name, **settings), watch_every_s=0.02))
        return made[-1]

    yield backend
    for each in made:
        await each.aclose()


def says(script: Script) -> list[dict[str, Any]]:
    return [{"role": "user", "content": str(script)}]


async def seen_by(triton: TritonServer, backend: TritonBackend, request_id: str, **fields: Any) -> dict[str, Any]:
    call = make_call(messages=says(Script(pieces=PIECES)), **fields)
    await collect(backend, replace(call, request_id=request_id))
    tensors: dict[str, Any] = triton.event("received", request_id=request_id)["tensors"]
    return tensors


@pytest.mark.parametrize(("adds_bos", "begins"), [(True, "<user>"), (False, "<s><user>")])
async def test_the_prompt_is_rendered_by_the_folders_template_with_one_beginning_token(
    triton: TritonServer, make: Any, folder: Path, adds_bos: bool, begins: str
) -> None:
    backend = make("bls", folder=folder, adds_bos=adds_bos)
    tensors = await seen_by(triton, backend, f"bos-{adds_bos}")
    assert tensors["text_input"]["values"][0].startswith(begins)
    assert tensors["text_input"]["values"][0].endswith("<|im_end|><assistant>")


async def test_what_ends_a_turn_is_a_stop_sequence_beside_the_clients_and_the_operators(
    triton: TritonServer, make: Any, folder: Path
) -> None:
    backend = make("bls", folder=folder, stop=("OPERATOR",))
    assert (await seen_by(triton, backend, "stops", stop="CLIENT"))["stop_words"]["values"] == [
        "CLIENT",
        "OPERATOR",
        "<|im_end|>",
    ]
    said = says(Script(pieces=["Hi", "<|im_", "end|>", "<user>more"]))
    answer = whole_of(await collect(backend, make_call(messages=said)))
    assert answer["choices"][0]["message"]["content"] == "Hi"
    assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [True, False])
async def test_where_the_engine_counts_nothing_its_tokenizer_does_and_the_usage_says_so(
    make: Any, folder: Path, tokenizer_json: bytes, stream: bool
) -> None:
    tokenizer = Tokenizer.from_json(tokenizer_json)
    said = says(Script(pieces=PIECES))
    events = await collect(make("ensemble_old", folder=folder), make_call(messages=said, stream=stream))
    usage = events[-1].usage
    assert usage is not None
    assert usage.estimated
    assert usage.completion_tokens == tokenizer.count("".join(PIECES))
    begin_token = 1  # which the engine adds
    prompt = f"<user>{said[0]['content']}<|im_end|><assistant>"
    assert usage.prompt_tokens == tokenizer.count(prompt) + begin_token


async def test_an_answer_as_long_as_it_may_be_by_its_tokenizer_ended_for_its_length(
    make: Any, folder: Path, tokenizer_json: bytes
) -> None:
    tokens = Tokenizer.from_json(tokenizer_json).count("".join(PIECES))
    for max_tokens, reason in ((tokens, "length"), (tokens + 1, "stop")):
        call = make_call(messages=says(Script(pieces=PIECES)), max_tokens=max_tokens)
        answer = whole_of(await collect(make("ensemble_old", folder=folder), call))
        assert answer["choices"][0]["finish_reason"] == reason


async def test_without_a_bound_an_answer_may_fill_what_the_window_leaves(
    triton: TritonServer, make: Any, folder: Path, tokenizer_json: bytes
) -> None:
    write_folder(folder, model_max_length=1000)
    tensors = await seen_by(triton, make("bls", folder=folder), "window")
    prompt = tensors["text_input"]["values"][0]
    begin_token = 1  # which the engine adds
    left = 1000 - Tokenizer.from_json(tokenizer_json).count(prompt) - begin_token
    assert tensors["max_tokens"]["values"] == [left]


async def test_a_prompt_beyond_the_window_is_refused_before_it_is_asked(
    triton: TritonServer, make: Any, folder: Path
) -> None:
    write_folder(folder, model_max_length=50)
    call = replace(make_call(messages=says(Script(pieces=PIECES))), request_id="beyond")
    with pytest.raises(RequestRejected, match="of the 50 tokens") as refused:
        await collect(make("bls", folder=folder), call)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")
    assert triton.events("received", request_id="beyond") == []


async def test_a_folder_that_changes_is_read_again(triton: TritonServer, make: Any, folder: Path) -> None:
    backend = make("bls", folder=folder)
    run = asyncio.get_running_loop().create_task(backend.run())
    try:
        await seen_by(triton, backend, "folder-before")
        write_folder(folder, "NEW {{ messages[0].content }}")
        async with asyncio.timeout(5):
            for attempt in range(1000):
                tensors = await seen_by(triton, backend, f"folder-after-{attempt}")
                if tensors["text_input"]["values"][0].startswith("NEW "):
                    break
                await asyncio.sleep(0.02)
    finally:
        run.cancel()
        await asyncio.wait([run])


async def test_a_folder_that_cannot_be_read_makes_the_backend_say_which_file_and_field(make: Any, folder: Path) -> None:
    write_folder(folder, "{% if %}")
    with pytest.raises(BackendProtocolError, match=r"tokenizer_config\.json.*chat_template"):
        await make("bls", folder=folder).check(within_s=5)


async def test_several_tokens_of_one_response_each_have_their_log_probability(
    make: Any, folder: Path, tokenizer_json: bytes
) -> None:
    text = "The quick brown fox"
    tokens = Tokenizer.from_json(tokenizer_json).split(text)
    piece = Piece(text, tokens=len(tokens), log_probs=tuple(-float(n) for n in range(len(tokens))))
    call = make_call(messages=says(Script(pieces=[piece])), logprobs=True)
    answer = whole_of(await collect(make("bls", folder=folder), call))
    entries = answer["choices"][0]["logprobs"]["content"]
    assert [(entry["token"], entry["logprob"]) for entry in entries] == [(t, -float(n)) for n, t in enumerate(tokens)]
