"""The fused step on CUDA: three launches a step, whatever the number of layers, and nothing read back.

The kernels are in ``fused_cuda_kernels.py``. Triton compiles them at the first step, which takes seconds, and keeps
them on disk in its own cache. Host time limits small networks: beyond the launches, a step only compares the tensors'
addresses with those of the step before, and copies a new table of them to the device if an address has changed.
"""

from __future__ import annotations

import functools
import math
import operator
from array import array
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from largebatch import triton_kernels
from largebatch.optim.param_groups import LambNumbers, LarsNumbers, Part

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_KERNELS = "largebatch.optim.fused_cuda_kernels"


def why_not(weights: list[Tensor]) -> str:
    """Return the reason why these tensors can't take the fused step; empty if they can."""
    if weights[0].dtype not in _DTYPES:  # all are of one type
        return "the fused step on CUDA requires fp32, bf16 or fp16 parameters"
    device = weights[0].device
    return triton_kernels.why_not(_KERNELS, device) or _failed_trial(device, weights[0].dtype)


def lars(part: Part, numbers: LarsNumbers) -> Tensor:
    """Update a part in place by the equation of ``LARS``; no synchronisation.

    Weights and gradients are of one type (fp32, bf16 or fp16), state is fp32. All are dense; weight, gradient and state
    of a parameter have one shape and layout. ``part.tables`` is empty at first, then kept from step to step.

    Returns:
        fp32 of shape [3, adapted parameters] on their device: weight norm, gradient norm, trust ratio.
    """
    with torch.cuda.device_of(part.weights[0]):  # type: ignore[no-untyped-call]  # triton takes the current device
        table, partials, stats, types = _prepared(part)
        count, chunks, rows = len(part.weights), len(table.chunks), len(table.rows)
        sign = -1.0 if numbers.maximize else 1.0
        lr, coefficient = _value(numbers.lr, stats), _value(numbers.coefficient, stats)
        types = *types, table.gradient_align
        if table.adapted_chunks:
            _launch(
                "lars_norms", table.adapted_chunks, types,
                table.chunks, table.pointers, partials, count, chunks, numbers.weight_decay, sign,
            )  # fmt: skip
        if rows:
            _launch(
                "trust_ratios", rows, (numbers.sum_of_norms,),
                table.rows, partials, part.given_norms, stats, chunks, rows,
                coefficient, numbers.weight_decay, numbers.eps, numbers.norm_clip, numbers.norm_clip,
                lr if numbers.larc else 1.0, numbers.max_ratio,
            )  # fmt: skip
        if chunks:
            inner, outer = (lr, 1.0) if numbers.lr_in_momentum else (1.0, lr)
            _launch(
                "lars_update", chunks, (*types, bool(part.state[0]), numbers.nesterov),
                table.chunks, table.pointers, stats, count, rows,
                numbers.weight_decay, sign, numbers.momentum, inner, outer,
            )  # fmt: skip
    return stats


def lamb(part: Part, numbers: LambNumbers) -> Tensor:
    """Update a part in place by the equation of ``LAMB``; tensors and result are as in ``lars``.

    If the third list of the state isn't empty, it has fp32 step counts on the device, which give the corrections.
    """
    with torch.cuda.device_of(part.weights[0]):  # type: ignore[no-untyped-call]
        table, partials, stats, types = _prepared(part)
        count, chunks, rows = len(part.weights), len(table.chunks), len(table.rows)
        has_steps, lr = bool(part.state[2]), _value(numbers.lr, stats)
        scales = 1 / numbers.correction1, 1 / numbers.correction2
        if has_steps:
            scales = _log(numbers.beta1), _log(numbers.beta2)
        if chunks:
            _launch(
                "lamb_moments", chunks, (*types, table.gradient_align, has_steps),
                table.chunks, table.pointers, partials, count, chunks, -1.0 if numbers.maximize else 1.0,
                numbers.beta1, 1 - numbers.beta1, numbers.beta2, 1 - numbers.beta2,
                *scales, numbers.eps, numbers.weight_decay,
            )  # fmt: skip
        if rows:
            _launch(
                "trust_ratios", rows, (False,), table.rows, partials, None, stats, chunks, rows,
                1.0, 0.0, 0.0, numbers.norm_clip, math.inf, 1.0, numbers.max_ratio,
            )  # fmt: skip
        if chunks:
            _launch(
                "lamb_update", chunks, (*types, has_steps),
                table.chunks, table.pointers, stats, count, rows, lr, *scales, numbers.eps, numbers.weight_decay,
            )  # fmt: skip
    return stats


def tvlars_coefficient(
    step: Tensor, coefficient: float, lmbda: float, alpha: float, delay: float, gamma_min: float
) -> Tensor:
    """Return ``coefficient * phi(t)`` of ``TVLARS`` on the device of ``step``, an fp32 tensor that becomes ``t``."""
    with torch.cuda.device_of(step):  # type: ignore[no-untyped-call]
        result = torch.empty_like(step)
        _launch("tvlars_coefficient", 1, (), step, result, coefficient, lmbda, alpha, delay, gamma_min)
    return result


def _value(number: Any, like: Tensor) -> Any:
    """Return a hyper-parameter for a kernel: a tensor on the device stays there, for a CUDA graph to read it anew."""
    if not isinstance(number, Tensor):
        return float(number)
    if number.device.type == "cpu" and like.is_cuda:  # no wait: it's on the host
        return float(number)
    return number.to(like.device, non_blocking=True)


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf


# -- launches

_compiled: dict[tuple[Any, ...], Any] = {}


def _launch(name: str, programs: int, constants: tuple[Any, ...], *arguments: Any) -> None:
    """Launch a kernel whose constants follow its other arguments, on the current device.

    Triton's own launch inspects each argument, which takes longer than the launch: a compiled kernel is kept for each
    combination of types. Other tensors than hyper-parameters are aligned, because they are whole allocations.
    """
    types = [value.dtype if isinstance(value, Tensor) else type(value) for value in arguments]
    key = name, arguments[0].get_device(), constants, *types
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[programs, 1, 1](*arguments, *constants)
        return
    kernels = triton_kernels.imported(_KERNELS)
    options = kernels.RATIO_OPTIONS if name in ("trust_ratios", "tvlars_coefficient") else kernels.OPTIONS
    compiled = getattr(kernels, name)[programs,](*arguments, *constants, **options)
    if compiled is not None:  # the interpreter compiles nothing
        _compiled[key] = compiled


# -- tables on the device


class _Table(NamedTuple):
    """``chunks``, ``rows`` and ``pointers`` as described in ``fused_cuda_kernels.py``."""

    chunks: Tensor
    rows: Tensor
    pointers: Tensor
    adapted_chunks: int  # number of chunks of adapted tensors, which come first
    align: int  # bytes, at most 16, that divide the addresses of weights and state
    gradient_align: int  # the same of gradients: views into a bucket of DDP are aligned to their element's size only


def _prepared(part: Part) -> tuple[_Table, Tensor, Tensor, tuple[Any, ...]]:
    """Return the table, space for partial sums and for statistics, and the kernels' type and alignment."""
    table = _table(part)
    like: dict[str, Any] = {"dtype": torch.float32, "device": table.chunks.device}
    partials, stats = torch.empty(3, len(table.chunks), **like), torch.empty(3, len(table.rows), **like)
    return table, partials, stats, (triton_kernels.imported(_KERNELS).DTYPES[part.weights[0].dtype], table.align)


def _table(part: Part) -> _Table:
    """Return the table of the step before if it still holds, else a new table."""
    tables, flags = part.tables, [part.adapted, part.decayed]
    addresses = list(map(Tensor.data_ptr, chain(part.weights, part.gradients, *part.state)))
    device = part.weights[0].device
    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if addresses == tables.get("addresses") and flags == tables["flags"]:
        table: _Table = tables["table"]
        if captured:
            tables.setdefault("captured", []).append(table)  # a later step must not free what the graph reads
        return table
    numels = [weight.numel() for weight in part.weights]
    layout = numels, flags, device
    if layout != tables.get("layout"):
        if captured:
            raise RuntimeError("a CUDA graph can't capture the first step: take one step with these parameters before")
        tables["divided"] = _chunks_and_rows(numels, part.adapted, part.decayed, device)
    chunks, rows, adapted_chunks = tables["divided"]
    # torch.tensor takes five times as long for a list of Python numbers.
    host = torch.frombuffer(array("q", addresses), dtype=torch.int64)
    count, pointers = len(part.weights), host
    if device.type == "cuda":
        source = tables.pop("spare").copy_(host) if captured and "spare" in tables else host.pin_memory()
        pointers = source.to(device, non_blocking=True)
    align = _alignment(addresses[:count] + addresses[2 * count : 4 * count])
    table = _Table(chunks, rows, pointers, adapted_chunks, align, _alignment(addresses[count : 2 * count]))
    if (
        captured
    ):  # each replay copies ``source`` again, and nothing has been copied yet: no other step may use the table
        tables.setdefault("captured", []).append((table, source))
        return table
    if device.type == "cuda" and len(tables.get("spare", ())) != len(host):
        # For a capture in which the backward pass allocates the gradients: allocated now, because then it may fail.
        tables["spare"] = torch.empty_like(host, pin_memory=True)
    tables.update(addresses=addresses, flags=flags, layout=layout, table=table)
    return table


def _chunks_and_rows(
    numels: list[int], adapted: list[bool], decayed: list[bool], device: torch.device
) -> tuple[Tensor, Tensor, int]:
    size = triton_kernels.imported(_KERNELS).CHUNK.value
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
    # Explicit shapes, because a table may be empty.
    return _to_device(tables[0].view(-1, 5), device), _to_device(tables[1].view(-1, 3), device), adapted_chunks


def _to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copy without waiting: torch's allocator of pinned memory keeps the source until the copy is done."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def _alignment(addresses: list[int]) -> int:
    """Return the largest power of two, at most 16, that divides all addresses."""
    bits = functools.reduce(operator.or_, addresses, 16)
    return bits & -bits


# -- triton


@functools.cache
def _failed_trial(device: torch.device, dtype: torch.dtype) -> str:
    """Return the error of a small trial step on this device; empty if there is none."""
    weights, gradients = ([torch.full((2, 2), value, device=device, dtype=dtype)] for value in (2.0, 0.5))
    buffer, moment1, moment2 = ([torch.zeros(2, 2, device=device)] for _ in range(3))

    def trial() -> bool:
        # ||w|| = 4 and ||g|| = 1, so q = 0.4 and w - lr * q * g = 2 - 0.5 * 0.4 * 0.5 = 1.9.
        plain = LarsNumbers(0.5, 0.1, 0.5, 0.0, 0.0, math.inf, math.inf, *[False] * 5)
        lars(Part(weights, weights, gradients, (buffer,), [True], [False]), plain)
        expected = torch.full_like(weights[0], 1.9)
        # u = g / sqrt(g^2) = 1, ||u|| = 2 and ||w|| = 3.8, so w - lr * q * u = 1.9 - 0.5 * 1.9 = 0.95.
        adam = LambNumbers(0.5, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, math.inf, math.inf, False)
        right = torch.allclose(weights[0], expected, rtol=0.01)
        lamb(Part(weights, weights, gradients, (moment1, moment2, []), [True], [False]), adam)
        right &= torch.allclose(weights[0], expected / 2, rtol=0.01)
        return bool(right)

    return triton_kernels.failure(trial, "fused step")
