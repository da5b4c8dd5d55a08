"""LAMB: Adam's direction, scaled, layer by layer, to the length of the weight."""

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


class LAMB(LayerwiseOptimizer):
    """LAMB (arXiv 1904.00962, Algorithm 2).

    For every layer, with gradient ``g``, weight ``w`` and its own step count ``t = 1, 2, ...``::

        m  = beta1 * m + (1 - beta1) * g
        v  = beta2 * v + (1 - beta2) * g^2
        r  = m_hat / (sqrt(v_hat) + eps)             # m_hat = m / (1 - beta1^t), v_hat = v / (1 - beta2^t)
        u  = r + weight_decay * w
        w -= lr * z(||w||) / ||u|| * u               # z(x) = min(x, norm_clip); the factor is 1 if either norm is 0

    Args:
        params: parameters, named parameters (``model.named_parameters()``) or groups of them.
        lr: learning rate.
        betas: decay of the two moments, each in [0, 1). The paper's values.
        eps: the paper's 1e-6.
        weight_decay: decoupled, but inside the direction that is normalised. The paper's 0.01.
        bias_correction: divide the moments by ``1 - beta^t``, as the paper's algorithm does. Without it ``m_hat = m``
            and ``v_hat = v``; the paper's appendix says that this acts like a warm-up.
        adapt_1d: scale parameters of at most one dimension (biases, norm layers) too; otherwise their factor is 1.
        decay_1d: decay those parameters too.
        norm_clip: limit of the weight norm. The paper has a clamp without its values; the TVLARS program has 10.

    Raises:
        ValueError: for a hyper-parameter out of its range, also in a parameter group.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        bias_correction: bool = True,
        adapt_1d: bool = False,
        decay_1d: bool = False,
        norm_clip: float | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "adapt_1d": adapt_1d,
            "decay_1d": decay_1d,
            "norm_clip": norm_clip,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: Group) -> None:
        check_non_negative("lr", group["lr"])
        if not isinstance(group["betas"], (tuple, list)) or len(group["betas"]) != 2:
            raise ValueError(f"betas must be two numbers, got {group['betas']!r}")
        for index, beta in enumerate(group["betas"]):
            check_fraction(f"betas[{index}]", beta)
        check_non_negative("eps", group["eps"])
        check_non_negative("weight_decay", group["weight_decay"])
        if group["norm_clip"] is not None:
            check_positive("norm_clip", group["norm_clip"])

    def _update_group(self, group: Group, parameters: list[Tensor]) -> None:
        for parameter in parameters:
            measured = lamb_update(parameter, group, self.state[parameter])
            if measured is not None:
                self._record(parameter, measured)


def lamb_update(parameter: Tensor, group: Group, state: dict[str, Any]) -> Measured | None:
    """One step of one parameter, in place.

    Returns:
        Weight norm, gradient norm and trust ratio, or None for a parameter that isn't adapted.
    """
    assert parameter.grad is not None
    weight, gradient = at_least_float32(parameter), at_least_float32(parameter.grad)
    direction = _adam_direction(gradient, group, state)
    if is_decayed(parameter, group):
        direction.add_(weight, alpha=group["weight_decay"])
    measured = None
    if is_adapted(parameter, group):
        weight_norm = norm(weight)
        ratio = trust_ratio(1.0, clipped(weight_norm, group["norm_clip"]), norm(direction))
        direction.mul_(ratio)
        measured = weight_norm, norm(gradient), ratio
    parameter.sub_(direction, alpha=group["lr"])
    return measured


def _adam_direction(gradient: Tensor, group: Group, state: dict[str, Any]) -> Tensor:
    """``r``, a new tensor; the moments in ``state`` advance by one step."""
    if not state:
        # Counted for each parameter, because the bias to correct is that of its own moments. A Python int: the
        # correction is a host scalar, and torch carries it through state_dict unchanged.
        state["step"] = 0
        state["exp_avg"] = torch.zeros_like(gradient)
        state["exp_avg_sq"] = torch.zeros_like(gradient)
    state["step"] += 1
    beta1, beta2 = group["betas"]
    first: Tensor = state["exp_avg"].mul_(beta1).add_(gradient, alpha=1 - beta1)
    second: Tensor = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    if group["bias_correction"]:
        first = first / (1 - beta1 ** state["step"])
        second = second / (1 - beta2 ** state["step"])
    return first / second.sqrt().add_(group["eps"])
