"""Optimizer steps of an epoch, and the batch that doesn't fill up at its end (``dataset.last_batch``)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from largebatch.config.batch import has_batch_statistics
from largebatch.config.batch_schedule import Stage
from largebatch.errors import UserError

if TYPE_CHECKING:
    from largebatch.config.schema import Config


@dataclass
class Epochs:
    """Division of the passes over a training set into optimizer steps. Steps are counted from 0.

    - ``carry``: the rest of an epoch's order opens the next epoch's first batch. An epoch has ``images / batch_size``
      steps, also a fraction. Every step has ``batch_size`` images, or the size of its stage (``batch_schedule``).
    - ``keep``: the last step of an epoch has the rest.
    - ``drop``: the rest is left out.

    Attributes:
        images: images of the training set.
        batch_size: images of a step, with stages the largest number.
        rest: images in the last step of an epoch with ``keep``. 0 if the batches are full, and otherwise.
        stages: only with ``carry``, the sizes of steps; empty: ``batch_size``. The norm test lets them ``grow``.
    """

    images: int
    batch_size: int
    last_batch: str
    rest: int = 0
    stages: tuple[Stage, ...] = ()

    @property
    def steps(self) -> float:
        """Steps of ``batch_size`` images per epoch: a fraction with ``carry``, else a whole number."""
        if self.last_batch == "carry":
            return self.images / self.batch_size
        return self._whole_steps

    def grow(self, step: int, size: int) -> None:
        """Let the steps from ``step`` on have ``size`` images. The last stage must have begun before."""
        self.stages = (*self.stages, Stage(step, self.examples(step), size))

    @property
    def _whole_steps(self) -> int:
        return self.images // self.batch_size + (self.rest > 0)

    def steps_of(self, epochs: int) -> int:
        """Return the optimizer steps of ``epochs`` epochs, with ``carry`` rounded down."""
        if self.last_batch != "carry":
            return epochs * self._whole_steps
        images = epochs * self.images
        first_step, first_image, size = self._stage(lambda stage: stage.first_image <= images)
        return first_step + (images - first_image) // size

    def completed(self, step: int) -> int:
        """Return the number of whole epochs after ``step`` optimizer steps."""
        if self.last_batch == "carry":
            return self.examples(step) // self.images
        return step // self._whole_steps

    def epoch(self, step: int) -> float:
        """Return the number of epochs after ``step`` optimizer steps, maybe a fraction."""
        if self.stages:
            return self.examples(step) / self.images
        return step / self.steps

    def ends(self, step: int, every: float = 1) -> bool:
        """Return True if ``step`` optimizer steps are the first to complete a multiple of ``every`` epochs."""
        before, after = (math.floor(self.epoch(at) / every + 1e-9) for at in (max(step - 1, 0), step))  # 0.3 / 0.1 < 3
        return after > before

    def place(self, step: int) -> tuple[int, int]:
        """Return the epoch of a step's first image, and the image's position in the epoch's order."""
        if self.last_batch == "carry":
            return divmod(self.examples(step), self.images)
        epoch, number = divmod(step, self._whole_steps)
        return epoch, number * self.batch_size

    def size(self, step: int) -> int:
        """Return the number of images in step ``step``."""
        if self.rest and (step + 1) % self._whole_steps == 0:
            return self.rest
        return self._stage(lambda stage: stage.first_step <= step).size

    def examples(self, step: int) -> int:
        """Return the number of training examples in the first ``step`` optimizer steps."""
        first_step, first_image, size = self._stage(lambda stage: stage.first_step <= step)
        missing = self.batch_size - self.rest if self.rest else 0
        return first_image + (step - first_step) * size - (self.completed(step) * missing if missing else 0)

    def _stage(self, begun: Callable[[Stage], bool]) -> Stage:
        """Return the last stage that has ``begun``."""
        return next((stage for stage in reversed(self.stages) if begun(stage)), Stage(0, 0, self.batch_size))


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
    grows = batch_size is None and config.batch_schedule.shape != "constant"
    stages = config.batch_schedule.stages(config, images) if grows else ()
    return Epochs(images, size, config.dataset.last_batch, rest, stages)


def planned_steps(config: Config, epochs: Epochs) -> int:
    """Return the optimizer steps of the main training; before a norm test, the most possible number."""
    return config.steps if config.steps is not None else epochs.steps_of(config.epochs or 0)


def lr_factor(config: Config, epochs: Epochs) -> Callable[[int], float]:
    """Return the factor of the learning rate as a function of the optimizer step.

    A growing batch counts the schedule's steps in images: at a step, the schedule is where a training with
    ``batch_size`` would be after as many images.

    Raises:
        UserError: if no step is left after the warm-up.
    """
    if not epochs.stages:
        return config.schedule.factor(planned_steps(config, epochs), epochs.steps)
    total = (config.epochs or 0) * epochs.images / epochs.batch_size
    schedule, growth = config.schedule.factor(round(total), epochs.steps), config.batch_schedule

    def factor(step: int) -> float:
        return schedule(epochs.examples(step) / epochs.batch_size) * growth.lr_factor(
            epochs.size(step) / epochs.batch_size
        )

    return factor
