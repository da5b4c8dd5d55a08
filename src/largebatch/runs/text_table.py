"""Tables for terminals and pipes."""

from __future__ import annotations

import io
import itertools
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

Cells = Sequence[str]
_WIDEST = 100_000  # columns: a table never wraps


def print_table(table: str) -> None:
    """Print a table with whole cells; each row is one line, which a narrow terminal wraps."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.text import Text

        first, _, rest = table.partition("\n")
        Console().print(Text(first, "bold"), Text(rest), sep="\n", soft_wrap=True)
    else:
        print(table, flush=True)


def plain_table(headings: Cells, rows: Iterable[Cells]) -> str:
    """Return a table as text, with two spaces between columns and whole cells."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    lines = [[Text(" ".join(cell.splitlines())) for cell in row] for row in rows]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading, column in itertools.zip_longest(headings, zip(*lines, strict=True)):
        numeric = _is_numeric([cell.plain for cell in column or ()])
        table.add_column(heading, justify="right" if numeric else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    text = io.StringIO()
    Console(file=text, width=_WIDEST, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def live_table(headline: str, table: str) -> Text:
    """Return a headline and a table for rich's live view, which cuts lines that are too long."""
    from rich.text import Text

    return Text(f"{headline}\n\n{table}", no_wrap=True, overflow="ellipsis")


def _is_numeric(cells: Cells) -> bool:
    return all(cell[:1].isdigit() or cell in ("-", "") for cell in cells) and any(cells)
