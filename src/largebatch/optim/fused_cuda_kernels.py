# mypy: ignore-errors
# ruff: noqa: N803 (capitals are compile-time constants, as in all triton programs)
"""The Triton kernels of ``fused_cuda.py``; importing this needs triton.

All tensors of a step are cut into chunks of ``CHUNK`` elements, one program each, so that a step takes three launches
for any number of layers: sums of squares of each chunk, trust ratio of each layer, update of each chunk. The arithmetic
of an element is fp32; ``tl.sum`` adds a chunk's 2048 squares in a tree of at most 16 levels (8 elements in a thread,
then across threads). A norm is therefore right to 5e-7 for any numbers. Chunks are added in fp64, without atomics, in
the same order in every run.

The same equations stand in ``unfused.py`` and ``fused_cpu.cpp``.

Tables, all int64 on the device:
    chunks [chunks, 5]: tensor, first element, elements left in the tensor from there, row (place among the adapted
        tensors; -1: not adapted), decayed (1 or 0). Chunks of adapted tensors come first.
    rows [adapted tensors, 3]: first chunk, number of chunks, decayed.
    pointers [kinds, tensors]: addresses of weights, gradients and state; in LAMB of step counts too, if these are on
        the device.

Hyper-parameters are fp32 numbers. ``lr``, ``coefficient`` and what is computed of them may be addresses of numbers on
the device instead, which a CUDA graph reads at each replay.
"""

# No ``from __future__ import annotations``: triton's interpreter compares annotations with tl.constexpr itself.

import torch
import triton
import triton.language as tl

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
INTERPRETED = triton.knobs.runtime.interpret  # its value when the decorators below read it

# The work is bound by memory (28 bytes an element in LARS, 40 in LAMB). 8 elements a thread are two 16-byte loads of
# each of 2 to 4 tensors. They need 32 to 64 registers, so that an SM holds 4 to 8 programs and has 100 to 200 KB in
# flight; Hopper needs about 25 KB to hide its latency. 16 elements need 48 to 128 registers.
CHUNK = tl.constexpr(2048)
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}  # explicit, because triton's default is changing
# Partial sums that a program adds at a time; ResNet-50's largest layer has 1,152.
_PARTIALS = tl.constexpr(1024)
RATIO_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _value(number):
    """Return a hyper-parameter that is given by its value or by its address."""
    number = tl.core.to_tensor(number)  # the interpreter passes numbers as they are
    if number.dtype.is_ptr():
        number = tl.load(number).to(tl.float32)
    return number


@triton.jit
def _chunk(chunks, number):
    record = chunks + number.to(tl.int64) * 5
    first = tl.multiple_of(tl.load(record + 1), CHUNK)
    return tl.load(record), first, tl.load(record + 2), tl.load(record + 3), tl.load(record + 4)


@triton.jit
def _address(pointers, tensor, first, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    """Return a chunk's address. The alignment that the compiler knows decides how wide the accesses are."""
    pointer = tl.load(pointers + tensor).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, ALIGN) + first


@triton.jit
def _load(address, left, MASKED: tl.constexpr):
    offsets = tl.arange(0, CHUNK)
    if MASKED:
        values = tl.load(address + offsets, mask=offsets < left, other=0.0)
    else:
        values = tl.load(address + offsets)
    return values.to(tl.float32)


@triton.jit
def _store(address, values, left, MASKED: tl.constexpr):
    offsets = tl.arange(0, CHUNK)
    if MASKED:
        tl.store(address + offsets, values.to(address.dtype.element_ty), mask=offsets < left)
    else:
        tl.store(address + offsets, values.to(address.dtype.element_ty))


@triton.jit
def _with_decay(direction, weight, weight_decay, decayed):
    # A choice, because a product with 0 would turn an infinite weight into NaN.
    return tl.where(decayed != 0, direction + weight_decay * weight, direction)


@triton.jit
def _at_most(value, limit):
    return tl.where(value > limit, limit, value)  # NaN stays NaN


# -- trust ratios


@triton.jit(do_not_specialize=["chunk_count", "row_count"], do_not_specialize_on_alignment=["coefficient", "divisor"])
def trust_ratios(
    rows, partials, given_norms, stats, chunk_count, row_count,
    coefficient, weight_decay, eps, numerator_clip, denominator_clip, divisor, max_ratio,
    SUM_OF_NORMS: tl.constexpr,
):  # fmt: skip
    """Compute a row's norms and ``q = coefficient * ||w|| / (denominator + eps) / divisor`` in fp64.

    The denominator is ``||g'||`` in LARS (or as given), ``||u||`` in LAMB; ``q`` is 1 if either norm is 0.
    """
    row = tl.program_id(0)
    first, count = tl.load(rows + row * 3), tl.load(rows + row * 3 + 1)
    places = tl.arange(0, _PARTIALS)
    squares_w = tl.zeros([_PARTIALS], tl.float64)
    squares_g = tl.zeros([_PARTIALS], tl.float64)
    squares_d = tl.zeros([_PARTIALS], tl.float64)
    for start in range(0, count, _PARTIALS):
        partial, mask = partials + first + start + places, start + places < count
        squares_w += tl.load(partial, mask=mask, other=0.0).to(tl.float64)
        squares_g += tl.load(partial + chunk_count, mask=mask, other=0.0).to(tl.float64)
        squares_d += tl.load(partial + 2 * chunk_count, mask=mask, other=0.0).to(tl.float64)
    weight_norm, gradient_norm = tl.sqrt(tl.sum(squares_w)), tl.sqrt(tl.sum(squares_g))
    norm = gradient_norm
    if given_norms is not None:
        norm = tl.load(given_norms + row).to(tl.float64)
    if SUM_OF_NORMS:
        norm = _with_decay(norm, weight_norm, weight_decay, tl.load(rows + row * 3 + 2))
    elif given_norms is None:
        norm = tl.sqrt(tl.sum(squares_d))
    ratio = _value(coefficient) * _at_most(weight_norm, numerator_clip) / (_at_most(norm, denominator_clip) + eps)
    ratio = tl.where((weight_norm == 0) | (norm == 0), 1.0, ratio) / _value(divisor)
    tl.store(stats + row, weight_norm.to(tl.float32))
    tl.store(stats + row_count + row, gradient_norm.to(tl.float32))
    tl.store(stats + 2 * row_count + row, _at_most(ratio, max_ratio).to(tl.float32))


@triton.jit
def tvlars_coefficient(step, result, coefficient, lmbda, alpha, delay, gamma_min):
    """Compute ``step += 1`` and ``coefficient * phi(step)``, as ``tvlars.py``, in fp64."""
    now = tl.load(step) + 1
    tl.store(step, now)
    denominator = alpha + tl.exp(lmbda * (now.to(tl.float64) - delay))
    # The least normal number of fp32: the fraction long before the delay is larger than any number.
    denominator = tl.where(denominator < 1.1754943508222875e-38, 1.1754943508222875e-38, denominator)
    tl.store(result, (coefficient * (1 / denominator + gamma_min)).to(tl.float32))


@triton.jit
def _ratio(stats, row, row_count):
    return tl.load(stats + 2 * row_count + row, mask=row >= 0, other=1.0)


@triton.jit
def _store_sums(partials, number, chunk_count, weight, gradient, direction):
    tl.store(partials + number, tl.sum(weight * weight))
    tl.store(partials + chunk_count + number, tl.sum(gradient * gradient))
    tl.store(partials + 2 * chunk_count + number, tl.sum(direction * direction))


# -- LARS


@triton.jit(do_not_specialize=["tensor_count", "chunk_count"])
def lars_norms(
    chunks, pointers, partials, tensor_count, chunk_count, weight_decay, sign,
    DTYPE: tl.constexpr, ALIGN: tl.constexpr, GRADIENT_ALIGN: tl.constexpr,
):  # fmt: skip
    """Sum the squares of a chunk's ``w``, ``g`` and ``g' = g + weight_decay * w``."""
    number = tl.program_id(0)
    tensor, first, left, _, decayed = _chunk(chunks, number)
    weights = _address(pointers, tensor, first, DTYPE, ALIGN)
    gradients = _address(pointers + tensor_count, tensor, first, DTYPE, GRADIENT_ALIGN)
    for masked in tl.static_range(2):  # two copies of the body: a mask would forbid wide accesses
        if masked == (left < CHUNK):
            weight, gradient = _load(weights, left, masked), _load(gradients, left, masked) * sign
            direction = _with_decay(gradient, weight, weight_decay, decayed)
            _store_sums(partials, number, chunk_count, weight, gradient, direction)


@triton.jit(do_not_specialize=["tensor_count", "row_count"], do_not_specialize_on_alignment=["inner_lr", "outer_lr"])
def lars_update(
    chunks, pointers, stats, tensor_count, row_count, weight_decay, sign, momentum, inner_lr, outer_lr,
    DTYPE: tl.constexpr, ALIGN: tl.constexpr, GRADIENT_ALIGN: tl.constexpr,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
):  # fmt: skip
    """Compute ``v = momentum * v + q * inner_lr * g'`` and ``w -= outer_lr * v`` for a chunk."""
    # Backwards: the end of the first pass is still in the cache (50 MB; ResNet-18's weights and gradients are 89 MB).
    tensor, first, left, row, decayed = _chunk(chunks, tl.num_programs(0) - 1 - tl.program_id(0))
    weights = _address(pointers, tensor, first, DTYPE, ALIGN)
    gradients = _address(pointers + tensor_count, tensor, first, DTYPE, GRADIENT_ALIGN)
    buffers = weights
    if MOMENTUM:
        buffers = _address(pointers + 2 * tensor_count, tensor, first, tl.float32, ALIGN)
    scale, outer = _ratio(stats, row, row_count) * _value(inner_lr), _value(outer_lr)
    for masked in tl.static_range(2):
        if masked == (left < CHUNK):
            weight, gradient = _load(weights, left, masked), _load(gradients, left, masked) * sign
            move = scale * _with_decay(gradient, weight, weight_decay, decayed)
            if MOMENTUM:
                buffer = momentum * _load(buffers, left, masked) + move
                _store(buffers, buffer, left, masked)
                if NESTEROV:
                    move += momentum * buffer
                else:
                    move = buffer
            _store(weights, weight - outer * move, left, masked)


# -- LAMB


@triton.jit
def _scales(pointer, log1, log2):
    """Return ``1 / (1 - beta^t)`` for both moments, with t of the tensor and the betas' logarithms."""
    step = tl.load(tl.load(pointer).to(tl.pointer_type(tl.float32)))
    return tl.div_rn(1.0, _correction(step * log1)), tl.div_rn(1.0, _correction(step * log2))


@triton.jit
def _correction(power):
    """Return ``1 - exp(power)`` for a negative power: near 0 by 8 terms, because the difference cancels there."""
    terms = tl.full([], 1.0, tl.float32)
    for i in tl.static_range(8):
        terms = 1.0 + terms * power * (1.0 / (9 - i))
    return tl.where(power > -0.5, -power * terms, 1.0 - tl.exp(power))


@triton.jit(do_not_specialize=["tensor_count", "chunk_count"])
def lamb_moments(
    chunks, pointers, partials, tensor_count, chunk_count,
    sign, beta1, rest1, beta2, rest2, scale1, scale2, eps, weight_decay,
    DTYPE: tl.constexpr, ALIGN: tl.constexpr, GRADIENT_ALIGN: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Update ``m`` and ``v`` of a chunk; sum the squares of its ``w``, ``g`` and ``u``."""
    number = tl.program_id(0)
    tensor, first, left, _, decayed = _chunk(chunks, number)
    weights = _address(pointers, tensor, first, DTYPE, ALIGN)
    gradients = _address(pointers + tensor_count, tensor, first, DTYPE, GRADIENT_ALIGN)
    firsts = _address(pointers + 2 * tensor_count, tensor, first, tl.float32, ALIGN)
    seconds = _address(pointers + 3 * tensor_count, tensor, first, tl.float32, ALIGN)
    if STEPS:
        scale1, scale2 = _scales(pointers + 4 * tensor_count + tensor, scale1, scale2)
    for masked in tl.static_range(2):
        if masked == (left < CHUNK):
            weight, gradient = _load(weights, left, masked), _load(gradients, left, masked) * sign
            moment1 = beta1 * _load(firsts, left, masked) + rest1 * gradient
            moment2 = beta2 * _load(seconds, left, masked) + rest2 * gradient * gradient
            _store(firsts, moment1, left, masked)
            _store(seconds, moment2, left, masked)
            direction = _lamb_direction(weight, moment1, moment2, scale1, scale2, eps, weight_decay, decayed)
            if masked:  # without eps the direction is 0 / 0 beyond the end
                direction = tl.where(tl.arange(0, CHUNK) < left, direction, 0.0)
            _store_sums(partials, number, chunk_count, weight, gradient, direction)


@triton.jit
def _lamb_direction(weight, moment1, moment2, scale1, scale2, eps, weight_decay, decayed):
    # u = m_hat / (sqrt(v_hat) + eps) + weight_decay * w. Exact division and root: triton's own are approximate in fp32.
    adam = tl.div_rn(moment1 * scale1, tl.sqrt_rn(moment2 * scale2) + eps)
    return _with_decay(adam, weight, weight_decay, decayed)


@triton.jit(do_not_specialize=["tensor_count", "row_count"], do_not_specialize_on_alignment=["lr"])
def lamb_update(
    chunks, pointers, stats, tensor_count, row_count,
    lr, scale1, scale2, eps, weight_decay,
    DTYPE: tl.constexpr, ALIGN: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Compute ``w -= lr * q * u`` for a chunk; ``u`` is computed again, because storing it costs 8 bytes an element."""
    tensor, first, left, row, decayed = _chunk(chunks, tl.num_programs(0) - 1 - tl.program_id(0))  # as in LARS
    weights = _address(pointers, tensor, first, DTYPE, ALIGN)
    firsts = _address(pointers + 2 * tensor_count, tensor, first, tl.float32, ALIGN)
    seconds = _address(pointers + 3 * tensor_count, tensor, first, tl.float32, ALIGN)
    if STEPS:
        scale1, scale2 = _scales(pointers + 4 * tensor_count + tensor, scale1, scale2)
    scale = _value(lr) * _ratio(stats, row, row_count)
    for masked in tl.static_range(2):
        if masked == (left < CHUNK):
            weight = _load(weights, left, masked)
            moment1, moment2 = _load(firsts, left, masked), _load(seconds, left, masked)
            direction = _lamb_direction(weight, moment1, moment2, scale1, scale2, eps, weight_decay, decayed)
            _store(weights, weight - scale * direction, left, masked)
