"""The mean, over groups of samples, of the square of each element of the gradient, for VR-LARS and VR-LAMB."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist

from largebatch.optim.group_norms import (
    Conv,
    bias_group_squares,
    conv_group_squares,
    linear_group_squares,
    squares_sum,
)
from largebatch.optim.sample_norms import SampleNorms


class SampleSquares(SampleNorms):
    """Sum, over groups of samples, of the squares of the elements of the group's contribution to a layer's gradient.

    With k groups in all processes together and the gradients ``g_i`` of the groups' own mean losses, ``p.grad`` is
    ``mean_i g_i``, and ``means()`` is ``mean_i g_i^2``, element by element. The difference ``mean_i g_i^2 - p.grad^2``
    is the variance of the gradient over groups. All groups must have the same number of samples.

    It is used as ``SampleNorms`` is, with the same methods, layers and arguments, and keeps one number more for each
    element of the layers. With several processes, ``means()`` is one all-reduce of these numbers. Hooks write each
    group's gradient of a layer out, a few groups at a time. A linear layer with one row per group needs only one
    product of matrices.

    Raises:
        ValueError: as in ``SampleNorms``, and for sharded parameters.
    """

    QUANTITY = "squares"

    def __init__(self, model: nn.Module, sample_size: int = 1, **options: Any) -> None:
        super().__init__(model, sample_size, **options)
        for layer in self._layers:
            if hasattr(layer, "device_mesh"):
                self.remove()
                raise ValueError(f"{self._names[layer]} is sharded: its groups' gradients aren't in one process")
        self._counts = [0] * len(self._layers)  # groups of this step

    def means(self, scale: float | Tensor = 1.0) -> dict[nn.Parameter, Tensor]:
        """Return the mean over groups of the squared gradient of each layer since the last call, and reset the sums.

        With ``torch.distributed`` initialised, the groups are those of all ranks, and every rank must call it. The
        call doesn't synchronise with the device.

        Args:
            scale: the factor of the loss, as ``GradScaler.get_scale()``. It may be a 0-dimensional tensor.

        Returns:
            Tensors of the layers' shapes in fp32 (fp64 for fp64), on the model's device.

        Raises:
            RuntimeError: if no backward pass has run since the last call.
        """
        sums, groups = self._sums, max(self._counts)
        self.forget()
        if sums is None:
            raise RuntimeError("no backward pass since the last call of means(), or since SampleSquares was created")
        # A contribution is the group's gradient times processes / groups, because DDP takes the mean over processes.
        sums[-1] = groups
        processes = 1
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
            processes = dist.get_world_size()
        squares = sums[:-1] * (sums[-1] / (processes * scale) ** 2)
        parts = torch.split(squares, [layer.numel() for layer in self._layers])
        return {layer: part.view(layer.shape) for layer, part in zip(self._layers, parts, strict=True)}

    def forget(self) -> None:
        super().forget()
        self._counts = [0] * len(self._layers)

    def _zeros(self) -> Tensor:
        """Return one tensor, so that ``means`` is one all-reduce. The last number is that of groups."""
        dtype = torch.promote_types(self._layers[0].dtype, torch.float32)
        numbers = sum(layer.numel() for layer in self._layers) + 1
        return torch.zeros(numbers, device=self._layers[0].device, dtype=dtype)

    def _add_squares(self, layer: Tensor, squares: Tensor, groups: int) -> None:
        place = self._places[layer]
        if self._sums is None:
            self._sums = self._zeros()
        start = sum(layer.numel() for layer in self._layers[:place])
        self._sums[start : start + layer.numel()] += squares.flatten()
        self._counts[place] += groups

    @torch.no_grad()
    def _add_pass(self, layer: nn.Parameter, gradient: Tensor) -> None:
        self._add_squares(layer, squares_sum(gradient[None]), 1)

    def _measure(self, module: nn.Linear | Conv, inputs: Tensor, gradient: Tensor) -> None:
        size, groups = self.sample_size, len(inputs) // self.sample_size
        linear = isinstance(module, nn.Linear)
        if module.weight in self._places:
            if linear:
                found = linear_group_squares(inputs, gradient, size)
            else:
                found = conv_group_squares(inputs, gradient, size, cast(Conv, module))
            self._add_squares(module.weight, found, groups)
        if module.bias is not None and module.bias in self._places:
            found = bias_group_squares(gradient, size, channels=-1 if linear else 1)
            self._add_squares(module.bias, found, groups)
