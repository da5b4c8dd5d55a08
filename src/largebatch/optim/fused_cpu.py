"""The fused step on CPU: ``fused_cpu.cpp``, compiled once for this machine (``native.py``)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

from largebatch import native
from largebatch.optim.numbers import LambNumbers, LarsNumbers

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
    """Why these tensors can't take the fused step; empty where they can."""
    if weights[0].dtype != torch.float32:  # all are of one type
        return "the fused step on CPU is for fp32 parameters"
    return native.why_not(_SOURCE)


def lars(
    weights: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Tensor],
    adapted: Sequence[bool],
    decayed: Sequence[bool],
    given_norms: Tensor | None,
    numbers: LarsNumbers,
    tables: dict[Any, Any],
) -> Tensor:
    """One step of LARS, in place.

    Args:
        weights, gradients, buffers: fp32 tensors, dense, each triple of one shape and layout; ``buffers`` empty without
            momentum.
        adapted, decayed: for each tensor, whether it is scaled and whether it is decayed.
        given_norms: in place of the gradient norms in the denominators, of shape [adapted tensors]; None measures them.
        numbers: the hyper-parameters.
        tables: kept by the caller for these tensors from step to step; unused here.

    Returns:
        fp32 of shape [3, adapted tensors]: weight norm, gradient norm, trust ratio.
    """
    return _call("lars", weights, gradients, (buffers, []), adapted, decayed, given_norms, _LarsNumbers(*numbers))


def lamb(
    weights: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    adapted: Sequence[bool],
    decayed: Sequence[bool],
    numbers: LambNumbers,
    tables: dict[Any, Any],
) -> Tensor:
    """One step of LAMB, in place; as ``lars``."""
    return _call("lamb", weights, gradients, (exp_avgs, exp_avg_sqs), adapted, decayed, None, _LambNumbers(*numbers))


def _call(
    function: str,
    weights: list[Tensor],
    gradients: list[Tensor],
    state: tuple[list[Tensor], list[Tensor]],
    adapted: Sequence[bool],
    decayed: Sequence[bool],
    given_norms: Tensor | None,
    numbers: ctypes.Structure,
) -> Tensor:
    count, rows = len(weights), sum(adapted)
    statistics = torch.empty(3, rows)
    given = None if given_norms is None else given_norms.to("cpu", torch.float64).contiguous()
    ranks = iter(range(rows))
    row = (ctypes.c_int32 * count)(*[next(ranks) if one else -1 for one in adapted])
    numel = (ctypes.c_int64 * count)(*map(Tensor.numel, weights))
    arrays = [_pointers(tensors) for tensors in (weights, gradients, *state)]
    flags = (ctypes.c_bool * count)(*decayed)
    tensors = _Tensors(
        count, torch.get_num_threads(), rows, *[ctypes.addressof(array) if array else None for array in arrays],
        ctypes.addressof(numel), ctypes.addressof(row), ctypes.addressof(flags),
        None if given is None else given.data_ptr(), statistics.data_ptr(),
    )  # fmt: skip
    getattr(native.library(_SOURCE), function)(ctypes.byref(tensors), ctypes.byref(numbers))
    return statistics


def _pointers(tensors: list[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*map(Tensor.data_ptr, tensors))
