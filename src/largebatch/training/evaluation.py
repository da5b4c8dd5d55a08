"""A model's figures on the validation and test sets."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from largebatch.data import Split, evaluation_share
from largebatch.machine import distributed
from largebatch.modes import bt, clf
from largebatch.modes.collapse import effective_rank, mean_deviation
from largebatch.modes.knn import knn_predictions
from largebatch.training.features import split_features, without_gradient
from largebatch.training.state import Run

_BANK = 100_000  # training images at most that nearest neighbours are looked for among
_EMBEDDINGS = 1024  # test images at most that a collapse is looked for in


def evaluate(run: Run, model: nn.Module) -> dict[str, float]:
    """Figures of the main training: a classifier's own, or what pre-trained features are worth."""
    if isinstance(model, bt.BarlowTwins):
        return feature_figures(run, model)
    return classification_figures(run, model)


def classification_figures(run: Run, model: nn.Module) -> dict[str, float]:
    """Loss and accuracy on the whole validation and test sets, over all processes."""
    distributed.share_buffers(model)
    model.eval()
    figures: dict[str, float] = {}
    for name, split in held_out(run):
        totals = without_gradient(run, split, lambda batches: clf.evaluate(model, batches, run.device))
        figures |= clf.evaluation_figures(name, distributed.sum_over_processes(totals).tolist())
    return figures


@torch.no_grad()
def feature_figures(run: Run, model: bt.BarlowTwins) -> dict[str, float]:
    """Nearest-neighbour accuracy of frozen features on the validation and test sets, and whether embeddings collapse.

    The neighbours are training images, all or 100,000 evenly spaced ones, without augmentation. Embeddings are those of
    up to 1,024 evenly spaced test images.
    """
    distributed.share_buffers(model)
    model.eval()
    mode = run.config.mode
    assert mode.knn_neighbours is not None
    assert mode.knn_temperature is not None
    bank, bank_labels = split_features(run, model, run.data.train, _BANK)
    figures: dict[str, float] = {}
    features = bank
    for name, split in held_out(run):
        features, labels = split_features(run, model, split)
        share = evaluation_share(len(labels), run.rank, run.processes).to(run.device)
        predictions = knn_predictions(
            features[share], bank, bank_labels, run.data.num_classes,
            neighbours=mode.knn_neighbours, temperature=mode.knn_temperature,
        )  # fmt: skip
        correct = distributed.sum_over_processes((predictions == labels[share]).sum())
        figures[f"{name}/knn_accuracy"] = float(correct) / len(labels)
    few = torch.arange(min(len(features), _EMBEDDINGS)) * len(features) // min(len(features), _EMBEDDINGS)
    with run.autocast:
        embeddings: Tensor = model.projector(features[few.to(run.device)]).float()
    return figures | {
        "embedding/std": float(mean_deviation(embeddings)),
        "embedding/effective_rank": float(effective_rank(embeddings)),
    }


def held_out(run: Run) -> Iterator[tuple[str, Split]]:
    """The validation set, if there is one, and the test set, by name."""
    if run.data.val is not None:
        yield "val", run.data.val
    yield "test", run.data.test
