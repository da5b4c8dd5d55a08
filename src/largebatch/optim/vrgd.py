"""VR-LARS and VR-LAMB: the gradient's elements are scaled by their signal-to-noise ratio over groups of samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from largebatch.optim.lamb import LAMB
from largebatch.optim.lars import LARS
from largebatch.optim.layerwise import Measured
from largebatch.optim.measured import MeasuredOptimizer
from largebatch.optim.param_groups import HALF, Group, check_fraction, is_adapted
from largebatch.optim.sample_squares import SampleSquares

_LEAST_VARIANCE = 1e-6  # of the mean square: below, the difference of two fp32 numbers is rounding


class VarianceReduced(MeasuredOptimizer):
    """The common part of VR-LARS and VR-LAMB: VRGD (arXiv 2309.13681).

    For every layer, with gradient ``g`` of the mean loss and gradients ``g_i`` of groups of samples, for each element::

        r  = g^2 / (mean_i g_i^2 - g^2)              # signal-to-noise ratio; the variance is at least 1e-6 of the mean
        r  = clip(r / mean(r), gsnr_min, 1)          # mean over the layer's elements
        g' = r * g

    ``g'`` takes the place of the gradient in the step that follows, and in the layer statistics. The training loop
    sets the mean squares before each step::

        optimizer = VRLARS(model.named_parameters(), lr=1.0)
        norms = SampleSquares(model, sample_size=8, parameters=optimizer.layers)
        for images, labels in batches:
            optimizer.zero_grad()
            loss(model(images), labels).backward()
            optimizer.set_mean_squares(norms.means())
            optimizer.step()

    ``p.grad`` must be the mean over the same groups. After clipping it by a factor c, take ``norms.means(1 / c)``.
    """

    MEASURE = SampleSquares
    GIVEN = "mean squares"
    GIVE = "set_mean_squares"

    def set_mean_squares(self, means: Mapping[Any, Tensor]) -> None:
        """Set the mean over groups of each layer's squared gradient, of its shape, for the next step only."""
        self.give(means)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_fraction("gsnr_min", group["gsnr_min"])

    def _step_group(
        self, index: int, group: Group, parameters: list[Tensor], gradients: list[Tensor]
    ) -> list[Measured]:
        scaled = list(gradients)
        for place, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
            if is_adapted(parameter, group):
                ratio = _signal_to_noise(gradient, self._given[parameter], group["gsnr_min"])
                ratio = self._smoothed(parameter, ratio, group)
                # Multiplied in place, to keep the gradient's type and memory layout.
                scaled[place] = gradient.clone().mul_(ratio)
        return super()._step_group(index, group, parameters, scaled)

    def _smoothed(self, parameter: Tensor, ratio: Tensor, group: Group) -> Tensor:
        """Return the factor of the gradient, given this step's ratio; called once a step."""
        return ratio


class VRLARS(VarianceReduced, LARS):
    """VR-LARS (arXiv 2309.13681): LARS of the gradient ``g' = r * g``; ``VarianceReduced`` has the equation of ``r``.

    Args:
        gsnr_min: the least factor of an element, in [0, 1); the paper's gamma, 0.1. With a value near 1 it is LARS.
        params, lr, and all others: as in ``LARS``.

    Raises:
        ValueError: for a hyper-parameter out of its range, also in a parameter group.
    """

    def __init__(self, params: ParamsT, lr: float | Tensor, *args: float, gsnr_min: float = 0.1, **lars: Any) -> None:
        self._own_options = {"gsnr_min": gsnr_min}
        super().__init__(params, lr, *args, **lars)


class VRLAMB(VarianceReduced, LAMB):
    """VR-LAMB (arXiv 2309.13681): LAMB of the gradient ``g'``; ``VarianceReduced`` has the equation of ``r``.

    For every layer, with its own step count ``t = 1, 2, ...``::

        p  = gsnr_beta * p + (1 - gsnr_beta) * r
        g' = p / (1 - gsnr_beta^t) * g

    Args:
        gsnr_min: the least factor of an element, in [0, 1); the paper's gamma, 0.1. With a value near 1 it is LAMB.
        gsnr_beta: decay of the mean of ``r``, in [0, 1), from memory: the paper's beta3, 0.9. With 0, ``g' = r * g``
            and there is no state ``p``.
        params, lr, and all others: as in ``LAMB``.

    Raises:
        ValueError: for a hyper-parameter out of its range, also in a parameter group.
    """

    STATE = (*LAMB.STATE, "gsnr_avg", "gsnr_weight")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        *args: Any,
        gsnr_min: float = 0.1,
        gsnr_beta: float = 0.9,
        **lamb: Any,
    ) -> None:
        self._own_options = {"gsnr_min": gsnr_min, "gsnr_beta": gsnr_beta}
        super().__init__(params, lr, *args, **lamb)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_fraction("gsnr_beta", group["gsnr_beta"])

    def _smoothed(self, parameter: Tensor, ratio: Tensor, group: Group) -> Tensor:
        if group["gsnr_beta"] == 0:
            return ratio
        (state,) = self._states([parameter], "gsnr_avg")
        average: Tensor = state["gsnr_avg"]
        if "gsnr_weight" not in state:
            state["gsnr_weight"] = torch.zeros((), device=average.device, dtype=average.dtype)
        # 1 - beta^t as a mean of ones: it stays on the device, so that a graph can capture the step.
        weight: Tensor = state["gsnr_weight"].lerp_(torch.ones_like(state["gsnr_weight"]), 1 - group["gsnr_beta"])
        average.lerp_(ratio.to(average.dtype), 1 - group["gsnr_beta"])
        return average / weight


def _signal_to_noise(gradient: Tensor, mean_squares: Tensor, least: float) -> Tensor:
    """Return the factor ``clip(r / mean(r), least, 1)`` of each element, in fp32 (fp64 for fp64)."""
    squares = (gradient.float() if gradient.dtype in HALF else gradient).square()
    mean_squares = mean_squares.to(squares)
    variance = torch.maximum(mean_squares - squares, _LEAST_VARIANCE * mean_squares)
    tiny = torch.finfo(squares.dtype).tiny  # elements and layers without a gradient have no ratio, but 0
    ratio = squares / variance.clamp(min=tiny)
    return (ratio / ratio.mean().clamp(min=tiny)).clamp(min=least, max=1)
