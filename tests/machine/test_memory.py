"""``in_little_memory.py`` in a process of its own: what fits depends on what tests before it have left over."""

from __future__ import annotations

import subprocess
import sys

from conftest import ROOT


def test_in_little_memory() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/tools/in_little_memory.py"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
