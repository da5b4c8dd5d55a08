"""LARS: momentum SGD whose rate is scaled, layer by layer, by weight norm over gradient norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from largebatch.optim.layerwise import (
    Group,
    LayerwiseOptimizer,
    Measured,
    at_least_float32,
    check_fraction,
    check_non_negative,
    check_positive,
    clipped,
    is_adapted,
    is_decayed,
    norm,
    trust_ratio,
)


class LARS(LayerwiseOptimizer):
    """LARS (arXiv 1708.03888), in the form of the Barlow Twins and TVLARS programs.

    For every layer, with gradient ``g`` and weight ``w``::

        g' = g + weight_decay * w
        q  = trust_coefficient * ||w|| / ||g'||      # 1 if either norm is 0
        v  = momentum * v + q * g'
        w -= lr * v                                  # nesterov: lr * (q * g' + momentum * v)

    The paper's form differs twice: its denominator is ``||g|| + weight_decay * ||w||``, and the learning rate is inside
    the buffer ``v``. Here a change of the rate acts on the old momentum too.

    Args:
        params: parameters, named parameters (``model.named_parameters()``) or groups of them.
        lr: learning rate.
        momentum: in [0, 1). 0.9 in the paper and the programs.
        weight_decay: L2 penalty, part of the gradient that is scaled. The TVLARS program takes 5e-4.
        trust_coefficient: eta. 1e-3 in both programs.
        adapt_1d: scale parameters of at most one dimension (biases, norm layers) too; otherwise their ``q`` is 1.
        decay_1d: decay those parameters too.
        norm_clip: limit both norms from above in ``q``. The TVLARS program has 10 for TVLARS and none for LARS.
        nesterov: step with ``q * g' + momentum * v``.

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
        }
        super().__init__(params, defaults)

    def _check_group(self, group: Group) -> None:
        check_lars(group)

    def _update_group(self, group: Group, parameters: list[Tensor]) -> None:
        for parameter in parameters:
            measured = lars_update(parameter, group, self.state[parameter], group["trust_coefficient"])
            if measured is not None:
                self._record(parameter, measured)


def lars_update(parameter: Tensor, group: Group, state: dict[str, Any], coefficient: float) -> Measured | None:
    """One step of one parameter, in place; ``coefficient`` is what multiplies the ratio of the norms.

    Returns:
        Weight norm, gradient norm and trust ratio, or None for a parameter that isn't adapted.
    """
    assert parameter.grad is not None
    weight, gradient = at_least_float32(parameter), at_least_float32(parameter.grad)
    decays = is_decayed(parameter, group)
    decayed = gradient.add(weight, alpha=group["weight_decay"]) if decays else gradient
    if is_adapted(parameter, group):
        weight_norm, gradient_norm = norm(weight), norm(gradient)
        decayed_norm = norm(decayed) if decays else gradient_norm
        clip = group["norm_clip"]
        ratio = trust_ratio(coefficient, clipped(weight_norm, clip), clipped(decayed_norm, clip))
        scaled, measured = decayed * ratio, (weight_norm, gradient_norm, ratio)
    else:
        scaled, measured = decayed, None
    parameter.sub_(_with_momentum(scaled, group, state), alpha=group["lr"])
    return measured


def _with_momentum(scaled: Tensor, group: Group, state: dict[str, Any]) -> Tensor:
    momentum = group["momentum"]
    if momentum == 0:
        return scaled
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(scaled)
    buffer: Tensor = state["momentum_buffer"].mul_(momentum).add_(scaled)
    return scaled.add(buffer, alpha=momentum) if group["nesterov"] else buffer


def check_lars(group: Group) -> None:
    """Raise ``ValueError`` for a hyper-parameter of LARS that is out of its range."""
    check_non_negative("lr", group["lr"])
    check_fraction("momentum", group["momentum"])
    check_non_negative("weight_decay", group["weight_decay"])
    check_positive("trust_coefficient", group["trust_coefficient"])
    if group["norm_clip"] is not None:
        check_positive("norm_clip", group["norm_clip"])
    if group["nesterov"] and group["momentum"] == 0:
        raise ValueError("nesterov needs a momentum above 0, got momentum=0")
