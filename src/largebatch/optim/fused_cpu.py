"""The fused step on CPU: ``fused_cpu.cpp``, compiled once for this machine (``native.py``)."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import get_type_hints

import torch
from torch import Tensor

from largebatch import native
from largebatch.optim.param_groups import LambNumbers, LarsNumbers, Part

_SOURCE = Path(__file__).with_suffix(".cpp")


class _Tensors(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("count", "threads", "rows")),
        *((name, ctypes.c_void_p) for name in ("weights", "gradients", "first", "second")),
        *((name, ctypes.c_void_p) for name in ("numel", "row", "decayed", "given_norms", "statistics")),
    )


def _structure(numbers: type[LarsNumbers] | type[LambNumbers]) -> type[ctypes.Structure]:
    kinds = {float: ctypes.c_double, bool: ctypes.c_bool}
    fields = [(name, kinds[kind]) for name, kind in get_type_hints(numbers).items()]
    return type(numbers.__name__, (ctypes.Structure,), {"_fields_": fields})


_LarsNumbers, _LambNumbers = _structure(LarsNumbers), _structure(LambNumbers)


def why_not(weights: list[Tensor]) -> str:
    """Return the reason why these tensors can't take the fused step; empty if they can."""
    if weights[0].dtype != torch.float32:  # all are of one type
        return "the fused step on CPU requires fp32 parameters"
    return native.why_not(_SOURCE)


def lars(part: Part, numbers: LarsNumbers) -> Tensor:
    """Update a part in place by the equation of ``LARS``.

    All tensors are fp32 and dense; weight, gradient and state of a parameter have one shape and layout.

    Returns:
        fp32 of shape [3, adapted parameters]: weight norm, gradient norm, trust ratio.
    """
    return _call("lars", part, _LarsNumbers(*numbers))


def lamb(part: Part, numbers: LambNumbers) -> Tensor:
    """Update a part in place by the equation of ``LAMB``; tensors and result are as in ``lars``."""
    return _call("lamb", part, _LambNumbers(*numbers))


def _call(function: str, part: Part, numbers: ctypes.Structure) -> Tensor:
    count, rows = len(part.weights), sum(part.adapted)
    statistics = torch.empty(3, rows)
    given = None if part.given_norms is None else part.given_norms.to("cpu", torch.float64).contiguous()
    ranks = iter(range(rows))
    row = (ctypes.c_int32 * count)(*[next(ranks) if one else -1 for one in part.adapted])
    numel = (ctypes.c_int64 * count)(*map(Tensor.numel, part.weights))
    first, second, *_ = *part.state, []  # LARS has no second state
    arrays = [_pointers(tensors) for tensors in (part.weights, part.gradients, first, second)]
    flags = (ctypes.c_bool * count)(*part.decayed)
    tensors = _Tensors(
        count, torch.get_num_threads(), rows, *[ctypes.addressof(array) if array else None for array in arrays],
        ctypes.addressof(numel), ctypes.addressof(row), ctypes.addressof(flags),
        None if given is None else given.data_ptr(), statistics.data_ptr(),
    )  # fmt: skip
    getattr(native.library(_SOURCE), function)(ctypes.byref(tensors), ctypes.byref(numbers))
    return statistics


def _pointers(tensors: list[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*map(Tensor.data_ptr, tensors))
