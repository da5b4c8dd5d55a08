"""LAMB: Adam's direction, scaled, layer by layer, to the length of the weight."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from largebatch.optim.layerwise import LayerwiseOptimizer, Measured
from largebatch.optim.numbers import LambNumbers
from largebatch.optim.options import Group, check_fraction, check_non_negative, limit, options_of
from largebatch.optim.part import (
    Part,
    at_least_float32,
    clipped,
    norms,
    one_where_zero,
    only,
    parts,
    subtract_,
)


class LAMB(LayerwiseOptimizer):
    """LAMB (arXiv 1904.00962, Algorithm 2).

    For every layer, with gradient ``g``, weight ``w`` and its own step count ``t = 1, 2, ...``::

        m  = beta1 * m + (1 - beta1) * g
        v  = beta2 * v + (1 - beta2) * g^2
        r  = m_hat / (sqrt(v_hat) + eps)             # m_hat = m / (1 - beta1^t), v_hat = v / (1 - beta2^t)
        u  = r + weight_decay * w
        q  = z(||w||) / ||u||                        # z(x) = min(x, norm_clip); 1 if either norm is 0
        w -= lr * min(q, max_ratio) * u

    Args:
        params: parameters, named parameters (``model.named_parameters()``) or groups of them.
        lr: learning rate; a number, or a 0-dimensional tensor.
        betas: decay of the two moments, each in [0, 1). The paper's values.
        eps: the paper's 1e-6.
        weight_decay: decoupled, but inside the direction that is normalised. The paper's 0.01.
        bias_correction: divide the moments by ``1 - beta^t``, as the paper's algorithm does. Without it ``m_hat = m``
            and ``v_hat = v``; the paper's appendix says that this acts like a warm-up.
        adapt_1d: scale parameters of at most one dimension (biases, norm layers) too; otherwise their factor is 1.
        decay_1d: decay those parameters too.
        norm_clip: limit of the weight norm. The paper has a clamp without its values; the TVLARS program has 10.
        max_ratio: limit of the trust ratio. LAMBC (arXiv 2011.13584) has one, best at 1 in its experiments.
        adapt, maximize, foreach, fused: as in ``LARS``.
        capturable: only what may be captured in a CUDA graph; the step counts are then tensors on the device.

    Raises:
        ValueError: for a hyper-parameter out of its range, also in a parameter group.
    """

    STATE = ("step", "exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        bias_correction: bool = True,
        adapt_1d: bool = False,
        decay_1d: bool = False,
        norm_clip: float | None = None,
        max_ratio: float | None = None,
        adapt: bool | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> None:
        super().__init__(params, options_of(locals()))

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        if not isinstance(group["betas"], (tuple, list)) or len(group["betas"]) != 2:
            raise ValueError(f"betas must be two numbers, got {group['betas']!r}")
        for index, beta in enumerate(group["betas"]):
            check_fraction(f"betas[{index}]", beta)
        check_non_negative("eps", group["eps"])

    def _steps_taken(self, parameter: Tensor, group: Group) -> int | Tensor:
        """Counted for each parameter, because the bias to correct is that of its own moments."""
        # A Python int: the correction is then a host scalar. A graph that is replayed has to find the count on the
        # device, in a tensor of its own.
        state = self.state[parameter]
        step: int | Tensor = state.get("step", 0)
        if group["capturable"] and not isinstance(step, Tensor):
            step = state["step"] = torch.tensor(float(step), device=parameter.device)
        elif isinstance(step, Tensor) and not group["capturable"]:
            step = int(step)
        return step

    def _step_group(
        self, index: int, group: Group, parameters: list[Tensor], gradients: list[Tensor]
    ) -> list[Measured]:
        exp_avgs, exp_avg_sqs = self._buffers(parameters, "exp_avg"), self._buffers(parameters, "exp_avg_sq")
        steps: list[Any] = [self._steps_taken(parameter, group) for parameter in parameters]
        if group["capturable"] and steps:
            torch._foreach_add_(steps, 1)
            corrected = steps if group["bias_correction"] else []
            divided = parts(group, parameters, gradients, exp_avgs, exp_avg_sqs, corrected)
            return [self._step_part(index, group, part, _numbers(group)) for part in divided]
        measured = []
        for step in dict.fromkeys(steps):  # one, unless some parameters had no gradient for a while
            now = [step == other for other in steps]
            for parameter in only(parameters, now):
                self.state[parameter]["step"] = step + 1
            lists = [only(tensors, now) for tensors in (parameters, gradients, exp_avgs, exp_avg_sqs)]
            divided = parts(group, *lists, [])
            measured += [self._step_part(index, group, part, _numbers(group, step + 1)) for part in divided]
        return measured

    def _fused(self, kernels: ModuleType, part: Part, numbers: LambNumbers, tables: dict[Any, Any]) -> Tensor:
        exp_avgs, exp_avg_sqs, _ = part.state
        measured: Tensor = kernels.lamb(
            part.weights, part.gradients, exp_avgs, exp_avg_sqs, part.adapted, part.decayed, numbers, tables
        )
        return measured

    def _eager(self, part: Part, numbers: LambNumbers) -> Tensor:
        weights, gradients = at_least_float32(part.weights), at_least_float32(part.gradients)
        if numbers.maximize:
            gradients = list(torch._foreach_neg(gradients))
        directions = _adam_directions(gradients, part, numbers)
        if any(part.decayed):
            decayed = only(directions, part.decayed)
            torch._foreach_add_(decayed, only(weights, part.decayed), alpha=numbers.weight_decay)
        measured = torch.empty(3, 0, device=weights[0].device)
        if any(part.adapted):
            layers = only(directions, part.adapted)
            lists = [only(weights, part.adapted), only(gradients, part.adapted), layers]
            weight_norm, gradient_norm, direction_norm = norms(lists, part.shards)
            ratio = clipped(weight_norm, numbers.norm_clip) / direction_norm
            ratio = clipped(one_where_zero(ratio, weight_norm, direction_norm), numbers.max_ratio)
            measured = torch.stack([weight_norm, gradient_norm, ratio])
            torch._foreach_mul_(layers, ratio.unbind())
        subtract_(part.weights, directions, numbers.lr)
        return measured.float()


def _adam_directions(gradients: list[Tensor], part: Part, numbers: LambNumbers) -> list[Tensor]:
    """``r``, new tensors; the moments advance by one step."""
    exp_avgs, exp_avg_sqs, steps = part.state
    torch._foreach_lerp_(exp_avgs, gradients, 1 - numbers.beta1)
    torch._foreach_mul_(exp_avg_sqs, numbers.beta2)
    torch._foreach_addcmul_(exp_avg_sqs, gradients, gradients, 1 - numbers.beta2)
    correction1: Any = numbers.correction1
    correction2: Any = numbers.correction2
    if steps:
        taken = torch.stack(steps)
        correction1, correction2 = (_correction(beta, taken).unbind() for beta in (numbers.beta1, numbers.beta2))
    denominators = list(torch._foreach_div(exp_avg_sqs, correction2))
    torch._foreach_sqrt_(denominators)
    torch._foreach_add_(denominators, numbers.eps)
    directions = list(torch._foreach_div(exp_avgs, correction1))
    torch._foreach_div_(directions, denominators)
    return directions


def _correction(beta: float, steps: Tensor) -> Tensor:
    """``1 - beta^t`` to the last digit, which is lost in fp32 where ``beta^t`` is near 1."""
    return -torch.expm1(steps * (math.log(beta) if beta else -math.inf))


def _numbers(group: Group, step: int | None = None) -> LambNumbers:
    """``step``: t, or None where the counts are tensors and the corrections are made of them."""
    beta1, beta2 = group["betas"]
    corrects = group["bias_correction"] and step is not None
    return LambNumbers(
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        correction1=1 - beta1**step if corrects else 1.0,
        correction2=1 - beta2**step if corrects else 1.0,
        norm_clip=limit(group["norm_clip"]),
        max_ratio=limit(group["max_ratio"]),
        maximize=group["maximize"],
    )
