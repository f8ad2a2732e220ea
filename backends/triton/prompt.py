"""From a request to the text that a model continues: the chat template, the tools in it, the images beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from backends.chat import ChatRequest, ContentPart
from backends.templates import ChatTemplate, TemplateFailed, template_messages
from backends.tool_calls.parser import ToolFormat, forced_call_schema
from backends.triton.sampling import FieldRefused

Json = dict[str, Any]

_REASONING_EFFORT = "reasoning_effort"

_PART_TYPES = frozenset({"text", "refusal", "image_url"})
"""Parts of a message that a model may be shown. What else there is (sound, files) would be lost on the way to it."""

_INLINE_IMAGE = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII)


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of the model, as text."""

    text: str
    image_urls: tuple[str, ...] = ()
    tool_names: frozenset[str] = frozenset()
    """The tools that the model may call; empty where none was offered, or none may be called."""
    forced_schema: Json | None = None
    """The JSON schema of the call that the model has to make, where the client demands one."""


class Prompter:
    """Renders requests for one model.

    Without `template` a chat is refused, and only text completions are had. `bos_token` is taken off the beginning of a
    rendered prompt where the engine adds it by itself, since a doubled one changes the answer; None leaves it there.
    With `remote_images` the engine may be handed URLs to fetch; without, images come inside the request alone.
    """

    def __init__(
        self,
        *,
        template: ChatTemplate | None,
        tool_format: ToolFormat | None,
        bos_token: str | None,
        takes_images: bool,
        remote_images: bool,
    ) -> None:
        self._template = template
        self._tool_format = tool_format
        self._bos_token = bos_token
        self._takes_images = takes_images
        self._remote_images = remote_images

    def prompt(self, request: ChatRequest) -> Prompt:
        """The prompt of a request. Raises `FieldRefused`."""
        if request.operation == "embeddings":
            raise FieldRefused("input", "this model makes no embeddings")
        return self._completion(request) if request.operation == "text_completion" else self._chat(request)

    def _completion(self, request: ChatRequest) -> Prompt:
        text = _one_text(_field(request, "prompt"))
        for field in ("suffix", "echo"):
            if _field(request, field):
                raise FieldRefused(field, "this model only goes on from its prompt; remove it")
        return Prompt(text=text)

    def _chat(self, request: ChatRequest) -> Prompt:
        if self._template is None:
            raise FieldRefused("messages", "this model has no chat template; use text completions")
        image_urls = self._image_urls(request)
        tools, names, forced = self._tools(request)
        messages = _messages_with_images(request) if image_urls else template_messages(request)
        extra = self._extra(request, self._template)
        try:
            text = self._template.render(messages, tools=tools, extra=extra)
        except TemplateFailed as error:
            raise FieldRefused("messages", str(error)) from error
        if self._bos_token:
            text = text.removeprefix(self._bos_token)
        return Prompt(text=text, image_urls=image_urls, tool_names=names, forced_schema=forced)

    def _extra(self, request: ChatRequest, template: ChatTemplate) -> Mapping[str, Any]:
        """What the client hands to the template besides the conversation."""
        extra = _field(request, "chat_template_kwargs") or {}
        if not isinstance(extra, dict):
            raise FieldRefused("chat_template_kwargs", "expected an object")
        if taken := sorted(template.reserved.intersection(extra)):
            raise FieldRefused("chat_template_kwargs", f"it cannot set {', '.join(taken)}")
        if (effort := _field(request, _REASONING_EFFORT)) is not None:
            if _REASONING_EFFORT not in template.source:
                raise FieldRefused(_REASONING_EFFORT, "this model's chat template knows no such thing; remove it")
            extra = {**extra, _REASONING_EFFORT: effort}
        return extra

    def _tools(self, request: ChatRequest) -> tuple[list[Json] | None, frozenset[str], Json | None]:
        """The tools for the template, the names the model may call, and the schema of a call it has to make."""
        tools = _field(request, "tools") or []
        choice = _field(request, "tool_choice")
        if not tools and choice not in (None, "none", "auto"):
            raise FieldRefused("tool_choice", "it demands a call, and there are no tools; offer some")
        if not tools or choice == "none":
            return None, frozenset(), None
        if self._tool_format is None:
            raise FieldRefused("tools", "this model cannot call tools")
        names = frozenset(map(_tool_name, tools))
        return tools, names, self._forced(tools, names, choice, self._tool_format)

    def _forced(self, tools: Sequence[Json], names: frozenset[str], choice: Any, form: ToolFormat) -> Json | None:
        try:
            match choice:
                case None | "auto":
                    return None
                case "required":
                    return forced_call_schema(tools, name=None, format=form)
                case {"type": "function", "function": {"name": str(name)}} if name in names:
                    return forced_call_schema(tools, name=name, format=form)
        except (ValueError, RecursionError) as error:
            raise FieldRefused("tools", f"a call of them cannot be demanded: {error}") from error
        raise FieldRefused("tool_choice", "expected none, auto, required, or a function that is among the tools")

    def _image_urls(self, request: ChatRequest) -> tuple[str, ...]:
        parts = [part for message in request.messages if isinstance(message.content, list) for part in message.content]
        if others := sorted({part.type for part in parts}.difference(_PART_TYPES)):
            raise FieldRefused("messages", f"this model takes no content of type {', '.join(others)}; leave it out")
        images = [part for part in parts if part.type == "image_url"]
        if images and not self._takes_images:
            raise FieldRefused("messages", "this model takes text only, and there are images in the conversation")
        return tuple(map(self._image_url, images))

    def _image_url(self, part: ContentPart) -> str:
        url = part.image_url.get("url") if isinstance(part.image_url, dict) else part.image_url
        if isinstance(url, str) and _INLINE_IMAGE.match(url):
            return url
        if self._remote_images and isinstance(url, str) and url.startswith(("http://", "https://")):
            return url
        raise FieldRefused(
            "messages", "send images inside the request, as data: URLs in base64; this gateway fetches none"
        )


def _one_text(prompt: Any) -> str:
    """The prompt of a text completion; a list of one text is one as well."""
    match prompt:
        case str(text) | [str(text)]:
            return text
        case []:
            raise FieldRefused("prompt", "the list is empty")
    raise FieldRefused("prompt", "this model takes a text, not tokens")


def _tool_name(tool: Any) -> str:
    """The name of a function that is offered. Raises `FieldRefused` for whatever else a client calls a tool."""
    match tool:
        case {"type": "function", "function": {"name": str(name), **function}} if name:
            if not isinstance(function.get("parameters") or {}, dict):
                raise FieldRefused("tools", f"the parameters of '{name}' are no JSON schema")
            return name
        case {"type": "function"}:
            raise FieldRefused("tools", "a function needs a name, which is a text")
    raise FieldRefused("tools", "this model calls functions only")


def _messages_with_images(request: ChatRequest) -> list[Json]:
    """The messages as templates of vision models expect them: content as parts, an image as a place for one."""
    written: list[Json] = msgspec.json.decode(request.fields["messages"])
    return [
        {**message, "content": [_part(part) for part in fields["content"]]}
        if isinstance(fields.get("content"), list)
        else message
        for message, fields in zip(template_messages(request), written, strict=True)
    ]


def _part(part: Json) -> Json:
    return {"type": "image"} if part.get("type") == "image_url" else part


def _field(request: ChatRequest, name: str) -> Any:
    raw = request.fields.get(name)
    return None if raw is None else msgspec.json.decode(raw)
