"""What follows on pre-training: a linear classifier on the frozen backbone (linear probe), or fine-tuning of both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from largebatch.data import train_batches
from largebatch.data.sampling import global_batches
from largebatch.machine import distributed
from largebatch.modes import clf
from largebatch.modes.bt import BarlowTwins
from largebatch.seeding import derive_seed
from largebatch.tracking.recorder import Recorder
from largebatch.training.checkpoint import CheckpointWriter
from largebatch.training.clock import StepClock
from largebatch.training.evaluation import classification_figures, held_out
from largebatch.training.features import split_features
from largebatch.training.saving import keeps_as_best, save_training
from largebatch.training.state import Probe, Run, Training
from largebatch.training.stop import StepBoundary

Batches = Iterator[tuple[Tensor, Tensor]]
_MOMENTUM = 0.9  # the reference program's, as are the draws of the linear layer
_DEVIATION = 0.01


def build_probe(run: Run, model: BarlowTwins) -> Probe:
    """The linear layer at its start (``N(0, 0.01)``, bias 0), and what trains it, and with it maybe the backbone."""
    mode = run.config.mode
    torch.manual_seed(derive_seed(run.config.seed, "probe", "head"))
    head = nn.Linear(model.features, run.data.num_classes)
    nn.init.normal_(head.weight, std=_DEVIATION)
    nn.init.zeros_(head.bias)
    head.to(run.device)
    groups = [{"params": list(head.parameters()), "lr": mode.lr_classifier}]
    if mode.lr_backbone:
        groups.append({"params": list(model.backbone.parameters()), "lr": mode.lr_backbone})
    assert mode.eval_weight_decay is not None
    optimizer = torch.optim.SGD(groups, momentum=_MOMENTUM, weight_decay=mode.eval_weight_decay)
    totals = torch.zeros(clf.TOTALS, dtype=torch.float64, device=run.device)
    return Probe(head, optimizer, [float(group["lr"]) for group in groups], totals)  # type: ignore[arg-type]


def train_probe(
    run: Run,
    training: Training,
    recorder: Recorder | None,
    writer: CheckpointWriter | None,
    clock: StepClock,
    boundary: StepBoundary,
) -> tuple[str, str]:
    """Train and evaluate the probe from where it stands. Returns the run's state and a word on it.

    With ``mode.lr_backbone=0`` the backbone is in evaluation mode throughout and its features of the test set are
    computed once; without ``mode.eval_augmentation`` those of the training set too.

    Raises:
        RuntimeError: when a frozen backbone isn't what it was.
    """
    model, probe, plan = training.model, training.probe, run.probe
    assert isinstance(model, BarlowTwins)
    assert probe is not None
    assert plan is not None
    frozen = not run.config.mode.lr_backbone
    distributed.share_buffers(model)
    model.eval()
    classifier = nn.Sequential(model.backbone, probe.head)
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()} if frozen else {}
    figures_now = _frozen_figures(run, model, probe.head) if frozen else None
    batches, features = _batches(run, training)

    while training.step < run.total_steps:
        training.step += 1
        step = training.step - run.steps
        epoch = (step - 1) // plan.epoch_steps
        for group, lr in zip(probe.optimizer.param_groups, probe.rates, strict=True):
            group["lr"] = lr * (1 + math.cos(math.pi * epoch / plan.epochs)) / 2
        torch.manual_seed(derive_seed(run.config.seed, "probe", "step", step, run.rank))
        if not frozen:
            model.backbone.train()
        for _ in range(plan.batch.accumulation):
            inputs, labels = next(batches)
            loss, counted = clf.loss(run.config, lambda x: probe.head(features(x)), inputs, labels)
            torch.autograd.backward(loss / plan.batch.accumulation)
            probe.totals += counted
        distributed.average_gradients(classifier)
        probe.optimizer.step()
        probe.optimizer.zero_grad(set_to_none=True)

        is_best = False
        if step % plan.epoch_steps == 0:
            row = _row(run, step, probe)
            if figures_now:
                row |= figures_now()
            elif (epoch + 1) % run.config.eval_every == 0 or epoch + 1 == plan.epochs:
                row |= classification_figures(run, classifier)
            if recorder:
                recorder.row(row | {"wall_seconds": clock.elapsed()})
            is_best = keeps_as_best(run, training, row)
            if not all(map(math.isfinite, row.values())):
                return "diverged", f"the loss was not finite in epoch {epoch + 1} of the evaluation's training"
        stop, save = boundary.after_step(training.step)
        if save or is_best or training.step == run.total_steps:
            save_training(run, training, recorder, writer, clock, is_best)
            boundary.saved(training.step)
            if stop and training.step < run.total_steps:
                return "preempted", ""

    for name, tensor in model.backbone.state_dict().items() if frozen else ():
        if not torch.equal(tensor, before[name]):
            raise RuntimeError(f"the linear probe changed the frozen backbone: {name}")
    return "finished", ""


def _row(run: Run, step: int, probe: Probe) -> dict[str, float]:
    """Where the probe is after ``step`` of its own, counted on from the pre-training, and its training figures."""
    assert run.probe is not None
    figures = clf.train_figures(distributed.sum_over_processes(probe.totals).tolist())
    probe.totals.zero_()
    epoch = step / run.probe.epoch_steps
    return {
        "step": run.steps + step,
        "epoch": run.steps / run.epoch_steps + epoch,
        "examples": run.steps * run.config.batch_size + step * run.probe.batch.global_batch,
        "probe/epoch": epoch,
        "probe/lr": probe.optimizer.param_groups[0]["lr"],
        **{name.replace("train/", "probe/"): value for name, value in figures.items()},
    }


def _frozen_figures(run: Run, model: BarlowTwins, head: nn.Linear) -> Callable[[], dict[str, float]]:
    """What gives the figures of ``head`` as it then is, on features that are computed now."""
    splits = {name: split_features(run, model, split) for name, split in held_out(run)}

    def figures() -> dict[str, float]:
        found: dict[str, float] = {}
        for name, features_and_labels in splits.items():
            totals = clf.evaluate(head, [features_and_labels], run.device)
            found |= clf.evaluation_figures(name, totals.tolist())
        return found

    return figures


def _batches(run: Run, training: Training) -> tuple[Batches, Callable[[Tensor], Tensor]]:
    """This process's pieces of the batches from the probe's step on, and what makes features of them."""
    model, plan, mode = training.model, run.probe, run.config.mode
    assert isinstance(model, BarlowTwins)
    assert plan is not None
    seed, start = derive_seed(run.config.seed, "probe"), training.step - run.steps
    if not mode.lr_backbone and not mode.eval_augmentation:
        return _feature_batches(run, model, seed, start), lambda features: features
    dataset = run.config.dataset
    if not mode.eval_augmentation:
        dataset = replace(dataset, crop_padding=0, flip=False, rotation=0.0)
    batches = train_batches(
        run.data.train, dataset, run.data.mean, run.data.std, batch_size=plan.batch.global_batch, rank=run.rank,
        processes=run.processes, micro_batch=plan.batch.micro_batch, seed=seed, start_step=start, device=run.device,
        channels_last=run.arithmetic.channels_last,
    )  # fmt: skip

    def features(images: Tensor) -> Tensor:
        with torch.set_grad_enabled(bool(mode.lr_backbone)), run.autocast:
            found: Tensor = model.backbone(images)
        return found.float()

    return batches, features


def _feature_batches(run: Run, model: BarlowTwins, seed: int, start: int) -> Batches:
    """As ``train_batches``, of features that are computed once."""
    assert run.probe is not None
    batch = run.probe.batch
    features, labels = split_features(run, model, run.data.train)
    for _, indices in global_batches(len(labels), batch.global_batch, seed, start):
        share = indices[run.rank * batch.per_process : (run.rank + 1) * batch.per_process].to(run.device)
        for piece in torch.split(share, batch.micro_batch):
            yield features[piece], labels[piece]
