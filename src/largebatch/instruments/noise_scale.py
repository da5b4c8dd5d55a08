"""The gradient noise scale from squared norms of small-batch and large-batch gradients, and means of cosines.

McCandlish et al., "An empirical model of large-batch training" (arXiv 1812.06162), appendix A. With the true gradient
G and the covariance S of one image's gradient, a gradient over B images has the expected squared norm
``|G|^2 + tr(S) / B``. Two batch sizes therefore give unbiased estimates of ``tr(S)`` and ``|G|^2``. The noise scale is
``B_simple = tr(S) / |G|^2``, in images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MEMORY = 100  # steps: the mean is uniform over so many first steps, then exponential with this time constant
LEAST_STEPS = 10  # an interval from fewer steps is too wide to be of use
CONFIDENCE = 0.9


def two_batch(small: Tensor, large: Tensor, small_batch: float, large_batch: float) -> Tensor:
    """Return unbiased estimates of tr(S) and |G|^2, along a new last dimension.

    Args:
        small: squared norms of gradients of the mean loss over ``small_batch`` images; fp64 of any shape.
        large: squared norms over ``large_batch`` images.
        small_batch, large_batch: numbers of images, ``small_batch < large_batch``.
    """
    trace = (small - large) / (1 / small_batch - 1 / large_batch)
    squared = (large_batch * large - small_batch * small) / (large_batch - small_batch)
    return torch.stack([trace, squared], dim=-1)


@dataclass(frozen=True)
class Interval:
    """Ratios of means and their confidence intervals; fp64 of shape [count]. Noise scales are in images.

    Attributes:
        value: the estimate; NaN if the denominator's mean isn't positive.
        low: the lower limit.
        high: the upper limit; infinite if the data can't distinguish the denominator from 0.
    """

    value: Tensor
    low: Tensor
    high: Tensor


class PairedMeans:
    """Means over steps of a numerator and a denominator, such as ``two_batch`` estimates, and their covariance.

    The covariance comes from the scatter over steps, so no distribution is assumed. A change of the true values
    during training widens it.

    Args:
        count: number of pairs, such as layers.
        memory: steps of the mean.

    Attributes:
        steps: number of steps in the means.
    """

    def __init__(self, count: int, memory: int = MEMORY) -> None:
        self._memory, self.steps = memory, 0
        self._mean = torch.zeros(count, 2, dtype=torch.float64)
        self._covariance = torch.zeros(count, 2, 2, dtype=torch.float64)  # weighted, of one step
        self._squared_weights = 0.0  # sum over steps; its inverse is the effective number of steps

    def add(self, estimates: Tensor) -> None:
        """Add a step's pairs, [count, 2] on the CPU. A step that isn't finite doesn't count."""
        if not estimates.isfinite().all():
            return
        self.steps += 1
        new = 1 / min(self.steps, self._memory)
        difference = estimates - self._mean
        self._mean += new * difference
        self._covariance += new * difference[:, :, None] * difference[:, None, :]
        self._covariance *= 1 - new
        self._squared_weights = (1 - new) ** 2 * self._squared_weights + new**2

    @property
    def numerators(self) -> Tensor:
        """Mean numerators, [count]; such as tr(S)."""
        return self._mean[:, 0]

    def noise_scales(self, confidence: float = CONFIDENCE) -> Interval | None:
        """Return noise scales with ``confidence`` intervals, at least 0. None after fewer than ``LEAST_STEPS`` steps.

        The ratio of two noisy means is biased. Beale's factor ``(1 + cov / (N * D)) / (1 + var / D^2)`` removes the
        bias of first order. The interval is Fieller's: all ratios R for which the mean of ``tr(S) - R |G|^2`` is within
        Student's t of 0.
        """
        if self.steps < LEAST_STEPS:
            return None
        t, trace, squared, var_trace, both, var_squared = self._moments(confidence)
        # trace / squared * (1 + both / (trace * squared)) / (1 + var_squared / squared^2), without division by 0
        scale = (trace * squared + both) / (squared.square() + var_squared)
        # (trace - R squared)^2 <= t^2 (var_trace - 2 R both + R^2 var_squared), as a R^2 - 2 b R + c <= 0
        a = squared.square() - t**2 * var_squared
        b = trace * squared - t**2 * both
        c = trace.square() - t**2 * var_trace
        root = (b.square() - a * c).clamp(min=0).sqrt()
        bounded = (a > 0) & (squared > 0)
        low = torch.where(c > 0, c / (b + root), torch.zeros_like(c))
        return Interval(
            scale.where(squared > 0, torch.nan).clamp(min=0),
            low.clamp(min=0),
            torch.where(bounded, (b + root) / a, torch.inf).clamp(min=0),
        )

    def cosines(self, confidence: float = CONFIDENCE) -> Interval | None:
        """Return mean dot products over mean products of norms. None after fewer than ``LEAST_STEPS`` steps.

        Products of norms scatter little, so the interval's length is that of the linearised ratio.
        """
        if self.steps < LEAST_STEPS:
            return None
        t, dot, norms, var_dot, both, var_norms = self._moments(confidence)
        cosine = dot / norms
        half = t * (var_dot - 2 * cosine * both + cosine.square() * var_norms).clamp(min=0).sqrt() / norms
        return Interval(*((cosine + add).clamp(-1, 1) for add in (0, -half, half)))  # rounding may exceed 1

    def _moments(self, confidence: float) -> tuple[float, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return Student's t; both means, [count]; and variance, covariance and variance of these means."""
        from scipy.special import stdtrit  # here, because its import takes a while

        t = float(stdtrit(1 / self._squared_weights - 1, (1 + confidence) / 2))
        of_means = self._covariance * (self._squared_weights / (1 - self._squared_weights))
        return t, self._mean[:, 0], self._mean[:, 1], of_means[:, 0, 0], of_means[:, 0, 1], of_means[:, 1, 1]

    def state(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "mean": self._mean,
            "covariance": self._covariance,
            "squared_weights": self._squared_weights,
        }

    def load(self, saved: dict[str, Any]) -> None:
        self.steps, self._squared_weights = saved["steps"], saved["squared_weights"]
        self._mean.copy_(saved["mean"])
        self._covariance.copy_(saved["covariance"])
