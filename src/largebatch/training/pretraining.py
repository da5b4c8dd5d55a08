"""Pre-training with Barlow Twins, the main phase of ``mode=bt``."""

from __future__ import annotations

from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from largebatch.config.epochs import plan_epochs
from largebatch.data import evaluation_share
from largebatch.data.location import in_words
from largebatch.machine import distributed
from largebatch.modes import bt
from largebatch.modes.collapse import effective_rank, mean_deviation
from largebatch.modes.exact import ExactGradient
from largebatch.modes.knn import knn_predictions
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
        training.probe = build_probe(run, self.model)

    @property
    def total_steps(self) -> int:
        return self.end + self.probe_steps

    def following(self) -> MainPhase:
        return ProbePhase(self.run, self.training, self.total_steps)

    def _forward_backward(self, batches: Batches) -> Tensor:
        run, training = self.run, self.training
        if not run.exact:
            return super()._forward_backward(batches)

        def seed(number: int, view: int) -> None:
            torch.manual_seed(derive_seed(run.config.seed, "view", training.step, run.rank, number, view))

        exact = ExactGradient(
            self.model, training.replica if self._smaller else training.network, self.options, batches,
            run.batch.pieces(run.rank, self._images), self._images, run.autocast, seed,
            training.statistics.after_pass, self.profile.phase,
        )  # fmt: skip
        training.statistics.begin(run.batch.groups(self._images))
        counted, finite = exact.compute()
        training.statistics.end()
        training.totals += counted
        return finite

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
        run, model, options = self.run, self.model, self.options
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
