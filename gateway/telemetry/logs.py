"""Structured logs: one line per event, for people or as JSON. No field ever holds a prompt, an answer or a secret."""

from __future__ import annotations

import logging
import sys
from typing import Any

import msgspec
import structlog

Log = structlog.typing.FilteringBoundLogger


def open_log(log_format: str, **bound: object) -> Log:
    """A logger that writes to standard error: `console` for people, `json` for machines."""
    as_json = log_format == "json"
    processors: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso" if as_json else "%H:%M:%S", utc=as_json),
        structlog.processors.format_exc_info,
        structlog.processors.JSONRenderer(serializer=_json)
        if as_json
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
    ]
    log: Log = structlog.wrap_logger(
        structlog.PrintLogger(sys.stderr),
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
    ).bind(**bound)
    return log


def _json(event: object, **_: object) -> str:
    return msgspec.json.encode(event, enc_hook=repr).decode()
