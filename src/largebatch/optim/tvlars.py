"""TVLARS: LARS whose trust ratio starts high and falls along a sigmoid of time, in place of a warm-up."""

from __future__ import annotations

import math
import sys
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from largebatch.optim.lars import LarsFamily
from largebatch.optim.options import Group, check_non_negative, options_of


@overload
def phi(step: float, lmbda: float, alpha: float, delay: float, gamma_min: float) -> float: ...


@overload
def phi(step: Tensor, lmbda: float, alpha: float, delay: float, gamma_min: float) -> Tensor: ...


def phi(step: float | Tensor, lmbda: float, alpha: float, delay: float, gamma_min: float) -> float | Tensor:
    """``1 / (alpha + exp(lmbda * (step - delay))) + gamma_min`` (arXiv 2309.14053, section 4), for any ``step``.

    Falls from at most ``1/alpha + gamma_min`` to ``gamma_min``; half-way at ``delay + ln(alpha)/lmbda``. Of a tensor of
    steps, the tensor of values: on its device, in its type if that is floating-point, else in fp64.
    """
    if isinstance(step, Tensor):
        return _phi_of_tensor(step, lmbda, alpha, delay, gamma_min)
    exponent = lmbda * (step - delay)
    if exponent > 0:  # the formula's fraction multiplied by exp(-exponent), which can't overflow
        decayed = math.exp(-exponent)
        return decayed / (1 + alpha * decayed) + gamma_min
    # Without alpha, the fraction long before the delay is beyond any float.
    return 1 / max(alpha + math.exp(exponent), sys.float_info.min) + gamma_min


def _phi_of_tensor(step: Tensor, lmbda: float, alpha: float, delay: float, gamma_min: float) -> Tensor:
    steps = step if step.is_floating_point() else step.double()
    exponent = lmbda * (steps - delay)
    decayed = torch.exp(-exponent.abs())
    after = decayed / (1 + alpha * decayed)
    before = 1 / (alpha + decayed).clamp(min=torch.finfo(steps.dtype).tiny)
    return torch.where(exponent > 0, after, before) + gamma_min


class TVLARS(LarsFamily):
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
        lmbda: steepness of the decay, per optimizer step. 1e-3 in the program.
        alpha: the fraction is below ``1/alpha``. 1 keeps phi at or below LARS's rate (with no floor); the program has
            0.1.
        delay: the paper's d_e, here in optimizer steps. The program has none.
        gamma_min: phi's floor. The paper has one; the program has none.
        params, lr, and all others: as in ``LARS``.

    Raises:
        ValueError: for a hyper-parameter out of its range, also in a parameter group.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        *,
        lmbda: float = 1e-3,
        alpha: float = 1.0,
        delay: float = 0,
        gamma_min: float = 0.0,
        adapt_1d: bool = False,
        decay_1d: bool = False,
        norm_clip: float | None = None,
        nesterov: bool = False,
        denominator: str = "norm_of_sum",
        lr_in_momentum: bool = False,
        max_ratio: float | None = None,
        larc: bool = False,
        eps: float = 0.0,
        adapt: bool | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> None:
        # step is t, the optimizer steps taken. In the groups because it belongs to no parameter (one that has no
        # gradient for a while doesn't stop the clock), and because state_dict carries what is in a group.
        super().__init__(params, options_of(locals()) | {"step": 0})

    def add_param_group(self, param_group: Group) -> None:
        """Add a group that may set any option for itself; its phi runs on the optimizer's clock."""
        if self.param_groups and isinstance(param_group, dict):
            step = self.param_groups[0]["step"]
            param_group.setdefault("step", step.clone() if isinstance(step, Tensor) else step)
        super().add_param_group(param_group)
        _set_clock(self.param_groups[-1])

    def phi(self, step: Any) -> Any:
        """phi at optimizer step ``step`` (1 is the first), before or after it, with the first group's options.

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

    def _coefficient(self, group: Group) -> float:
        _set_clock(group)  # torch.compile traces every step as a capturable one
        group["step"] += 1  # in place where it is a tensor
        coefficient: float = group["trust_coefficient"] * _group_phi(group["step"], group)
        return coefficient

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            _set_clock(group)


def _set_clock(group: Group) -> None:
    """A graph that is replayed has to find the time on the device; otherwise it is a Python int."""
    if group["capturable"] and group["params"]:
        group["step"] = torch.as_tensor(group["step"], dtype=torch.float32, device=group["params"][0].device)
    elif isinstance(group["step"], Tensor):
        group["step"] = int(group["step"])


def _group_phi(step: Any, group: Group) -> Any:
    return phi(step, group["lmbda"], group["alpha"], group["delay"], group["gamma_min"])
