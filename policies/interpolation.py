"""`${NAME}` in the values of a policy file: what differs between hosts, and what must not stand in a file."""

from __future__ import annotations

import re
from collections.abc import Mapping

_REFERENCE = re.compile(r"\$\$\{|\$\{([A-Za-z_][A-Za-z0-9_]*)(:-([^}]*))?\}|\$\{")


class BadReference(Exception):
    """A `${` that can not be replaced. `message` and `remedy` name variables, never values."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


def interpolate(text: str, env: Mapping[str, str]) -> str:
    """`text` with each `${NAME}` replaced by the variable's value, as it is: what it holds is not read again.

    `${NAME:-default}` is the default where the variable is unset or empty; `$${` is a `${`. Raises `BadReference` for
    a variable that is not set and for a `${` that is none of these.
    """

    def value(match: re.Match[str]) -> str:
        if match[0] == "$${":
            return "${"
        name, has_default, default = match[1], match[2] is not None, match[3]
        if name is None:
            raise BadReference("'${' without a variable's name and '}'", "write $${ for a literal ${")
        if has_default:
            return env.get(name) or default
        if name not in env:
            raise BadReference(f"environment variable {name} is not set", f"set it, or write ${{{name}:-default}}")
        return env[name]

    return _REFERENCE.sub(value, text)


def has_reference(text: str) -> bool:
    """Whether a value of the environment may have gone into `text`."""
    return any(match[0] != "$${" for match in _REFERENCE.finditer(text))


def referenced(text: str) -> frozenset[str]:
    """The variables that `text` refers to."""
    return frozenset(match[1] for match in _REFERENCE.finditer(text) if match[1])
