"""LARS: momentum SGD whose rate is scaled, layer by layer, by weight norm over gradient norm."""

from __future__ import annotations

from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from largebatch.optim.layerwise import LayerwiseOptimizer, Measured
from largebatch.optim.numbers import LarsNumbers
from largebatch.optim.options import (
    Group,
    check_fraction,
    check_non_negative,
    check_one_of,
    check_positive,
    limit,
    options_of,
)
from largebatch.optim.part import (
    Part,
    at_least_float32,
    clipped,
    norms,
    one_where_zero,
    only,
    parts,
    replaced,
    subtract_,
    with_decay,
)


class LarsFamily(LayerwiseOptimizer):
    """The step of LARS, for LARS itself and for those that differ from it in ``q`` alone."""

    STATE = ("momentum_buffer",)
    DENOMINATORS: ClassVar = ("norm_of_sum", "sum_of_norms")

    def _coefficient(self, group: Group) -> float:
        """What multiplies the ratio of the norms in this step; called once a step. May be a tensor on the device."""
        coefficient: float = group["trust_coefficient"]
        return coefficient

    def _given_norms(self, layers: list[Tensor]) -> Tensor | None:
        """What takes the place of these layers' gradient norms in ``q``, of shape [layers]; None has them measured."""
        return None

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_fraction("momentum", group["momentum"])
        check_positive("trust_coefficient", group["trust_coefficient"])
        check_non_negative("eps", group["eps"])
        check_one_of("denominator", group["denominator"], self.DENOMINATORS)
        if group["nesterov"] and group["momentum"] == 0:
            raise ValueError("nesterov needs a momentum above 0, got momentum=0")
        if group["larc"] and group["max_ratio"] is None:
            raise ValueError("larc needs max_ratio (LARC has 1): without a limit lr would have no effect on the layers")

    def _step_group(
        self, index: int, group: Group, parameters: list[Tensor], gradients: list[Tensor]
    ) -> list[Measured]:
        buffers = self._buffers(parameters, "momentum_buffer") if group["momentum"] != 0 else []
        numbers = LarsNumbers(
            lr=group["lr"],
            coefficient=self._coefficient(group),
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            norm_clip=limit(group["norm_clip"]),
            max_ratio=limit(group["max_ratio"]),
            larc=group["larc"],
            sum_of_norms=group["denominator"] == "sum_of_norms",
            lr_in_momentum=group["lr_in_momentum"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        divided = parts(group, parameters, gradients, buffers)
        for part in divided:
            part.given_norms = self._given_norms(part.layers())
        return [self._step_part(index, group, part, numbers) for part in divided]

    def _fused(self, kernels: ModuleType, part: Part, numbers: LarsNumbers, tables: dict[Any, Any]) -> Tensor:
        (buffers,) = part.state
        measured: Tensor = kernels.lars(
            part.weights, part.gradients, buffers, part.adapted, part.decayed, part.given_norms, numbers, tables
        )
        return measured

    def _eager(self, part: Part, numbers: LarsNumbers) -> Tensor:
        weights, gradients = at_least_float32(part.weights), at_least_float32(part.gradients)
        if numbers.maximize:
            gradients = list(torch._foreach_neg(gradients))
        directions = with_decay(gradients, weights, part.decayed, numbers.weight_decay)
        measured = torch.empty(3, 0, device=weights[0].device)
        if any(part.adapted):
            layers = only(directions, part.adapted)
            measured = _measure(only(weights, part.adapted), only(gradients, part.adapted), layers, part, numbers)
            if numbers.maximize or all(only(part.decayed, part.adapted)):  # new tensors, not p.grad
                torch._foreach_mul_(layers, measured[2].unbind())
            else:
                directions = replaced(directions, part.adapted, torch._foreach_mul(layers, measured[2].unbind()))
        if numbers.lr_in_momentum:
            directions = list(torch._foreach_mul(directions, numbers.lr))
        (buffers,) = part.state
        if buffers:
            torch._foreach_mul_(buffers, numbers.momentum)
            torch._foreach_add_(buffers, directions)
            if numbers.nesterov:
                directions = list(torch._foreach_add(directions, buffers, alpha=numbers.momentum))
            else:
                directions = buffers
        subtract_(part.weights, directions, 1.0 if numbers.lr_in_momentum else numbers.lr)
        return measured.float()


def _measure(
    weights: list[Tensor], gradients: list[Tensor], directions: list[Tensor], part: Part, numbers: LarsNumbers
) -> Tensor:
    """Of shape [3, layers]: weight norm, gradient norm, and ``q``."""
    weight_norm, gradient_norm, direction_norm = norms([weights, gradients, directions], part.shards)
    denominator = direction_norm if part.given_norms is None else part.given_norms.to(weight_norm)
    if numbers.sum_of_norms:
        decays = [numbers.weight_decay * decayed for decayed in only(part.decayed, part.adapted)]
        penalty = torch.stack(torch._foreach_mul(weight_norm.unbind(), decays))  # a tensor of them can't be captured
        denominator = (gradient_norm if part.given_norms is None else denominator) + penalty
    numerator, limited = clipped(weight_norm, numbers.norm_clip), clipped(denominator, numbers.norm_clip)
    ratio = numbers.coefficient * numerator / (limited + numbers.eps)
    ratio = one_where_zero(ratio, weight_norm, denominator)
    if numbers.larc:
        ratio = ratio / numbers.lr
    return torch.stack([weight_norm, gradient_norm, clipped(ratio, numbers.max_ratio)])


class LARS(LarsFamily):
    """LARS (arXiv 1708.03888), with its variants as options; by default the Barlow Twins and TVLARS programs' form.

    For every layer, with gradient ``g`` and weight ``w``::

        g' = g + weight_decay * w
        q  = trust_coefficient * ||w|| / (||g'|| + eps)      # 1 if either norm is 0
        v  = momentum * v + q * g'
        w -= lr * v                                          # nesterov: lr * (q * g' + momentum * v)

    Args:
        params: parameters, named parameters (``model.named_parameters()``) or groups of them.
        lr: learning rate; a number, or a 0-dimensional tensor.
        momentum: in [0, 1). 0.9 in the paper and the programs.
        weight_decay: L2 penalty, part of the gradient that is scaled. The TVLARS program takes 5e-4.
        trust_coefficient: eta. 1e-3 in both programs.
        adapt_1d: scale parameters of at most one dimension (biases, norm layers) too; otherwise their ``q`` is 1.
        decay_1d: decay those parameters too.
        norm_clip: limit both norms from above in ``q``. The TVLARS program has 10 for TVLARS and none for LARS.
        nesterov: step with ``q * g' + momentum * v``.
        denominator: ``norm_of_sum``: ``||g + weight_decay * w||``, the programs'; ``sum_of_norms``:
            ``||g|| + weight_decay * ||w||``, the paper's and timm's, which is never smaller.
        lr_in_momentum: ``v = momentum * v + lr * q * g'`` and ``w -= v``, as in the paper: a change of the rate then
            acts on new gradients only.
        max_ratio: limit ``q`` from above; with 1 no layer's rate exceeds ``lr``.
        larc: divide ``q`` by ``lr`` before ``max_ratio`` limits it, as LARC does: the layer's own rate is then
            ``min(trust_coefficient * ||w|| / ||g'||, max_ratio * lr)``.
        eps: added to the denominator. timm and LARC have 1e-8.
        adapt: for a parameter group: scale all of its parameters, or none, whatever their dimensions. None: by
            dimensions.
        maximize: ascend.
        foreach: carry the step out over all tensors at once (True) or one at a time (False) with torch's operations.
        fused: one pass over memory for the norms and one for the update; taken where it can be unless ``foreach`` or
            ``fused`` says otherwise. True warns, once, where it can't.
        capturable: only what may be captured in a CUDA graph. For a rate that changes between replays, ``lr`` has to
            be a tensor.

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
        super().__init__(params, options_of(locals()))
