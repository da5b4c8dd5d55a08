"""The scripts draw the committed plots."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, environment
from made_runs import write_run

from largebatch import cli

PLOTS = ROOT / "docs" / "plots"


def draw(script: str, *arguments: str | Path) -> str:
    """Call a script in this process. Return the text of its file, the last argument."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(PLOTS / script), run_name="__main__")
    return Path(arguments[-1]).read_text(encoding="utf-8")


def curves(svg: str) -> dict[str, np.ndarray]:
    """Return the corners of each named curve, by x, in points. Shape [corners, 2]."""
    paths = re.findall(r'<g id="([a-z0-9-]+-(?:512|16384))">\s*<path d="([^"]+)"', svg)
    return {name: np.array(re.findall(r"[ML] (\S+) (\S+)", path), dtype=float) for name, path in paths}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> str:
    return draw("phi.py", tmp_path_factory.mktemp("plots") / "phi.svg")


def test_phi_script_reproduces_the_committed_curves(drawn: str) -> None:
    redrawn, committed = curves(drawn), curves((PLOTS / "phi.svg").read_text("utf-8"))
    assert len(committed) == 14  # seven schedules at two batch sizes
    assert redrawn.keys() == committed.keys()
    for name, corners in committed.items():
        x, y = corners.T
        # Each version of matplotlib may drop other corners of nearly straight lines.
        assert np.interp(x, *redrawn[name].T) == pytest.approx(y, abs=0.3), name


def test_phi_script_draws_the_same_file_each_time(drawn: str, tmp_path: Path) -> None:
    """The second drawing is by a new process."""
    command = [sys.executable, str(PLOTS / "phi.py"), str(tmp_path / "again.svg")]
    subprocess.run(command, env=environment(), check=True, timeout=120)
    assert (tmp_path / "again.svg").read_text("utf-8") == drawn


def test_pages_have_the_tables_that_scripts_wrote() -> None:
    pages = "".join(page.read_text("utf-8") for page in (ROOT / "docs").glob("*.md"))
    tables = sorted(PLOTS.glob("*.md"))
    assert [table.name for table in tables if table.read_text("utf-8") not in pages] == []


def test_readme_has_the_answer_and_the_table_of_its_page() -> None:
    answer, found, _ = (PLOTS / "large_batch.md").read_text("utf-8").partition("\n\n| learning rate")
    assert found
    assert answer in (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"betas": [0.9, 0.99]}]
)
def test_steps_on_a_quadratic_diverge_beyond_the_limit_of_the_sharpness_plot(options: dict[str, Any]) -> None:
    spec = importlib.util.spec_from_file_location("instruments_plot", PLOTS / "instruments.py")
    assert spec is not None
    assert spec.loader is not None
    plot = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plot)
    ends = []
    for product in (0.97 * plot.limit(options), 1.03 * plot.limit(options)):
        weight, momentum = 1.0, 0.0
        for _ in range(600):  # of the loss weight^2 / 2
            if "betas" in options:
                momentum = 0.9 * momentum + 0.1 * weight
                weight -= product * momentum
            else:
                factor = options.get("momentum", 0.0)
                momentum = factor * momentum + weight
                weight -= product * (weight + factor * momentum if options.get("nesterov") else momentum)
        ends.append(abs(weight))
    assert ends[0] < 1e-2
    assert ends[1] > 1e2


def test_instruments_script_draws_runs_that_measured_them(tmp_path: Path) -> None:
    for name in ("lars", "tvlars"):
        folder = write_run(tmp_path / "runs", f"optimizer={name}")
        folder.summary.write_text(json.dumps(folder.read_summary() | {"optimizer_options": {"momentum": 0.9}}))
        rows = [
            {"step": 10, "epoch": 1.0, "optim/lr": 6.0, "noise/scale": 100.0, "noise/scale_low": 50.0},
            {"step": 10, "epoch": 1.0, "sharpness/eigenvalue": 90.0, "sharpness/preconditioned": 0.5},
            {"step": 20, "epoch": 2.0, "sharpness/eigenvalue": 120.0},
            {"step": 30, "epoch": 3.0, "noise/scale": 200.0, "noise/scale_low": 90.0, "noise/scale_high": 400.0,
             "noise/cosine": 0.2, "noise/cosine_low": 0.1, "noise/cosine_high": 0.3},
        ]  # fmt: skip
        folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind in ("sharpness", "noise"):
        drawn = draw("instruments.py", kind, tmp_path / "runs", tmp_path / f"{kind}.svg")
        assert "<!-- TVLARS -->" in drawn


def test_instruments_script_draws_slices_and_a_plane(tmp_path: Path) -> None:
    for name, loss in (
        ("lars", [[2.0, 0.3, 2.5]]),
        ("lars-plane", [[4.0, 2.0, 4.0], [2.0, 0.2, 2.0], [4.0, 2.0, 4.0]]),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps({"at": [-1.0, 0.0, 1.0], "loss": loss}))
    assert "<!-- LARS -->" in draw("instruments.py", "surface", tmp_path, tmp_path / "surface.svg")


def test_instruments_script_draws_the_hyperbolas_of_the_critical_batch_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    for size, steps in ((128, 60), (512, 20), (2048, 10)):
        folder = write_run(runs, "optimizer=lars", f"batch_size={size}")
        rows = [
            {"step": step, "epoch": 1.0, "examples": size * step, "wall_seconds": 1.0, "test/accuracy": accuracy}
            for step, accuracy in ((steps // 2, 0.4), (steps, 0.9))
        ]
        folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["critical", str(runs), "--target", "0.5", "--json"]) == 0
    answer = tmp_path / "critical.json"
    answer.write_text(capsys.readouterr().out)
    assert "<!-- LARS -->" in draw("instruments.py", "critical", answer, tmp_path / "critical.svg")
