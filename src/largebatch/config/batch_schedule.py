"""Batch sizes that grow during a training (``batch_schedule``).

``batch_size`` B is the last and largest batch size. The learning rate and its scaling belong to it. Before, a step has
``b`` images, by the part x of the training's images that were seen:

- ``steps``: ``sizes[i]`` up to the part ``at[i]``.
- ``linear``: ``start``, ``2 * start``, ... up to B at x = ``until``: b rises linearly with the images.
- ``doubling``: ``start``, ``2 * start``, ``4 * start``, ... up to B at x = ``until``, in stages of equal images.
- ``seesaw`` (Meterez et al., arXiv 2510.14717): b doubles from ``start``, up to B, whenever the learning-rate schedule
  has fallen by another half. With ``lr_rule: sqrt`` the learning rate then falls by only a factor of sqrt(2).

The learning rate is multiplied by ``b / B`` (``lr_rule: linear``), its square root (``sqrt``) or 1 (``none``).
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from largebatch.config.options import option

if TYPE_CHECKING:
    from largebatch.config.schema import Config

_POINTS = 1000  # at which Seesaw looks at the schedule


class Stage(NamedTuple):
    """Optimizer steps of equal size, from a step and an image of the whole training on."""

    first_step: int
    first_image: int
    size: int


@dataclass
class BatchScheduleConfig:
    shape: str = option("constant", allowed=("constant", "steps", "linear", "doubling", "seesaw"))
    start: int | None = option(None, least=1)  # first batch size, for linear, doubling and seesaw
    until: float = option(0.5, above=0, most=1)  # part of the training after which linear and doubling reach batch_size
    sizes: list[int] = field(default_factory=list)  # batch sizes before batch_size, for steps
    at: list[float] = field(default_factory=list)  # parts of the training at whose end sizes change, for steps
    lr_rule: str = option("none", allowed=("none", "sqrt", "linear"))  # of the learning rate over the batch size

    @property
    def first(self) -> int | None:
        """The first batch size. None: constant."""
        if self.shape == "constant":
            return None
        return self.sizes[0] if self.shape == "steps" else self.start

    def lr_factor(self, ratio: float) -> float:
        """Return the factor of the learning rate for a batch of ``ratio`` times ``batch_size``."""
        return {"none": 1.0, "sqrt": math.sqrt(ratio), "linear": ratio}[self.lr_rule]

    def stages(self, config: Config, images: int) -> tuple[Stage, ...]:
        """Return the stages of a training on ``images`` images per epoch. A stage begins with a whole step."""
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
        if self.shape == "constant":
            return self._without_effect()
        key = f"batch_schedule.shape={self.shape}"
        problems = []
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
        ):
            if other:
                problems.append(f"{key}: not allowed with {other}. Fix: {fix}")
        if self.shape == "seesaw" and config.schedule.decay(1.0) > 0.5:
            problems.append(f"{key}: needs a schedule that falls below a half, not schedule={config.schedule.name}")
        return [*problems, *self._size_problems(config.batch_size)]

    def _without_effect(self) -> list[str]:
        default = BatchScheduleConfig()
        return [
            f"batch_schedule.{name}={value}: needs batch_schedule.shape. Allowed: steps, linear, doubling, seesaw"
            for name, value in vars(self).items()
            if value != getattr(default, name)
        ]

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
        if self.shape != "linear" and (last // self.start).bit_count() != 1:
            return [f"{key}: batch_size={last} must be start times a power of 2 with shape={self.shape}"]
        return []
