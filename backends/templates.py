"""Chat templates: the Jinja text that turns a conversation into the plain prompt a model was trained on.

A template is the operator's, the conversation a client's: it is rendered in Jinja's immutable sandbox, into at most a
stated number of bytes, with what Hugging Face tokenizers give a template and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NoReturn

import jinja2
import jinja2.nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_PROMPT_BYTES = 16 * 1024 * 1024


class TemplateFailed(ValueError):
    """The template does not take this conversation: it says so itself, breaks on it, or writes too much."""


class _Generation(Extension):
    """`{% generation %}`, which marks the model's own turns for training, and means nothing here."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled chat template. Raises ValueError where `source` is not one.

    `now` is the clock behind `strftime_now`. `bos_token` is for models whose engine does not add it by itself.
    """

    def __init__(
        self,
        source: str,
        *,
        now: Callable[[], datetime],
        bos_token: str = "",
        eos_token: str = "",
        max_prompt_bytes: int = MAX_PROMPT_BYTES,
    ) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"line {error.lineno}: {error.message}") from error
        except Exception as error:  # a program from outside: Jinja and Python compile it, each with errors of its own
            raise ValueError(f"does not compile: {type(error).__name__}: {error}") from error
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._max_prompt_bytes = max_prompt_bytes

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt that ends where the model's turn begins. Raises `TemplateFailed`."""
        pieces = []
        size_bytes = 0
        try:
            for piece in self._template.generate(messages=messages, add_generation_prompt=True, **self._tokens):
                size_bytes += len(piece.encode())
                if size_bytes > self._max_prompt_bytes:
                    raise TemplateFailed(f"the prompt is larger than {self._max_prompt_bytes} bytes")
                pieces.append(piece)
        except TemplateFailed:
            raise
        except Exception as error:  # a template is a program: it can raise anything, each a refusal
            raise TemplateFailed(f"the chat template does not take these messages: {error}") from error
        return "".join(pieces)


def _refuse(message: str) -> NoReturn:
    raise TemplateFailed(message)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """JSON as tokenizers write it into prompts: not escaped for HTML, which Jinja's own filter is for."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def template_fault(source: str) -> str | None:
    """What keeps `source` from being a chat template, with its line; None for one that compiles."""
    try:
        ChatTemplate(source, now=lambda: datetime.fromtimestamp(0, UTC))
    except ValueError as error:
        return str(error)
    else:
        return None
