"""Starting runs in a folder of their own, and what is in the run folder afterwards."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import torch
from conftest import start

from largebatch.runs.metrics import read_rows

TIMES = ("wall_seconds", "perf/images_per_second", "perf/step_ms")


def parameters(run: Path) -> dict[str, torch.Tensor]:
    newest = sorted((run / "checkpoints").glob("step-*.pt"))[-1]
    state: dict[str, torch.Tensor] = torch.load(newest, weights_only=True)["model"]
    return state


def the_run(folder: Path) -> Path:
    (run,) = (folder / "runs").iterdir()
    return run


def timeless(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(run / "metrics.jsonl")]


def finish(process: subprocess.Popen[str]) -> str:
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, out + errors
    return out


def train_in(folder: Path, *overrides: str) -> Path:
    """Carry a run out in a new folder; its run folder."""
    folder.mkdir()
    finish(start(*overrides, cwd=folder))
    return the_run(folder)
