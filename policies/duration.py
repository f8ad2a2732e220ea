"""Durations as operators write them (`250ms`, `30s`, `5m`, `1h`, `7d`, or a number of seconds)."""

from __future__ import annotations

import re

_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_TEXT = re.compile(r"^(\d+(?:\.\d+)?)(ms|s|m|h|d)$")


class Duration(float):
    """Seconds, zero or more. Read from YAML by `Duration.parse`."""

    __slots__ = ()

    @classmethod
    def parse(cls, value: object) -> Duration:
        """A Duration from `"250ms"`, `"30s"`, `"5m"`, `"1h"`, `"7d"` or a number of seconds. Raises ValueError."""
        if isinstance(value, str) and (match := _TEXT.match(value)):
            return cls(float(match[1]) * _UNITS_S[match[2]])
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf"):
            return cls(value)
        raise ValueError("expected a duration such as 250ms, 30s, 5m, 1h or 7d, or a number of seconds")
