"""LAMB: Adam's direction, scaled, layer by layer, to the length of the weight."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from largebatch.optim.layerwise import LayerwiseOptimizer, Measured
from largebatch.optim.param_groups import (
    Group,
    LambNumbers,
    check_fraction,
    check_non_negative,
    numbers_of,
    only,
    options_of,
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
            and ``v_hat = v``, which acts like a warm-up according to the paper's appendix.
        adapt_1d: scale parameters of at most one dimension (biases, norm layers) too; otherwise their factor is 1.
        decay_1d: decay those parameters too.
        norm_clip: limit of the weight norm. The paper has a clamp but not its values; the TVLARS program has 10.
        max_ratio: limit of the trust ratio, as in LAMBC (arXiv 2011.13584), where 1 was the best value.
        adapt, maximize, foreach, fused: as in ``LARS``.
        capturable: as in ``LARS``; the step counts are then tensors on the device.

    Raises:
        ValueError: for a hyper-parameter out of its range, also in a parameter group.
    """

    EQUATION = "lamb"
    STATE: ClassVar[tuple[str, ...]] = ("step", "exp_avg", "exp_avg_sq")

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

    def _steps_taken(self, parameters: list[Tensor], states: list[dict[str, Any]], capturable: bool) -> list[Any]:
        """Return the parameters' own step counts, because the bias to correct is that of their own moments.

        They are Python ints, so that the corrections are host scalars. With ``capturable`` they are tensors of their
        own on the device, because a graph that is replayed has to read them there.
        """
        steps = [state.get("step", 0) for state in states]
        if all(isinstance(step, Tensor) == capturable for step in dict.fromkeys(steps)):
            return steps
        if not capturable:
            return [int(step) for step in steps]
        for parameter, state, step in zip(parameters, states, steps, strict=True):
            if not isinstance(step, Tensor):
                state["step"] = torch.tensor(float(step), device=parameter.device)
        return [state["step"] for state in states]

    def _step_group(
        self, index: int, group: Group, parameters: list[Tensor], gradients: list[Tensor]
    ) -> list[Measured]:
        states = self._states(parameters, "exp_avg", "exp_avg_sq")
        moments = [[state[name] for state in states] for name in ("exp_avg", "exp_avg_sq")]
        steps = self._steps_taken(parameters, states, bool(group["capturable"]))
        if group["capturable"] and steps:
            torch._foreach_add_(steps, 1)
            corrected = steps if group["bias_correction"] else []
            divided, numbers = self._parts(index, group, parameters, gradients, *moments, corrected), _numbers(group)
            return [self._step_part(index, group, part, numbers) for part in divided]
        measured = []
        lists: list[list[Any]] = [states, parameters, gradients, *moments]
        for step in dict.fromkeys(steps):  # one step count, unless some parameters had no gradient for a while
            own = lists
            if steps.count(step) < len(steps):
                own = [only(values, [step == other for other in steps]) for values in lists]
            for state in own[0]:
                state["step"] = step + 1
            divided, numbers = self._parts(index, group, *own[1:], []), _numbers(group, step + 1)
            measured += [self._step_part(index, group, part, numbers) for part in divided]
        return measured


def _numbers(group: Group, step: int | None = None) -> LambNumbers:
    """Return the numbers of step t; None if the counts are tensors, from which the update makes the corrections."""
    beta1, beta2 = group["betas"]
    correction1 = correction2 = 1.0
    if group["bias_correction"] and step is not None:
        correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    own = {"beta1": beta1, "beta2": beta2, "correction1": correction1, "correction2": correction2}
    return numbers_of(LambNumbers, group, **own)
