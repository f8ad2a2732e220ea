"""From a YAML file to a `Policy`, or to every reason why it is none, each with file, line, column and remedy.

    read_policy   bytes of a file          yaml_source   text to a tree with places
    conform       the tree against the structs           references   the parts against each other

`${NAME}` is filled in from the environment that is passed in; no message, warning or error ever holds such a value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from policies.conform import Conformed, conform
from policies.duration import Duration
from policies.mistakes import START, Findings, Place, PolicyError
from policies.money import UsdPer1M
from policies.references import TemplateFault, check_references
from policies.routing_policy import PATH_FIELDS, Policy, PolicyFile
from policies.yaml_source import parse_yaml

T = TypeVar("T", bound=msgspec.Struct)

MAX_BYTES = 1_048_576


def no_template_check(template: str) -> None:
    """Takes every chat template as it is."""


def load_policy(path: Path, env: Mapping[str, str], template_fault: TemplateFault = no_template_check) -> Policy:
    """The policy in `path`, `${NAME}` filled in from `env`. Raises `PolicyError` with all mistakes found.

    `template_fault` says what is wrong with a chat template. The call blocks for the time of reading and parsing
    (milliseconds): make it in a thread where an event loop runs.
    """
    return parse_policy(read_policy(path), path, env, template_fault)


def read_policy(path: Path) -> bytes:
    """What the file holds. Raises `PolicyError` when it can not be read or has more than `MAX_BYTES`."""
    findings = Findings(str(path))
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except IsADirectoryError as error:
        raise findings.fatal(START, (), "is a directory", "name a policy file in it") from error
    except FileNotFoundError as error:
        raise findings.fatal(START, (), "no such file") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a path"
        raise findings.fatal(START, (), f"can not be read: {reason}") from error
    if len(content) > MAX_BYTES:
        raise findings.fatal(START, (), f"larger than {MAX_BYTES} bytes", "is this a policy file?")
    return content


def parse_policy(
    content: bytes, path: Path, env: Mapping[str, str], template_fault: TemplateFault = no_template_check
) -> Policy:
    """The policy that `content` says, as if it stood in `path`. Raises `PolicyError` with all mistakes found."""
    findings = Findings(str(path))
    tree = parse_yaml(_decoded(content, findings), findings)
    conformed = conform(tree, PolicyFile, env, findings)
    check_references(conformed, path.parent, findings, template_fault)
    if findings.mistakes:
        raise PolicyError(findings.mistakes)
    file = _converted(conformed, findings)
    return Policy(
        file=_with_absolute_paths(file, path.parent),
        version=_version(file),
        source=str(path),
        warnings=findings.warnings,
    )


def _decoded(content: bytes, findings: Findings) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-8-sig", "replace")
        lines = before.split("\n")
        place = Place(len(lines), len(lines[-1]) + 1)
        raise findings.fatal(place, (), "not UTF-8", "save the file as UTF-8") from error


def _converted(conformed: Conformed, findings: Findings) -> PolicyFile:
    try:
        return msgspec.convert(conformed.data, PolicyFile)
    except msgspec.ValidationError as error:
        # `conform` accepts exactly what msgspec does (a law in the tests). The error's text may hold a secret: its
        # place alone is shown.
        where = str(error).rpartition("`$")[2].rstrip("`")
        raise findings.fatal(START, (), f"does not fit a policy at '{where or 'its top'}'") from error


def _version(file: PolicyFile) -> str:
    canonical = msgspec.json.encode(file, enc_hook=_plain, order="sorted")
    return hashlib.blake2b(canonical).hexdigest()[:12]


def _plain(value: object) -> object:
    match value:
        case Duration():
            return float(value)
        case UsdPer1M():
            return int(value)
    raise NotImplementedError(f"no canonical form for {type(value).__name__}")


def _with_absolute_paths(file: PolicyFile, folder: Path) -> PolicyFile:
    backends = {name: _absolute(backend, folder) for name, backend in file.backends.items()}
    return msgspec.structs.replace(file, backends=backends)


def _absolute(part: T, folder: Path) -> T:
    """`part` with the paths in it, and in its `tls`, seen from `folder`."""
    changes: dict[str, object] = {}
    for name in PATH_FIELDS:
        if (path := getattr(part, name, None)) is not None:
            changes[name] = str((folder / path).absolute())
    if (tls := getattr(part, "tls", None)) is not None:
        changes["tls"] = _absolute(tls, folder)
    return msgspec.structs.replace(part, **changes) if changes else part
