"""What a model's folder says about talking to it: its chat template, its tokenizer, what ends its turns.

The folder is as Hugging Face lays it out. Read are, each where it is there and nothing else (no weights):

    tokenizer_config.json       chat_template, special tokens, added_tokens_decoder, model_max_length
    chat_template.jinja         the template, before the two in JSON
    chat_template.json          the template, before the one in tokenizer_config.json
    additional_chat_templates/tool_use.jinja    the template for conversations with tools, beside chat_template.jinja
    tokenizer.json              the tokenizer
    generation_config.json      eos_token_id
    config.json                 max_position_embeddings; eos_token_id where generation_config.json has none
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import msgspec

from backends.templates import ChatTemplate, template_fault
from backends.tokenizer import Tokenizer

_TOKENIZER_CONFIG = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"
_TEMPLATE_JSON = "chat_template.json"
_TOOL_TEMPLATE = "additional_chat_templates/tool_use.jinja"
_TOKENIZER = "tokenizer.json"
_GENERATION_CONFIG = "generation_config.json"
_CONFIG = "config.json"

_FILES = (_TOKENIZER_CONFIG, _TEMPLATE, _TEMPLATE_JSON, _TOOL_TEMPLATE, _TOKENIZER, _GENERATION_CONFIG, _CONFIG)

_UNLIMITED_TOKENS = 10**12
"""From here on a `model_max_length` means that nobody set one; transformers writes int(1e30)."""


class ModelFolderError(ValueError):
    """A model folder that cannot be used; the message names the file, the field in it, and what to do."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """What a model's folder says."""

    template: ChatTemplate | None
    """Gives the template `bos_token` too: an engine that adds its own must be told not to."""
    tokenizer: Tokenizer | None
    bos_token: str
    """Empty where the model has none, as with Qwen."""
    eos_token: str
    stop: tuple[str, ...]
    """Texts that end a turn: `eos_token`, then those of the `eos_token_id`s."""
    context_tokens: int | None
    """Longest prompt and completion together."""
    digest: str
    """Of the names and contents of all that was read, in hexadecimal."""


def read_model_folder(path: Path, *, now: Callable[[], datetime]) -> ModelFolder:
    """Read a model's folder. Blocks for the disk and for loading the tokenizer (some seconds): call it in a thread.

    `now` is the clock that templates tell dates by. Raises `ModelFolderError`.
    """
    files = _read(path)
    config = files.decoded(_TOKENIZER_CONFIG, _TokenizerConfig) or _TokenizerConfig()
    model = files.decoded(_CONFIG, _ModelConfig) or _ModelConfig()
    tokenizer = _tokenizer(files)
    eos_token = _text(config.eos_token)
    return ModelFolder(
        template=_template(files, config, now),
        tokenizer=tokenizer,
        bos_token=_text(config.bos_token),
        eos_token=eos_token,
        stop=tuple(dict.fromkeys(text for text in (eos_token, *_end_texts(files, config, model, tokenizer)) if text)),
        context_tokens=_context_tokens(config, model),
        digest=_digest((name.encode(), content) for name, content in files.contents.items()),
    )


def folder_digest(path: Path) -> str:
    """A digest of the names, sizes and times of change of the files that `read_model_folder` reads.

    It changes when one of them is written, appears or disappears, and opens none: a watcher can ask often. It blocks
    for a few system calls. Raises `ModelFolderError` where the folder is not there.
    """
    if not path.is_dir():
        raise _missing(path)
    return _digest(_traces(path))


def _traces(path: Path) -> Iterator[tuple[bytes, bytes]]:
    for name in _FILES:
        try:
            found = (path / name).stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise _unreadable(path / name, error) from error
        yield name.encode(), f"{found.st_size} {found.st_mtime_ns}".encode()


def _digest(parts: Iterator[tuple[bytes, bytes]]) -> str:
    """A digest that no other list of parts has: each part is led by its length."""
    digest = hashlib.sha256()
    for pair in parts:
        for part in pair:
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part)
    return digest.hexdigest()


def _read(path: Path) -> _Files:
    """The files that are there, in the order of `_FILES`."""
    if not path.is_dir():
        raise _missing(path)
    contents = {}
    for name in _FILES:
        try:
            contents[name] = (path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise _unreadable(path / name, error) from error
    if not contents:
        raise ModelFolderError(
            f"{path} holds none of {', '.join(_FILES)}: name the folder that the model's own files are in"
        )
    return _Files(path, contents)


def _missing(path: Path) -> ModelFolderError:
    return ModelFolderError(f"{path} is not a folder: name the folder that the model's own files are in")


def _unreadable(file: Path, error: OSError) -> ModelFolderError:
    return ModelFolderError(f"{file}: {error.strerror}: make it a file that this process may read")


class _AddedToken(msgspec.Struct, frozen=True):
    content: str


class _NamedTemplate(msgspec.Struct, frozen=True):
    name: str
    template: str


_Token = str | _AddedToken | None


class _TokenizerConfig(msgspec.Struct, frozen=True):
    chat_template: str | list[_NamedTemplate] | None = None
    bos_token: _Token = None
    eos_token: _Token = None
    unk_token: _Token = None
    sep_token: _Token = None
    pad_token: _Token = None
    cls_token: _Token = None
    mask_token: _Token = None
    added_tokens_decoder: dict[int, _AddedToken] = msgspec.field(default_factory=dict)
    model_max_length: int | float | None = None

    @property
    def other_tokens(self) -> dict[str, str]:
        """The special tokens besides the first and the last, by the names that templates have for them."""
        tokens = {
            "unk_token": self.unk_token,
            "sep_token": self.sep_token,
            "pad_token": self.pad_token,
            "cls_token": self.cls_token,
            "mask_token": self.mask_token,
        }
        return {name: _text(token) for name, token in tokens.items() if token is not None}


class _TemplateFile(msgspec.Struct, frozen=True):
    chat_template: str


class _GenerationConfig(msgspec.Struct, frozen=True):
    eos_token_id: int | list[int] | None = None


class _TextConfig(msgspec.Struct, frozen=True):
    max_position_embeddings: int | None = None


class _ModelConfig(msgspec.Struct, frozen=True):
    max_position_embeddings: int | None = None
    eos_token_id: int | list[int] | None = None
    text_config: _TextConfig | None = None
    """Where models that see have what others have at the top."""


def _text(token: _Token) -> str:
    return token.content if isinstance(token, _AddedToken) else token or ""


_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Files:
    """The contents of a model folder's files, by name."""

    path: Path
    contents: dict[str, bytes]

    def decoded(self, name: str, kind: type[_T]) -> _T | None:
        """The file as `kind`; None where there is none."""
        content = self.contents.get(name)
        if content is None:
            return None
        try:
            return msgspec.json.decode(content, type=kind)
        except msgspec.ValidationError as error:
            fault, _, field = str(error).partition(" - at ")
            field = field.strip("`").removeprefix("$").removeprefix(".")
            raise self.fault(name, f"{fault}: correct it, or take the file from the model again", field) from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self.fault(name, f"not JSON ({error}): take the file from the model again") from error

    def source(self, name: str) -> _Source | None:
        content = self.contents.get(name)
        if content is None:
            return None
        try:
            return _Source(content.decode(), name)
        except UnicodeDecodeError as error:
            raise self.fault(name, f"not UTF-8 ({error.reason}): save it as UTF-8") from error

    def fault(self, name: str, what: str, field: str = "") -> ModelFolderError:
        return ModelFolderError(": ".join(part for part in (str(self.path / name), field, what) if part))


@dataclass(frozen=True, slots=True)
class _Source:
    """The text of a template, and where it was found."""

    text: str
    file: str
    field: str = ""


def _tokenizer(files: _Files) -> Tokenizer | None:
    content = files.contents.get(_TOKENIZER)
    if content is None:
        return None
    try:
        return Tokenizer.from_json(content)
    except ValueError as error:
        raise files.fault(_TOKENIZER, f"{error}: take the file from the model again") from error


def _template(files: _Files, config: _TokenizerConfig, now: Callable[[], datetime]) -> ChatTemplate | None:
    source, tool_source = _sources(files, config)
    if source is None:
        return None
    for each in (source, tool_source):
        if each is not None and (fault := template_fault(each.text)):
            what = f"{fault}: correct it, or put a template that works in {_TEMPLATE}"
            raise files.fault(each.file, what, each.field)
    return ChatTemplate(
        source.text,
        now=now,
        bos_token=_text(config.bos_token),
        eos_token=_text(config.eos_token),
        tool_source=None if tool_source is None else tool_source.text,
        special_tokens=config.other_tokens,
    )


def _sources(files: _Files, config: _TokenizerConfig) -> tuple[_Source | None, _Source | None]:
    """The template, and the one for conversations with tools where the model has one of its own."""
    if (source := files.source(_TEMPLATE)) is not None:
        return source, files.source(_TOOL_TEMPLATE)
    if (found := files.decoded(_TEMPLATE_JSON, _TemplateFile)) is not None:
        return _Source(found.chat_template, _TEMPLATE_JSON, "chat_template"), None
    match config.chat_template:
        case None:
            return None, None
        case str(text):
            return _Source(text, _TOKENIZER_CONFIG, "chat_template"), None
        case named:
            return _named_sources(files, named)


def _named_sources(files: _Files, named: Sequence[_NamedTemplate]) -> tuple[_Source, _Source | None]:
    sources = {each.name: _Source(each.template, _TOKENIZER_CONFIG, f"chat_template: {each.name}") for each in named}
    if "default" not in sources:
        what = (
            f"no template is named default ({', '.join(sources) or 'there is none'}): name one of them so, or put the"
            f" template to use in {_TEMPLATE}"
        )
        raise files.fault(_TOKENIZER_CONFIG, what, "chat_template")
    return sources["default"], sources.get("tool_use")


def _end_texts(
    files: _Files, config: _TokenizerConfig, model: _ModelConfig, tokenizer: Tokenizer | None
) -> Iterator[str]:
    """The texts of the tokens that end an answer."""
    generation = files.decoded(_GENERATION_CONFIG, _GenerationConfig) or _GenerationConfig()
    ids, file = generation.eos_token_id, _GENERATION_CONFIG
    if ids is None:
        ids, file = model.eos_token_id, _CONFIG
    for token_id in [ids] if isinstance(ids, int) else ids or ():
        added = config.added_tokens_decoder.get(token_id)
        text = added.content if added is not None else tokenizer and tokenizer.token_of(token_id)
        if not text:
            what = f"no token has the id {token_id}: correct it, or put the model's {_TOKENIZER} beside it"
            raise files.fault(file, what, "eos_token_id")
        yield text


def _context_tokens(config: _TokenizerConfig, model: _ModelConfig) -> int | None:
    text_config = model.text_config or _TextConfig()
    for limit in (model.max_position_embeddings, text_config.max_position_embeddings, config.model_max_length):
        if limit is not None and 0 < limit < _UNLIMITED_TOKENS:
            return int(limit)
    return None
