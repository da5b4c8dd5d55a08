"""The default tracker in a run of the real program: offline, complete, and without secrets of the environment."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
from conftest import ROOT, TINY, environment
from offline import history_of, records
from programs import Programs

from largebatch.runs.metrics import read_rows
from largebatch.tracking.rows import COLUMNS

WITH_WANDB = [item for item in TINY if item != "tracker=none"]
SECRETS = {"WANDB_API_KEY": "5ec4e7" * 6 + "beef", "AWS_SECRET_ACCESS_KEY": "canary-aws", "MY_TOKEN": "canary-token"}


def test_an_offline_run_holds_config_history_and_summary_and_no_secret(tmp_path: Path) -> None:
    overrides = [*WITH_WANDB, "steps=6", "tracker.group=mine", "tracker.console=true"]
    refused = {"WANDB_BASE_URL": "http://127.0.0.1:9"}
    result = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *overrides], cwd=tmp_path, timeout=120, check=False,
        env={**environment(), **SECRETS, **refused}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "W&B offline" in result.stdout
    (run,) = (tmp_path / "runs").iterdir()

    found = records(run)
    (started,) = found["run"]
    assert started["run_id"] == run.name.rsplit("-", 1)[-1]
    config = started["config"]["update"]
    assert config["optimizer"]["name"] == "lars"
    assert config["resolved"]["steps"] == 6
    assert "W&B offline" in json.dumps(found["output_raw"])
    rows = read_rows(run / "metrics.jsonl")
    history, summary = history_of(run)
    assert [row for row in history if not any(name.startswith("layers/") for name in row)] == rows
    assert summary["test/accuracy"] == json.loads((run / "summary.json").read_text())["test/accuracy"]

    for path in run.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for secret in SECRETS.values():
                assert secret.encode() not in content, path


@pytest.mark.parametrize("optimizer", ["lars", "adamw"])
def test_layer_statistics_of_every_checkpoint_reach_wandb(tmp_path: Path, process: Programs, optimizer: str) -> None:
    """W&B has each row of the table once, with more rows than the device keeps and checkpoints in between."""
    command = [*WITH_WANDB, f"optimizer={optimizer}", "steps=50", "tracker.layers_every=1", "checkpoint.every_steps=41"]
    run = process.train(tmp_path, *command)
    table = pyarrow.parquet.read_table(run / "layers.parquet").to_pylist()
    assert {row["step"] for row in table} == set(range(1, 51))
    expected: dict[int, dict[str, float]] = {}
    for row in table:
        values = {f"layers/{column}/{row['layer']}": row[column] for column in COLUMNS}
        expected.setdefault(row["step"], {"step": row["step"], "epoch": row["step"] / 4}).update(values)

    history, summary = history_of(run)
    layers = [row for row in history if any(name.startswith("layers/") for name in row)]
    assert layers == [expected[step] for step in range(1, 51)]
    assert [row for row in history if row not in layers] == read_rows(run / "metrics.jsonl")
    assert (summary["step"], summary["epoch"]) == (50, 12.5)
