"""What can go wrong between Forebay and an engine, by cause.

    BackendError
    ├── BackendUnreachable      no connection, or it broke before the answer began
    ├── BackendOverloaded       the engine, or our limit for it, has no room (429, 503)
    ├── BackendTimeout          connect, first token, idle or total time ran out
    ├── BackendFailed           the engine answered 5xx, or an error event
    ├── BackendProtocolError    the engine answered something that is not OpenAI's protocol, or broke off early
    ├── BackendRefusedCredentials   the engine refused *our* credentials or knows no such model: an operator's fault
    └── RequestRejected         the engine says the client's request is at fault (400, 413, 422)

The caller decides on fields, never on text: `retryable` (another attempt may succeed), `upstream_fault` (counts against
the backend's health), `retry_after_s` (the engine's own word).
"""

from __future__ import annotations

from typing import ClassVar


class BackendError(Exception):
    """An attempt that brought no answer. `backend` and `model` say whose."""

    retryable: ClassVar[bool] = True
    upstream_fault: ClassVar[bool] = True

    def __init__(self, message: str, *, backend: str = "", model: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.backend = backend
        self.model = model
        self.retry_after_s = retry_after_s


class BackendUnreachable(BackendError):
    pass


class BackendOverloaded(BackendError):
    upstream_fault = False


class BackendTimeout(BackendError):
    """`phase` is the clock that ran out: connect, first_token, idle or total."""

    def __init__(self, message: str, *, phase: str, backend: str = "", model: str = "") -> None:
        super().__init__(message, backend=backend, model=model)
        self.phase = phase


class BackendFailed(BackendError):
    """`status` is the HTTP status the engine gave, or 500 where it only sent an error event."""

    def __init__(self, message: str, *, status: int = 500, backend: str = "", model: str = "") -> None:
        super().__init__(message, backend=backend, model=model)
        self.status = status


class BackendProtocolError(BackendError):
    pass


class BackendRefusedCredentials(BackendError):
    """Another backend may still answer; retrying this one will not help."""


class RequestRejected(BackendError):
    """The engine refused the request itself; `status`, `code` and `param` are its own, to be shown to the client."""

    retryable = False
    upstream_fault = False

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        error_type: str | None = None,
        backend: str = "",
        model: str = "",
    ) -> None:
        super().__init__(message, backend=backend, model=model)
        self.status = status
        self.code = code
        self.param = param
        self.error_type = error_type
