"""TVLARS: LARS whose trust ratio starts high and falls along a sigmoid of time, in place of a warm-up."""

from __future__ import annotations

import math
import sys

from torch import Tensor
from torch.optim.optimizer import ParamsT

from largebatch.optim.lars import check_lars, lars_update
from largebatch.optim.layerwise import Group, LayerwiseOptimizer, check_non_negative


def phi(step: float, lmbda: float, alpha: float, delay: float, gamma_min: float) -> float:
    """``1 / (alpha + exp(lmbda * (step - delay))) + gamma_min`` (arXiv 2309.14053, section 4), for any ``step``.

    Falls from at most ``1/alpha + gamma_min`` to ``gamma_min``; half-way at ``delay + ln(alpha)/lmbda``.
    """
    exponent = lmbda * (step - delay)
    if exponent > 0:  # the formula's fraction multiplied by exp(-exponent), which can't overflow
        decayed = math.exp(-exponent)
        return decayed / (1 + alpha * decayed) + gamma_min
    # Without alpha, the fraction long before the delay is beyond any float.
    return 1 / max(alpha + math.exp(exponent), sys.float_info.min) + gamma_min


class TVLARS(LayerwiseOptimizer):
    """TVLARS (arXiv 2309.14053), in the form of its program: LARS with ``q`` multiplied by ``phi(t)``.

    For every layer, with gradient ``g``, weight ``w`` and ``t = 1`` at the first optimizer step::

        phi(t) = 1 / (alpha + exp(lmbda * (t - delay))) + gamma_min
        g' = g + weight_decay * w
        q  = trust_coefficient * phi(t) * ||w|| / ||g'||      # 1 if either norm is 0
        v  = momentum * v + q * g'
        w -= lr * v

    phi acts where the adaptation acts: parameters of at most one dimension, unless ``adapt_1d``, and layers with a zero
    norm keep ``q = 1`` without it.

    Args:
        params, lr, momentum, weight_decay, trust_coefficient, adapt_1d, decay_1d, norm_clip, nesterov: as in ``LARS``.
        lmbda: steepness of the decay, per optimizer step. 1e-3 in the program.
        alpha: the fraction is below ``1/alpha``. 1 keeps phi at or below LARS's rate (with no floor); the program has
            0.1.
        delay: the paper's d_e, here in optimizer steps. The program has none.
        gamma_min: phi's floor. The paper has one; the program has none.

    Raises:
        ValueError: for a hyper-parameter out of its range, also in a parameter group.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        *,
        adapt_1d: bool = False,
        decay_1d: bool = False,
        norm_clip: float | None = None,
        nesterov: bool = False,
        lmbda: float = 1e-3,
        alpha: float = 1.0,
        delay: float = 0,
        gamma_min: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "adapt_1d": adapt_1d,
            "decay_1d": decay_1d,
            "norm_clip": norm_clip,
            "nesterov": nesterov,
            "lmbda": lmbda,
            "alpha": alpha,
            "delay": delay,
            "gamma_min": gamma_min,
            # t, the optimizer steps taken. In the groups because it belongs to no parameter (one that has no gradient
            # for a while doesn't stop the clock), and because state_dict carries what is in a group.
            "step": 0,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group that may set any option for itself; its phi runs on the optimizer's clock."""
        if self.param_groups and isinstance(param_group, dict):
            param_group.setdefault("step", self.param_groups[0]["step"])
        super().add_param_group(param_group)

    def phi(self, step: float) -> float:
        """phi at optimizer step ``step`` (1 is the first), before or after it, with the first group's options."""
        return _group_phi(step, self.param_groups[0])

    def _check_group(self, group: Group) -> None:
        check_lars(group)
        for name in ("lmbda", "alpha", "delay", "gamma_min"):
            check_non_negative(name, group[name])

    def _update_group(self, group: Group, parameters: list[Tensor]) -> None:
        group["step"] += 1
        coefficient = group["trust_coefficient"] * _group_phi(group["step"], group)
        for parameter in parameters:
            measured = lars_update(parameter, group, self.state[parameter], coefficient)
            if measured is not None:
                self._record(parameter, measured)


def _group_phi(step: float, group: Group) -> float:
    return phi(step, group["lmbda"], group["alpha"], group["delay"], group["gamma_min"])
