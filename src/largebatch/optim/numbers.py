"""The hyper-parameters of one step as plain numbers, equal for torch, C++ and Triton."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeVar


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


def numbers_of(kind: type[Numbers], group: dict[str, Any], **own: Any) -> Numbers:
    """Take each field from ``own``, else from the group's option of that name; a limit of None becomes infinity."""
    values = {**group, **own}
    values |= {name: math.inf for name in ("norm_clip", "max_ratio") if values[name] is None}
    return kind(**{name: values[name] for name in kind._fields})
