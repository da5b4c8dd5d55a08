"""The diagonal matrix by which an optimizer's step multiplies the gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from largebatch.optim import CLARS, LAMB, LARS, TVLARS
from largebatch.optim.layerwise import LayerwiseOptimizer

Group = dict[str, Any]
State = dict[str, Any]


def inverse_preconditioner(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> Tensor | None:
    """Return the diagonal of ``D^-1`` in the latest step ``w -= lr * D^-1 * m``, with the momentum m of gradients.

    Each element is the product of these factors:

    - the learning rate of the parameter's group over that of the first group, at the start of the schedule (``lr_1d``)
    - the trust ratio of the layer, of LARS, TVLARS, CLARS and LAMB; 1 for parameters that aren't adapted
    - ``1 / (sqrt(v) + eps)`` of LAMB, Adam, AdamW and RMSprop, with the bias-corrected v that the step used. Adagrad:
      ``1 / ((1 + (t - 1) lr_decay) (sqrt(v) + eps))`` at step t

    Args:
        optimizer: the optimizer after a step.
        parameters: the trained parameters, in the order of the result.

    Returns:
        fp64 [n]. None if the optimizer's step has no such matrix here (VR-LARS and VR-LAMB scale single elements of
        each gradient), or if the latest step left out a parameter.
    """
    if not is_known(optimizer):
        return None
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    if any(parameter not in groups for parameter in parameters):
        return None
    ratios: dict[Tensor, Tensor] = {}
    if isinstance(optimizer, LayerwiseOptimizer):
        ratios = dict(zip(optimizer.layers, optimizer.layer_stats()["trust_ratio"].double(), strict=True))
    first = _initial_lr(optimizer.param_groups[0])
    found = []
    for parameter in parameters:
        group = groups[parameter]
        divisor = _DIVISORS[type(optimizer)](group, optimizer.state.get(parameter, {}))
        if divisor is None:
            return None
        factor = _initial_lr(group) / first * ratios.get(parameter, parameter.new_ones((), dtype=torch.float64))
        found.append((factor / divisor).expand(parameter.shape).flatten())
    inverse = torch.cat(found)
    return inverse if bool(inverse.isfinite().all()) else None


def is_known(optimizer: torch.optim.Optimizer) -> bool:
    """Return True for an optimizer with a known matrix. A subclass may take another step, so it is unknown."""
    return type(optimizer) in _DIVISORS


def _initial_lr(group: Group) -> float:
    lr: float | Tensor = group["initial_lr"] if "initial_lr" in group else group["lr"]  # at the end, lr may be 0
    return float(lr)


def _none(group: Group, state: State) -> Tensor:
    return torch.ones((), dtype=torch.float64)


def _adam(group: Group, state: State) -> Tensor | None:
    if "exp_avg_sq" not in state:
        return None
    squares: Tensor = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"]
    corrected = 1 - float(group["betas"][1]) ** float(state["step"]) if group.get("bias_correction", True) else 1.0
    return (squares.double() / corrected).sqrt() + float(group["eps"])


def _rmsprop(group: Group, state: State) -> Tensor | None:
    if "square_avg" not in state:
        return None
    squares: Tensor = state["square_avg"].double()
    if group["centered"]:
        squares = squares - state["grad_avg"].double().square()
    return squares.clamp(min=0).sqrt() + float(group["eps"])


def _adagrad(group: Group, state: State) -> Tensor | None:
    if not state or not float(state["step"]):
        return None
    decay = 1 + (float(state["step"]) - 1) * float(group["lr_decay"])
    squares: Tensor = state["sum"].double()
    return decay * (squares.sqrt() + float(group["eps"]))


_DIVISORS: dict[type[torch.optim.Optimizer], Callable[[Group, State], Tensor | None]] = {
    torch.optim.SGD: _none,
    LARS: _none,
    TVLARS: _none,
    CLARS: _none,
    LAMB: _adam,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.RMSprop: _rmsprop,
    torch.optim.Adagrad: _adagrad,
}
