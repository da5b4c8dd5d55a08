"""Tests of Triton kernels in a process of their own: interpreted on the CPU, or on the GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton isn't installed")


def run_checks(file: str, where: str) -> None:
    """Run all ``check_*`` of a test file in a process of their own.

    Triton reads TRITON_INTERPRET when it is imported, which another test may already have done in this process.

    Args:
        where: interpreter or gpu. Without a GPU, or with an interpreter that can't run, the test is skipped.
    """
    if where == "gpu" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if where == "interpreter" and tuple(map(int, version("triton").split(".")[:2])) < (3, 7):
        pytest.skip("the interpreter of Triton 3.6 can't run a loop with numpy 2.5")
    environment = {**os.environ, "TRITON_INTERPRET": "1" if where == "interpreter" else "0"}
    command = [sys.executable, "-m", "pytest", file, "-q", "-x", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, "-o", "python_functions=check_*"], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
