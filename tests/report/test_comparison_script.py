"""The script that writes the table and picture of a comparison, on a folder of runs."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment
from made_runs import write_run
from scipy.special import stdtrit

SCRIPT = ROOT / "docs" / "plots" / "comparison.py"


def draw(runs_dir: Path, folder: Path, *options: str) -> tuple[str, str]:
    """Call the script in this process. Return its table and picture."""
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [SCRIPT.name, str(runs_dir), "two", str(folder), *options])
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return written(folder)


def written(folder: Path) -> tuple[str, str]:
    return (folder / "two.md").read_text(), (folder / "two.svg").read_text()


def test_the_script_writes_the_table_and_the_same_picture_each_time(tmp_path: Path) -> None:
    for optimizer, accuracies in (("lars", (0.90, 0.91, 0.92)), ("lamb", (0.80, 0.81, 0.82))):
        for seed, accuracy in enumerate(accuracies):
            for batch in (128, 1024):
                overrides = ("dataset=digits", f"optimizer={optimizer}", f"batch_size={batch}", f"seed={seed}")
                write_run(tmp_path / "runs", *overrides, accuracies=(0.1, accuracy))
    table, picture = draw(tmp_path / "runs", tmp_path / "first")
    assert "| LARS | **91.0 ± 1.0** | **91.0 ± 1.0** |" in table.splitlines()
    assert "| LAMB | 81.0 ± 1.0 | 81.0 ± 1.0 |" in table.splitlines()
    assert len(re.findall("<!-- LARS -->|<!-- LAMB -->", picture)) == 2  # the legend
    (second := tmp_path / "second").mkdir()
    command = [sys.executable, str(SCRIPT), str(tmp_path / "runs"), "two", str(second)]
    subprocess.run(command, env=environment(), check=True, timeout=120)
    assert written(second) == (table, picture)


def test_the_chosen_learning_rates_have_the_error_of_the_scaling_rule(tmp_path: Path) -> None:
    scaled = ("dataset=digits", "optimizer=lars", "lr_scaling.rule=sqrt", "lr_scaling.base_batch=1024")
    for batch, lr, accuracy in ((128, 1, 0.9), (128, 2, 0.8), (1024, 1, 0.7), (1024, 2, 0.85)):
        write_run(tmp_path / "runs", *scaled, f"batch_size={batch}", f"optimizer.lr={lr}", accuracies=(0.1, accuracy))
    table, _ = draw(tmp_path / "runs", tmp_path / "drawn")
    lines = table.splitlines()
    assert "| learning rate (points lost by the one chosen at batch 1,024) | batch 128 | batch 1,024 |" in lines
    assert "| LARS | 1 (10.0) | 2 |" in lines


def test_leads_over_adamw_and_their_change_per_doubling(tmp_path: Path) -> None:
    """Differences of -10, -9 and -11 points at both batch sizes. The interval also counts the number of test images."""
    for optimizer, accuracies in (("adamw", (0.90, 0.91, 0.92)), ("lamb", (0.80, 0.82, 0.81))):
        for seed, accuracy in enumerate(accuracies):
            for batch in (128, 1024):
                overrides = ("dataset=digits", f"optimizer={optimizer}", f"batch_size={batch}", f"seed={seed}")
                write_run(tmp_path / "runs", *overrides, accuracies=(0.1, accuracy))
    table, picture = draw(tmp_path / "runs", tmp_path / "drawn", "--lead")
    lines = table.splitlines()
    assert "| lead over AdamW [points] | batch 128 | batch 1,024 | per doubling |" in lines
    (row,) = (line for line in lines if line.startswith("| LAMB | -10.00"))
    found = re.fullmatch(r"\| LAMB \| -10\.00 ± (.*) \| -10\.00 ± (.*) \| [+-]0\.00 ± (.*) \|", row)
    assert found
    of_seeds = float(stdtrit(4, 0.975)) / 3**0.5  # the spread is pooled over the batch sizes
    assert of_seeds - 0.005 < float(found[1]) == float(found[2]) < 1.1 * of_seeds
    assert 0 < float(found[3]) < of_seeds
    assert "points of accuracy" in picture
