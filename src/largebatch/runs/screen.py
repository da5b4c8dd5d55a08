"""Tables of runs that fit on a terminal: short names, coloured states, and no line break inside a word."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from largebatch.terminal import printable

if TYPE_CHECKING:
    from rich.text import Text

_STYLES = {
    "finished": "green", "running": "cyan", "diverged": "magenta", "failed": "bold red", "unreadable": "bold red",
    "queued": "yellow", "preempted": "yellow", "interrupted": "yellow",
}  # fmt: skip
_GAP = 2  # spaces between columns
_FEWEST = 20  # characters: a narrower column of settings or news makes room, or is left out
_DROPPED = ("node", "job", "seconds", "of", "step")  # columns that a narrow terminal lacks, the first one first
_INDENT = "    "

Columns = Mapping[str, Sequence[str]]  # cells by heading; "settings" is the column that adapts


def split_names(names: Sequence[str]) -> tuple[list[tuple[str, str]], str]:
    """Return digits and settings of each run's name, and the part of the names that all runs share.

    The last eight digits name a run in every command. ``digits-cnn-lars-b128-s0-1a2b3c4d`` beside a run of ``lamb`` has
    the settings ``lars``, and both share ``digits cnn b128 s0``. A name without such digits is its own digits.
    """
    parts = []
    for name in names:
        prefix, _, digits = name.rpartition("-")
        # The minus of an exponent, as in lr1e-05, doesn't end a part.
        of_prefix = re.split(r"(?<!\de)-", prefix) if re.fullmatch("[0-9a-f]{8}", digits) else None
        parts.append((digits, of_prefix) if of_prefix else (name, []))
    named = [set(of_prefix) for _, of_prefix in parts if of_prefix]
    shared = set.intersection(*named) if len(named) > 1 else set()
    common = next((" ".join(part for part in of_prefix if part in shared) for _, of_prefix in parts if of_prefix), "")
    return [(digits, " ".join(p for p in of_prefix if p not in shared)) for digits, of_prefix in parts], common


def short_label(label: str) -> str:
    """Return overrides with the last parts of their keys, ``lr=1`` for ``optimizer.lr=1``, unless two are equal."""
    pairs = [override.partition("=") for override in label.split(" ")]
    last = [key.rpartition(".")[2] for key, _, _ in pairs]
    return " ".join(
        (short if last.count(short) == 1 else key) + equals + value
        for (key, equals, value), short in zip(pairs, last, strict=True)
    )


def screen_table(columns: Columns, news: Sequence[str], width: int, *, live: bool = False) -> Text:
    """Return a table of at most ``width`` characters a line.

    The column ``settings`` takes the room that the others leave. It is wrapped between words, as are the ``news``. News
    stand in the last column if they fit, else below their row.

    Args:
        news: text of each row, such as why it failed. May be empty.
        live: for a display that is redrawn. A row is one line, and long texts end in an ellipsis.
    """
    from rich.text import Text

    shown = {name: [_one_line(cell) for cell in cells] for name, cells in columns.items()}
    news = [_one_line(text).replace(f"{Path.cwd()}/", "") for text in news]
    widths = {name: max(map(len, (name, *cells))) for name, cells in shown.items()}
    longest = max((len(word) for cell in shown.get("settings", ()) for word in cell.split()), default=0)
    for name in _DROPPED:
        if name in widths and _room(widths, width) < min(widths.get("settings", 0), max(longest, _FEWEST)):
            del widths[name]
    if "settings" in widths:
        widths["settings"] = max(len("settings"), min(widths["settings"], _room(widths, width)))
    beside = width - sum(widths.values()) - _GAP * len(widths)
    beside = 0 if beside < _FEWEST else beside
    numeric = {name: name not in ("run", "settings") and _is_numeric(cells) for name, cells in shown.items()}
    heads = [head.rjust(widths[head]) if numeric[head] else head.ljust(widths[head]) for head in widths]
    table = Text(no_wrap=True, overflow="ellipsis").append((" " * _GAP).join(heads).rstrip(), "bold")
    for index, text in enumerate(news):
        row = {name: shown[name][index] for name in widths}
        space = widths.get("settings", 0)
        lines = [_cut(line, space) for line in _lines(row.get("settings", ""), space, live)]
        cells = [_padded(name, row | {"settings": lines[0]}, widths[name], numeric[name]) for name in widths]
        fits = bool(text and beside) and (live or len(text) <= beside)
        if fits:
            cells.append(Text(_cut(text, beside)))
        table.append("\n")
        table.append_text(Text(" " * _GAP).join(cells))
        before = sum(widths[name] + _GAP for name in list(widths)[: list(widths).index("settings")]) if lines[1:] else 0
        table.append("".join(f"\n{' ' * before}{line}" for line in lines[1:]))
        if text and not fits:
            below = _lines(text, width - len(_INDENT), live)
            table.append("".join(f"\n{_INDENT}{line}" for line in below), _STYLES.get(row.get("state", ""), ""))
    return table


def wrapped(text: str, stream: TextIO) -> str:
    """Return text for a stream. On a terminal, breaks between words keep lines within the terminal's width.

    A word that is longer than a line stays whole, so that a path can be copied.
    """
    if not stream.isatty():
        return text
    width = shutil.get_terminal_size().columns
    lines = []
    for line in text.replace(f"{Path.cwd()}/", "").split("\n"):
        indent = " " * (len(line) - len(line.lstrip())) + _INDENT
        lines.append(
            textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        )
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Return hours, minutes and seconds, as in ``0:12:30``."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _room(widths: Mapping[str, int], width: int) -> int:
    """Return the characters that the other columns leave to the settings."""
    others = [size for name, size in widths.items() if name != "settings"]
    return width - sum(others) - _GAP * len(others)


def _lines(text: str, width: int, live: bool) -> list[str]:
    """Wrap ``text`` between words, or cut it to a line."""
    if live:
        return [_cut(text, width)]
    return textwrap.wrap(text, max(width, 1), break_long_words=False, break_on_hyphens=False) or [""]


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))


def _cut(text: str, width: int) -> str:
    """Return ``text``, or its beginning with an ellipsis if it is longer than ``width``."""
    return text if len(text) <= width else text[: max(width - 1, 0)].rstrip() + "…"


def _padded(name: str, row: Mapping[str, str], width: int, right: bool) -> Text:
    from rich.text import Text

    cell = row[name]
    text = Text(cell, _STYLES.get(cell, "") if name == "state" else "")
    text.pad_left(width - len(cell)) if right else text.pad_right(width - len(cell))
    return text


def _is_numeric(cells: Iterable[str]) -> bool:
    """Return True if a column of these cells is aligned on the right."""
    cells = list(cells)
    return any(cells) and all(cell[:1].isdigit() or cell in ("-", "") for cell in cells)
