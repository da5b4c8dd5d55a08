"""The moving average of the weights (``ema_decay``)."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY
from programs import Programs
from same_run import assert_same_run
from steps import at_start, take_steps
from test_bt_resume import as_if_killed, resume_after
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from largebatch import load_run
from largebatch.errors import UserError
from largebatch.models.weights import read_weights
from largebatch.results.evaluate import evaluate
from largebatch.training.averaging import AveragedWeights
from largebatch.training.loss_scale import LossScale
from largebatch.training.phase import MainPhase

CPU = torch.device("cpu")


def moved(model: nn.Module) -> None:
    """Change all parameters and buffers, as a step with batch norm does."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data += 1 if not tensor.is_floating_point() else 0.1 * torch.randn_like(tensor)


def test_the_average_is_timm_s_bit_for_bit() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    ours, theirs = AveragedWeights(model, 0.9), ModelEmaV3(model, decay=0.9)
    for _ in range(5):
        moved(model)
        ours.update(model)
        theirs.update(model)
    expected = theirs.module.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.model.state_dict().items())
    assert ours.model[1].num_batches_tracked == 5  # type: ignore[index]
    assert not any(parameter.requires_grad for parameter in ours.model.parameters())


def test_the_average_is_torch_s_bit_for_bit_from_the_same_start() -> None:
    """torch begins with the weights after the first update, ours with those before it."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)  # type: ignore[no-untyped-call]
    theirs.update_parameters(model)
    ours = AveragedWeights(model, 0.9)
    for _ in range(5):
        moved(model)
        ours.update(model)
        theirs.update_parameters(model)
    assert torch.equal(ours.model.weight, theirs.module.weight)  # type: ignore[arg-type]


def weights_of(phase: MainPhase) -> dict[str, Tensor]:
    return copy.deepcopy(phase.training.model.state_dict())


@pytest.mark.parametrize("mode", [(), ("mode=bt",)], ids=" ".join)
def test_each_step_moves_the_average_and_no_bit_of_the_training(tmp_path: Path, mode: tuple[str, ...]) -> None:
    overrides = ("model.norm=batch", "micro_batch=4", "batch_norm_size=4", *mode)
    plain, phase = at_start(tmp_path / "plain", *overrides), at_start(tmp_path / "ema", *overrides, "ema_decay=0.75")
    expected = {name: tensor.double() for name, tensor in weights_of(phase).items()}
    for _ in range(3):
        take_steps(phase, 1)
        expected = {name: 0.75 * mean + 0.25 * weights_of(phase)[name].double() for name, mean in expected.items()}
    take_steps(plain, 3)
    assert all(torch.equal(tensor, weights_of(plain)[name]) for name, tensor in weights_of(phase).items())
    assert phase.training.averaged is not None
    for name, tensor in phase.training.averaged.model.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-7)
        else:
            assert torch.equal(tensor, weights_of(phase)[name])
    metrics = phase.evaluate()
    phase.training.averaged = None
    assert metrics != phase.evaluate()


def test_a_skipped_step_does_not_move_the_average(tmp_path: Path) -> None:
    phase = at_start(tmp_path, "ema_decay=0.75", "optimizer=sgd")
    phase.training.loss_scale = LossScale(CPU, enabled=True)
    take_steps(phase, 1)
    assert phase.training.averaged is not None
    before = copy.deepcopy(phase.training.averaged.model.state_dict())

    def overflow(phase: MainPhase) -> None:
        gradient = next(phase.training.model.parameters()).grad
        assert gradient is not None
        gradient.fill_(torch.inf)

    take_steps(phase, 1, overflow)
    assert all(torch.equal(tensor, before[n]) for n, tensor in phase.training.averaged.model.state_dict().items())


def test_reading_the_average_of_a_schedule_free_class_changes_no_bit_of_the_training(tmp_path: Path) -> None:
    own = ("optimizer=custom", "optimizer.target=pytorch_optimizer:ScheduleFreeSGD", "optimizer.lr=0.1")
    phase = at_start(tmp_path, *own)
    training = phase.training
    assert training.averaged is not None
    initial = weights_of(phase)
    assert all(torch.equal(tensor, initial[n]) for n, tensor in training.result.state_dict().items())
    take_steps(phase, 3)
    before = weights_of(phase)
    average = copy.deepcopy(training.result.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(phase).items())
    assert training.optimizer.param_groups[0]["train_mode"]
    for name, parameter in training.model.named_parameters():
        z = training.optimizer.state[parameter]["z"]
        torch.testing.assert_close(before[name], 0.9 * average[name] + 0.1 * z)
        assert not torch.equal(before[name], average[name])
    with pytest.raises(UserError, match="the optimizer ScheduleFreeSGD averages the weights itself"):
        at_start(tmp_path / "both", *own, "ema_decay=0.9")


RUN = (
    *TINY, "steps=30", "checkpoint.every_steps=10", "ema_decay=0.9", "model.norm=batch", "optimizer=sgd",
    "optimizer.lr=0.05", "cluster.threads=1", "cluster.processes=2",
)  # fmt: skip


def test_a_run_logs_saves_and_exports_the_average_and_resumes_exactly(tmp_path: Path, process: Programs) -> None:
    whole = process.train(tmp_path / "whole", *RUN)
    run = load_run(whole)
    raw, averaged = run.saved["model"], run.saved["averaged"]
    assert any(not torch.equal(raw[name], averaged[name]) for name in raw)
    for found in (run.model().state_dict(), read_weights(whole / "checkpoints" / "step-00000030.pt").state):
        assert all(torch.equal(found[name], averaged[name]) for name in averaged)
    assert run.backbone().state_dict().keys() < averaged.keys()
    again = evaluate(run, [], CPU, lambda line: None)
    assert {name: again[name] for name in ("test/accuracy", "test/loss")} == {
        name: pytest.approx(run.summary[name], rel=1e-6) for name in ("test/accuracy", "test/loss")
    }
    stopped = tmp_path / "stopped" / "runs" / whole.name
    shutil.copytree(whole, stopped)
    as_if_killed(stopped, 20)
    assert process.train(tmp_path / "stopped", *RUN) == stopped
    assert "resumed after step 20 of 30" in (stopped / "log.txt").read_text()
    assert_same_run(stopped, whole)


# Six steps of pre-training, then three epochs of two steps of fine-tuning.
BT = (
    *TINY, "mode=bt", "mode.projector=[12,8,6]", "steps=6", "ema_decay=0.9", "mode.eval_epochs=3",
    "mode.eval_batch_size=32", "mode.knn_every=1", "mode.lr_backbone=0.01", "cluster.threads=1", "optimizer=sgd",
    "optimizer.lr=0.05",
)  # fmt: skip


def test_a_probe_begins_with_the_average(tmp_path: Path) -> None:
    phase = at_start(tmp_path, *BT)
    take_steps(phase, 6)
    assert phase.training.averaged is not None
    averaged = copy.deepcopy(phase.training.averaged.model.state_dict())
    phase.end = 6  # of the nine steps of ``at_start``
    phase.following()
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in weights_of(phase).items())
    assert phase.training.averaged is None


@pytest.mark.parametrize(("step", "every"), [(6, 20), (9, 9)])
def test_fine_tuning_of_the_average_resumes_exactly(tmp_path: Path, process: Programs, step: int, every: int) -> None:
    command = (*BT, f"checkpoint.every_steps={every}")
    whole = process.train(tmp_path / "whole", *command)
    assert "averaged" not in load_run(whole).saved  # fine-tuning changes the model alone
    resume_after(step, 12, whole, process, tmp_path / "stopped", *command)
