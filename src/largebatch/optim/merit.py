"""MERIT: Adam's direction, scaled, element by element, by ratios of max-norms of rows, columns and the layer."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from largebatch.optim.lamb import LAMB
from largebatch.optim.layerwise import Measured
from largebatch.optim.param_groups import Group, Part, check_positive


class MERIT(LAMB):
    """MERIT (arXiv 2508.20577), with the arithmetic of its authors' program (NUS-HPC-AI-Lab/MERIT).

    For every layer, with gradient ``g``, weight ``w`` and the max-norm ``|x| = max_ij |x_ij|``::

        m     = beta1 * m + (1 - beta1) * g
        v     = beta2 * v + (1 - beta2) * g^2
        u     = m / (sqrt(v) + eps) + weight_decay * w
        b     = |w| / |u|
        r_i   = |w_i| / |u_i|                            # of row i
        c_j   = |w_j| / |u_j|                            # of column j
        s_ij  = max(r_i, c_j, b)                         # 1 if the max-norm of the row or column of w or u is 0
        w_ij -= lr * clip(s_ij * u_ij, -update_clip, update_clip)

    A row has the elements with one index in the first dimension, a column those with one index in the second. A
    convolution has rows and columns for each position of its kernel. A layer of at most one dimension has ``s = b``.
    There is no fused step. The layer's ``trust_ratio`` is ``||clip(s * u)|| / ||u||`` with L2 norms.

    Args:
        bias_correction: divide the moments by ``1 - beta^t`` as LAMB does. The program doesn't.
        update_clip: limit of the absolute value of an element of ``s * u``. The paper's 1. None: no limit.
        norm_clip: limit of the weight's max-norms. Not in the paper.
        max_ratio: limit of ``s``. Not in the paper.
        params, lr, betas, eps, weight_decay, and all others: as in ``LAMB``. The program has the default betas and
            eps, and no weight decay by default. It scales and decays parameters of one dimension too.

    Raises:
        ValueError: for a hyper-parameter out of its range, also in a parameter group.
        RuntimeError: in a step, for sharded parameters.
    """

    EQUATION = "merit"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        *args: Any,
        bias_correction: bool = False,
        update_clip: float | None = 1.0,
        **lamb: Any,
    ) -> None:
        self._own_options = {"update_clip": update_clip}
        super().__init__(params, lr, *args, bias_correction=bias_correction, **lamb)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        if group["update_clip"] is not None:
            check_positive("update_clip", group["update_clip"])

    def _step_part(self, index: int, group: Group, part: Part, numbers: Any) -> Measured:
        if part.shards:
            raise RuntimeError(
                f"MERIT requires whole parameters, and {self._name(part.parameters[0])} is sharded. Fix: LAMB"
            )
        part.update_clip = math.inf if group["update_clip"] is None else group["update_clip"]
        return super()._step_part(index, group, part, numbers)
