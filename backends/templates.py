"""Chat templates: the Jinja text that turns a conversation into the plain prompt a model was trained on.

The conversation is a client's; the template is the operator's, and a program: it is rendered in Jinja's immutable
sandbox, into at most a stated number of bytes, with what Hugging Face's `apply_chat_template` gives a template and
nothing else. What bounds its output does not bound its time: a template that loops without writing, or multiplies
strings, keeps its thread and memory as long as it likes. So take templates from where you would take code.

`template_messages` brings OpenAI's messages into the form that templates expect.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, NoReturn

import jinja2
import jinja2.meta
import jinja2.nodes
import msgspec
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from backends.chat import ChatRequest

Json = dict[str, Any]

MAX_PROMPT_BYTES = 16 * 1024 * 1024

_OURS = ("messages", "tools", "documents", "add_generation_prompt")
"""What `ChatTemplate.render` itself gives a template."""

_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Names that a message's reasoning goes by, as Hugging Face knows them; the first is the one most templates read."""

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class TemplateFailed(ValueError):
    """The template does not take this conversation: it says so itself, breaks on it, or writes too much."""


class _Generation(Extension):
    """`{% generation %}`, which marks the model's own turns for training, and means nothing here."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled chat template. Raises ValueError where `source` (or `tool_source`) is not one.

    `tool_source` is the template for conversations with tools, for models that have one of their own (`tool_use`).
    `now` is the clock behind `strftime_now`. `bos_token` is for models whose engine does not add it by itself;
    `special_tokens` are others that the template may name, such as `unk_token`.
    """

    def __init__(
        self,
        source: str,
        *,
        now: Callable[[], datetime],
        bos_token: str = "",
        eos_token: str = "",
        tool_source: str | None = None,
        special_tokens: Mapping[str, str] = _NOTHING,
        max_prompt_bytes: int = MAX_PROMPT_BYTES,
    ) -> None:
        environment = _environment(now)
        self._template, takes_tools = _compiled(environment, source)
        self._tool_template = self._template
        if tool_source is not None:
            self._tool_template, takes_tools = _compiled(environment, tool_source)
        self.source = source if tool_source is None else tool_source
        """The template's text, with tools where they make another."""
        self._takes_tools = takes_tools
        self._tokens = {**special_tokens, "bos_token": bos_token, "eos_token": eos_token}
        self.reserved = frozenset((*environment.globals, *self._tokens, *_OURS))
        """The variables that are not the client's to set."""
        self._max_prompt_bytes = max_prompt_bytes

    @property
    def takes_tools(self) -> bool:
        """Whether the template reads `tools` at all; one that does not would silently drop them."""
        return self._takes_tools

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        extra: Mapping[str, Any] = _NOTHING,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt, which ends where the model's turn begins, or without `add_generation_prompt` where the last ends.

        `messages` are as `template_messages` makes them, `tools` as OpenAI's requests have them (none and an empty list
        are the same). `extra` is the client's `chat_template_kwargs`: more variables, such as `enable_thinking`.

        Raises `TemplateFailed`, also for tools that the template would drop and for a variable of `extra` that is not
        the client's to set.
        """
        if taken := sorted(self.reserved.intersection(extra)):
            raise TemplateFailed(f"chat_template_kwargs cannot set {', '.join(taken)}")
        if tools and not self._takes_tools:
            raise TemplateFailed("the chat template has no place for tools")
        template = self._tool_template if tools else self._template
        variables = {
            **extra,
            **self._tokens,
            "messages": messages,
            "tools": tools or None,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        return self._written(template, variables)

    def _written(self, template: jinja2.Template, variables: Json) -> str:
        pieces = []
        size_bytes = 0
        try:
            for piece in template.generate(variables):
                size_bytes += len(piece.encode())
                if size_bytes > self._max_prompt_bytes:
                    raise TemplateFailed(f"the prompt is larger than {self._max_prompt_bytes} bytes")
                pieces.append(piece)
        except TemplateFailed:
            raise
        except Exception as error:  # a template is a program: it can raise anything, each a refusal
            raise TemplateFailed(f"the chat template does not take these messages: {error}") from error
        return "".join(pieces)


def _environment(now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    return environment


def _compiled(environment: ImmutableSandboxedEnvironment, source: str) -> tuple[jinja2.Template, bool]:
    """The template, and whether it reads `tools`."""
    try:
        variables = jinja2.meta.find_undeclared_variables(environment.parse(source))
        return environment.from_string(source), "tools" in variables
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno}: {error.message}") from error
    except Exception as error:  # a program from outside: Jinja and Python compile it, each with errors of its own
        raise ValueError(f"does not compile: {type(error).__name__}: {error}") from error


def _refuse(message: str) -> NoReturn:
    raise TemplateFailed(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as Hugging Face writes it into prompts: not escaped for HTML, which Jinja's own filter is for."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def template_fault(source: str) -> str | None:
    """What keeps `source` from being a chat template, with its line; None for one that compiles."""
    try:
        ChatTemplate(source, now=lambda: datetime.fromtimestamp(0, UTC))
    except ValueError as error:
        return str(error)
    else:
        return None


def template_messages(request: ChatRequest) -> list[Json]:
    """The messages of a chat as templates expect them; fields that are not named here are kept as they came.

    - Content in parts becomes one text, `Message.text`; images and audio are lost: refuse them before.
    - A tool call's `arguments` become the object that OpenAI's clients send as a string: nothing written is an empty
      object, and a string that holds no object stays the string.
    - A null field and an empty `tool_calls` are left out: templates ask whether they are there.
    - `developer` becomes `system`, its older name: most templates skip or refuse a role that they do not know.
    - Reasoning is found under each name that templates read it by, `reasoning_content` and `thinking`.
    """
    messages: list[Json] = msgspec.json.decode(request.fields["messages"])
    return [_template_message(fields, message.text) for fields, message in zip(messages, request.messages, strict=True)]


def _template_message(fields: Json, text: str) -> Json:
    message = {name: value for name, value in fields.items() if value is not None}
    if isinstance(message.get("content"), list):
        message["content"] = text
    if message.get("role") == "developer":
        message["role"] = "system"
    if calls := message.pop("tool_calls", None):
        message["tool_calls"] = [_template_tool_call(call) for call in calls]
    reasoning = next((message[name] for name in _REASONING_FIELDS if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _template_tool_call(call: Any) -> Any:
    match call:
        case {"function": {"arguments": str(written)} as function}:
            return {**call, "function": {**function, "arguments": _arguments(written)}}
    return call


def _arguments(written: str) -> Json | str:
    if not written.strip():
        return {}
    try:
        arguments = msgspec.json.decode(written)
    except (msgspec.DecodeError, RecursionError):
        return written
    return arguments if isinstance(arguments, dict) else written
