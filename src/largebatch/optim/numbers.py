"""The hyper-parameters of one step as plain numbers, the same for every way to carry it out."""

from __future__ import annotations

from typing import NamedTuple


class LarsNumbers(NamedTuple):
    """Of LARS, TVLARS and CLARS. ``coefficient`` multiplies the ratio of the norms; no limit is infinity."""

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
    """Of LAMB. ``correction1`` and ``correction2`` divide the moments: ``1 - beta^t``, or 1 without bias correction."""

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
