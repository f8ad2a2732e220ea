"""What is wrong with a policy file, and where: `PolicyMistake`, the `PolicyError` that holds all of them, `Findings`.

PolicyError     the file is not a policy; `mistakes` says every reason found, in the order of the file
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple

import msgspec

Path = tuple[str | int, ...]
"""Where a value stands in a policy: keys, and indexes of lists."""

MAX_MISTAKES = 100
"""More than this is another kind of file, not a policy with mistakes."""

_MAX_CANDIDATES = 500


class Place(NamedTuple):
    """A position in a file, both from 1, the column in characters."""

    line: int
    column: int


START = Place(1, 1)


class PolicyMistake(msgspec.Struct, frozen=True, kw_only=True):
    """One thing to change in a policy file. Its text never holds a value that came from the environment."""

    file: str
    line: int
    column: int
    path: str = ""
    """The key it is about, like `routes.auto.fallbacks[0]`; empty where the file as a whole is meant."""
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        about = f"{self.path}: " if self.path else ""
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.file}:{self.line}:{self.column}: {about}{self.message}{remedy}"


class PolicyError(Exception):
    """A file that is not a policy. Its text is one line per mistake, each `file:line:column: key: what; remedy`."""

    def __init__(self, mistakes: tuple[PolicyMistake, ...]) -> None:
        super().__init__("\n".join(map(str, mistakes)))
        self.mistakes = mistakes


class Findings:
    """Collects what is found in one file: mistakes, which refuse it, and warnings, which do not."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._mistakes: dict[tuple[Place, str], PolicyMistake] = {}
        self._warnings: list[PolicyMistake] = []

    def mistake(self, place: Place, path: Path, message: str, remedy: str = "") -> None:
        """Note a mistake. What an alias repeats is noted once. Raises `PolicyError` when there are `MAX_MISTAKES`."""
        self._mistakes.setdefault((place, message), self._finding(place, path, message, remedy))
        if len(self._mistakes) >= MAX_MISTAKES:
            raise PolicyError((*self.mistakes, self._finding(place, (), f"stopped after {MAX_MISTAKES} mistakes", "")))

    def warning(self, place: Place, path: Path, message: str, remedy: str = "") -> None:
        self._warnings.append(self._finding(place, path, message, remedy))

    def fatal(self, place: Place, path: Path, message: str, remedy: str = "") -> PolicyError:
        """The error to raise where reading can not go on: this mistake and all before it."""
        self._mistakes.setdefault((place, message), self._finding(place, path, message, remedy))
        return PolicyError(self.mistakes)

    @property
    def mistakes(self) -> tuple[PolicyMistake, ...]:
        return _in_order(self._mistakes.values())

    @property
    def warnings(self) -> tuple[PolicyMistake, ...]:
        return _in_order(self._warnings)

    def _finding(self, place: Place, path: Path, message: str, remedy: str) -> PolicyMistake:
        return PolicyMistake(
            file=self._file,
            line=place.line,
            column=place.column,
            path=dotted(path),
            message=message,
            remedy=remedy,
        )


def dotted(path: Path) -> str:
    """`("routes", "auto", "fallbacks", 0)` as `routes.auto.fallbacks[0]`."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{in_print(step)}" for step in path)
    return "".join(steps).removeprefix(".")


def in_print(text: str, limit: int = 60) -> str:
    """`text` fit for one line of a terminal or a log: short, control characters and broken Unicode escaped."""
    short = text if len(text) <= limit else f"{text[: limit - 3]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)


def quoted(text: str) -> str:
    return f"'{in_print(text)}'"


def listed(names: Iterable[str]) -> str:
    """Names for a message, at most 20 of them."""
    names = list(names)
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(map(in_print, names[:20])) + more


def suggestion(word: str, known: Iterable[str], *, noun: str = "known") -> str:
    """What to write instead of `word`: the nearest known name, or the known names where none is near."""
    known = list(known)
    if (near := nearest(word, known)) is not None:
        return f"did you mean {quoted(near)}?"
    return f"{noun}: {listed(known)}" if known else ""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name fewest edits away from `word`, if that is at most a third of its length (one edit at least)."""
    best: str | None = None
    limit = max(1, len(word) // 3)
    for name in islice(known, _MAX_CANDIDATES):
        if abs(len(name) - len(word)) <= limit and (edits := _edits(word.lower(), name.lower())) <= limit:
            best, limit = name, edits - 1
    return best


def _edits(a: str, b: str) -> int:
    """Insertions, deletions, substitutions and swaps of neighbours that make `b` of `a`."""
    older: list[int] = []
    above: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        older, above, row = above, row, [i]
        for j, y in enumerate(b, 1):
            fewest = min(row[j - 1] + 1, above[j] + 1, above[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                fewest = min(fewest, older[j - 2] + 1)
            row.append(fewest)
    return row[-1]


def _in_order(findings: Iterable[PolicyMistake]) -> tuple[PolicyMistake, ...]:
    return tuple(sorted(findings, key=lambda finding: (finding.line, finding.column)))
