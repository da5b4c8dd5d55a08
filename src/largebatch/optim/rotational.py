"""Rotational Lion: signs of a momentum, that turn the weights of each neuron by a given angle."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from largebatch.optim.param_groups import Group, check_fraction, check_non_negative, check_positive, options_of


class RotationalLion(Optimizer):
    """Rotational Lion (arXiv 2305.17212), with the arithmetic of its authors' program (epfml/REQ).

    LionAR (arXiv 2410.23922) of the same authors is a rotational Lion too. For every parameter of two dimensions or
    more, with gradient ``g`` and, for each neuron (an index of the first dimension), weight ``w`` and its norm ``n`` at
    the first step::

        u    = sign(beta1 * m + (1 - beta1) * g)
        m    = beta2 * m + (1 - beta2) * g
        d    = u - mean(u)                                  # without zero_mean: u
        d    = d - w * <d, w> / n^2                         # the part that turns w
        s    = norm_beta * s + (1 - norm_beta) * ||d||^2
        w    = w - angle * n * d / (sqrt(s / (1 - norm_beta^t)) + eps)
        w    = w * n / ||w||
        angle = sqrt(pi * lr * weight_decay) * sqrt((1 - beta1)^2 + beta1^2 * (1 - beta2) / (1 + beta2))

    Lion with weight decay turns ``w`` by ``angle`` radians in each step, on average, once its norm is steady.
    Rotational Lion does so from the first step on, and the norm never changes. ``t`` counts the parameter's steps.

    Parameters of one dimension, and neurons of norm 0, take Lion's step without decay: ``w -= lr * u``. Sharded
    parameters (FSDP2) aren't supported.

    Args:
        params: parameters, named parameters (``model.named_parameters()``) or groups of them.
        lr: learning rate. The angle is proportional to its square root.
        betas: weights of the momentum in the direction, and in the momentum itself. The program's values, and Lion's.
            ``(beta^2, beta)`` is Nesterov momentum of one ``beta``.
        weight_decay: above 0; it sets the angle. The program's 1.
        norm_beta: decay of the mean square of the direction's norm, in [0, 1). The program's 0.9. With 0, every step
            turns a neuron by exactly ``atan(angle)``.
        zero_mean: keep the mean of a neuron's weights at 0, as the program does. The first step removes it.
        eps: the program's 1e-8.

    Raises:
        ValueError: for a hyper-parameter out of its range, also in a parameter group.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1.0,
        *,
        norm_beta: float = 0.9,
        zero_mean: bool = True,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, options_of(locals()))

    def add_param_group(self, param_group: Group) -> None:
        """Add a group that may set any option for itself.

        Raises:
            ValueError: for a hyper-parameter out of its range; then nothing is added.
        """
        group = {**self.defaults, **param_group}
        check_non_negative("lr", group["lr"])
        check_positive("weight_decay", group["weight_decay"])
        check_non_negative("eps", group["eps"])
        check_fraction("norm_beta", group["norm_beta"])
        for index, beta in enumerate(group["betas"]):
            check_fraction(f"betas[{index}]", beta)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient once; ``p.grad`` is left as it was.

        Args:
            closure: function that evaluates the model again, calls ``backward`` and returns the loss.

        Returns:
            The result of ``closure``, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            gradients = [parameter.grad for parameter in parameters]
            momenta = [self._momentum(parameter) for parameter in parameters]
            beta1, beta2 = group["betas"]
            directions = torch._foreach_lerp(gradients, momenta, beta1)
            torch._foreach_sign_(directions)
            torch._foreach_lerp_(momenta, gradients, 1 - beta2)
            for parameter, direction in zip(parameters, directions, strict=True):
                if parameter.ndim > 1:
                    self._turn(group, parameter, direction)
                else:
                    parameter.sub_(direction, alpha=group["lr"])
        return loss

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(parameter)
        momentum: Tensor = state["exp_avg"]
        return momentum

    def _turn(self, group: Group, weight: Tensor, direction: Tensor) -> None:
        """Turn the neurons of ``weight`` by the group's angle; a neuron of norm 0 takes Lion's step."""
        state = self.state[weight]
        if "norm" not in state:
            state["norm"] = _fix_norms(weight, group["zero_mean"])
            state["norm_square"], state["step"] = torch.zeros_like(state["norm"]), 0
        state["step"] += 1
        norm, inputs = state["norm"], _inputs(weight)
        tangent = direction - direction.mean(inputs, keepdim=True) if group["zero_mean"] else direction
        tangent = tangent - weight * ((tangent * weight).sum(inputs, keepdim=True) / norm.square())
        state["norm_square"].lerp_(_norms(tangent).square(), 1 - group["norm_beta"])
        size = (state["norm_square"] / (1 - group["norm_beta"] ** state["step"])).sqrt() + group["eps"]
        turned = weight - tangent * (_angle(group) * norm / size)
        turned *= norm / _norms(turned)
        weight.copy_(torch.where(norm > 0, turned, weight - group["lr"] * direction))


def _angle(group: Group) -> float:
    """Return the angle of a step in radians: that of Lion with weight decay in equilibrium."""
    beta1, beta2 = group["betas"]
    momentum = (1 - beta1) ** 2 + beta1**2 * (1 - beta2) / (1 + beta2)
    return math.sqrt(math.pi * group["lr"] * group["weight_decay"] * momentum)


def _fix_norms(weight: Tensor, zero_mean: bool) -> Tensor:
    """Return the neurons' norms. With ``zero_mean``, remove their means and keep their norms.

    A neuron of equal weights has no direction without its mean: it stays as it is, and its norm counts as 0.
    """
    norm = _norms(weight)
    if not zero_mean:
        return norm
    centred = weight - weight.mean(_inputs(weight), keepdim=True)
    length = _norms(centred)
    has_direction = length > 1e-6 * norm  # less is rounding
    weight.copy_(torch.where(has_direction, centred * (norm / length), weight))
    return torch.where(has_direction, norm, 0.0)


def _inputs(weight: Tensor) -> tuple[int, ...]:
    """Return the dimensions of a neuron's weights."""
    return tuple(range(1, weight.ndim))


def _norms(tensor: Tensor) -> Tensor:
    """Return the L2 norm of each neuron, of shape [neurons, 1, ...]."""
    norms: Tensor = torch.linalg.vector_norm(tensor, 2, _inputs(tensor), keepdim=True)
    return norms
