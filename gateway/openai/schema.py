"""The hot routes in the OpenAPI document.

Litestar leaves `@asgi` handlers out of it, so they are described here, from the structs that read their bodies.
"""

from __future__ import annotations

from typing import Any

import msgspec
from litestar.openapi.spec import (
    OpenAPI,
    OpenAPIMediaType,
    OpenAPIResponse,
    Operation,
    PathItem,
    RequestBody,
    Schema,
)

from gateway.openai.translate import ChatCompletionRequest, CompletionRequest, EmbeddingRequest

_ERRORS = {
    "400": "The request is at fault; the message names the field and the remedy.",
    "401": "No key, or a wrong, revoked or expired one.",
    "403": "The key may not use this model.",
    "404": "No such model or route; the message names the known ones.",
    "413": "The body is too large after unpacking.",
    "429": "A limit of the tenant has no room.",
    "502": "The model failed.",
    "503": "The model has no room, or the gateway is shutting down.",
    "504": "The time was up.",
}


def add_hot_routes(document: OpenAPI) -> None:
    """Describe `/v1/chat/completions`, `/v1/completions` and `/v1/embeddings` in `document`."""
    paths = document.paths if document.paths is not None else {}
    document.paths = paths
    paths["/v1/chat/completions"] = _path("Create a chat completion", "createChatCompletion", ChatCompletionRequest)
    paths["/v1/completions"] = _path("Create a text completion", "createCompletion", CompletionRequest)
    paths["/v1/embeddings"] = _path("Create embeddings", "createEmbedding", EmbeddingRequest, streams=False)


def _path(summary: str, operation_id: str, body: type[msgspec.Struct], *, streams: bool = True) -> PathItem:
    answer = {"application/json": OpenAPIMediaType(schema=Schema(type=None, description="As OpenAI has it."))}
    if streams:
        chunks = Schema(type=None, description="With `stream`: its chunks.")
        answer["text/event-stream"] = OpenAPIMediaType(schema=chunks)
    responses: dict[str, Any] = {"200": OpenAPIResponse(description="The answer.", content=answer)}
    responses |= {status: OpenAPIResponse(description=meaning) for status, meaning in _ERRORS.items()}
    return PathItem(
        post=Operation(
            summary=summary,
            operation_id=operation_id,
            tags=["inference"],
            description=(
                "Takes any field that OpenAI's API has; those that are not listed are carried to the model as they are."
            ),
            request_body=RequestBody(
                required=True, content={"application/json": OpenAPIMediaType(schema=_schema(body))}
            ),
            responses=responses,
        )
    )


def _schema(body: type[msgspec.Struct]) -> Any:
    """The struct's JSON Schema, self-contained, as the plain mapping that the document serialises."""
    (_, components) = msgspec.json.schema_components([body], ref_template="{name}")
    return Literal(_inlined({"$ref": body.__name__}, components))


def _inlined(node: Any, components: dict[str, Any]) -> Any:
    if isinstance(node, dict):
        if "$ref" in node:
            return _inlined(components[node["$ref"]], components)
        return {key: _inlined(value, components) for key, value in node.items()}
    if isinstance(node, list):
        return [_inlined(item, components) for item in node]
    return node


class Literal(Schema):
    """A schema that is written as it stands."""

    def __init__(self, schema: dict[str, Any]) -> None:
        super().__init__()
        self._schema = schema

    def to_schema(self) -> dict[str, Any]:
        return self._schema
