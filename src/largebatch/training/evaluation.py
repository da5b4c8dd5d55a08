"""Metrics of a classifier on the validation and test sets."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from largebatch.data import Split
from largebatch.machine import distributed
from largebatch.modes import clf
from largebatch.training.features import without_gradient
from largebatch.training.state import Run


def classification_metrics(run: Run, model: nn.Module) -> dict[str, float]:
    """Return loss and accuracy on the whole validation and test sets, over all processes."""
    distributed.share_buffers(model)
    model.eval()
    metrics: dict[str, float] = {}
    for name, split in held_out(run):
        totals = without_gradient(run, split, lambda batches: clf.evaluate(model, batches, run.device))
        metrics |= clf.evaluation_metrics(name, distributed.sum_over_processes(totals).tolist())
    return metrics


def held_out(run: Run) -> Iterator[tuple[str, Split]]:
    """Yield name and images of the validation set, if any, and of the test set."""
    if run.data.val is not None:
        yield "val", run.data.val
    yield "test", run.data.test
