"""The one table from an error's type to what a client is told: status, OpenAI `type`, `code`.

Whatever is not in the table is a 500 that says nothing about its cause; the log has it, under the request id.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import msgspec

from backends.attempts import AnswerBroke, AttemptsFailed
from backends.errors import (
    BackendError,
    BackendFailed,
    BackendOverloaded,
    BackendProtocolError,
    BackendRefusedCredentials,
    BackendTimeout,
    BackendUnreachable,
    RequestRejected,
)
from backends.fold import Unfoldable
from cache.inflight import FlightAbandoned
from cache.key import UnreadableField
from gateway.auth import InvalidKey, KeyExpired, MissingKey, StoreUnavailable
from gateway.snapshot import UnknownModel
from policies.ledger import QuotaExceeded
from policies.store import StoreUnreachable
from routing.decision import NoEligibleModel


class RequestError(Exception):
    """The request itself cannot be served as it is. `param` names the field, the message the remedy."""

    status = 400
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        if code is not None:
            self.code = code


class BodyTooLarge(RequestError):
    status = 413
    code = "request_too_large"


class UnsupportedEncoding(RequestError):
    status = 415
    code = "unsupported_content_encoding"


class BodyTimeout(RequestError):
    status = 408
    code = "request_timeout"


class RouteNotFound(RequestError):
    status = 404
    code = "not_found"


class MethodNotAllowed(RequestError):
    """`allow` are the methods that are, as the `Allow` header writes them."""

    status = 405
    code = "method_not_allowed"

    def __init__(self, message: str, *, allow: str) -> None:
        super().__init__(message)
        self.allow = allow


class ModelNotAllowed(RequestError):
    status = 403
    code = "model_not_allowed"


class WrongTask(RequestError):
    """A model for chat was asked for embeddings, or the other way round."""

    code = "unsupported_by_model"


class AdminForbidden(RequestError):
    status = 403
    code = "role_required"


class DeadlinePassed(Exception):
    """The request's time was up."""


class Rendered(msgspec.Struct, frozen=True, kw_only=True):
    """An error as a client gets to see it."""

    status: int
    type: str
    code: str | None
    message: str
    param: str | None = None
    retry_after_s: float | None = None
    should_retry: bool | None = None
    """What `x-should-retry` tells an SDK; None leaves it to the status."""
    allow: str | None = None
    """With a 405: the methods that are allowed."""

    def body(self) -> bytes:
        return msgspec.json.encode(
            {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}
        )

    def headers(self) -> list[tuple[bytes, bytes]]:
        headers: list[tuple[bytes, bytes]] = []
        if self.retry_after_s is not None:
            headers.append((b"retry-after", str(math.ceil(self.retry_after_s)).encode()))
            headers.append((b"retry-after-ms", str(math.ceil(self.retry_after_s * 1000)).encode()))
        if self.allow is not None:
            headers.append((b"allow", self.allow.encode()))
        if self.should_retry is not None:
            headers.append((b"x-should-retry", b"true" if self.should_retry else b"false"))
        return headers


def render(error: Exception) -> Rendered:
    """What the client is told of `error`."""
    if isinstance(error, AttemptsFailed | AnswerBroke):
        error = error.error
    for kind in type(error).__mro__:
        rule = TABLE.get(kind)
        if rule is not None:
            return rule(error)
    return _UNEXPECTED


_INVALID = "invalid_request_error"
_SERVER = "server_error"


def _request_error(error: RequestError) -> Rendered:
    return Rendered(status=error.status, type=_INVALID, code=error.code, message=str(error), param=error.param)


def _key_error(code: str) -> Callable[[Exception], Rendered]:
    return lambda error: Rendered(status=401, type=_INVALID, code=code, message=str(error))


def _unknown_model(error: UnknownModel) -> Rendered:
    return Rendered(status=404, type=_INVALID, code="model_not_found", message=str(error), param="model")


def _not_eligible(error: NoEligibleModel) -> Rendered:
    too_long = all(rejection.reason.startswith("context_window") for rejection in error.rejected)
    code = "context_length_exceeded" if too_long else "unsupported_by_model"
    return Rendered(status=400, type=_INVALID, code=code, message=str(error), param="messages" if too_long else None)


def _quota(error: QuotaExceeded) -> Rendered:
    return Rendered(
        status=429,
        type="insufficient_quota" if error.retry_after_s is None else "rate_limit_exceeded",
        code=error.limit,
        message=error.message,
        retry_after_s=error.retry_after_s,
        should_retry=False if error.retry_after_s is None else None,
    )


def _backend(status: int, code: str, says: str) -> Callable[[BackendError], Rendered]:
    """What the engine said stays in our logs: it may name hosts, paths and keys that are no client's business."""

    def rule(error: BackendError) -> Rendered:
        where = f" (model '{error.model}')" if error.model else ""
        return Rendered(status=status, type=_SERVER, code=code, message=says + where, retry_after_s=error.retry_after_s)

    return rule


def _timeout(error: BackendTimeout) -> Rendered:
    return Rendered(
        status=504,
        type=_SERVER,
        code="backend_timeout",
        message=f"the model did not answer in time: its {error.phase.replace('_', ' ')} time ran out"
        + (f" (model '{error.model}')" if error.model else ""),
    )


def _rejected(error: RequestRejected) -> Rendered:
    return Rendered(
        status=error.status,
        type=error.error_type or _INVALID,
        code=error.code,
        message=error.message,
        param=error.param,
    )


TABLE: Mapping[type[Exception], Callable[..., Rendered]] = {
    RequestError: _request_error,
    MethodNotAllowed: lambda error: msgspec.structs.replace(_request_error(error), allow=error.allow),
    UnreadableField: lambda error: Rendered(
        status=400, type=_INVALID, code="invalid_value", message=str(error), param=error.field
    ),
    MissingKey: _key_error("missing_api_key"),
    InvalidKey: _key_error("invalid_api_key"),
    KeyExpired: _key_error("expired_api_key"),
    StoreUnreachable: lambda error: Rendered(
        status=503, type=_SERVER, code="store_unavailable", message="the record does not answer", retry_after_s=1.0
    ),
    StoreUnavailable: lambda error: Rendered(
        status=503,
        type=_SERVER,
        code="key_store_unavailable",
        message="keys cannot be checked at the moment; try again shortly",
        retry_after_s=1.0,
    ),
    UnknownModel: _unknown_model,
    NoEligibleModel: _not_eligible,
    QuotaExceeded: _quota,
    RequestRejected: _rejected,
    BackendUnreachable: _backend(502, "backend_unreachable", "the model cannot be reached"),
    BackendOverloaded: _backend(503, "backend_overloaded", "the model has no room for another request right now"),
    BackendTimeout: _timeout,
    BackendFailed: _backend(502, "backend_failed", "the model failed to answer"),
    BackendProtocolError: _backend(502, "backend_protocol_error", "the model's answer broke off or was unreadable"),
    Unfoldable: lambda error: Rendered(
        status=502,
        type=_SERVER,
        code="backend_protocol_error",
        message="the model's answer came in pieces that do not add up to one",
    ),
    BackendRefusedCredentials: lambda error: msgspec.structs.replace(
        _backend(
            502, "backend_refused_credentials", "the model refused the gateway's credentials; its operator has to act"
        )(error),
        should_retry=False,
    ),
    DeadlinePassed: lambda error: Rendered(
        status=504, type=_SERVER, code="deadline_passed", message="the request's time was up"
    ),
    FlightAbandoned: lambda error: Rendered(
        status=503, type=_SERVER, code="shutting_down", message="the gateway is shutting down", retry_after_s=1.0
    ),
}

_UNEXPECTED = Rendered(
    status=500, type=_SERVER, code="internal_error", message="an unexpected error; its request id is in the log"
)
