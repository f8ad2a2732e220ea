from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from backends.model_folder import ModelFolder, ModelFolderError, folder_digest, read_model_folder
from tests.backends import tiny_tokenizers

FAMILIES = Path(__file__).parents[1] / "fixtures" / "model_folders"

USER = [{"role": "user", "content": "x"}]


def read(path: Path) -> ModelFolder:
    return read_model_folder(path, now=lambda: datetime(2024, 5, 6, tzinfo=UTC))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "tokenizer_config.json", chat_template="config", bos_token="<s>", eos_token="</s>")
    return tmp_path


def write(folder: Path, name: str, **fields: Any) -> None:
    write_text(folder, name, json.dumps(fields))


def write_text(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)


def rendered(folder: Path, **given: Any) -> str:
    template = read(folder).template
    assert template is not None
    return template.render(USER, **given)


@pytest.mark.parametrize(
    ("family", "bos_token", "stop", "context_tokens"),
    [
        ("smollm2", "<|im_start|>", ("<|im_end|>",), 8192),
        ("llama-3.1", "<|begin_of_text|>", ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"), 131072),
        ("qwen2.5", "", ("<|im_end|>", "<|endoftext|>"), 131072),
        ("mistral", "<s>", ("</s>",), None),
        ("gemma-2", "<bos>", ("<eos>", "<end_of_turn>"), None),
    ],
)
def test_a_familys_folder_says_how_to_talk_to_it(
    family: str, bos_token: str, stop: tuple[str, ...], context_tokens: int | None
) -> None:
    model = read(FAMILIES / family)
    assert (model.bos_token, model.stop, model.context_tokens) == (bos_token, stop, context_tokens)
    assert model.eos_token == stop[0]
    assert model.tokenizer is None
    assert model.template is not None
    assert model.template.render(USER).startswith(bos_token)


def test_a_template_in_its_own_file_wins_over_those_in_json(folder: Path) -> None:
    assert rendered(folder) == "config"
    write(folder, "chat_template.json", chat_template="json")
    assert rendered(folder) == "json"
    write_text(folder, "chat_template.jinja", "jinja ü {{ bos_token }}")
    assert rendered(folder) == "jinja ü <s>"


TOOLS = [{"type": "function", "function": {"name": "ping"}}]


def test_a_template_for_tools_is_used_where_there_are_tools(folder: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }}"}]
    write(folder, "tokenizer_config.json", chat_template=[*named, {"name": "rag", "template": "rag"}])
    assert (rendered(folder), rendered(folder, tools=TOOLS)) == ("plain", "1")

    write_text(folder, "chat_template.jinja", "jinja")
    write_text(folder, "additional_chat_templates/tool_use.jinja", "jinja {{ tools | length }}")
    assert (rendered(folder), rendered(folder, tools=TOOLS)) == ("jinja", "jinja 1")


def test_special_tokens_are_texts_or_objects_or_nothing(folder: Path) -> None:
    source = "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ strftime_now('%Y') }}"
    tokens = {"bos_token": {"content": "<b>", "lstrip": False}, "eos_token": None, "unk_token": "<u>"}
    write(folder, "tokenizer_config.json", chat_template=source, **tokens)
    assert rendered(folder) == "<b>||<u>|2024"
    assert (read(folder).bos_token, read(folder).eos_token, read(folder).stop) == ("<b>", "", ())


def test_a_folder_without_a_template_or_tokenizer_has_none(tmp_path: Path) -> None:
    write(tmp_path, "config.json", max_position_embeddings=4096)
    model = read(tmp_path)
    assert (model.template, model.tokenizer, model.stop, model.context_tokens) == (None, None, (), 4096)


def test_ends_are_looked_up_in_the_added_tokens_and_then_in_the_tokenizer(folder: Path) -> None:
    tiny_tokenizers.byte_level(folder / "tokenizer.json", ["<unk>", "<end>", "</s>"])
    write(folder, "tokenizer_config.json", eos_token="</s>", added_tokens_decoder={"7": {"content": "<turn>"}})
    write(folder, "config.json", eos_token_id=1)
    assert read(folder).stop == ("</s>", "<end>")
    write(folder, "generation_config.json", eos_token_id=[2, 7])
    model = read(folder)
    assert model.stop == ("</s>", "<turn>")
    assert model.tokenizer is not None
    assert model.tokenizer.id_of("<end>") == 1


@pytest.mark.parametrize(
    ("config", "model", "context_tokens"),
    [
        ({"max_position_embeddings": 4096}, {"model_max_length": 2048}, 4096),
        ({"text_config": {"max_position_embeddings": 4096}}, {}, 4096),
        ({}, {"model_max_length": 2048}, 2048),
        ({}, {"model_max_length": int(1e30)}, None),
        ({}, {"model_max_length": 1e30}, None),
        ({}, {}, None),
    ],
)
def test_the_context_is_the_models_limit_or_else_the_tokenizers(
    folder: Path, config: Any, model: Any, context_tokens: int | None
) -> None:
    write(folder, "config.json", **config)
    write(folder, "tokenizer_config.json", **model)
    assert read(folder).context_tokens == context_tokens


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer_config.json", "{", "not JSON"),
        ("tokenizer_config.json", '{"x":' * 100_000, "not JSON"),
        ("tokenizer_config.json", "[]", "Expected `object`, got `array`"),
        ("tokenizer_config.json", '{"bos_token": 1}', "bos_token: Expected `str | object | null`, got `int`"),
        ("tokenizer_config.json", '{"eos_token": {}}', "eos_token: Object missing required field `content`"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": ""}}}', "added_tokens_decoder"),
        ("tokenizer_config.json", '{"chat_template": "\\n{% for %}"}', "chat_template: line 2"),
        (
            "tokenizer_config.json",
            '{"chat_template": []}',
            "chat_template: no template is named default (there is none)",
        ),
        ("tokenizer_config.json", '{"chat_template": [{"name": "rag", "template": ""}]}', "named default (rag)"),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "default", "template": ""}, {"name": "tool_use", "template": "{{"}]}',
            "chat_template: tool_use: line 1",
        ),
        ("chat_template.jinja", "{{", "line 1"),
        ("chat_template.json", "{}", "missing required field `chat_template`"),
        ("chat_template.json", '{"chat_template": "{{"}', "chat_template: line 1"),
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id: Expected"),
        ("generation_config.json", '{"eos_token_id": [7]}', "eos_token_id: no token has the id 7"),
        ("config.json", '{"eos_token_id": -1}', "eos_token_id: no token has the id -1"),
        ("config.json", '{"max_position_embeddings": "x"}', "max_position_embeddings: Expected"),
    ],
)
def test_what_is_wrong_is_named_with_its_file_and_field(folder: Path, name: str, content: str, says: str) -> None:
    write_text(folder, name, content)
    with pytest.raises(ModelFolderError) as error:
        read(folder)
    assert str(error.value).startswith(f"{folder / name}: ")
    assert says in str(error.value)
    assert any(remedy in str(error.value) for remedy in ("correct it", "take the file", "name one of them"))


def test_a_file_that_cannot_be_read_or_is_no_text_is_named(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelFolderError, match=r"chat_template.jinja: not UTF-8 .*: save it as UTF-8$"):
        read(folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").mkdir()
    with pytest.raises(ModelFolderError, match=r"chat_template.jinja: Is a directory"):
        read(folder)


def test_a_folder_that_is_none_or_holds_nothing_is_refused(tmp_path: Path) -> None:
    for ask in (read, folder_digest):
        with pytest.raises(ModelFolderError, match="is not a folder"):
            ask(tmp_path / "nowhere")
    with pytest.raises(ModelFolderError, match=r"holds none of tokenizer_config\.json"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer_config.json", '{"chat_template": "other"}'),
        ("chat_template.jinja", "x"),
        ("chat_template.json", '{"chat_template": "x"}'),
        ("additional_chat_templates/tool_use.jinja", "x"),
        ("generation_config.json", "{}"),
        ("config.json", "{}"),
    ],
)
def test_both_digests_change_with_each_file_and_come_back_with_it(folder: Path, name: str, text: str) -> None:
    kept = (folder / "tokenizer_config.json").read_text()
    stamp = (folder / "tokenizer_config.json").stat().st_mtime_ns
    before = read(folder).digest, folder_digest(folder)
    assert (read(folder).digest, folder_digest(folder)) == before

    write_text(folder, name, text)
    changed = read(folder).digest, folder_digest(folder)
    assert changed[0] != before[0]
    assert changed[1] != before[1]

    (folder / name).unlink()
    write_text(folder, "tokenizer_config.json", kept)
    os.utime(folder / "tokenizer_config.json", ns=(stamp, stamp))
    assert (read(folder).digest, folder_digest(folder)) == before


def test_a_file_written_anew_with_the_same_size_is_noticed_by_its_time(folder: Path) -> None:
    before = folder_digest(folder)
    os.utime(folder / "tokenizer_config.json", ns=(1, 1))
    assert folder_digest(folder) != before
    assert folder_digest(folder) == folder_digest(folder)


def test_a_file_of_another_size_is_noticed_whatever_its_time(folder: Path) -> None:
    stamp = (folder / "tokenizer_config.json").stat().st_mtime_ns
    before = folder_digest(folder)
    write_text(folder, "tokenizer_config.json", "{}")
    os.utime(folder / "tokenizer_config.json", ns=(stamp, stamp))
    assert folder_digest(folder) != before


def test_other_files_in_the_folder_are_of_no_account(folder: Path) -> None:
    before = read(folder).digest, folder_digest(folder)
    write_text(folder, "model.safetensors", "weights")
    assert (read(folder).digest, folder_digest(folder)) == before
