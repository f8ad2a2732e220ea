"""What the command line prints: data as it is, and styles that are ours alone.

Names, messages and last words of a process may hold anything, also what the terminal library takes for markup.
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDE = 1000
"""Columns of a table: an id that is cut off cannot be pasted."""


def say(*parts: str | tuple[str, str]) -> None:
    """Print `parts` as one line on standard output; a pair is a text and its style."""
    _Console().print(Text.assemble(*parts), soft_wrap=True)


def report(*parts: str | tuple[str, str]) -> None:
    """Like `say`, on standard error: what is told beside the answer. Raises OSError where nobody can read it."""
    _Reports(stderr=True).print(Text.assemble(*parts), soft_wrap=True)


def say_table(table: Table) -> None:
    """Print a table as wide as its content, on standard output."""
    _Console(width=_WIDE).print(table)


class _Console(Console):
    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        super().__init__(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


class _Reports(_Console):
    def on_broken_pipe(self) -> None:
        # By default the program ends here: right for a table, wrong for a supervisor that only reports.
        raise BrokenPipeError
