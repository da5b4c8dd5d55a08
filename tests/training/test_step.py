"""A step must not read numbers back from the device."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, configuration
from torch.utils._python_dispatch import TorchDispatchMode

from largebatch.runs.folder import RunFolder
from largebatch.tracking.console import Console
from largebatch.training.set_up import set_up

CPU = torch.device("cpu")


class Counting(TorchDispatchMode):
    """Count torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations[str(function.overloadpacket)] += 1
        return function(*args, **(kwargs or {}))


def assert_nothing_is_read_back(folder: Path, *overrides: str) -> None:
    with Console(folder / "log.txt", speaking=False) as console:
        phase = set_up(configuration(*TINY, "steps=9", *overrides), RunFolder(folder), 0, 1, CPU, console, None)
    batches, run = phase.batches(), phase.run
    passes = 2 if run.exact and run.batch.accumulation > 1 else 1
    ready = [next(batches) for _ in range(passes * run.batch.accumulation)]
    for step in (1, 2, 3):
        phase.training.step = step
        with Counting() as counting:
            finite = phase.gradient(iter(ready))
            phase.update(None)
        assert finite is not None
        assert counting.operations["aten.convolution_backward"] > 0
        assert counting.operations["aten._local_scalar_dense"] == 0


OPTIMIZERS = (
    "lars", "lamb", "tvlars", "clars", "merit", "rotational_lion", "sgd",
    "vrlars optimizer.sample_size=2", "vrlamb optimizer.sample_size=2",
)  # fmt: skip


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("division", [(), ("micro_batch=4",), ("micro_batch=auto",)])
def test_a_step_reads_no_number_back(tmp_path: Path, optimizer: str, division: tuple[str, ...]) -> None:
    """On a GPU, each read would wait for all queued work."""
    assert_nothing_is_read_back(tmp_path, *f"optimizer={optimizer}".split(), *division)


@pytest.mark.parametrize(("optimizer", "exact"), [("lars", "true"), ("lars", "false"), ("clars", "true")])
@pytest.mark.parametrize("division", [(), ("micro_batch=4",), ("micro_batch=auto",)])
def test_a_pretraining_step_reads_no_number_back(
    tmp_path: Path, optimizer: str, exact: str, division: tuple[str, ...]
) -> None:
    bt = ("mode=bt", "mode.projector=[12,8,6]", f"mode.exact={exact}")
    assert_nothing_is_read_back(tmp_path, *bt, f"optimizer={optimizer}", *division)


@pytest.mark.parametrize("division", [(), ("micro_batch=4",)])
def test_a_step_that_measures_the_noise_scale_reads_no_number_back(tmp_path: Path, division: tuple[str, ...]) -> None:
    assert_nothing_is_read_back(tmp_path, "instruments.noise_scale=true", *division)
