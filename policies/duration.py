"""Durations as operators write them (`250ms`, `30s`, `5m`, `1h`, `7d`, or a number of seconds)."""

from __future__ import annotations

import math
import re

_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, None: 1.0}
PATTERN = r"((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?)(ms|s|m|h|d)?"
"""What a duration looks like as text, a number of seconds included."""

_TEXT = re.compile(PATTERN)


class Duration(float):
    """Seconds, zero or more. Read from YAML by `Duration.parse`."""

    __slots__ = ()

    @classmethod
    def parse(cls, value: object) -> Duration:
        """A Duration from `"250ms"`, `"30s"`, `"5m"`, `"1h"`, `"7d"` or a number of seconds. Raises ValueError."""
        seconds = math.nan
        if isinstance(value, str) and (match := _TEXT.fullmatch(value)):
            seconds = float(match[1]) * _UNITS_S[match[2]]
        elif isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool)):
            # An integer beyond the range of a float is infinite here, and refused below.
            seconds = float(value) if abs(value) < 1e300 else math.inf
        if not 0 <= seconds < math.inf:
            raise ValueError("expected a duration such as 250ms, 30s, 5m, 1h or 7d, or a number of seconds")
        return cls(seconds)
