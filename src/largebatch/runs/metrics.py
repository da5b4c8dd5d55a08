"""``metrics.jsonl``, one object a row, flushed as it is written; and the same as a table at the end."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from largebatch.errors import UserError
from largebatch.runs.folder import read_tail

Row = dict[str, Any]
_TAIL = 1 << 15  # bytes: some hundred rows


class MetricsLog:
    """Appends rows to a JSONL file.

    Args:
        path: the file; rows that are there already are kept up to ``step`` and dropped after it, because a resumed run
            writes those again.
        step: the optimizer step that the run continues from; a run from 0 writes its row of step 0 anew too.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept = [row for row in read_rows(path) if row["step"] <= step] if step > 0 else []
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(_line(row) for row in kept))
        os.replace(temporary, path)
        self._file = path.open("a")

    def write(self, row: Row) -> None:
        self._file.write(_line(row))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_rows(path: Path) -> list[Row]:
    """All complete rows; a last line that a crash cut off is left out. Empty where there is no file."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]  # what follows the last newline is an unfinished row
    return [json.loads(line) for line in lines]


def newest(path: Path, *names: str) -> float | None:
    """The newest value among the last rows of the first of ``names`` that they have, without reading the others.

    Raises:
        UserError: when one of them isn't JSON.
    """
    try:
        rows = [json.loads(line) for line in reversed(read_tail(path, _TAIL))]
    except ValueError as error:
        raise UserError(f"{path}: has a row that isn't JSON ({error})") from None
    return next((row[name] for name in names for row in rows if row.get(name) is not None), None)


def write_table(rows: list[Row], path: Path) -> None:
    """Parquet with one column a name, in order of first appearance; null where a row has no such figure."""
    import pyarrow
    import pyarrow.parquet

    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
    temporary = path.with_name(f".{path.name}.tmp")
    pyarrow.parquet.write_table(table, temporary)
    os.replace(temporary, path)


def _line(row: Row) -> str:
    # NaN and infinity have no JSON form: null, and the run's state says that it diverged.
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite) + "\n"
