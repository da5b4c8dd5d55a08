"""MERIT: 25 steps compared with a scalar reference in float64, and its limits."""

import functools
import math

import numpy as np
import pytest
import torch
from test_trajectories import (
    SHAPES,
    WITH_A_CLOCK,
    assert_same,
    each_scale,
    gradients,
    learning_rate,
    length,
    run,
    start,
)

from largebatch.optim import MERIT

LR = 0.02
OPTIONS = {
    "defaults": {},
    "no_decay": {"weight_decay": 0.0},
    "bias_correction": {"bias_correction": True, "betas": (0.8, 0.95), "eps": 1e-3},
    "no_clip": {"update_clip": None},
    "clip": {"update_clip": 0.3, "weight_decay": 0.1},
    "adapt_and_decay_1d": {"adapt_1d": True, "decay_1d": True, "weight_decay": 0.1},
    "norm_clip": {"norm_clip": 0.7},
    "max_ratio": {"max_ratio": 0.3},
    "maximize": {"maximize": True},
    "adapt_none": {"adapt": False},
}
each_way = pytest.mark.parametrize(
    ("way", "dtype"), [way for name, way in WITH_A_CLOCK.items() if name != "fused"],
    ids=[name for name in WITH_A_CLOCK if name != "fused"],
)  # fmt: skip


def element_ratios(w, u, norm_clip=math.inf, max_ratio=math.inf):
    """Return ``s`` element by element; ``w`` and ``u`` have any shape."""

    @functools.cache
    def norms(place):
        """Return the max-norms of ``w`` and ``u`` over elements with these indices; None is every index."""
        chosen = tuple(slice(None) if index is None else index for index in place)
        return [max(abs(x) for x in np.ravel(tensor[chosen]).tolist()) for tensor in (w, u)]

    result = np.ones_like(w)
    for place in np.ndindex(w.shape):
        lines = [(), (*place[:1], None, *place[2:]), (None, *place[1:])]  # layer, row, column
        pairs = [norms(line) for line in (lines if w.ndim > 1 else lines[:1])]
        if all(norm > 0 for pair in pairs for norm in pair):
            result[place] = max(min(one, norm_clip) / other for one, other in pairs)
        result[place] = min(result[place], max_ratio)
    return result


@functools.cache
def reference(case, scale):
    return trajectory(start(), gradients(scale), **OPTIONS[case])


def trajectory(
    weights,
    steps,
    betas=(0.9, 0.999),
    eps=1e-6,
    weight_decay=0.01,
    bias_correction=False,
    adapt_1d=False,
    decay_1d=False,
    update_clip=1.0,
    maximize=False,
    adapt=None,
    **limits,
):
    weights = {name: weight.astype(np.float64) for name, weight in weights.items()}
    m = {name: np.zeros_like(weight) for name, weight in weights.items()}
    v = {name: np.zeros_like(weight) for name, weight in weights.items()}
    stats = []
    for t, grads in enumerate(steps, start=1):
        stats.append({})
        for name, w in weights.items():
            g = grads[name].astype(np.float64) * (-1 if maximize else 1)
            matrix = len(SHAPES[name]) > 1
            m[name] = betas[0] * m[name] + (1 - betas[0]) * g
            v[name] = betas[1] * v[name] + (1 - betas[1]) * g**2
            corrections = [1 - beta**t if bias_correction else 1.0 for beta in betas]
            u = m[name] / corrections[0] / (np.sqrt(v[name] / corrections[1]) + eps)
            u = u + (weight_decay * w if matrix or decay_1d else 0.0)
            if (matrix or adapt_1d) if adapt is None else adapt:
                limit = math.inf if update_clip is None else update_clip
                scaled = np.clip(element_ratios(w, u, **limits) * u, -limit, limit)
                stats[-1][name] = (length(w), length(g), length(scaled) / length(u))
                u = scaled
            weights[name] = w - learning_rate(LR, t) * u
    return weights, stats


@each_way
@each_scale
@pytest.mark.parametrize("case", OPTIONS)
def test_25_steps_equal_the_reference(case, scale, way, dtype):
    ours = run(MERIT, start(), gradients(scale), dtype, lr=LR, **OPTIONS[case], **way)
    assert_same(ours, reference(case, scale), dtype)


def one_step(weight, gradient, **options):
    """Return the direction of the first step, without decay."""
    parameter = torch.nn.Parameter(weight.clone())
    parameter.grad = gradient
    MERIT([parameter], lr=1.0, weight_decay=0.0, eps=0.0, **options).step()
    return weight - parameter.detach()


def test_rows_and_columns_of_zeros_take_adams_step():
    """The first direction is the gradient's sign times 0.1 / sqrt(0.001), which exceeds the default limit."""
    weight = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.5, 0.2], [0.0, 0.1, 0.3]])
    signs = torch.tensor([[1.0, -1.0, 1.0], [1.0, 1.0, -1.0], [1.0, -1.0, 1.0]])
    adam = 0.1 / math.sqrt(1e-3)
    expected = signs * torch.tensor([[adam, adam, adam], [adam, 0.5, 0.5], [adam, 0.5, 0.5]])
    torch.testing.assert_close(one_step(weight, 0.1 * signs, update_clip=None), expected)
    torch.testing.assert_close(one_step(weight, 0.1 * signs), expected.clamp(-1, 1))


def test_without_the_limit_no_element_moves_further_than_the_largest_weight():
    torch.manual_seed(0)
    weight, gradient = torch.randn(20, 30), torch.randn(20, 30) * torch.rand(20, 1) ** 9
    assert one_step(weight, gradient, update_clip=None).abs().max() <= weight.abs().max() * (1 + 1e-5)


def test_a_gradient_that_is_not_finite_reaches_the_weights():
    for bad in (math.nan, math.inf):
        weight = torch.nn.Parameter(torch.ones(4, 3))
        weight.grad = torch.full((4, 3), 0.5)
        weight.grad[2, 1] = bad
        optimizer = MERIT([weight], lr=0.1)
        optimizer.step()
        assert not weight.isfinite().all()


def test_fused_true_takes_the_unfused_step_and_warns():
    weights = [torch.nn.Parameter(torch.ones(3, 2)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.full((3, 2), 0.5)
    with pytest.warns(UserWarning, match="takes the unfused step instead: merit has no fused step"):
        MERIT(weights[:1], lr=0.1, fused=True).step()
    MERIT(weights[1:], lr=0.1).step()
    assert torch.equal(*weights)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_a_limit_out_of_range_raises(value):
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="update_clip must be a finite number above 0"):
        MERIT([parameter], lr=0.1, update_clip=value)
    with pytest.raises(ValueError, match="update_clip must be a finite number above 0"):
        MERIT([{"params": [parameter], "update_clip": value}], lr=0.1)
