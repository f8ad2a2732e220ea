"""From a request to the text that a model continues: the chat template, the tools in it, the images beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from backends.chat import ChatRequest, ContentPart
from backends.templates import ChatTemplate, TemplateFailed, template_messages
from backends.tool_calls.parser import ToolFormat, forced_call_schema
from backends.triton.sampling import FieldRefused

Json = dict[str, Any]

_REASONING_EFFORT = "reasoning_effort"


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
        if request.prompt is None:
            raise FieldRefused("prompt", "this model takes a text, not tokens")
        for field in ("suffix", "echo"):
            if _field(request, field):
                raise FieldRefused(field, "this model only goes on from its prompt; remove it")
        return Prompt(text=request.prompt)

    def _chat(self, request: ChatRequest) -> Prompt:
        if self._template is None:
            raise FieldRefused("messages", "this model has no chat template; use text completions")
        image_urls = self._image_urls(request)
        tools, names, forced = self._tools(request)
        messages = _messages_with_images(request) if image_urls else template_messages(request)
        try:
            text = self._template.render(messages, tools=tools, extra=self._extra(request))
        except TemplateFailed as error:
            raise FieldRefused("messages", str(error)) from error
        if self._bos_token:
            text = text.removeprefix(self._bos_token)
        return Prompt(text=text, image_urls=image_urls, tool_names=names, forced_schema=forced)

    def _extra(self, request: ChatRequest) -> Mapping[str, Any]:
        """What the client hands to the template besides the conversation."""
        extra = _field(request, "chat_template_kwargs") or {}
        if not isinstance(extra, dict):
            raise FieldRefused("chat_template_kwargs", "expected an object")
        if (effort := _field(request, _REASONING_EFFORT)) is not None:
            if self._template is None or _REASONING_EFFORT not in self._template.source:
                raise FieldRefused(_REASONING_EFFORT, "this model's chat template knows no such thing; remove it")
            extra = {**extra, _REASONING_EFFORT: effort}
        return extra

    def _tools(self, request: ChatRequest) -> tuple[list[Json] | None, frozenset[str], Json | None]:
        """The tools for the template, the names the model may call, and the schema of a call it has to make."""
        tools = _field(request, "tools") or []
        choice = _field(request, "tool_choice")
        if not tools or choice == "none":
            return None, frozenset(), None
        if self._tool_format is None:
            raise FieldRefused("tools", "this model cannot call tools")
        functions = [tool for tool in tools if isinstance(tool, dict) and tool.get("type") == "function"]
        if len(functions) < len(tools):
            raise FieldRefused("tools", "this model calls functions only")
        names = frozenset(tool["function"]["name"] for tool in functions)
        return functions, names, self._forced(functions, names, choice, self._tool_format)

    def _forced(self, tools: Sequence[Json], names: frozenset[str], choice: Any, form: ToolFormat) -> Json | None:
        match choice:
            case None | "auto":
                return None
            case "required":
                return forced_call_schema(tools, name=None, format=form)
            case {"type": "function", "function": {"name": str(name)}} if name in names:
                return forced_call_schema(tools, name=name, format=form)
        raise FieldRefused("tool_choice", "expected none, auto, required, or a function that is among the tools")

    def _image_urls(self, request: ChatRequest) -> tuple[str, ...]:
        if not request.has_images:
            return ()
        if not self._takes_images:
            raise FieldRefused("messages", "this model takes text only, and there are images in the conversation")
        parts = [part for message in request.messages if isinstance(message.content, list) for part in message.content]
        return tuple(self._image_url(part) for part in parts if part.type == "image_url")

    def _image_url(self, part: ContentPart) -> str:
        url = part.image_url.get("url") if isinstance(part.image_url, dict) else part.image_url
        if isinstance(url, str) and url.startswith("data:image/"):
            return url
        if self._remote_images and isinstance(url, str) and url.startswith(("http://", "https://")):
            return url
        raise FieldRefused("messages", "send images inside the request, as data: URLs; this gateway fetches none")


def _messages_with_images(request: ChatRequest) -> list[Json]:
    """The messages as templates of vision models expect them: content as parts, an image as a place for one."""
    fields: list[Json] = msgspec.json.decode(request.fields["messages"])
    return [
        {**message, "content": [_part(part) for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in fields
    ]


def _part(part: Json) -> Json:
    return {"type": "image"} if part.get("type") == "image_url" else part


def _field(request: ChatRequest, name: str) -> Any:
    raw = request.fields.get(name)
    return None if raw is None else msgspec.json.decode(raw)
