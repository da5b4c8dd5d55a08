"""Random numbers that an optimizer draws in its step."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import torch
from conftest import TINY, configuration

from largebatch.runs.folder import RunFolder
from largebatch.tracking.console import Console
from largebatch.training.set_up import set_up


def test_draws_are_a_function_of_seed_and_step(tmp_path: Path) -> None:
    """Another process and a resumed run have other states of the global generators before the step."""

    class Draws(torch.optim.SGD):
        found: list[tuple[float, float, float]]

        def step(self, closure: Any = None) -> Any:
            self.found.append((float(torch.rand(())), float(numpy.random.rand()), random.random()))
            return super().step(closure)

    def draws(seed: int, before: int) -> list[tuple[float, float, float]]:
        config = configuration(*TINY, "optimizer=sgd", f"seed={seed}", "tracker.layers_every=0")
        with Console(tmp_path / "log.txt", speaking=False) as console:
            phase = set_up(config, RunFolder(tmp_path), 0, 1, torch.device("cpu"), console, None)
        phase.training.optimizer = optimizer = Draws(phase.training.model.parameters(), lr=0.1)
        optimizer.found = []
        batches = phase.batches()
        for step in (1, 2):
            phase.training.step = step
            phase.gradient(batches)
            torch.manual_seed(before), numpy.random.seed(before), random.seed(before)
            phase.update(None)
        return optimizer.found

    first = draws(seed=0, before=1)
    assert draws(seed=0, before=2) == first
    assert len({*first, *draws(seed=1, before=1)}) == 4
