"""Modules of Triton kernels: import, and a trial on the device before their use.

The kernels are compiled by the Triton and driver of this machine: a trial protects a run from wrong or failing kernels.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch

_OLDEST = (7, 0)  # compute capability that triton supports


@functools.cache
def imported(module: str) -> Any:
    """Return the module of kernels, or the reason why it can't be imported."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        return f"triton can't be imported ({error})"


@functools.cache  # reading the device's capability takes 10 us
def why_not(module: str, device: torch.device) -> str:
    """Return the reason why the kernels can't run on this device; empty if they can, up to a trial.

    ``module.INTERPRETED`` is True if Triton interprets the kernels, which then run on the CPU only.
    """
    kernels = imported(module)
    if isinstance(kernels, str):
        return kernels
    if kernels.INTERPRETED:
        return "" if device.type == "cpu" else "TRITON_INTERPRET is set"
    if device.type != "cuda" or torch.version.hip is not None:
        return "triton requires an NVIDIA device"
    if torch.cuda.get_device_capability(device) < _OLDEST:
        return f"triton needs compute capability {_OLDEST[0]}.{_OLDEST[1]} or newer"
    return ""


def failure(trial: Callable[[], bool], feature: str) -> str:
    """Return the reason why ``trial`` fails, and warn that ``feature`` isn't used; empty if it returns True."""
    try:
        failed = "" if trial() else "its Triton kernels give wrong results on this device"
    except Exception as error:  # any error: torch's operations take over, and the warning names the reason
        failed = f"its Triton kernels don't run on this device ({type(error).__name__}: {error})".replace("\n", " ")
    if failed:
        warnings.warn(f"largebatch's {feature} isn't used: {failed}", stacklevel=2)
    return failed
