"""Process settings: read once from the command line and the environment, typed, each with where it came from.

`FOREBAY_<NAME>` sets a field of `Settings`; a command-line option of the same name wins over it. Nothing else in the
product reads the environment, but for `${NAME}` in a policy file, which `load` expands from the mapping it is given.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

ENVIRONMENT_PREFIX = "FOREBAY_"


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a process may be told from outside, besides its policy."""

    policy: str = ""
    """Path of the policy file."""
    data_dir: str = ".forebay"
    """Where state that must survive is kept: the SQLite file, the state Valkey, the root secret, local models."""
    host: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 8080
    """0 picks a free port."""
    workers: Annotated[int, msgspec.Meta(ge=1, le=256)] = 1
    store_url: str = ""
    """SQL store; default: a SQLite file in the data directory."""
    state_url: str = ""
    """Redis for counters and leases (`noeviction`); default: an embedded Valkey."""
    cache_url: str = ""
    """Redis for answers (evicting); default: a second embedded Valkey."""
    cache_max_memory_mb: Annotated[int, msgspec.Meta(ge=1)] = 256
    """Memory of the embedded cache Valkey."""
    root_secret: str = ""
    """The secret every other one is derived from, 32 characters or more; default: a file in the data directory."""
    max_body_bytes: Annotated[int, msgspec.Meta(ge=1024)] = 16 * 1024 * 1024
    """Of a request, after unpacking."""
    body_within_s: Annotated[float, msgspec.Meta(gt=0)] = 30.0
    drain_s: Annotated[float, msgspec.Meta(ge=0)] = 30.0
    """How long answers in flight may take to finish after SIGTERM."""
    log_format: str = "console"
    """`console` for people, `json` for machines."""
    engines: str = "{}"
    """JSON object of local engines by backend name and URL. Set by the supervisor for its workers."""
    metrics_dir: str = ""
    """Where workers share their metrics. Set by the supervisor for its workers."""
    runtime_dir: str = ""
    """Sockets and status files of this run. Set by the supervisor for its workers."""

    @property
    def data_path(self) -> Path:
        return Path(self.data_dir)

    @property
    def resolved_store_url(self) -> str:
        return self.store_url or f"sqlite+aiosqlite:///{self.data_path / 'forebay.sqlite3'}"


class SettingError(Exception):
    """A setting that cannot be what it was given as. The message names it, its source and the remedy."""


class ResolvedSettings(msgspec.Struct, frozen=True, kw_only=True):
    settings: Settings
    origins: dict[str, str]
    """By field: `default`, `environment FOREBAY_…` or `option --…`."""
    unknown: tuple[str, ...] = ()
    """`FOREBAY_` variables that name no setting; a policy may use them all the same."""


SECRET_FIELDS = frozenset({"root_secret"})

SUPERVISOR_FIELDS = frozenset({"engines", "metrics_dir", "runtime_dir"})
"""What the supervisor tells its workers; nobody else sets them."""


def resolve_settings(options: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> ResolvedSettings:
    """Settings from command-line `options` (None: not given) over the environment over defaults.

    Raises `SettingError` for a value that does not fit.
    """
    environment = os.environ if environment is None else environment
    values: dict[str, Any] = {}
    unknown: list[str] = []
    origins = dict.fromkeys(Settings.__struct_fields__, "default")
    for variable, text in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        if name in origins:
            values[name], origins[name] = text, f"environment {variable}"
        else:
            unknown.append(variable)
    for name, value in options.items():
        if value is not None:
            values[name], origins[name] = value, f"option --{name.replace('_', '-')}"
    for name in values:
        _check(name, values[name], origins[name])
    settings = msgspec.convert(values, Settings, strict=False)
    return ResolvedSettings(settings=settings, origins=origins, unknown=tuple(unknown))


def _check(name: str, value: Any, origin: str) -> None:
    try:
        msgspec.convert({name: value}, Settings, strict=False)
    except msgspec.ValidationError as error:
        reason = str(error).partition(" - at `$")[0].partition(", got ")[0]
        given = "" if name in SECRET_FIELDS else f", got {str(value)!r}"
        raise SettingError(f"{origin}: {reason[:1].lower()}{reason[1:]}{given}") from None
