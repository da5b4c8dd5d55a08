"""Parameter groups: their options, their division into parts that one call updates, and their plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Group = dict[str, Any]
T = TypeVar("T")

HALF = (torch.float16, torch.bfloat16)


def is_adapted(parameter: Tensor, group: Group) -> bool:
    """Return True if the parameter is scaled: by ``adapt`` if it is set, else by dimensions and ``adapt_1d``."""
    if group["adapt"] is not None:
        return bool(group["adapt"])
    return parameter.ndim > 1 or bool(group["adapt_1d"])


def is_decayed(parameter: Tensor, group: Group) -> bool:
    """Return True if the parameter is decayed: it has two dimensions or more, or ``decay_1d`` is set."""
    return group["weight_decay"] != 0 and (parameter.ndim > 1 or bool(group["decay_1d"]))


def options_of(arguments: dict[str, Any]) -> Group:
    """Return the options among a constructor's ``locals()``."""
    return {name: value for name, value in arguments.items() if name not in ("self", "params", "__class__")}


def check_non_negative(name: str, value: Any) -> None:
    if not (_is_finite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")


def check_positive(name: str, value: Any) -> None:
    if not (_is_finite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")


def check_fraction(name: str, value: Any) -> None:
    if not (_is_finite(value) and 0 <= value < 1):
        raise ValueError(f"{name} must be at least 0 and below 1, got {value!r}")


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


@dataclass
class Part:
    """Parameters with a gradient, of one group, device, type and sharding; all lists are in their order.

    ``weights``, ``gradients`` and ``state`` are the tensors in this process: of a DTensor its local shard.
    """

    parameters: list[Tensor]
    weights: list[Tensor]
    gradients: list[Tensor]
    state: tuple[list[Tensor], ...]
    adapted: list[bool]
    decayed: list[bool]
    shards: tuple[Any, ...] = ()  # process groups over which a layer is divided
    given_norms: Tensor | None = None  # [adapted parameters]: override of the gradient norms in denominators
    tables: dict[Any, Any] = field(default_factory=dict)  # memory of the CUDA step, kept from step to step

    def layers(self) -> list[Tensor]:
        return only(self.parameters, self.adapted)


def parts(group: Group, parameters: list[Tensor], gradients: list[Tensor], *state: list[Tensor]) -> list[Part]:
    """Divide the parameters of a group into parts. A list of state may be empty.

    With ``foreach=False`` each parameter is a part of its own.
    """
    alone = group["foreach"] is False and not group["fused"]
    places: dict[tuple[Any, ...], list[int]] = {}
    for place, pair in enumerate(zip(parameters, gradients, strict=True)):
        places.setdefault((place if alone else None, *_kind(*pair)), []).append(place)
    divided = []
    for (*_, mesh, placements), chosen in places.items():  # in order of appearance, so equal in every process
        own, their_gradients = [parameters[i] for i in chosen], [gradients[i] for i in chosen]
        their_state = tuple([tensors[i] for i in chosen] if tensors else [] for tensors in state)
        flags = [is_adapted(one, group) for one in own], [is_decayed(one, group) for one in own]
        if mesh is None:
            divided.append(Part(own, own, their_gradients, their_state, *flags))
        else:
            shards = tuple(mesh.get_group(dim) for dim, kind in enumerate(placements) if not kind.is_replicate())
            their_gradients = [_like(gradient, mesh, placements) for gradient in their_gradients]
            lists = _local(own), _local(their_gradients), tuple(_local(tensors) for tensors in their_state)
            divided.append(Part(own, *lists, *flags, shards))
    return divided


def only(values: Sequence[T], wanted: Sequence[bool]) -> list[T]:
    return [value for value, yes in zip(values, wanted, strict=True) if yes]


def _kind(parameter: Tensor, gradient: Tensor) -> tuple[Any, ...]:
    """Return device, types and sharding, which all tensors of a part share."""
    sharding = (None, None)
    if type(parameter) not in (torch.nn.Parameter, Tensor) and hasattr(parameter, "device_mesh"):
        sharding = (parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
    return parameter.device, parameter.dtype, gradient.dtype, *sharding


def _like(gradient: Any, mesh: Any, placements: Any) -> Any:
    return gradient if gradient.placements == placements else gradient.redistribute(mesh, placements)


def _local(tensors: list[Any]) -> list[Tensor]:
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]


class LarsNumbers(NamedTuple):
    """Numbers of LARS, TVLARS and CLARS. ``coefficient`` multiplies the ratio of the norms; no limit is infinity."""

    lr: float
    coefficient: float
    momentum: float
    weight_decay: float
    eps: float
    norm_clip: float
    max_ratio: float
    larc: bool
    sum_of_norms: bool
    lr_in_momentum: bool
    nesterov: bool
    maximize: bool


class LambNumbers(NamedTuple):
    """Numbers of LAMB. ``correction1`` and ``correction2`` divide the moments: ``1 - beta^t``, or 1 uncorrected."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    correction1: float
    correction2: float
    norm_clip: float
    max_ratio: float
    maximize: bool


Numbers = TypeVar("Numbers", LarsNumbers, LambNumbers)


def numbers_of(kind: type[Numbers], group: Group, **own: Any) -> Numbers:
    """Take each field from ``own``, else from the group's option of that name; a limit of None becomes infinity."""
    values = {**group, **own}
    values |= {name: math.inf for name in ("norm_clip", "max_ratio") if values[name] is None}
    return kind(**{name: values[name] for name in kind._fields})
