"""The scripts draw the committed plots."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, environment

PLOTS = ROOT / "docs" / "plots"


def draw(script: str, target: Path) -> str:
    command = [sys.executable, str(PLOTS / script), str(target)]
    subprocess.run(command, env=environment(), check=True, timeout=120)
    return target.read_text(encoding="utf-8")


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
    assert draw("phi.py", tmp_path / "again.svg") == drawn


def test_pages_have_the_tables_that_scripts_wrote() -> None:
    pages = "".join(page.read_text("utf-8") for page in (ROOT / "docs").glob("*.md"))
    tables = sorted(PLOTS.glob("*.md"))
    assert [table.name for table in tables if table.read_text("utf-8") not in pages] == []


def test_readme_has_the_answer_and_the_table_of_its_page() -> None:
    answer, found, _ = (PLOTS / "large_batch.md").read_text("utf-8").partition("\n\n| learning rate")
    assert found
    assert answer in (ROOT / "README.md").read_text("utf-8")
