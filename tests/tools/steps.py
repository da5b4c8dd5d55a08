"""A few optimizer steps in this process, without the launcher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from conftest import TINY, configuration

from largebatch.runs.folder import RunFolder
from largebatch.tracking.console import Console
from largebatch.training.phase import MainPhase
from largebatch.training.set_up import set_up


def at_start(folder: Path, *overrides: str) -> MainPhase:
    """Return a run's main phase before its first step, in a new folder."""
    folder.mkdir(exist_ok=True)
    with Console(folder / "log.txt", speaking=False) as console:
        config = configuration(*TINY, "steps=9", *overrides)
        return set_up(config, RunFolder(folder), 0, 1, torch.device("cpu"), console, None)


def take_steps(phase: MainPhase, steps: int, before_update: Callable[[MainPhase], object] = lambda phase: None) -> None:
    """Take optimizer steps after the steps done. Call ``before_update`` with each step's gradient in the parameters."""
    batches = phase.batches()
    for _ in range(steps):
        phase.training.step += 1
        assert phase.gradient(batches) is not None
        before_update(phase)
        phase.update(None)
