"""TVLARS: LARS whose trust ratio starts high and falls along a sigmoid of time, instead of a warm-up."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from largebatch.optim.fused import fused_tvlars_coefficient
from largebatch.optim.lars import LARS
from largebatch.optim.param_groups import Group, check_non_negative


def phi(step: Any, lmbda: float, alpha: float, delay: float, gamma_min: float) -> Any:
    """Return ``1 / (alpha + exp(lmbda * (step - delay))) + gamma_min`` (arXiv 2309.14053, section 4), for any ``step``.

    It falls from at most ``1/alpha + gamma_min`` to ``gamma_min``; half-way at ``delay + ln(alpha)/lmbda``. A tensor of
    steps gives a tensor of values: on its device, in its type if that is floating-point, else in fp64.
    """
    # With alpha = 0, the fraction long before the delay is larger than any float: hence the least denominators.
    if isinstance(step, Tensor):
        steps = step if step.is_floating_point() else step.double()
        denominators = alpha + torch.exp(lmbda * (steps - delay))
        return 1 / denominators.clamp(min=torch.finfo(steps.dtype).tiny) + gamma_min
    denominator = alpha + math.exp(min(lmbda * (step - delay), 709.0))  # exp(710) overflows
    return 1 / max(denominator, sys.float_info.min) + gamma_min


class TVLARS(LARS):
    """TVLARS (arXiv 2309.14053), in the form of its program: LARS with ``q`` multiplied by ``phi(t)``.

    For every layer, with gradient ``g``, weight ``w`` and ``t = 1`` at the first optimizer step::

        phi(t) = 1 / (alpha + exp(lmbda * (t - delay))) + gamma_min
        g' = g + weight_decay * w
        q  = trust_coefficient * phi(t) * ||w|| / ||g'||      # 1 if either norm is 0
        v  = momentum * v + q * g'
        w -= lr * v

    phi acts on adapted parameters only. Parameters of at most one dimension, unless ``adapt_1d``, and layers with a
    zero norm keep ``q = 1``.

    Args:
        lmbda: steepness of the decay, per optimizer step. 1e-3 in the program.
        alpha: the fraction is below ``1/alpha``. With 1 and no floor, phi is at most 1 and so the learning rate at
            most LARS's; the program has 0.1.
        delay: the paper's d_e, here in optimizer steps. The program has no delay.
        gamma_min: phi's floor, as in the paper. The program has no floor.
        params, lr, and all others: as in ``LARS``.

    Raises:
        ValueError: for a hyper-parameter out of its range, also in a parameter group.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        *args: float,
        lmbda: float = 1e-3,
        alpha: float = 1.0,
        delay: float = 0,
        gamma_min: float = 0.0,
        **lars: Any,
    ) -> None:
        # step is t, the optimizer steps taken. It is in the groups because state_dict carries them, and because the
        # clock belongs to no parameter: it goes on while a parameter has no gradient.
        self._own_options = {"lmbda": lmbda, "alpha": alpha, "delay": delay, "gamma_min": gamma_min, "step": 0}
        super().__init__(params, lr, *args, **lars)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group that may set any option for itself; its phi runs on the optimizer's clock."""
        if self.param_groups and isinstance(param_group, dict):
            step = self.param_groups[0]["step"]
            param_group.setdefault("step", step.clone() if isinstance(step, Tensor) else step)
        super().add_param_group(param_group)

    def phi(self, step: Any) -> Any:
        """Return phi at optimizer step ``step`` (1 is the first), past or future, with the first group's options.

        Args:
            step: a number, or a tensor of any shape.

        Returns:
            A float, or a tensor of that shape.
        """
        return _group_phi(step, self.param_groups[0])

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        for name in ("lmbda", "alpha", "delay", "gamma_min"):
            check_non_negative(name, group[name])

    def _coefficient(self, group: Group) -> Any:
        # A graph that is replayed reads t from the device; otherwise t is a Python int. Checked at each step, because
        # torch.compile sets capturable while it traces, and a loaded state may come from another device.
        if group["capturable"] and group["params"]:
            group["step"] = torch.as_tensor(group["step"], dtype=torch.float32, device=group["params"][0].device)
            fused = fused_tvlars_coefficient(group["step"], group)
            if fused is not None:
                return fused
        elif isinstance(group["step"], Tensor):
            group["step"] = int(group["step"])
        group["step"] += 1  # in place if it is a tensor
        return group["trust_coefficient"] * _group_phi(group["step"], group)


def _group_phi(step: Any, group: Group) -> Any:
    return phi(step, group["lmbda"], group["alpha"], group["delay"], group["gamma_min"])
