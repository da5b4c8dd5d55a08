"""Offline runs of one part, as W&B's own reader prints them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from largebatch.tracking.rows import COLUMNS


def records(run: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the records that W&B's own reader finds, by kind."""
    (segment,) = (run / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(segment)]
    printed = subprocess.run(command, cwd=segment, capture_output=True, text=True, timeout=60, check=True).stdout
    found: dict[str, list[dict[str, Any]]] = {}
    for line in printed.splitlines():
        record = json.loads(line)
        found.setdefault(record["type"], []).append(record[record["type"]])
    return found


def history_of(run: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return every row without W&B's counters and layer histograms, and the final summary."""
    found = records(run)
    left_out = ("_", *(f"layers/{column}." for column in COLUMNS))
    rows = [{k: v for k, v in entry["item"].items() if not k.startswith(left_out)} for entry in found["history"]]
    return rows, {k: v for entry in found["summary"] for k, v in entry["update"].items()}
