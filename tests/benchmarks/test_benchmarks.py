"""Every script in ``benchmarks/`` runs to its end in its smallest size and prints a table."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT, environment

SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))
OPTIONAL = {
    "input_pipeline": "kornia",
    "optimizer_step": "pytorch_optimizer",
    "decoding": "nvidia.nvimgcodec",
}  # of extras

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.stem for script in SCRIPTS])
def test_benchmark_runs_in_its_smallest_size(script: Path, tmp_path: Path) -> None:
    assert "--smallest" in script.read_text().split('"""')[1], "the docstring names the option"
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    result = subprocess.run(
        [sys.executable, str(script), "--smallest"],
        cwd=tmp_path, env=environment() | threads, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^\|[:|-]+\|\n\| \S.* \|$", result.stdout, re.MULTILINE), result.stdout
    package = OPTIONAL.get(script.stem)
    if package and (find_spec(package.partition(".")[0]) is None or find_spec(package) is None):
        assert f"{package} isn't installed and is left out" in result.stdout
    assert list(tmp_path.iterdir()) == []
