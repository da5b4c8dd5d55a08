"""Batch sizes that grow during a training (``batch_schedule``).

``batch_size`` B is the last and largest batch size. The learning rate and its scaling belong to it. Before, a step has
``b`` images, by the part x of the training's images that were seen:

- ``steps``: ``sizes[i]`` up to the part ``at[i]``.
- ``linear``: ``start``, ``2 * start``, ... up to B at x = ``until``: b rises linearly with the images.
- ``doubling``: ``start``, ``2 * start``, ``4 * start``, ... up to B at x = ``until``, in stages of equal images.
- ``seesaw`` (Meterez et al., arXiv 2510.14717): b doubles from ``start``, up to B, whenever the learning-rate schedule
  has fallen by another half. With ``lr_rule: sqrt`` the learning rate then falls by only a factor of sqrt(2).
- ``norm_test`` (Byrd et al. 2012; AdAdaGrad, Lau et al., arXiv 2402.11215): ``start``, and after each step
  ``max(b, tr(S) / (eta^2 * |g|^2))``, rounded up to a multiple of ``start``, up to B. g is the gradient of the step's
  batch and S the covariance of one image's gradient. So b grows while the variance ``tr(S) / b`` of g is larger than
  ``eta^2 * |g|^2``. The paper takes ``tr(S)`` from the gradients of single images. Here the passes are small batches of
  ``small_batch`` images: with J of them, their gradients g_j and their mean g, ``tr(S)`` is the unbiased estimate
  ``small_batch / (J - 1) * sum_j |g_j - g|^2``. As in the paper, ``|g|^2`` isn't corrected for its own noise: its
  expectation is ``|G|^2 + tr(S) / b`` with the true gradient G.

The learning rate is multiplied by ``b / B`` (``lr_rule: linear``), its square root (``sqrt``) or 1 (``none``).
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from largebatch.config.options import option

if TYPE_CHECKING:
    from largebatch.config.schema import Config

_POINTS = 1000  # at which Seesaw looks at the schedule
# Keys of each shape. All but constant have lr_rule too.
_KEYS: dict[str, tuple[str, ...]] = {
    "constant": (),
    "steps": ("sizes", "at"),
    "linear": ("start", "until"),
    "doubling": ("start", "until"),
    "seesaw": ("start",),
    "norm_test": ("start", "small_batch", "eta"),
}


class Stage(NamedTuple):
    """Optimizer steps of equal size, from a step and an image of the whole training on."""

    first_step: int
    first_image: int
    size: int


@dataclass
class BatchScheduleConfig:
    shape: str = option("constant", allowed=tuple(_KEYS))
    start: int | None = option(None, least=1)  # first batch size, for all shapes but steps
    until: float = option(0.5, above=0, most=1)  # part of the training after which linear and doubling reach batch_size
    sizes: list[int] = field(default_factory=list)  # batch sizes before batch_size, for steps
    at: list[float] = field(default_factory=list)  # parts of the training at whose end sizes change, for steps
    small_batch: int | None = option(None, least=1)  # images per pass, for norm_test; None: half of start
    # Largest relative error of a step's gradient, for norm_test. AdAdaGrad's code has 0.5 for ResNet-18 on CIFAR-10,
    # 0.25 for ResNet-50, 0.1 for MNIST and ImageNet.
    eta: float = option(0.5, above=0, below=1)
    lr_rule: str = option("none", allowed=("none", "sqrt", "linear"))  # of the learning rate over the batch size

    @property
    def first(self) -> int | None:
        """The first batch size. None: constant."""
        if self.shape == "constant":
            return None
        return next(iter(self.sizes), None) if self.shape == "steps" else self.start

    @property
    def measures(self) -> bool:
        """True if the sizes depend on the training and can't be planned."""
        return self.shape == "norm_test"

    @property
    def small(self) -> int:
        """Number of images per pass of the norm test."""
        return self.small_batch or max((self.start or 0) // 2, 1)

    def after_test(self, size: int, most: int, trace: float, squared: float) -> int:
        """Return the batch size after a norm test: at least ``size``, at most ``most``, a multiple of ``start``.

        Args:
            size: images of the tested step.
            most: the largest batch size.
            trace: estimate of tr(S). NaN, as after an overflow in fp16, doesn't let the batch grow.
            squared: squared norm of the gradient of the step's batch.
        """
        start, limit = self.start or 1, self.eta**2 * squared
        if not trace > limit * size:
            return size
        return most if trace >= limit * most else min(most, start * math.ceil(trace / (limit * start)))

    def lr_factor(self, ratio: float) -> float:
        """Return the factor of the learning rate for a batch of ``ratio`` times ``batch_size``."""
        return {"none": 1.0, "sqrt": math.sqrt(ratio), "linear": ratio}[self.lr_rule]

    def stages(self, config: Config, images: int) -> tuple[Stage, ...]:
        """Return the stages of a training on ``images`` images per epoch. A stage begins with a whole step.

        The stages of the norm test are those of a training whose batch doesn't grow.
        """
        if self.shape == "constant":
            return (Stage(0, 0, config.batch_size),)
        total = (config.epochs or 0) * images
        found: list[Stage] = []
        for part, size in self._parts(config):
            if not found:
                found.append(Stage(0, 0, size))
                continue
            last = found[-1]
            steps = max(math.ceil((part * total - last.first_image) / last.size), 0)
            found.append(Stage(last.first_step + steps, last.first_image + steps * last.size, size))
        later = [*found[1:], Stage(sys.maxsize, 0, 0)]
        return tuple(one for one, after in zip(found, later, strict=True) if after.first_step > one.first_step)

    def _parts(self, config: Config) -> list[tuple[float, int]]:
        """Return the part of the training from which on steps have a size, and this size."""
        last, start = config.batch_size, self.start or 1
        if self.measures:
            return [(0.0, start)]
        if self.shape == "steps":
            return list(zip([0.0, *self.at], [*self.sizes, last], strict=True))
        if self.shape == "linear":
            count = last // start
            return [(self.until * i / (count - 1), start * (i + 1)) for i in range(count)]
        doublings = round(math.log2(last / start))
        if self.shape == "doubling":
            return [(self.until * i / doublings, start * 2**i) for i in range(doublings + 1)]
        return [
            (0.0, start),
            *((part, start * 2 ** (i + 1)) for i, part in enumerate(self._halvings(config, doublings))),
        ]

    def _halvings(self, config: Config, most: int) -> list[float]:
        """Return the parts of the training at which the schedule has fallen to a half, a quarter ... of its peak."""
        factor = config.schedule.factor(_POINTS, _POINTS / (config.epochs or 1))
        values = [factor(point) for point in range(_POINTS)]
        peak = values.index(max(values))
        found: list[float] = []
        for point, value in enumerate(values[peak:], peak):
            while len(found) < most and value <= max(values) / 2 ** (len(found) + 1):
                found.append(point / _POINTS)
        return found

    def problems(self, config: Config) -> list[str]:
        """Return one line for each conflict between options, or with the rest of the configuration."""
        problems = self._without_effect()
        if self.shape == "constant":
            return problems
        key = f"batch_schedule.shape={self.shape}"
        for other, fix in (
            (config.mode.name != "clf" and f"mode={config.mode.name}", "mode=clf"),
            (config.dataset.last_batch != "carry" and f"dataset.last_batch={config.dataset.last_batch}", "carry"),
            (config.steps is not None and f"steps={config.steps}", "epochs, which count images"),
            (config.optimizer.name == "tvlars" and "optimizer=tvlars", "another optimizer: its delay counts steps"),
            (
                getattr(config.schedule, "warmup_steps", None) is not None
                and f"schedule.warmup_steps={getattr(config.schedule, 'warmup_steps', None)}",
                "schedule.warmup_epochs",
            ),
            (
                self.measures and any(0 < at < 1 for at in config.checkpoint.keep_at) and "parts in checkpoint.keep_at",
                "numbers of steps, because the length in steps isn't known before",
            ),
            (
                self.measures and config.micro_batch == "auto" and "micro_batch=auto",
                "leave it out: passes have batch_schedule.small_batch images",
            ),
        ):
            if other:
                problems.append(f"{key}: not allowed with {other}. Fix: {fix}")
        if self.shape == "seesaw" and config.schedule.decay(1.0) > 0.5:
            problems.append(f"{key}: needs a schedule that falls below a half, not schedule={config.schedule.name}")
        return [*problems, *self._size_problems(config.batch_size)]

    def _without_effect(self) -> list[str]:
        """Return one line for each key that this shape doesn't have."""
        default, problems = BatchScheduleConfig(), []
        for key in (one.name for one in fields(self) if one.name != "shape"):
            shapes = [one for one, keys in _KEYS.items() if key in keys or (key == "lr_rule" and one != "constant")]
            value = getattr(self, key)
            if value != getattr(default, key) and self.shape not in shapes:
                problems.append(
                    f"batch_schedule.{key}={value}: does nothing with batch_schedule.shape={self.shape}. "
                    f"Allowed shapes: {', '.join(shapes)}. Fix: choose one of them, or leave it out"
                )
        return problems

    def _size_problems(self, last: int) -> list[str]:
        if self.shape == "steps":
            sizes, at = [*self.sizes, last], self.at
            if not self.sizes or len(self.sizes) != len(at):
                return [f"batch_schedule.sizes={self.sizes} and batch_schedule.at={at}: must have as many numbers"]
            if any(b <= a for a, b in pairwise(sizes)) or sizes[0] < 1:
                return [f"batch_schedule.sizes={self.sizes}: must grow up to below batch_size={last}"]
            if any(b <= a for a, b in pairwise([0.0, *at, 1.0])):
                return [f"batch_schedule.at={at}: must grow, between 0 and 1"]
            return []
        key = f"batch_schedule.start={self.start}"
        if self.start is None:
            return [f"{key}: batch_schedule.shape={self.shape} needs the first batch size"]
        if self.start >= last or last % self.start:
            return [f"{key}: must divide batch_size={last} and be smaller"]
        if self.shape in ("doubling", "seesaw") and (last // self.start).bit_count() != 1:
            return [f"{key}: batch_size={last} must be start times a power of 2 with shape={self.shape}"]
        if self.measures and (self.small >= self.start or self.start % self.small):
            return [
                f"batch_schedule.small_batch={self.small_batch}: must divide batch_schedule.start={self.start} and be "
                "smaller, because the norm test needs two passes. Default: half of start"
            ]
        return []
