"""A tracker is one module, and no failure of it stops a run or costs one of its files."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY, configuration

from largebatch.config.schema import Config
from largebatch.runs.folder import RunFolder
from largebatch.runs.metrics import read_rows
from largebatch.tracking.console import Console
from largebatch.tracking.recorder import Recorder
from largebatch.tracking.rows import COLUMNS, Layer

FACTS = {"steps": 3, "steps_per_epoch": 1}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the example of the documentation as ``tracking/rows_run.py``."""
    (code,) = re.findall("```python\n(.*?)```", (ROOT / "docs" / "tracking.md").read_text(), re.DOTALL)
    module = ModuleType("largebatch.tracking.rows_run")
    exec(code, module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.fixture
def config() -> Config:
    config = configuration(*TINY, "tracker.alerts=true", "tracker.checkpoints=true", "tracker.layers_every=1")
    config.tracker.name = "rows"
    return config


def record(config: Config, path: Path) -> str:
    """Record a short run that diverges. Return its log."""
    path.mkdir()
    folder = RunFolder(path)
    with Console(folder.log, speaking=True) as console, Recorder(config, folder, 0, FACTS, console) as recorder:
        for step in (1, 2, 3):
            recorder.layers(step, [Layer("weight", 2)], dict.fromkeys(COLUMNS, torch.ones(1)))
            recorder.row({"step": step, "epoch": step, "train/loss": 1.0 / step})
        recorder.finish("diverged", 3, "", 1.0, "0")
    return folder.log.read_text()


def test_the_documented_tracker_gets_every_row_once(module: ModuleType, config: Config, tmp_path: Path) -> None:
    assert record(config, tmp_path / "run") == ""
    rows = [json.loads(line) for line in (tmp_path / "run" / "rows.jsonl").read_text().splitlines()]
    assert [row for row in rows if "train/loss" in row] == read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "layers/weight_norm/weight" in row] == [1, 2, 3]
    assert len(rows) == 6


@pytest.mark.parametrize("method", ["start", "_log", "_summarize", "_alert", "_upload_checkpoints", "_finish"])
def test_a_tracker_that_fails_is_logged_once_and_costs_no_file(
    module: ModuleType, config: Config, tmp_path: Path, method: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("as told")

    if method == "start":
        module.start = fail
    else:
        setattr(module.RowsRun, method, fail)
    log = record(config, tmp_path / "failing")
    assert log.count("\n") == log.count("OSError: as told") == 1
    config.tracker.name = "none"
    record(config, tmp_path / "without")
    names = {path.name for path in (tmp_path / "without").iterdir()}
    assert {path.name for path in (tmp_path / "failing").iterdir()} - {"rows.jsonl"} == names
    for name in names - {"log.txt", "status.json", "metrics.parquet", "layers.parquet"}:
        assert (tmp_path / "failing" / name).read_bytes() == (tmp_path / "without" / name).read_bytes(), name
    assert RunFolder(tmp_path / "failing").state() == "diverged"
