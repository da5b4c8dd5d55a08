"""Single steps of Barlow Twins: any optimizer, running statistics, and too little memory."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from test_bt import CPU, in_this_process, same
from test_memory import MIB, a_run, memory_left, one_gradient
from torch import Tensor

from largebatch.clock import StepClock
from largebatch.modes.bt import BarlowTwins
from largebatch.probe import train_probe
from largebatch.profile import Profile
from largebatch.step import gradient, update
from largebatch.stop import StepBoundary
from largebatch.tracking.console import Console
from largebatch.train import batches_from, loop

OPTIMIZERS = [
    "lars", "lamb", "tvlars", "clars", "sgd", "adam", "adamw", "adagrad", "rmsprop", "timm optimizer.name=lars",
]  # fmt: skip


def two_steps(folder: Path, *overrides: str) -> dict[str, Tensor]:
    """The parameters after them; every one must have moved."""
    run, training = in_this_process(folder, "steps=2", *overrides)
    before = {name: parameter.detach().clone() for name, parameter in training.model.named_parameters()}
    batches, nothing = batches_from(run, 0), Profile(None, CPU, 2)
    for training.step in (1, 2):
        finite, _ = gradient(run, training, batches, nothing)
        assert finite is not None
        assert bool(finite)
        update(training, None, 0, nothing)
    after = {name: parameter.detach() for name, parameter in training.model.named_parameters()}
    assert [name for name in after if torch.equal(after[name], before[name])] == []
    assert all(bool(tensor.isfinite().all()) for tensor in after.values())
    return after


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_takes_the_same_steps_however_the_batch_is_divided(tmp_path: Path, optimizer: str) -> None:
    # At its full scale: what divides by the size of gradients makes rounding of none large.
    options = (*f"optimizer={optimizer}".split(), "optimizer.lr=0.001", "mode.loss_scale=1")
    whole, divided = two_steps(tmp_path, *options), two_steps(tmp_path, *options, "micro_batch=4")
    for name in whole:
        torch.testing.assert_close(whole[name], divided[name], rtol=1e-4, atol=1e-5)


def test_running_statistics_move_once_a_view_and_micro_batch(tmp_path: Path) -> None:
    """Though with accumulation each view passes twice."""
    run, training = in_this_process(tmp_path, "steps=1", "model.norm=batch", "micro_batch=4")
    assert isinstance(training.model, BarlowTwins)
    reference = copy.deepcopy(training.model.backbone).train()
    training.step = 1
    gradient(run, training, batches_from(run, 0), Profile(None, CPU, 1))
    for images, _ in itertools.islice(batches_from(run, 0), 4):
        for view in images.chunk(2):
            reference(view)
    assert int(reference.get_buffer("norm1.num_batches_tracked")) == 8
    assert same(dict(training.model.backbone.named_buffers()), dict(reference.named_buffers()))


# Two views of an image take twice the memory of one.
FEWER = ("mode=bt", "dataset.train_size=256", "batch_size=256")


def test_a_step_that_runs_out_of_memory_is_taken_again_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """Gradients, running statistics and totals equal those of a run that had the smaller micro-batches at once."""
    run, training = a_run(tmp_path / "short", *FEWER, "micro_batch=auto")
    assert run.batch.micro_batch == 256
    tried, finite = [], None
    with memory_left(150 * MIB):
        while finite is None:
            tried.append(run.batch.micro_batch)
            finite, run = one_gradient(run, training)
    assert len(tried) > 1
    assert tried == [256 >> n for n in range(len(tried))]

    plain_run, plain = a_run(tmp_path / "plain", *FEWER, f"micro_batch={tried[-1]}")
    one_gradient(plain_run, plain)
    assert bool(finite)
    assert torch.equal(training.totals, plain.totals)
    for (name, ours), theirs in zip(training.model.named_parameters(), plain.model.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad), name
    assert same(dict(training.model.named_buffers()), dict(plain.model.named_buffers()))


def test_the_probe_takes_the_micro_batches_that_pretraining_came_to(tmp_path: Path) -> None:
    probe = ("mode.eval_batch_size=256", "mode.eval_epochs=1", "mode.lr_backbone=0.01", "mode.knn_every=0")
    run, training = a_run(tmp_path, *FEWER, *probe, "micro_batch=auto")
    clock, boundary = StepClock(0.0, CPU), StepBoundary(3600.0, None, rank=0)
    with Console(tmp_path / "log.txt", speaking=False) as console, memory_left(150 * MIB):
        run, state, _ = loop(run, training, None, None, clock, console, boundary)
        assert state == "finished"
        assert run.batch.micro_batch < 256
        assert run.probe is not None
        assert run.probe.batch.micro_batch == run.batch.micro_batch
        assert train_probe(run, training, None, None, clock, boundary) == ("finished", "")
