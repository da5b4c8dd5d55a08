"""Networks on whole splits, computed by all processes together: a classifier's metrics, a backbone's features."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from largebatch.data import Split, evaluation_share
from largebatch.data.stream import stream
from largebatch.machine import distributed
from largebatch.machine.memory import is_out_of_memory
from largebatch.machine.pulse import progressed, waiting_for
from largebatch.modes import clf
from largebatch.modes.bt import BarlowTwins
from largebatch.runs.correct import write_correct
from largebatch.runs.predictions import WORST, Predictions, write_predictions
from largebatch.tracking.images import save_worst
from largebatch.training.micro_batch import release_memory
from largebatch.training.state import Run

_AT_ONCE = (256, 1024)  # bounds of the evaluation batch: a micro-batch that fits with gradients also fits without

Batches = Iterable[tuple[Tensor, Tensor]]


def classified(run: Run, model: nn.Module) -> dict[str, Tensor]:
    """Return the results of ``clf.evaluate`` for the whole validation and test sets, in every process."""
    distributed.share_buffers(model)
    model.eval()
    images = {}
    for name, split in held_out(run):
        here = without_gradient(run, split, lambda batches: clf.evaluate(model, batches, run.device))
        images[name] = distributed.gather_rows(here, _shares(run, len(split)))
    return images


def classified_features(run: Run, head: nn.Linear, features: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return the results of ``clf.evaluate`` for a linear layer on features and labels from ``split_features``."""
    return {name: clf.evaluate(head, [one], run.device) for name, one in features.items()}


def metrics_of_images(images: dict[str, Tensor]) -> dict[str, float]:
    """Return the metrics of the results of ``clf.evaluate`` by split."""
    metrics: dict[str, float] = {}
    for name, results in images.items():
        metrics |= clf.evaluation_metrics(name, results)
    return metrics


def recorded_metrics(run: Run, images: dict[str, Tensor], step: int, *, final: bool) -> dict[str, float]:
    """Return ``metrics_of_images``. Rank 0 records the correct test images, and all predictions if it is ``final``."""
    metrics = metrics_of_images(images)
    if run.rank == 0:
        chooses = metrics.get("val/accuracy", metrics["test/accuracy"])
        correct = images["test"][:, 1].bool().cpu().numpy()
        with waiting_for("the disk to write correct.npz"):
            write_correct(run.folder.correct, step, chooses, correct)
        if final:
            _record_predictions(run, images["test"].cpu())
    return metrics


def _record_predictions(run: Run, results: Tensor) -> None:
    """Write the predictions of all test images, and with ``tracker.images`` a picture of the worst images."""
    test = run.data.test
    found = Predictions(
        run.data.classes, test.labels.cpu().numpy(), results[:, 3].long().numpy(), results[:, 0].float().numpy()
    )
    with waiting_for("the disk to write predictions.parquet"):
        write_predictions(run.folder.predictions, found)
        if run.config.tracker.images:
            images = test.images.select(torch.from_numpy(found.worst(WORST)).to(test.labels.device))
            pixels = next(stream(images, [torch.arange(len(images))], batch=len(images), workers=0))
            save_worst(pixels, run.folder.worst_images)


def held_out(run: Run) -> Iterator[tuple[str, Split]]:
    """Yield name and images of the validation set, if any, and of the test set."""
    if run.data.val is not None:
        yield "val", run.data.val
    yield "test", run.data.test


def split_features(run: Run, model: BarlowTwins, split: Split, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Return features float32 [n, F] and labels int64 [n] of ``split`` without augmentation, in every process.

    Args:
        model: in evaluation mode.
        most: number of evenly spaced images to take if ``split`` has more.
    """
    chosen = torch.arange(len(split))
    if most is not None and most < len(split):
        chosen = torch.arange(most) * len(split) // most

    def features(batches: Batches) -> Tensor:
        found = [model.backbone(images).float() for images, _ in batches]
        return torch.cat(found) if found else torch.empty(0, model.features, device=run.device)

    here = without_gradient(run, split, features, chosen)
    labels = split.labels[chosen.to(split.labels.device)].to(run.device)
    return distributed.gather_rows(here, _shares(run, len(chosen))), labels


def _shares(run: Run, images: int) -> list[int]:
    """Return the number of images that each process evaluates."""
    return [len(evaluation_share(images, rank, run.processes)) for rank in range(run.processes)]


@torch.no_grad()
def without_gradient(
    run: Run, split: Split, compute: Callable[[Batches], Tensor], chosen: Tensor | None = None
) -> Tensor:
    """Return ``compute`` of this process's part of ``split``. ``micro_batch=auto``: halve batches on out of memory."""
    size = min(max(run.batch.micro_batch, _AT_ONCE[0]), _AT_ONCE[1])
    while True:
        batches = map(progressed, run.loader.evaluate(split, size, chosen))
        try:
            with run.autocast:
                return compute(batches)
        except (RuntimeError, MemoryError) as error:
            if run.config.micro_batch != "auto" or size == 1 or not is_out_of_memory(error):
                raise
        size //= 2
        release_memory(run.device)
