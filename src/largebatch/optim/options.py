"""Checks of hyper-parameters, and which parameters they act on."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import Tensor

Group = dict[str, Any]


def is_adapted(parameter: Tensor, group: Group) -> bool:
    """Scaled layer-wise: what the group says, else parameters of two dimensions or more, and all with ``adapt_1d``."""
    if group["adapt"] is not None:
        return bool(group["adapt"])
    return parameter.ndim > 1 or bool(group["adapt_1d"])


def is_decayed(parameter: Tensor, group: Group) -> bool:
    """Decayed: parameters of two dimensions or more, and all with ``decay_1d``."""
    return group["weight_decay"] != 0 and (parameter.ndim > 1 or bool(group["decay_1d"]))


def options_of(arguments: dict[str, Any]) -> Group:
    """The options among a constructor's ``locals()``."""
    return {name: value for name, value in arguments.items() if name not in ("self", "params", "__class__")}


def limit(value: float | None) -> float:
    """As a number: infinity where there is none."""
    return math.inf if value is None else value


def check_common(group: Group) -> None:
    """Raise ``ValueError`` for an option that all layer-wise optimizers have."""
    check_lr(group["lr"])
    check_non_negative("weight_decay", group["weight_decay"])
    check_limit("norm_clip", group["norm_clip"])
    check_limit("max_ratio", group["max_ratio"])
    for name in ("adapt", "foreach", "fused"):
        if group[name] not in (None, True, False):
            raise ValueError(f"{name} must be None, True or False, got {group[name]!r}")
    if group["foreach"] and group["fused"]:
        raise ValueError("foreach=True and fused=True: choose one of the two")


def check_lr(value: Any) -> None:
    if isinstance(value, Tensor):  # not read: that would wait for the device
        if value.numel() != 1:
            raise ValueError(f"lr must be one number, got a tensor of shape {tuple(value.shape)}")
    else:
        check_non_negative("lr", value)


def check_non_negative(name: str, value: Any) -> None:
    if not (_is_finite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")


def check_positive(name: str, value: Any) -> None:
    if not (_is_finite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")


def check_fraction(name: str, value: Any) -> None:
    if not (_is_finite(value) and 0 <= value < 1):
        raise ValueError(f"{name} must be at least 0 and below 1, got {value!r}")


def check_limit(name: str, value: Any) -> None:
    """A limit is positive, or None for no limit."""
    if value is not None:
        check_positive(name, value)


def check_one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)
