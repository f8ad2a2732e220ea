"""Money is an integer number of nano-dollars (1e-9 USD). Floats never hold it, not even on the way in."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation


class UsdPer1M(int):
    """A price in nano-dollars per 1M tokens, written in a policy file as USD per 1M tokens."""

    __slots__ = ()

    @classmethod
    def parse(cls, value: object) -> UsdPer1M:
        """From `0.15`, `3` or `"0.15"` USD, exact to the nano-dollar. Raises ValueError."""
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            try:
                nano = Decimal(str(value)) * 1_000_000_000
            except InvalidOperation:
                nano = Decimal(-1)
            if nano.is_finite() and nano >= 0 and nano == nano.to_integral_value():
                return cls(int(nano))
        raise ValueError("expected a price in USD per 1M tokens, zero or more, at most 9 decimals")
