"""The OpenAI face: `/v1/*` as an unmodified OpenAI client expects it.

`translate` reads a body into the domain's `ChatRequest`; `endpoint` is the hot path, from ASGI
to the pipeline and back;
`body` reads and unpacks a request's bytes; `sse` writes a stream and owns its closing; `hangup` notices a client that
leaves; `models` lists what can be asked for; `schema` puts the hot routes into the OpenAPI document.
"""
