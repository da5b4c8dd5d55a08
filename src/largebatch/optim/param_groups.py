"""Parameter groups: their options, their division into parts that one call updates, and their plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from operator import is_
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
    update_clip: float = math.inf  # limit of an element of a layer's scaled direction
    tables: dict[Any, Any] = field(default_factory=dict)  # memory of the CUDA step, kept from step to step

    def layers(self) -> list[Tensor]:
        return only(self.parameters, self.adapted)


@dataclass
class Division:
    """Division of a group's parameters, kept from step to step, because it takes longer than the launches of a step."""

    parameters: list[Tensor] = field(default_factory=list)
    seen: list[Any] = field(default_factory=list)  # from which the division follows
    places: list[list[int]] = field(default_factory=list)  # of each part
    flags: list[tuple[list[bool], list[bool]]] = field(default_factory=list)  # adapted and decayed, of each part


def parts(
    division: Division, group: Group, parameters: list[Tensor], gradients: list[Tensor], *state: list[Tensor]
) -> list[Part]:
    """Divide the parameters of a group into parts, as in the step before if nothing has changed.

    A list of state may be empty. With ``foreach=False`` each parameter is a part of its own.
    """
    _divide(division, group, parameters, gradients)
    divided = []
    for chosen, flags in zip(division.places, division.flags, strict=True):
        own, their_gradients, *their_state = (
            tensors if len(chosen) == len(tensors) else [tensors[i] for i in chosen] if tensors else []
            for tensors in (parameters, gradients, *state)
        )
        mesh, placements = _sharding(own[0])
        if mesh is None:
            divided.append(Part(own, own, their_gradients, tuple(their_state), *flags))
        else:
            shards = tuple(mesh.get_group(dim) for dim, kind in enumerate(placements) if not kind.is_replicate())
            their_gradients = [_like(gradient, mesh, placements) for gradient in their_gradients]
            lists = _local(own), _local(their_gradients), tuple(_local(tensors) for tensors in their_state)
            divided.append(Part(own, *lists, *flags, shards))
    return divided


def _divide(division: Division, group: Group, parameters: list[Tensor], gradients: list[Tensor]) -> None:
    """Bring ``division`` up to date."""
    seen = [
        *(group[name] for name in ("adapt", "adapt_1d", "decay_1d", "weight_decay", "foreach", "fused")),
        *([one.dtype for one in tensors] for tensors in (parameters, gradients)),
        [one.ndim for one in parameters],
        [one.device for one in parameters],
    ]
    same = len(parameters) == len(division.parameters) and all(map(is_, parameters, division.parameters))
    if same and seen == division.seen:
        return
    alone = group["foreach"] is False and not group["fused"]
    places: dict[tuple[Any, ...], list[int]] = {}
    for place, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        kind = parameter.device, parameter.dtype, gradient.dtype, *_sharding(parameter)
        places.setdefault((place if alone else None, *kind), []).append(place)
    division.parameters, division.seen = list(parameters), seen
    division.places = list(places.values())  # in order of appearance, so equal in every process
    division.flags = [
        ([is_adapted(parameters[i], group) for i in chosen], [is_decayed(parameters[i], group) for i in chosen])
        for chosen in division.places
    ]


def only(values: Sequence[T], wanted: Sequence[bool]) -> list[T]:
    return [value for value, yes in zip(values, wanted, strict=True) if yes]


def _sharding(parameter: Tensor) -> tuple[Any, Any]:
    """Return mesh and placements of a DTensor, else None."""
    if type(parameter) not in (torch.nn.Parameter, Tensor) and hasattr(parameter, "device_mesh"):
        return parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return None, None


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
