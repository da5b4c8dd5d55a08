"""Muon: momentum whose matrices are orthogonalised, with AdamW for all other parameters."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from largebatch.optim.newton_schulz import orthogonalise
from largebatch.optim.param_groups import Group, check_fraction, check_non_negative, only, options_of


class Muon(Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon), with the scale of arXiv 2502.16982.

    For every matrix, with gradient ``g`` and weight ``w`` of shape [m, n]; a convolution [m, i, h, w] is the matrix
    [m, i * h * w]::

        v  = momentum * v + (1 - momentum) * g
        u  = momentum * v + (1 - momentum) * g           # without nesterov: v
        o  = orthogonalise(u)                            # five Newton-Schulz iterations
        w -= lr * (weight_decay * w + scale * o)         # scale = 0.2 * sqrt(max(m, n))

    All other parameters take AdamW's step with the same learning rate: those of one dimension, without decay, and
    tensors whose first or second dimension is 1, such as position embeddings, depthwise convolutions and a first
    convolution of grey images. A group may choose for its parameters: ``orthogonal=False`` for a classifier or an
    embedding table.

    The iteration is in bf16 on GPUs and in fp32 on CPU, and the matrices of a shape share each product. Sharded
    parameters (FSDP2) aren't supported.

    Args:
        params: parameters, named parameters (``model.named_parameters()``) or groups of them.
        lr: learning rate of both parts.
        weight_decay: decoupled. torch's 0.1, which is also that of arXiv 2502.16982.
        momentum: decay of the momentum, the author's 0.95.
        nesterov: look ahead, the author's choice.
        adjust_lr_fn: ``match_rms_adamw``, or ``original`` for the author's scale ``sqrt(max(1, m / n))``.
        betas: decay of AdamW's moments.
        eps: AdamW's eps.
        orthogonal: True or False to take Muon's or AdamW's step for all parameters. None: by their shape.

    Raises:
        ValueError: for a hyper-parameter out of its range, also in a parameter group.
    """

    SCALES: ClassVar[tuple[str, ...]] = ("match_rms_adamw", "original")

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        *,
        nesterov: bool = True,
        adjust_lr_fn: str = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        orthogonal: bool | None = None,
    ) -> None:
        super().__init__(params, options_of(locals()))

    def add_param_group(self, param_group: Group) -> None:
        """Add a group that may set any option for itself.

        Raises:
            ValueError: for a hyper-parameter out of its range; then nothing is added.
        """
        group = {**self.defaults, **param_group}
        check_non_negative("lr", group["lr"])
        check_non_negative("weight_decay", group["weight_decay"])
        check_non_negative("eps", group["eps"])
        check_fraction("momentum", group["momentum"])
        for index, beta in enumerate(group["betas"]):
            check_fraction(f"betas[{index}]", beta)
        if group["adjust_lr_fn"] not in self.SCALES:
            raise ValueError(f"adjust_lr_fn must be {' or '.join(self.SCALES)}, got {group['adjust_lr_fn']!r}")
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
            parameters = [p for p in group["params"] if p.grad is not None and p.numel()]
            chosen = [is_orthogonalised(parameter, group) for parameter in parameters]
            self._step_matrices(group, only(parameters, chosen))
            others = only(parameters, [not yes for yes in chosen])
            vectors = [parameter.ndim <= 1 for parameter in others]
            self._step_adamw(group, only(others, vectors), 0.0)
            self._step_adamw(group, only(others, [not vector for vector in vectors]), group["weight_decay"])
        return loss

    def _step_matrices(self, group: Group, parameters: list[Tensor]) -> None:
        if not parameters:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        momenta = self._state(parameters, "momentum_buffer")
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        if group["nesterov"]:
            updates = list(torch._foreach_lerp(gradients, momenta, group["momentum"]))
        else:
            updates = [momentum.clone() for momentum in momenta]
        updates = [update if _is_channels_last(update) else update.contiguous() for update in updates]
        views = [_as_matrix(update) for update in updates]
        dtype = torch.bfloat16 if parameters[0].is_cuda else torch.float32
        torch._foreach_copy_(views, orthogonalise(views, dtype))
        self._scale(group, parameters, updates)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])

    def _scale(self, group: Group, parameters: list[Tensor], updates: list[Tensor]) -> None:
        """Multiply the orthogonal updates by their scale, in place."""
        shapes = [(len(update), update.numel() // len(update)) for update in updates]
        if group["adjust_lr_fn"] == "original":
            scales = [math.sqrt(max(1, m / n)) for m, n in shapes]
        else:
            scales = [0.2 * math.sqrt(max(shape)) for shape in shapes]
        torch._foreach_mul_(updates, scales)

    def _step_adamw(self, group: Group, parameters: list[Tensor], weight_decay: float) -> None:
        if not parameters:
            return
        for parameter in parameters:
            self.state[parameter].setdefault("step", torch.tensor(0.0))
        steps = [self.state[parameter]["step"] for parameter in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            parameters, [p.grad for p in parameters if p.grad is not None],
            self._state(parameters, "exp_avg"), self._state(parameters, "exp_avg_sq"), [], steps,
            amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=weight_decay, eps=group["eps"],
            maximize=False,
        )  # fmt: skip

    def _state(self, parameters: list[Tensor], name: str) -> list[Tensor]:
        """Return the parameters' state of a name, zeros at the first step."""
        for parameter in parameters:
            if name not in self.state[parameter]:
                self.state[parameter][name] = torch.zeros_like(parameter)
        return [self.state[parameter][name] for parameter in parameters]


class AdaMuon(Muon):
    """AdaMuon (arXiv 2507.11005) as in timm: Muon with a second moment of the orthogonal matrices.

    ::

        s  = betas[1] * s + (1 - betas[1]) * o^2
        a  = o / (sqrt(s) + eps)
        w -= lr * (weight_decay * w + 0.2 * sqrt(m * n) * a / ||a||)

    The rest is as in ``Muon``. The paper orthogonalises the sign of the momentum (from memory); timm doesn't.
    """

    SCALES = ("match_rms_adamw",)

    def _scale(self, group: Group, parameters: list[Tensor], updates: list[Tensor]) -> None:
        squares, beta = self._state(parameters, "exp_avg_sq"), group["betas"][1]
        torch._foreach_mul_(squares, beta)
        torch._foreach_addcmul_(squares, updates, updates, 1 - beta)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_div_(updates, roots)
        norms = torch._foreach_norm(updates)
        torch._foreach_add_(norms, group["eps"])
        torch._foreach_div_(updates, norms)
        torch._foreach_mul_(updates, [0.2 * math.sqrt(update.numel()) for update in updates])


def is_orthogonalised(parameter: Tensor, group: Group) -> bool:
    """Return True if the parameter takes Muon's step: by ``orthogonal`` if it is set, else by its shape."""
    if group["orthogonal"] is not None and parameter.ndim > 1:
        return bool(group["orthogonal"])
    return parameter.ndim > 1 and 1 not in parameter.shape[:2]


def _as_matrix(tensor: Tensor) -> Tensor:
    """Return a view [m, n] of a tensor [m, ...]; its columns are in the order of the memory format.

    The order of columns doesn't matter: it is also the order of the columns of the orthogonal matrix.
    """
    if _is_channels_last(tensor):
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.flatten(1)


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
