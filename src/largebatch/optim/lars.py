"""LARS: momentum SGD whose learning rate is scaled, layer by layer, by weight norm over gradient norm."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from largebatch.optim.layerwise import LayerwiseOptimizer, Measured
from largebatch.optim.param_groups import (
    Group,
    LarsNumbers,
    check_fraction,
    check_non_negative,
    check_positive,
    numbers_of,
    options_of,
)


class LARS(LayerwiseOptimizer):
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
        lr_in_momentum: ``v = momentum * v + lr * q * g'`` and ``w -= v``, as in the paper: a change of ``lr`` then
            acts on new gradients only.
        max_ratio: limit ``q`` from above; with 1 no layer's learning rate exceeds ``lr``.
        larc: divide ``q`` by ``lr`` before ``max_ratio`` limits it, as LARC does: the layer's own learning rate is
            then ``min(trust_coefficient * ||w|| / ||g'||, max_ratio * lr)``.
        eps: added to the denominator. timm and LARC have 1e-8.
        adapt: in a parameter group: scale all of its parameters (True) or none (False). None: by their dimensions.
        maximize: ascend.
        foreach: use torch's operations, over all tensors at once (True) or one tensor at a time (False).
        fused: one pass over memory for the norms and one for the update. By default used if possible, unless
            ``foreach`` is set. True warns once if the fused step isn't possible.
        capturable: use only operations that a CUDA graph can capture. If the learning rate changes between replays,
            ``lr`` has to be a tensor.

    Raises:
        ValueError: for a hyper-parameter out of its range, also in a parameter group.
    """

    EQUATION = "lars"
    STATE = ("momentum_buffer",)
    DENOMINATORS: ClassVar = ("norm_of_sum", "sum_of_norms")

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

    def _coefficient(self, group: Group) -> Any:
        """Return the factor of the norms' ratio in this step, a number or a tensor; called once a step."""
        return group["trust_coefficient"]

    def _given_norms(self, layers: list[Tensor]) -> Tensor | None:
        """Return an override for these layers' gradient norms in ``q``, of shape [layers]. None: measure them."""
        return None

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_fraction("momentum", group["momentum"])
        check_positive("trust_coefficient", group["trust_coefficient"])
        check_non_negative("eps", group["eps"])
        if group["denominator"] not in self.DENOMINATORS:
            raise ValueError(f"denominator must be one of {', '.join(self.DENOMINATORS)}, got {group['denominator']!r}")
        if group["nesterov"] and group["momentum"] == 0:
            raise ValueError("nesterov needs a momentum above 0, got momentum=0")
        if group["larc"] and group["max_ratio"] is None:
            raise ValueError("larc needs max_ratio (LARC has 1): without a limit lr would have no effect on the layers")

    def _step_group(
        self, index: int, group: Group, parameters: list[Tensor], gradients: list[Tensor]
    ) -> list[Measured]:
        buffers = []
        if group["momentum"] != 0:
            buffers = [state["momentum_buffer"] for state in self._states(parameters, "momentum_buffer")]
        sum_of_norms = group["denominator"] == "sum_of_norms"
        numbers = numbers_of(LarsNumbers, group, coefficient=self._coefficient(group), sum_of_norms=sum_of_norms)
        divided = self._parts(index, group, parameters, gradients, buffers)
        for part in divided:
            part.given_norms = self._given_norms(part.layers())
        return [self._step_part(index, group, part, numbers) for part in divided]
