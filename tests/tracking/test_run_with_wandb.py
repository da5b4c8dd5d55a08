"""The default tracker in a whole run of the real program: offline, complete, and without the environment's secrets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import ROOT, TINY, environment

from largebatch.tracking.metrics import read_rows

SECRETS = {"WANDB_API_KEY": "5ec4e7" * 6 + "beef", "AWS_SECRET_ACCESS_KEY": "canary-aws", "MY_TOKEN": "canary-token"}


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


def test_an_offline_run_holds_config_history_and_summary_and_no_secret(tmp_path: Path) -> None:
    overrides = [*(item for item in TINY if item != "tracker=none"), "steps=6", "tracker.group=mine"]
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
    rows = read_rows(run / "metrics.jsonl")
    history = [{k: v for k, v in entry["item"].items() if not k.startswith("_")} for entry in found["history"]]
    assert history == rows
    summary = {k: v for entry in found["summary"] for k, v in entry["update"].items()}
    assert summary["test/accuracy"] == json.loads((run / "summary.json").read_text())["test/accuracy"]

    for path in run.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for secret in SECRETS.values():
                assert secret.encode() not in content, path
