"""The phase after pre-training: a linear classifier on the frozen backbone (linear probe), or fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from largebatch.config.augmentation import without_augmentation
from largebatch.config.batch import BatchPlan
from largebatch.config.epochs import plan_epochs
from largebatch.data.sampling import global_batches
from largebatch.machine import distributed
from largebatch.modes import bt, clf
from largebatch.modes.bt import BarlowTwins
from largebatch.seeding import derive_seed
from largebatch.tracking.recorder import Recorder
from largebatch.training.evaluation import (
    classified,
    classified_features,
    held_out,
    recorded_metrics,
    split_features,
)
from largebatch.training.phase import Batches, MainPhase
from largebatch.training.profile import Profile
from largebatch.training.running_statistics import RunningStatistics
from largebatch.training.state import ProbeState, Run, Training

_MOMENTUM = 0.9  # as in the reference program
_DEVIATION = 0.01  # of the linear layer's initial weights; as in the reference program


def probe_batch(run: Run) -> BatchPlan:
    """Return the division of the probe's batch, at most all images, in micro-batches no larger than in pre-training.

    With batch norm in training mode, its statistics are of groups as large as in pre-training. Then a small batch may
    have fewer groups than there are processes, and some processes are idle.
    """
    options, batch = bt.options(run.config), run.batch
    images = min(options.eval_batch_size, len(run.data.train))
    if options.lr_backbone and run.config.batch_norm_size is not None:
        return replace(batch, global_batch=images, together=1)
    return BatchPlan(images, run.processes, min(batch.micro_batch, -(-images // run.processes)))


def build_probe(run: Run, model: BarlowTwins) -> ProbeState:
    """Return the initial linear layer (weights ``N(0, 0.01)``, bias 0) and optimizer, also of a trained backbone."""
    options = bt.options(run.config)
    torch.manual_seed(derive_seed(run.config.seed, "probe", "head"))
    head = nn.Linear(model.features, run.data.num_classes)
    nn.init.normal_(head.weight, std=_DEVIATION)
    nn.init.zeros_(head.bias)
    head.to(run.device)
    groups = [{"params": list(head.parameters()), "lr": options.lr_classifier}]
    if options.lr_backbone:
        groups.append({"params": list(model.backbone.parameters()), "lr": options.lr_backbone})
    optimizer = torch.optim.SGD(groups, momentum=_MOMENTUM, weight_decay=options.eval_weight_decay)
    totals = torch.zeros(clf.TOTALS, dtype=torch.float64, device=run.device)
    return ProbeState(head, optimizer, [group["lr"] for group in optimizer.param_groups], totals)


class ProbePhase(MainPhase):
    """Training and evaluation of the probe. Its step numbers follow those of pre-training.

    With ``mode.lr_backbone=0``, the backbone stays in evaluation mode, and the features of the held-out sets are
    computed once. Without ``mode.eval_augmentation``, so are the features of the training set.

    Args:
        end: number of the last optimizer step.
    """

    def __init__(self, run: Run, training: Training, end: int) -> None:
        super().__init__(run, training, clf)
        assert training.probe is not None
        self.probe, self.model = training.probe, cast(BarlowTwins, training.model)
        self.options, self.batch = bt.options(run.config), probe_batch(run)
        self.start, self.end = run.steps, end
        self.epochs = plan_epochs(run.config, len(run.data.train), self.batch.global_batch)
        self.profile = Profile(None, run.device)
        distributed.share_buffers(self.model)
        self.model.eval()
        self.classifier = nn.Sequential(self.model.backbone, self.probe.head)
        self.frozen = not self.options.lr_backbone
        trained = self.probe.head if self.frozen else self.classifier
        self.statistics = RunningStatistics(trained, over_processes=not run.config.sync_bn)
        backbone = self.model.backbone.state_dict() if self.frozen else {}
        self._before = {name: tensor.clone() for name, tensor in backbone.items()}
        # Features of the held-out sets, constant with a frozen backbone.
        splits = dict(held_out(run)) if self.frozen else {}
        self._held_out = {name: split_features(run, self.model, split) for name, split in splits.items()}

    @property
    def _step(self) -> int:
        """Number of the probe's optimizer step, from 1."""
        return self.training.step - self.start

    def batches(self) -> Generator[tuple[Tensor, Tensor]]:
        """Yield this process's micro-batches, of features if they are computed once, else of images."""
        run, batch = self.run, self.batch
        seed = derive_seed(run.config.seed, "probe")
        if self.frozen and not self.options.eval_augmentation:
            return self._feature_batches(seed)
        loader = run.loader
        if not self.options.eval_augmentation:
            loader = replace(loader, config=without_augmentation(loader.config))
        return loader.train(run.data.train, self.epochs, batch, seed, self._step)

    def _feature_batches(self, seed: int) -> Generator[tuple[Tensor, Tensor]]:
        run, batch = self.run, self.batch
        features, labels = split_features(run, self.model, run.data.train)
        for _, indices in global_batches(self.epochs, seed, self._step):
            for piece in batch.pieces(run.rank, len(indices)):
                chosen = indices[piece].to(run.device)
                yield features[chosen], labels[chosen]

    def _logits(self, inputs: Tensor) -> Tensor:
        """Return logits of a micro-batch of ``batches``: of features or of images."""
        if self.frozen and not self.options.eval_augmentation:
            return cast(Tensor, self.probe.head(inputs))
        with torch.set_grad_enabled(not self.frozen), self.run.autocast:
            features: Tensor = self.model.backbone(inputs)
        return cast(Tensor, self.probe.head(features.float()))

    def gradient(self, batches: Batches) -> Tensor | None:
        run, probe = self.run, self.probe
        torch.manual_seed(derive_seed(run.config.seed, "probe", "step", self._step, run.rank))
        if not self.frozen:
            self.model.backbone.train()
        finite = torch.ones((), dtype=torch.bool, device=run.device)
        images = self.epochs.size(self._step - 1)
        self.statistics.begin(self.batch.groups(images))
        for _ in self.batch.pieces(run.rank, images):
            inputs, labels = next(batches)
            loss, counted = clf.loss(run.config, self._logits, inputs, labels)
            mean = loss / (images / (run.processes * max(len(labels), 1)))
            torch.autograd.backward(self.training.loss_scale.scaled(mean))
            self.statistics.after_pass()
            probe.totals += counted
            finite &= loss.detach().isfinite()
        self.statistics.end()
        distributed.average_gradients(probe.head if self.frozen else self.classifier)
        return finite

    def update(self, recorder: Recorder | None) -> None:
        """Take one optimizer step. The learning rates follow half a cosine and are constant within an epoch."""
        epoch = self.epochs.completed(self._step - 1)
        for group, lr in zip(self.probe.optimizer.param_groups, self.probe.lrs, strict=True):
            group["lr"] = lr * (1 + math.cos(math.pi * epoch / self.options.eval_epochs)) / 2
        self.training.loss_scale.unscale(self.probe.optimizer)
        self.training.loss_scale.step(self.probe.optimizer)
        self.probe.optimizer.zero_grad(set_to_none=True)

    def position(self, step: int) -> dict[str, float]:
        """Return step, epoch and examples including pre-training, and the probe's epoch."""
        run, own = self.run, step - self.start
        epoch = own / self.epochs.steps
        return {
            "step": step,
            "epoch": self.start / run.epochs.steps + epoch,
            "examples": run.epochs.examples(self.start) + self.epochs.examples(own),
            "probe/epoch": epoch,
        }

    def learning_rates(self) -> dict[str, float]:
        return {}

    def logs_after(self, step: int) -> bool:
        return False  # the evaluation's row has the training metrics

    def evaluates_after(self, step: int) -> bool:
        return step > self.start and (step == self.end or self.epochs.ends(step - self.start))

    def evaluate(self) -> dict[str, float]:
        """Return the training metrics of the epoch, and the held-out sets' metrics if due."""
        totals = distributed.sum_over_processes(self.probe.totals).tolist()
        self.probe.totals.zero_()
        metrics = {name.replace("train/", "probe/"): value for name, value in clf.train_metrics(totals).items()}
        metrics["probe/lr"] = self.probe.optimizer.param_groups[0]["lr"]
        metrics |= self.training.loss_scale.metrics()
        step, final = self.training.step, self.training.step == self.end
        if self.frozen:
            images = classified_features(self.run, self.probe.head, self._held_out)
            metrics |= recorded_metrics(self.run, images, step, final=final)
        elif final or self.epochs.ends(self._step, self.run.config.eval_every):
            metrics |= recorded_metrics(self.run, classified(self.run, self.classifier), step, final=final)
        return metrics

    def close(self) -> None:
        """Check that a frozen backbone hasn't changed.

        Raises:
            RuntimeError: if it has changed.
        """
        for name, before in self._before.items():
            if not torch.equal(self.model.backbone.state_dict()[name], before):
                raise RuntimeError(f"the linear probe changed the frozen backbone: {name}")
