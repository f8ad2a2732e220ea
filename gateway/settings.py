"""Process settings: read once from the command line and the environment, typed, each with where it came from.

`FOREBAY_<NAME>` sets a field of `Settings`; a command-line option of the same name wins over it. Nothing else in the
product reads the environment, but for `${NAME}` in a policy file, which `load` expands from the mapping it is given.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec

from policies.redis_address import RedisAddress
from policies.secrets import RootSecret
from policies.store import check_url

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
    body_within_s: Annotated[float, msgspec.Meta(gt=0, le=86_400)] = 30.0
    drain_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 30.0
    """How long answers in flight may take to finish after SIGTERM."""
    drain_notice_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 0.5
    """How long after SIGTERM new connections are still served, while `/readyz` says 503: time for a load balancer to
    look elsewhere. Part of `drain_s` for an answer that runs."""
    log_format: Literal["console", "json"] = "console"
    """`console` for people, `json` for machines."""
    engines: str = "{}"
    """JSON object of local engines by backend name, see `gateway.app.Engine`. Set by the supervisor for its workers."""
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

URL_FIELDS = frozenset({"store_url", "state_url", "cache_url"})

_CHECKS: Mapping[str, Callable[[str], object]] = MappingProxyType(
    {
        "root_secret": lambda text: RootSecret.parse(text.encode()),
        "store_url": check_url,
        "state_url": RedisAddress.parse,
        "cache_url": RedisAddress.parse,
    }
)
"""Who says whether a setting is good, by an error that repeats no secret and no credential."""

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
    for name, value in values.items():
        _check(name, value, origins[name])
    settings = msgspec.convert(values, Settings, strict=False)
    return ResolvedSettings(settings=settings, origins=origins, unknown=tuple(unknown))


def shown(settings: Settings) -> dict[str, Any]:
    """Every setting that people make, fit to be read by anybody: no secret, no credential of a URL."""
    values = msgspec.structs.asdict(settings)
    return {
        name: "(set, not shown)"
        if name in SECRET_FIELDS and value
        else without_credentials(value)
        if name in URL_FIELDS
        else value
        for name, value in values.items()
        if name not in SUPERVISOR_FIELDS
    }


def without_credentials(url: str) -> str:
    """`url` with `***` for its user and password. Where it is not clear what is one, too much is left out."""
    return re.sub(r"(?i)([?&][^=&]*pass[^=&]*=)[^&]*", r"\1***", re.sub(r"(?s)://.*@", "://***@", url))


def _check(name: str, value: Any, origin: str) -> None:
    try:
        msgspec.convert({name: value}, Settings, strict=False)
    except msgspec.ValidationError as error:
        kind = {field.name: field.type for field in msgspec.structs.fields(Settings)}[name]
        if get_origin(kind) is Literal:
            reason = f"expected {' or '.join(get_args(kind))}"
        else:
            reason = str(error).partition(" - at `$")[0].partition(", got ")[0]
        given = "" if name in SECRET_FIELDS else f", got {str(value)!r}"
        raise SettingError(f"{origin}: {reason[:1].lower()}{reason[1:]}{given}") from None
    if value and (check := _CHECKS.get(name)):
        try:
            check(value)
        except ValueError as error:
            raise SettingError(f"{origin}: {error}") from None
