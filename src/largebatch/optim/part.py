"""What one step takes at once: tensors of one group, device, type and sharding; and arithmetic over all of them.

Everything stays on the device: no function here reads a number back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from largebatch.optim.options import Group, is_adapted, is_decayed

T = TypeVar("T")

HALF = (torch.float16, torch.bfloat16)


@dataclass
class Part:
    """Parameters with a gradient, and what belongs to each.

    ``weights``, ``gradients`` and ``state`` are what this process holds of them: of a DTensor its local shard.
    """

    parameters: list[Tensor]
    weights: list[Tensor]
    gradients: list[Tensor]
    state: tuple[list[Tensor], ...]
    adapted: list[bool]
    decayed: list[bool]
    shards: tuple[Any, ...]  # process groups over which a layer is divided
    given_norms: Tensor | None = None  # of shape [adapted parameters]: in place of the gradient norms in denominators

    def layers(self) -> list[Tensor]:
        return only(self.parameters, self.adapted)

    def one_by_one(self) -> Iterator[Part]:
        """Parts of one parameter each."""
        layer = 0
        for place, adapted in enumerate(self.adapted):
            here = slice(place, place + 1)
            yield Part(
                self.parameters[here],
                self.weights[here],
                self.gradients[here],
                tuple(tensors[here] for tensors in self.state),
                self.adapted[here],
                self.decayed[here],
                self.shards,
                None if self.given_norms is None else self.given_norms[layer : layer + adapted],
            )
            layer += adapted


def parts(group: Group, parameters: list[Tensor], gradients: list[Tensor], *state: list[Tensor]) -> list[Part]:
    """Divide the parameters of a group into lists that one call can take. A list of state may be empty."""
    keys = [_kind(parameter, gradient) for parameter, gradient in zip(parameters, gradients, strict=True)]
    divided = []
    for key in dict.fromkeys(keys):  # in order of appearance, and so the same in every process
        chosen = [other == key for other in keys]
        own, their_gradients = only(parameters, chosen), only(gradients, chosen)
        their_state = tuple(only(tensors, chosen) if tensors else [] for tensors in state)
        adapted, decayed = [is_adapted(one, group) for one in own], [is_decayed(one, group) for one in own]
        *_, mesh, placements = key
        if mesh is None:
            divided.append(Part(own, own, their_gradients, their_state, adapted, decayed, ()))
        else:
            shards = tuple(mesh.get_group(dim) for dim, kind in enumerate(placements) if not kind.is_replicate())
            their_gradients = [_like(gradient, mesh, placements) for gradient in their_gradients]
            lists = _local(own), _local(their_gradients), tuple(_local(tensors) for tensors in their_state)
            divided.append(Part(own, *lists, adapted, decayed, shards))
    return divided


def _kind(parameter: Tensor, gradient: Tensor) -> tuple[Any, ...]:
    """What tensors of one part have in common: device, types, and how they are sharded."""
    sharding = (None, None)
    if type(parameter) not in (torch.nn.Parameter, Tensor) and hasattr(parameter, "device_mesh"):
        sharding = (parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
    return parameter.device, parameter.dtype, gradient.dtype, *sharding


def _like(gradient: Any, mesh: Any, placements: Any) -> Any:
    return gradient if gradient.placements == placements else gradient.redistribute(mesh, placements)


def _local(tensors: list[Any]) -> list[Tensor]:
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]


# -- arithmetic over lists of tensors


def at_least_float32(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, in fp32 if they are fp16 or bf16."""
    return [tensor.float() for tensor in tensors] if tensors[0].dtype in HALF else tensors


def only(values: Sequence[T], wanted: Sequence[bool]) -> list[T]:
    return [value for value, yes in zip(values, wanted, strict=True) if yes]


def replaced(tensors: list[Tensor], wanted: Sequence[bool], others: Sequence[Tensor]) -> list[Tensor]:
    """``tensors`` with the wanted ones replaced by ``others``, in order."""
    following = iter(others)
    return [next(following) if yes else tensor for tensor, yes in zip(tensors, wanted, strict=True)]


def with_decay(
    tensors: list[Tensor], weights: list[Tensor], decayed: Sequence[bool], weight_decay: float
) -> list[Tensor]:
    """``tensor + weight_decay * weight`` for the decayed ones; the others themselves, not copies."""
    if not any(decayed):
        return tensors
    sums = torch._foreach_add(only(tensors, decayed), only(weights, decayed), alpha=weight_decay)
    return replaced(tensors, decayed, sums)


def subtract_(weights: list[Tensor], moves: list[Tensor], rate: Any) -> None:
    """``weight -= rate * move``; the rate is a number or a 0-dimensional tensor."""
    if isinstance(rate, Tensor):
        torch._foreach_sub_(weights, torch._foreach_mul(moves, rate))
    else:
        torch._foreach_add_(weights, moves, alpha=-rate)


def norms(lists: Sequence[list[Tensor]], shards: tuple[Any, ...]) -> Tensor:
    """L2 norms of whole layers, of shape [lists, layers], from lists with a tensor for each layer."""
    tensors = list(chain.from_iterable(lists))
    if tensors[0].device.type == "cpu" and not torch.compiler.is_compiling():
        values = _norms_by_pieces(tensors)
    else:
        values = torch.stack(torch._foreach_norm(tensors))
    if shards:
        squares = values.double().square()
        for process_group in shards:
            dist.all_reduce(squares, group=process_group)
        values = squares.sqrt()
    return values.view(len(lists), -1)


def _norms_by_pieces(tensors: list[Tensor]) -> Tensor:
    """torch's norm on CPU loses digits with the number of elements: 8e-7 at 2^17, 8e-5 at 2^22."""
    pieces = [torch.split(tensor.flatten(), 1 << 17) if tensor.numel() > 1 << 17 else (tensor,) for tensor in tensors]
    values = torch.stack(torch._foreach_norm(list(chain.from_iterable(pieces))))
    if len(values) == len(tensors):
        return values
    lengths = torch.tensor([len(parts) for parts in pieces])
    return torch.segment_reduce(values.double().square(), "sum", lengths=lengths).sqrt()


def clipped(values: Tensor, limit: float) -> Tensor:
    """``min(value, limit)``; NaN stays NaN. Infinity is no limit."""
    return values if limit == float("inf") else values.clamp(max=limit)


def one_where_zero(ratio: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """The trust ratio, 1 where either norm is 0."""
    return torch.where((numerator == 0) | (denominator == 0), 1.0, ratio)
