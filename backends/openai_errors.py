"""An engine's error answer, turned into an error by cause: by its HTTP status, else by the code and type it names.

Engines agree on no one shape: OpenAI and llama.cpp nest an `error` object, older vLLM puts its fields at the top, TGI
sends a bare text with an `error_type`, FastAPI a `detail`, Gemini a list with the object in it, Cloudflare `errors`.
Inside a 200 stream there is no status at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

import msgspec

from backends.errors import (
    BackendError,
    BackendFailed,
    BackendOverloaded,
    BackendRefusedCredentials,
    BackendTimeout,
    RequestRejected,
)

_MAX_MESSAGE_CHARS = 2_000
_MAX_RETRY_AFTER_S = 86_400.0

_STATUS_BY_NAME = {
    "invalid_request_error": 400,
    "badrequesterror": 400,
    "exceed_context_size_error": 400,
    "context_length_exceeded": 400,
    "unprocessable_entity": 422,
    "validation": 422,
    "authentication_error": 401,
    "authenticationerror": 401,
    "invalid_api_key": 401,
    "permission_error": 403,
    "permissiondeniederror": 403,
    "model_not_found": 404,
    "not_found_error": 404,
    "notfounderror": 404,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "ratelimiterror": 429,
    "insufficient_quota": 429,
    "overloaded": 503,
    "overloaded_error": 503,
    "unavailable_error": 503,
    "service_unavailable": 503,
    "timeout": 504,
    "timeout_error": 504,
    "invalid_argument": 400,
    "unauthenticated": 401,
    "permission_denied": 403,
    "not_found": 404,
    "resource_exhausted": 429,
    "service_tier_capacity_exceeded": 429,
    "engine_overloaded": 503,
    "unavailable": 503,
    "deadline_exceeded": 504,
}
"""What the names mean that OpenAI, vLLM, llama.cpp, TGI, Anthropic, Gemini and Mistral give as `code`, `type` or
`status`, in lower case."""

_OPERATORS_FAULT = {401, 402, 403, 404, 405, 410}


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine's error answer says, as far as it says it."""

    message: str = ""
    status: int | None = None
    """The HTTP status that the error itself names, or that its code or type stands for."""
    code: str | None = None
    error_type: str | None = None
    param: str | None = None
    retry_after_s: float | None = None
    """How long the engine asks to be left alone, 0 to 86,400 s, where the error itself says so."""


def read_error(body: bytes) -> ErrorDetail:
    """The detail in an error answer's body, whatever its shape; never raises."""
    try:
        return _detail(msgspec.json.decode(body))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ErrorDetail(message=body.decode(errors="replace").strip()[:_MAX_MESSAGE_CHARS])


def _detail(answer: object) -> ErrorDetail:
    if isinstance(answer, list) and answer:
        answer = answer[0]
    if not isinstance(answer, dict):
        return ErrorDetail(message=_text(answer))
    nested = answer.get("error") or answer.get("errors")
    nested = nested[0] if isinstance(nested, list) and nested else nested
    fields = nested if isinstance(nested, dict) else answer
    message = next((fields[name] for name in ("message", "detail", "error") if fields.get(name)), "")
    code, error_type, param = (_name(fields.get(name)) for name in ("code", "type", "param"))
    error_type = error_type or _name(answer.get("error_type"))
    return ErrorDetail(
        message=_text(message),
        status=_status(fields, code, error_type),
        code=code,
        error_type=error_type,
        param=param,
        retry_after_s=_retry_after_s(fields),
    )


def error_by_cause(
    detail: ErrorDetail,
    status: int | None,
    *,
    backend: str,
    model: str,
    retry_after_s: float | None = None,
) -> BackendError:
    """The error that an answer with `status` means; None where the error came inside a 200.

    `retry_after_s` is what the answer's headers said; what the error itself says counts where they say nothing.
    """
    if status is None or (status == 400 and detail.status == 404):
        status = detail.status or 500
    said = detail.message or "no reason given"
    if status in (429, 503, 529):
        if retry_after_s is None:
            retry_after_s = detail.retry_after_s
        return BackendOverloaded(said, backend=backend, model=model, retry_after_s=retry_after_s)
    if status in (408, 504):
        return BackendTimeout(f"the engine gave up: {said}", phase="total", backend=backend, model=model)
    if status in (401, 403):
        # The engine's own words are left out: they may quote our key.
        return BackendRefusedCredentials(f"credentials refused with status {status}", backend=backend, model=model)
    if status in _OPERATORS_FAULT:
        return BackendRefusedCredentials(f"refused with status {status}: {said}", backend=backend, model=model)
    if 400 <= status < 500:
        return RequestRejected(
            said,
            status=status,
            code=detail.code,
            param=detail.param,
            error_type=detail.error_type,
            backend=backend,
            model=model,
        )
    return BackendFailed(said, status=status, backend=backend, model=model)


def read_retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """How long the engine asks to be left alone, 0 to 86,400 s; `now` is Unix time, for the form that is a date."""
    milliseconds = headers.get("retry-after-ms")
    if milliseconds is not None and (seconds := _seconds(milliseconds)) is not None:
        return _bounded(seconds / 1000)
    text = headers.get("retry-after")
    if text is None:
        return None
    if (seconds := _seconds(text)) is not None:
        return _bounded(seconds)
    try:
        return _bounded(parsedate_to_datetime(text).timestamp() - now)
    except (ValueError, OverflowError):
        return None


def _retry_after_s(fields: Mapping[str, object]) -> float | None:
    """The wait in an error's own fields, or in the `metadata` that OpenRouter puts beside them."""
    metadata = fields.get("metadata")
    for said in (fields, metadata if isinstance(metadata, dict) else {}):
        for name, per_second in (("retry_after_ms", 1000.0), ("retry_after", 1.0), ("retry_after_seconds", 1.0)):
            value = said.get(name)
            if isinstance(value, int | float | str) and (seconds := _seconds(str(value))) is not None:
                return _bounded(seconds / per_second)
    return None


def _bounded(seconds: float) -> float:
    return min(max(seconds, 0.0), _MAX_RETRY_AFTER_S)


def _seconds(text: str) -> float | None:
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) else None


def _text(value: object) -> str:
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text[:_MAX_MESSAGE_CHARS]


def _name(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _status(fields: Mapping[str, object], code: str | None, error_type: str | None) -> int | None:
    for value in (fields.get("code"), fields.get("status"), fields.get("status_code")):
        if isinstance(value, str) and value.isdecimal():
            value = int(value)
        if isinstance(value, int) and 400 <= value <= 599:
            return value
    for name in (code, error_type, _name(fields.get("status"))):
        if name is not None and (status := _STATUS_BY_NAME.get(name.lower())) is not None:
            return status
    return None
