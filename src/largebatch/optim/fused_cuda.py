"""The fused step on CUDA: three launches a step, whatever the number of layers, and nothing read back.

The kernels are in ``fused_cuda_kernels.py``. Triton compiles them at the first step, which takes seconds, and keeps
them on disk in its own cache. Host time is what a small network pays for: beyond the launches a step only compares the
tensors' addresses with those of the step before, and copies a new table of them to the device if one has changed.
"""

from __future__ import annotations

import functools
import importlib
import operator
import warnings
from array import array
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from largebatch.optim.numbers import LambNumbers, LarsNumbers

_INFINITY = float("inf")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (7, 0)  # compute capability that triton supports


def why_not(weights: list[Tensor]) -> str:
    """Why these tensors can't take the fused step; empty where they can."""
    if weights[0].dtype not in _DTYPES:  # all are of one type
        return "the fused step on CUDA is for fp32, bf16 and fp16 parameters"
    device = weights[0].device
    kernels = _kernels()
    if isinstance(kernels, str):
        return kernels
    if kernels.INTERPRETED:
        return _failed_trial(device, weights[0].dtype) if device.type == "cpu" else "TRITON_INTERPRET is set"
    if device.type != "cuda" or torch.version.hip is not None:
        return "the fused step in triton is for NVIDIA devices"
    if torch.cuda.get_device_capability(device) < _OLDEST:
        return f"triton needs compute capability {_OLDEST[0]}.{_OLDEST[1]} or newer"
    return _broken_driver() or _failed_trial(device, weights[0].dtype)


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
    """One step of LARS, in place; no synchronisation.

    Args:
        weights, gradients: of one device and one type (fp32, bf16 or fp16), dense, each pair of one shape and layout.
        buffers: fp32, laid out as their weights; empty without momentum.
        adapted, decayed: for each tensor, whether it is scaled and whether it is decayed.
        given_norms: in place of the gradient norms in the denominators, of shape [adapted tensors]; None measures them.
        numbers: the hyper-parameters.
        tables: empty at first, then kept by the caller for these tensors from step to step.

    Returns:
        fp32 of shape [3, adapted tensors] on their device: weight norm, gradient norm, trust ratio.
    """
    kernels = _loaded_kernels()
    with torch.cuda.device_of(weights[0]):  # type: ignore[no-untyped-call]  # triton launches on the current device
        table = _table(tables, (weights, gradients, buffers), adapted, decayed)
        sign = -1.0 if numbers.maximize else 1.0
        common = {**_types(kernels, weights[0], table), "GRADIENT_ALIGN": table.gradient_align}
        partials, stats = _results(table)
        if table.adapted_chunks:
            kernels.lars_norms[(table.adapted_chunks,)](
                table.chunks, table.pointers, partials, len(weights), len(table.chunks), numbers.weight_decay, sign,
                **common,
            )  # fmt: skip
        if len(table.rows):
            kernels.trust_ratios[(len(table.rows),)](
                table.rows, partials, given_norms, stats, len(table.chunks), len(table.rows),
                numbers.coefficient, numbers.weight_decay, numbers.eps, numbers.norm_clip, numbers.norm_clip,
                numbers.lr if numbers.larc else 1.0, numbers.max_ratio, SUM_OF_NORMS=numbers.sum_of_norms,
                **kernels.RATIO_OPTIONS,
            )  # fmt: skip
        if len(table.chunks):
            inner, outer = (numbers.lr, 1.0) if numbers.lr_in_momentum else (1.0, numbers.lr)
            kernels.lars_update[(len(table.chunks),)](
                table.chunks, table.pointers, stats, len(weights), len(table.rows),
                numbers.weight_decay, sign, numbers.momentum, inner, outer,
                MOMENTUM=bool(buffers), NESTEROV=numbers.nesterov, **common,
            )  # fmt: skip
    return stats


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
    """One step of LAMB, in place; as ``lars``, with both moments in fp32."""
    kernels = _loaded_kernels()
    with torch.cuda.device_of(weights[0]):  # type: ignore[no-untyped-call]
        table = _table(tables, (weights, gradients, exp_avgs, exp_avg_sqs), adapted, decayed)
        common = _types(kernels, weights[0], table)
        partials, stats = _results(table)
        direction = 1 / numbers.correction1, 1 / numbers.correction2, numbers.eps, numbers.weight_decay
        if len(table.chunks):
            kernels.lamb_moments[(len(table.chunks),)](
                table.chunks, table.pointers, partials, len(weights), len(table.chunks),
                -1.0 if numbers.maximize else 1.0,
                numbers.beta1, 1 - numbers.beta1, numbers.beta2, 1 - numbers.beta2, *direction,
                GRADIENT_ALIGN=table.gradient_align, **common,
            )  # fmt: skip
        if len(table.rows):
            kernels.trust_ratios[(len(table.rows),)](
                table.rows, partials, None, stats, len(table.chunks), len(table.rows),
                1.0, 0.0, 0.0, numbers.norm_clip, _INFINITY, 1.0, numbers.max_ratio, SUM_OF_NORMS=False,
                **kernels.RATIO_OPTIONS,
            )  # fmt: skip
        if len(table.chunks):
            kernels.lamb_update[(len(table.chunks),)](
                table.chunks, table.pointers, stats, len(weights), len(table.rows), numbers.lr, *direction, **common
            )
    return stats


# -- tables on the device


class _Table(NamedTuple):
    """``chunks``, ``rows`` and ``pointers`` as described in ``fused_cuda_kernels.py``."""

    chunks: Tensor
    rows: Tensor
    pointers: Tensor
    adapted_chunks: int  # the first so many chunks are of adapted tensors
    align: int  # bytes that the addresses of weights and state are a multiple of, at most 16
    gradient_align: int  # of gradients: views into a bucket of DDP may be at any multiple of their element's size


def _table(
    tables: dict[Any, Any], tensors: tuple[list[Tensor], ...], adapted: Sequence[bool], decayed: Sequence[bool]
) -> _Table:
    """The table of the step before if it still holds, else a new one."""
    addresses, flags = list(map(Tensor.data_ptr, chain(*tensors))), (tuple(adapted), tuple(decayed))
    if addresses == tables.get("addresses") and flags == tables["flags"]:
        kept: _Table = tables["table"]
        return kept
    count, device = len(tensors[0]), tensors[0][0].device
    layout = [weight.numel() for weight in tensors[0]], *flags, device
    if layout != tables.get("layout"):
        tables["divided"] = _chunks_and_rows(*layout)
    chunks, rows, adapted_chunks = tables["divided"]
    # torch.tensor takes five times as long for a list of Python numbers.
    pointers = _to_device(torch.frombuffer(array("q", addresses), dtype=torch.int64), device)
    align = _alignment(addresses[:count] + addresses[2 * count :])
    table = _Table(chunks, rows, pointers, adapted_chunks, align, _alignment(addresses[count : 2 * count]))
    tables.update(addresses=addresses, flags=flags, layout=layout, table=table)
    return table


def _chunks_and_rows(
    numels: list[int], adapted: tuple[bool, ...], decayed: tuple[bool, ...], device: torch.device
) -> tuple[Tensor, Tensor, int]:
    size = _loaded_kernels().CHUNK.value
    chunks: list[list[int]] = []
    rows: list[list[int]] = []
    for tensor in sorted(range(len(numels)), key=lambda tensor: not adapted[tensor]):  # adapted first, else in order
        row = len(rows) if adapted[tensor] else -1
        own = [
            [tensor, first, numels[tensor] - first, row, int(decayed[tensor])]
            for first in range(0, numels[tensor], size)
        ]
        if row >= 0:
            rows.append([len(chunks), len(own), int(decayed[tensor])])
        chunks += own
    adapted_chunks = sum(record[1] for record in rows)
    tables = [torch.tensor(table, dtype=torch.int64, device="cpu") for table in (chunks, rows)]
    # Shapes said explicitly: either may be empty.
    return _to_device(tables[0].view(-1, 5), device), _to_device(tables[1].view(-1, 3), device), adapted_chunks


def _to_device(host: Tensor, device: torch.device) -> Tensor:
    """Without waiting: torch's allocator of pinned memory keeps it until the copy is done."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def _alignment(addresses: list[int]) -> int:
    """The largest power of two, at most 16, that divides all of them."""
    bits = functools.reduce(operator.or_, addresses, 16)
    return bits & -bits


def _results(table: _Table) -> tuple[Tensor, Tensor]:
    """Partial sums and statistics, to be filled."""
    like: dict[str, Any] = {"dtype": torch.float32, "device": table.chunks.device}
    return torch.empty(3, len(table.chunks), **like), torch.empty(3, len(table.rows), **like)


def _types(kernels: Any, weight: Tensor, table: _Table) -> dict[str, Any]:
    return {"DTYPE": kernels.DTYPES[weight.dtype], "ALIGN": table.align, **kernels.OPTIONS}


# -- triton


@functools.cache
def _kernels() -> Any:
    """The module of kernels, or why there is none."""
    try:
        return importlib.import_module("largebatch.optim.fused_cuda_kernels")
    except ImportError as error:
        return f"triton can't be imported ({error})"


def _loaded_kernels() -> Any:
    kernels = _kernels()
    assert not isinstance(kernels, str), kernels
    return kernels


@functools.cache
def _broken_driver() -> str:
    """Triton compiles its launcher with this machine's C compiler: what is wrong with it, or nothing."""
    try:
        importlib.import_module("triton").runtime.driver.active.get_current_target()
    except Exception as error:  # whatever it is, another way of stepping takes over and says why
        return f"triton can't start ({error})".replace("\n", " ")
    return ""


@functools.cache
def _failed_trial(device: torch.device, dtype: torch.dtype) -> str:
    """What goes wrong in a small step on this device, or nothing.

    The kernels are compiled here by whatever Triton and driver there are; a model's weights are worth a look first.
    """
    weights, gradients = ([torch.full((2, 2), value, device=device, dtype=dtype)] for value in (2.0, 0.5))
    state = [[torch.zeros(2, 2, device=device)] for _ in range(3)]
    flags = (True,)
    try:
        # ||w|| = 4 and ||g|| = 1, so q = 0.4 and w - lr * q * g = 2 - 0.5 * 0.4 * 0.5 = 1.9.
        plain = LarsNumbers(0.5, 0.1, 0.5, 0.0, 0.0, _INFINITY, _INFINITY, *[False] * 5)
        lars(weights, gradients, state[0], flags, (False,), None, plain, {})
        expected = torch.full_like(weights[0], 1.9)
        # u = g / sqrt(g^2) = 1, ||u|| = 2 and ||w|| = 3.8, so w - lr * q * u = 1.9 - 0.5 * 1.9 = 0.95.
        adam = LambNumbers(0.5, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, _INFINITY, _INFINITY, False)
        right = torch.allclose(weights[0], expected, rtol=0.01)
        lamb(weights, gradients, state[1], state[2], flags, (False,), adam, {})
        right &= torch.allclose(weights[0], expected / 2, rtol=0.01)
        failed = "" if right else "its Triton kernels compute something else on this device"
    except Exception as error:  # whatever it is, another way of stepping takes over and says why
        failed = f"its Triton kernels don't run on this device ({type(error).__name__}: {error})".replace("\n", " ")
    if failed:
        warnings.warn(f"largebatch's fused step isn't taken: {failed}", stacklevel=2)
    return failed
