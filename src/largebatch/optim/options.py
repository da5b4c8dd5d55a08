"""Checks of hyper-parameters, and the choice of the parameters that they act on."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import Tensor

Group = dict[str, Any]


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


def check_common(group: Group) -> None:
    """Check the options of all layer-wise optimizers.

    Raises:
        ValueError: for an option out of its range.
    """
    if isinstance(group["lr"], Tensor):  # its value isn't read: that would wait for the device
        if group["lr"].numel() != 1:
            raise ValueError(f"lr must be one number, got a tensor of shape {tuple(group['lr'].shape)}")
    else:
        check_non_negative("lr", group["lr"])
    check_non_negative("weight_decay", group["weight_decay"])
    for name in ("norm_clip", "max_ratio"):
        if group[name] is not None:
            check_positive(name, group[name])
    for name in ("adapt", "foreach", "fused"):
        if group[name] not in (None, True, False):
            raise ValueError(f"{name} must be None, True or False, got {group[name]!r}")
    if group["foreach"] and group["fused"]:
        raise ValueError("foreach=True and fused=True: choose one of the two")


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
