"""Single steps of Barlow Twins: every optimizer, and running statistics."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from test_bt import in_this_process
from torch import Tensor

from largebatch.modes.bt import BarlowTwins

OPTIMIZERS = [
    "lars", "lamb", "tvlars", "clars", "merit", "rotational_lion", "sgd", "adam", "adamw", "adagrad",
    "rmsprop", "timm optimizer.name=lars", "vrlars optimizer.sample_size=2", "vrlamb optimizer.sample_size=2",
]  # fmt: skip


def two_steps(folder: Path, *overrides: str) -> dict[str, Tensor]:
    """Return the parameters after two steps; every parameter must have changed."""
    phase = in_this_process(folder, "steps=2", *overrides)
    training, batches = phase.training, phase.batches()
    before = {name: parameter.detach().clone() for name, parameter in training.model.named_parameters()}
    for training.step in (1, 2):
        finite = phase.gradient(batches)
        assert finite is not None
        assert bool(finite)
        phase.update(None)
    after = {name: parameter.detach() for name, parameter in training.model.named_parameters()}
    assert [name for name in after if torch.equal(after[name], before[name])] == []
    assert all(bool(tensor.isfinite().all()) for tensor in after.values())
    return after


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_takes_the_same_steps_for_a_divided_batch(tmp_path: Path, optimizer: str) -> None:
    # loss_scale=1: optimizers that divide by gradient norms would magnify rounding of tiny gradients.
    options = (*f"optimizer={optimizer}".split(), "optimizer.lr=0.001", "mode.loss_scale=1")
    whole, divided = two_steps(tmp_path, *options), two_steps(tmp_path, *options, "micro_batch=4")
    for name in whole:
        # Of the whole tensor: RMSprop and Adam magnify the rounding of a single element whose gradient is almost 0.
        assert (whole[name] - divided[name]).norm() < 5e-5 * whole[name].norm(), name


def test_running_statistics_move_once_a_step_by_the_mean_over_micro_batches(tmp_path: Path) -> None:
    """With accumulation, each view passes twice, but counts once."""
    phase = in_this_process(tmp_path, "steps=1", "model.norm=batch", "micro_batch=4")
    training, again, batches = phase.training, phase.batches(), phase.batches()
    assert isinstance(training.model, BarlowTwins)
    untrained = copy.deepcopy(training.model.backbone).train()
    training.step = 1
    phase.gradient(batches)
    after = []
    for images, _ in itertools.islice(again, 4):
        alone = copy.deepcopy(untrained)
        for view in images.chunk(2):
            alone(view)
        after.append(dict(alone.named_buffers()))
    for name, buffer in training.model.backbone.named_buffers():
        torch.testing.assert_close(buffer.float(), torch.stack([each[name].float() for each in after]).mean(0))
    assert int(training.model.backbone.get_buffer("norm1.num_batches_tracked")) == 2
