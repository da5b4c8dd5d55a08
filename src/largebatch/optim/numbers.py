"""The hyper-parameters of one step as plain numbers, equal for torch, C++ and Triton."""

from __future__ import annotations

from typing import NamedTuple


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
