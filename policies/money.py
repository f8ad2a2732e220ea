"""Money is an integer number of nano-dollars (1e-9 USD). Floats never hold it, not even on the way in."""

from __future__ import annotations

import re
from decimal import Decimal

PATTERN = r"([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,2})?"
"""What a price looks like as text."""

_NUMBER = re.compile(PATTERN)
_NANO_DIGITS = 9
_LIMIT_USD = Decimal(1_000_000_000)
"""Far above any price; with it, no product of a price and a count of tokens leaves 128 bits."""


class UsdPer1M(int):
    """A price in nano-dollars per 1M tokens, written in a policy file as USD per 1M tokens."""

    __slots__ = ()

    @classmethod
    def parse(cls, value: object) -> UsdPer1M:
        """From `0.15`, `3` or `"0.15"` USD, exact to the nano-dollar, below a billion. Raises ValueError.

        A loader passes the text as it was written, so that no float stands between the operator and the price.
        """
        text = str(value) if isinstance(value, int | float | str) else ""
        if len(text) <= 40 and _NUMBER.fullmatch(text):
            usd = Decimal(text)
            exponent = usd.as_tuple().exponent
            # Below the limit and with nine decimals a price has 18 digits: `scaleb` rounds only beyond 28.
            if usd < _LIMIT_USD and isinstance(exponent, int) and exponent >= -_NANO_DIGITS:
                return cls(int(usd.scaleb(_NANO_DIGITS)))
        raise ValueError("expected a price in USD per 1M tokens, zero or more, at most 9 decimals")
