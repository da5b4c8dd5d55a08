"""``metrics.jsonl``: one JSON object a row, flushed after each; and a Parquet table of the rows at the end."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from largebatch.errors import UserError
from largebatch.runs.folder import read_tail, readable, replace_file

Row = dict[str, Any]
_TAIL = 1 << 15  # bytes: some hundred rows


class MetricsLog:
    """Appends rows to a JSONL file.

    Args:
        path: the file. Its rows after ``step``, and rows that a crash damaged, are removed: a resumed run writes them
            again.
        step: last optimizer step before a resumed run; 0 removes all rows.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept = b"".join(_lines_up_to(path, step)) if step > 0 else b""
        replace_file(path, lambda temporary: temporary.write_bytes(kept))
        self._size, self._crc = len(kept), zlib.crc32(kept)
        self._file = path.open("ab")

    def write(self, row: Row) -> None:
        line = _line(row).encode()
        self._file.write(line)
        self._file.flush()
        self._size, self._crc = self._size + len(line), zlib.crc32(line, self._crc)

    def to_sync(self) -> Callable[[], list[int]]:
        """Return a function that puts the rows so far on the disk, in any thread, and describes them."""
        described = [self._size, self._crc]

        def sync() -> list[int]:
            os.fsync(self._file.fileno())
            return described

        return sync

    def close(self) -> None:
        self._file.close()


def read_rows(path: Path) -> list[Row]:
    """Return all rows, without a last row that a crash cut off; an empty list if there is no file.

    Raises:
        UserError: the file can't be read, or a row isn't an object with a step.
    """
    rows = read_lines(path)
    if not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in rows):
        raise UserError(f"{path}: can't be read (a row isn't an object with a step). Fix: correct or remove the row")
    return rows


def read_lines(path: Path) -> list[Any]:
    """Return the JSON value of each complete line; an empty list if there is no file.

    Raises:
        UserError: the file can't be read.
    """
    if not path.exists():
        return []
    with readable(path):
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def has_rows(path: Path, described: list[int]) -> bool:
    """Return True if the file begins with the rows that ``MetricsLog.to_sync`` described: bytes and CRC-32."""
    size, crc = described
    content = path.read_bytes()[:size] if path.exists() else b""
    return len(content) == size and zlib.crc32(content) == crc


def _lines_up_to(path: Path, step: int) -> Iterator[bytes]:
    """Yield the lines before the first line that is of a later step, damaged or cut off."""
    if path.exists():
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:  # what a crash of the machine left after the last checkpoint
                return
            if not isinstance(row, dict) or row["step"] > step:
                return
            yield line


def newest(path: Path, *names: str) -> float | None:
    """Return the newest value of the first of ``names`` that the last rows have. Other rows aren't read.

    Raises:
        UserError: a row isn't JSON.
    """
    rows = _last_rows(path)[::-1]
    values = (row.get(name) if isinstance(row, dict) else row for name in names for row in rows)
    found = next((value for value in values if value is not None), None)
    if not isinstance(found, int | float | None):
        raise UserError(f"{path}: a row isn't an object with numbers. Fix: correct or remove the row")
    return found


def seconds_left(path: Path, steps: int) -> float | None:
    """Return the seconds to step ``steps`` at the speed of the last rows, or None if they have fewer than two steps.

    Raises:
        UserError: a row isn't JSON.
    """
    times = [
        (row["step"], row["wall_seconds"])
        for row in _last_rows(path)
        if isinstance(row, dict) and all(isinstance(row.get(name), int | float) for name in ("step", "wall_seconds"))
    ]
    if not times or times[-1][0] <= times[0][0]:
        return None
    (first, began), (step, now) = times[0], times[-1]
    return float(max(steps - step, 0) * max(now - began, 0.0) / (step - first))


def _last_rows(path: Path) -> list[Any]:
    try:
        return [json.loads(line) for line in read_tail(path, _TAIL)]
    except ValueError as error:
        raise UserError(f"{path}: a row isn't JSON ({error}). Fix: correct or remove the row") from None


def write_table(rows: list[Row], path: Path) -> None:
    """Write Parquet with a column for each name, in order of first appearance; null if a row lacks the name."""
    import pyarrow
    import pyarrow.parquet

    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
    replace_file(path, partial(pyarrow.parquet.write_table, table))


def _line(row: Row) -> str:
    # JSON has no NaN and no infinity: null, and the run's state is diverged.
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite) + "\n"
