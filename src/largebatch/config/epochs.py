"""Optimizer steps of an epoch, and the batch that doesn't fill up at its end (``dataset.last_batch``)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from largebatch.config.batch import has_batch_statistics
from largebatch.errors import UserError

if TYPE_CHECKING:
    from largebatch.config.schema import Config


@dataclass(frozen=True)
class Epochs:
    """Division of the passes over a training set into optimizer steps. Steps are counted from 0.

    - ``carry``: the rest of an epoch's order opens the next epoch's first batch. Every step has ``batch_size`` images,
      and an epoch has ``images / batch_size`` steps, also a fraction.
    - ``keep``: the last step of an epoch has the rest.
    - ``drop``: the rest is left out.

    Attributes:
        images: images of the training set.
        rest: images in the last step of an epoch with ``keep``. 0 if the batches are full, and otherwise.
    """

    images: int
    batch_size: int
    last_batch: str
    rest: int = 0

    @property
    def steps(self) -> float:
        """Optimizer steps per epoch: a fraction with ``carry``, else a whole number."""
        if self.last_batch == "carry":
            return self.images / self.batch_size
        return self._whole_steps

    @property
    def _whole_steps(self) -> int:
        return self.images // self.batch_size + (self.rest > 0)

    def steps_of(self, epochs: int) -> int:
        """Return the optimizer steps of ``epochs`` epochs, with ``carry`` rounded down."""
        if self.last_batch == "carry":
            return epochs * self.images // self.batch_size
        return epochs * self._whole_steps

    def completed(self, step: int) -> int:
        """Return the number of whole epochs after ``step`` optimizer steps."""
        if self.last_batch == "carry":
            return step * self.batch_size // self.images
        return step // self._whole_steps

    def ends(self, step: int, every: int = 1) -> bool:
        """Return True if ``step`` optimizer steps are the first to complete a multiple of ``every`` epochs."""
        return step > 0 and self.completed(step) // every > self.completed(step - 1) // every

    def place(self, step: int) -> tuple[int, int]:
        """Return the epoch of a step's first image, and the image's position in the epoch's order."""
        if self.last_batch == "carry":
            return divmod(step * self.batch_size, self.images)
        epoch, number = divmod(step, self._whole_steps)
        return epoch, number * self.batch_size

    def size(self, step: int) -> int:
        """Return the number of images in step ``step``."""
        return self.rest if self.rest and (step + 1) % self._whole_steps == 0 else self.batch_size

    def examples(self, step: int) -> int:
        """Return the number of training examples in the first ``step`` optimizer steps."""
        missing = self.batch_size - self.rest if self.rest else 0
        return step * self.batch_size - self.completed(step) * missing


def plan_epochs(config: Config, images: int, batch_size: int | None = None) -> Epochs:
    """Return the division of epochs of ``images`` images into steps of ``batch_size`` (None: ``config.batch_size``).

    With ``keep``, batch norm and Barlow Twins need two images: if the rest would give a group of one image, one image
    is left out, so that a rest of one image is dropped. Mixup and CutMix leave out the last of an odd number.

    Raises:
        UserError: if the batch is larger than the training set, or CLARS's ``sample_size`` doesn't divide the rest.
    """
    size = config.batch_size if batch_size is None else batch_size
    if size > images:
        raise UserError(f"batch_size={size}: larger than the training set of {images} images, so at most {images}")
    rest = images % size if config.dataset.last_batch == "keep" else 0
    rest -= rest % config.mode.images_together
    if rest and (has_batch_statistics(config) or config.mode.views > 1):
        groups = -(-rest // (config.batch_norm_size or rest))
        rest -= rest // groups < 2
    together = math.lcm(config.optimizer.samples_together, config.mode.images_together)
    if batch_size is None and rest % together:
        raise UserError(
            f"optimizer.sample_size={config.optimizer.samples_together}: doesn't divide the {rest} images of an "
            "epoch's last batch (dataset.last_batch=keep). Fix: dataset.last_batch=carry"
        )
    return Epochs(images, size, config.dataset.last_batch, rest)
