"""An offline run of one part, as W&B's own reader prints it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from largebatch.tracking.layers import COLUMNS


def records(run: Path) -> dict[str, list[dict[str, Any]]]:
    """What W&B's own reader finds, by kind of record."""
    (segment,) = (run / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(segment)]
    printed = subprocess.run(command, cwd=segment, capture_output=True, text=True, timeout=60, check=True).stdout
    found: dict[str, list[dict[str, Any]]] = {}
    for line in printed.splitlines():
        record = json.loads(line)
        found.setdefault(record["type"], []).append(record[record["type"]])
    return found


def history_of(run: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Every logged row, without W&B's own counters and histograms of layers, and the final summary."""
    found = records(run)
    left_out = ("_", *(f"layers/{column}." for column in COLUMNS))
    rows = [{k: v for k, v in entry["item"].items() if not k.startswith(left_out)} for entry in found["history"]]
    return rows, {k: v for entry in found["summary"] for k, v in entry["update"].items()}
