"""Runs of the real program in folders of their own, and the files that they leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from conftest import start

from largebatch.runs.metrics import newest, read_rows

TIMES = (
    *("wall_seconds", "perf/images_per_second", "perf/step_ms"),
    *("perf/decoded_images_per_second", "perf/data_share", "perf/sharpness_seconds"),
)


def parameters(run: Path) -> dict[str, torch.Tensor]:
    """Return the model's parameters in the newest checkpoint."""
    newest = sorted((run / "checkpoints").glob("step-*.pt"))[-1]
    state: dict[str, torch.Tensor] = torch.load(newest, weights_only=True)["model"]
    return state


def the_run(folder: Path) -> Path:
    (run,) = (folder / "runs").glob("[!.]*")
    return run


def timeless(run: Path) -> list[dict[str, Any]]:
    """Return the metrics rows without measured times."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(run / "metrics.jsonl")]


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a launcher that must succeed. Return its standard output."""
    out, errors = process.communicate(timeout=500)
    assert process.returncode == 0, out + errors
    return out


def kill_after_checkpoint(folder: Path, *overrides: str) -> None:
    """Start a run, and kill its worker as soon as there are rows after a checkpoint."""
    process = start(*overrides, cwd=folder)
    deadline = time.monotonic() + 200
    while not _has_rows_after_checkpoint(folder):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.kill(worker_pid(the_run(folder)), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors


def _has_rows_after_checkpoint(folder: Path) -> bool:
    saved = [int(path.stem.removeprefix("step-")) for path in folder.glob("runs/[!.]*/checkpoints/step-*.pt")]
    return bool(saved) and (newest(the_run(folder) / "metrics.jsonl", "step") or 0) > max(saved)


def train_in(folder: Path, *overrides: str) -> Path:
    """Run the program in a new folder. Return the run's folder."""
    folder.mkdir()
    finish(start(*overrides, cwd=folder))
    return the_run(folder)


def worker_pid(run: Path) -> int:
    pid: int = json.loads((run / "status.json").read_text())["pid"]
    return pid


def is_alive(pid: int) -> bool:
    """Return False if the process has ended, or is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def processes_of(folder: Path) -> list[int]:
    """Return the living processes with a path below the folder among their arguments."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if bytes(folder) + b"/" in (process / "cmdline").read_bytes() and is_alive(int(process.name)):
                found.append(int(process.name))
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
    return found
