"""Pre-training with Barlow Twins, the main phase of ``mode=bt``.

The gradient of the loss over a global batch (``mode.exact``) takes two passes over the same micro-batches. The first,
without gradients, collects the outputs of backbone and first layer of the projector. The loss over the global batch
follows from them, and its gradient with respect to them (``global_loss.py``). The second pass takes each micro-batch
through the backbone again, and that gradient back. A process that holds its whole share at once needs no second pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from largebatch.config.epochs import plan_epochs
from largebatch.data import evaluation_share
from largebatch.data.load import in_words
from largebatch.machine import distributed
from largebatch.machine.pulse import progressed
from largebatch.modes import bt
from largebatch.modes.features import effective_rank, knn_predictions, mean_deviation
from largebatch.modes.global_loss import global_loss
from largebatch.seeding import derive_seed
from largebatch.training.evaluation import held_out, split_features
from largebatch.training.facts import Facts
from largebatch.training.phase import Batches, MainPhase
from largebatch.training.probe import ProbePhase, build_probe, probe_batch
from largebatch.training.state import Run, Training

_BANK = 100_000  # largest number of training images to search for nearest neighbours
_EMBEDDINGS = 1024  # largest number of test images for the collapse metrics


class Pretraining(MainPhase):
    """Pre-training; ``ProbePhase`` follows."""

    def __init__(self, run: Run, training: Training, mode: ModuleType) -> None:
        super().__init__(run, training, mode)
        self.options = bt.options(run.config)
        self.model = cast(bt.BarlowTwins, training.model)
        batch = probe_batch(run)
        epochs = plan_epochs(run.config, len(run.data.train), batch.global_batch)
        self.probe_steps = epochs.steps_of(self.options.eval_epochs)
        self.total_steps = self.end + self.probe_steps
        training.probe = build_probe(run, self.model)

    def following(self) -> MainPhase:
        """Return the probe, of the averaged weights with ``ema_decay``: they become the model's."""
        training = self.training
        training.graphs.free()
        if training.averaged and training.step == self.end:  # later, a resumed probe has the model's weights
            training.model.load_state_dict(training.averaged.model.state_dict())
        training.averaged = None
        return ProbePhase(self.run, self.training, self.total_steps)

    def _forward_backward(self, batches: Batches) -> tuple[Tensor, Tensor]:
        """With ``mode.exact``, add a gradient whose mean over processes is that of the loss over the global batch."""
        run, model = self.run, self.model
        if not run.exact:
            return super()._forward_backward(batches)
        model.train()
        sizes = [piece.stop - piece.start for piece in run.batch.pieces(run.rank, self._images)]
        statistics = self.training.statistics
        statistics.begin(run.batch.groups(self._images))
        if len(sizes) == 1:
            with self.profile.phase("data"):
                images, _ = progressed(next(batches))
            totals, finite = self._call(self._whole_share, images)
            statistics.after_pass()
        else:
            totals, finite = self._in_two_passes(batches, sizes)
        statistics.end()
        return totals, finite

    def _in_two_passes(self, batches: Batches, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Add the gradient of this process's micro-batches of these ``sizes``. Return totals and finiteness."""
        buffers = list(self.model.buffers())
        before = [buffer.clone() for buffer in buffers]
        weight = self.model.projector.first.weight
        collected = weight.new_empty(2, 0, len(weight))  # stays empty in a process without images
        for view, rows, pixels in self._views(batches, sizes):
            (output,) = self._call(self._first_layer_alone, pixels)
            if len(collected[0]) < sum(sizes):
                collected = output.new_empty(2, sum(sizes), output.shape[1])
            collected[view, rows] = output
        for buffer, saved in zip(buffers, before, strict=True):  # the second pass updates the running statistics
            buffer.copy_(saved)
        totals, finite, gradient = self._global_loss(collected, max([1, *sizes]))
        for view, rows, pixels in self._views(batches, sizes):
            self._call(self._second_pass, pixels, gradient[view, rows])
            if view == 1:
                self.training.statistics.after_pass()
        return totals, finite

    def _views(self, batches: Batches, sizes: Sequence[int]) -> Iterator[tuple[int, slice, Tensor]]:
        """Yield view (0 or 1), rows among this process's images, and images of each view of each micro-batch.

        The seed of a view of a micro-batch is the same in both passes, and so is dropout.

        Args:
            sizes: number of images of each of this process's micro-batches.
        """
        run, training = self.run, self.training
        ends = [0, *itertools.accumulate(sizes)]
        for number, rows in enumerate(itertools.starmap(slice, itertools.pairwise(ends))):
            with self.profile.phase("data"):
                images, _ = progressed(next(batches))
            for view, pixels in enumerate(images.chunk(2)):
                torch.manual_seed(derive_seed(run.config.seed, "view", training.step, run.rank, number, view))
                yield view, rows, pixels

    def _whole_share(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Add the gradient of all images of this process. Return totals and finiteness."""
        outputs = [self._first_layer(pixels) for pixels in images.chunk(2)]
        totals, finite, gradient = self._global_loss(torch.stack([o.detach() for o in outputs]), len(outputs[0]))
        with self.profile.phase("backward"):
            for output, its_gradient in zip(outputs, gradient, strict=True):
                torch.autograd.backward(output, its_gradient)
        return totals, finite

    def _first_layer(self, pixels: Tensor) -> Tensor:
        """Return the output of backbone and projector's first layer for images of one view."""
        network = self.training.replica if self._uneven else self.training.network
        with self.profile.phase("forward"), self.run.autocast:
            output: Tensor = self.model.projector.first(network(pixels))
        return output

    @torch.no_grad()
    def _first_layer_alone(self, pixels: Tensor) -> tuple[Tensor]:
        return (self._first_layer(pixels),)

    def _second_pass(self, pixels: Tensor, gradient: Tensor) -> tuple[()]:
        """Take ``pixels`` through the network again, and the gradient with respect to the first layer's output back."""
        output = self._first_layer(pixels)
        with self.profile.phase("backward"):
            torch.autograd.backward(output, gradient)
        return ()

    def _global_loss(self, collected: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return totals, finiteness, and the gradient with respect to the outputs ``collected`` of the first layer."""
        run, options = self.run, self.options
        with self.profile.phase("forward"):
            parts, gradient = global_loss(
                self.model.projector, collected, rows, run.autocast,
                images=self._images, lmbda=options.lmbda, scale=options.loss_scale * self.training.loss_scale.value,
            )  # fmt: skip
        return bt.counted(options.loss_scale, parts, collected.shape[1]), parts[0].isfinite(), gradient

    def evaluates_after(self, step: int) -> bool:
        every = self.options.knn_every
        if every == 0:
            return False
        return step in (self.start, self.end) or self.epochs.ends(step, every)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the nearest-neighbour accuracy of frozen features, and collapse metrics of the embeddings.

        The neighbours are all training images, or 100,000 evenly spaced ones, without augmentation. The embeddings are
        of up to 1,024 evenly spaced test images.
        """
        run, model, options = self.run, cast(bt.BarlowTwins, self.training.result), self.options
        distributed.share_buffers(model)
        model.eval()
        bank, bank_labels = split_features(run, model, run.data.train, _BANK)
        metrics: dict[str, float] = {}
        features = bank
        for name, split in held_out(run):
            features, labels = split_features(run, model, split)
            share = evaluation_share(len(labels), run.rank, run.processes).to(run.device)
            predictions = knn_predictions(
                features[share], bank, bank_labels, run.data.num_classes,
                neighbours=options.knn_neighbours, temperature=options.knn_temperature,
            )  # fmt: skip
            correct = distributed.sum_over_processes((predictions == labels[share]).sum())
            metrics[f"{name}/knn_accuracy"] = float(correct) / len(labels)
        few = torch.arange(min(len(features), _EMBEDDINGS)) * len(features) // min(len(features), _EMBEDDINGS)
        with run.autocast:
            embeddings: Tensor = model.projector(features[few.to(run.device)]).float()
        return metrics | {
            "embedding/std": float(mean_deviation(embeddings)),
            "embedding/effective_rank": float(effective_rank(embeddings)),
        }

    def facts(self) -> Facts:
        run = self.run
        return {
            "pretraining_steps": run.steps,
            "probe_steps": self.probe_steps,
            "probe_batch": probe_batch(run).global_batch,
            "loss_batch": run.batch.global_batch if run.exact else run.batch.micro_batch,
            "embedding_bytes": bt.kept_bytes(run.config, run.batch),
        }

    def facts_in_words(self, facts: Facts) -> list[str]:
        if self.run.exact:
            how = f"the global batch (mode.exact=true, {in_words(facts['embedding_bytes'])} of embeddings per process)"
        else:
            how = (
                f"each micro-batch of {facts['loss_batch']:,} images (mode.exact=false; with several micro-batches, "
                "this isn't the loss over the global batch)"
            )
        after = "fine-tuning" if self.options.lr_backbone else "linear probe"
        return [
            f"Barlow Twins: {facts['pretraining_steps']:,} steps with the loss over {how}; then {after}: "
            f"{facts['probe_steps']:,} steps of batch {facts['probe_batch']:,}"
        ]
