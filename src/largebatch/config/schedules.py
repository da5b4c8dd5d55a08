"""Options of each learning-rate schedule, and its factor at each optimizer step.

The factor multiplies the learning rate at optimizer step t = 0, 1, ... T - 1. It is ``(t + 1) / W`` during W warm-up
steps. After the warm-up it is ``decay(s)`` at the progress ``s = (t - W) / (T - W)``, or ``s = t / T`` for schedules
that count from the start (``from_start``). To add a schedule, add its dataclass here and to ``SCHEDULES``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

from omegaconf import MISSING

from largebatch.config.custom import Custom
from largebatch.config.options import option
from largebatch.errors import UserError

if TYPE_CHECKING:
    from largebatch.config.schema import Config


@dataclass
class ScheduleConfig:
    """Options of every schedule. Without warm-up and decay unless a subclass has them.

    ``label`` follows the optimizer's name in reports. ``from_start`` is True if the progress counts from the start of
    the training, and not from the end of the warm-up.
    """

    label: ClassVar[str] = ""
    from_start: ClassVar[bool] = False

    name: str = MISSING

    def decay(self, progress: float) -> float:
        """Return the factor after the warm-up, at ``progress`` from 0 to 1."""
        return 1.0

    def warmup(self, steps_per_epoch: float) -> int:
        """Return the number of warm-up steps."""
        return 0

    def factor(self, total_steps: int, steps_per_epoch: float) -> Callable[[float], float]:
        """Return the factor as a function of the optimizer step, with ``batch_schedule`` also of a fraction.

        Raises:
            UserError: if no step is left after the warm-up.
        """
        warmup = self.warmup(steps_per_epoch)
        self.check_warmup(warmup, total_steps, "steps")
        begin = 0 if self.from_start else warmup

        def factor(step: float) -> float:
            if step < warmup:
                return min((step + 1) / warmup, 1.0)
            return self.decay(min((step - begin) / max(total_steps - begin, 1), 1.0))

        return factor

    def warmup_key(self) -> str:
        return ""

    def check_warmup(self, warmup: float, training: int, unit: str) -> None:
        """Raise a ``UserError`` if a warm-up is as long as the training."""
        if training and warmup >= training:
            raise UserError(
                f"{self.warmup_key()}: {warmup:.10g} {unit} of warm-up, but the training has {training}. "
                "Fix: shorten the warm-up, or train longer"
            )

    def problems(self, config: Config) -> list[str]:
        """Return one line for each conflict between options, or with the length of the training."""
        return []


@dataclass
class Constant(ScheduleConfig):
    """Constant learning rate: ``decay(s) = 1``."""


@dataclass
class Cosine(ScheduleConfig):
    """Half a cosine: ``decay(s) = f + (1 - f) * (1 + cos(pi * s)) / 2``, with the final factor f."""

    label = ", cosine"

    final_factor: float = option(0.0, least=0)  # factor at the end of training

    def decay(self, progress: float) -> float:
        return self.final_factor + (1 - self.final_factor) * (1 + math.cos(math.pi * progress)) / 2


@dataclass
class _Warmup(ScheduleConfig):
    """Linear warm-up, in epochs or in steps."""

    warmup_epochs: float | None = option(None, least=0)
    warmup_steps: int | None = option(None, least=0)

    def warmup(self, steps_per_epoch: float) -> int:
        if self.warmup_steps is not None:
            return self.warmup_steps
        return round((self.warmup_epochs or 0) * steps_per_epoch)

    def warmup_key(self) -> str:
        if self.warmup_steps is not None:
            return f"schedule.warmup_steps={self.warmup_steps}"
        return f"schedule.warmup_epochs={self.warmup_epochs:g}"

    def problems(self, config: Config) -> list[str]:
        if (self.warmup_epochs is None) == (self.warmup_steps is None):
            return [
                f"schedule.warmup_epochs={self.warmup_epochs} and schedule.warmup_steps={self.warmup_steps}: "
                "exactly one must be set. Fix: set one, and the other to null"
            ]
        return []


@dataclass
class WarmupCosine(_Warmup, Cosine):
    """``Cosine`` after a linear warm-up."""

    label = " + warm-up"


@dataclass
class WarmupPoly(_Warmup):
    """Polynomial after a linear warm-up: ``decay(s) = f + (1 - f) * (1 - s) ** power``, with the final factor f."""

    label = " + warm-up, poly"

    final_factor: float = option(0.0, least=0)  # factor at the end of training
    power: float = option(2.0, above=0)

    def decay(self, progress: float) -> float:
        return self.final_factor + (1 - self.final_factor) * math.pow(1 - progress, self.power)


@dataclass
class _Stable(_Warmup):
    """Full learning rate up to a part of the whole training. A linear warm-up is possible."""

    from_start = True

    def stable(self) -> tuple[float, str]:
        """Return the part of the training after which the learning rate first falls, and the key that sets it."""
        raise NotImplementedError

    def check_warmup(self, warmup: float, training: int, unit: str) -> None:
        """Raise a ``UserError`` if the warm-up is as long as the training, or ends after the first fall."""
        super().check_warmup(warmup, training, unit)
        part, key = self.stable()
        if training and warmup > part * training:
            raise UserError(
                f"{self.warmup_key()}: {warmup:.10g} {unit} of warm-up, but with {key} the learning rate falls after "
                f"{part * training:.4g} of {training}. Fix: shorten the warm-up, or let the learning rate fall later"
            )

    def problems(self, config: Config) -> list[str]:
        return super().problems(config) if (self.warmup_epochs, self.warmup_steps) != (None, None) else []


@dataclass
class Wsd(_Stable):
    """Warm-up, stable, decay: ``decay(s) = f + (1 - f) * (1 - shape(x))`` with the final factor f.

    ``x = (s - (1 - d)) / d`` goes from 0 to 1 in the last part d of the training; ``shape`` is the identity or a square
    root.
    """

    label = ", WSD"

    decay_fraction: float = option(0.2, above=0, most=1)  # part of the training in which the learning rate falls
    shape: str = option("sqrt", allowed=("sqrt", "linear"))
    final_factor: float = option(0.0, least=0)  # factor at the end of training

    def stable(self) -> tuple[float, str]:
        return 1 - self.decay_fraction, f"schedule.decay_fraction={self.decay_fraction:g}"

    def decay(self, progress: float) -> float:
        fallen = max((progress - (1 - self.decay_fraction)) / self.decay_fraction, 0.0)
        fallen = math.sqrt(fallen) if self.shape == "sqrt" else fallen
        return self.final_factor + (1 - self.final_factor) * (1 - fallen)


@dataclass
class Step(_Stable):
    """Steps: ``decay(s)`` is gamma to the number of milestones up to s, as in torch's ``MultiStepLR``."""

    label = ", steps"

    # Parts of the training. 30, 60 and 80 of 90 epochs.
    milestones: list[float] = option([1 / 3, 2 / 3, 8 / 9], above=0, below=1)
    gamma: float = option(0.1, above=0)  # factor of the learning rate at each milestone

    def stable(self) -> tuple[float, str]:
        return self.milestones[0], f"schedule.milestones={self.milestones}"

    def decay(self, progress: float) -> float:
        return math.pow(self.gamma, sum(progress >= milestone for milestone in self.milestones))

    def problems(self, config: Config) -> list[str]:
        found = super().problems(config)
        if any(later <= earlier for earlier, later in pairwise(self.milestones)):
            found.append(f"schedule.milestones={self.milestones}: each must be larger than the one before")
        return found


@dataclass
class CustomSchedule(Custom, _Warmup):
    """``target(progress, **options)`` is ``decay``, after a linear warm-up if one is set."""

    group = "schedule"
    positional = ("progress",)

    def decay(self, progress: float) -> float:
        """Return the factor.

        Raises:
            UserError: the function doesn't return a finite number of at least 0.
        """
        value = self.call(progress)
        with contextlib.suppress(TypeError, ValueError):
            if math.isfinite(float(value)) and float(value) >= 0:
                return float(value)
        raise UserError(f"{self.key}: returns {value!r} at progress {progress:g}. Allowed: a finite number from 0 on")

    def factor(self, total_steps: int, steps_per_epoch: float) -> Callable[[float], float]:
        for progress in (0.0, 0.5, 1.0):  # an error at the end of the training would cost the training
            self.decay(progress)
        return super().factor(total_steps, steps_per_epoch)

    def problems(self, config: Config) -> list[str]:
        return super().problems(config) if (self.warmup_epochs, self.warmup_steps) != (None, None) else []


SCHEDULES: dict[str, type[ScheduleConfig]] = {
    "constant": Constant,
    "cosine": Cosine,
    "warmup_cosine": WarmupCosine,
    "warmup_poly": WarmupPoly,
    "wsd": Wsd,
    "step": Step,
}
LIBRARIES: dict[str, type[ScheduleConfig]] = {"custom": CustomSchedule}
