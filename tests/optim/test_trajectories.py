"""25 steps with every option, compared with references written out in float64."""

import math

import numpy as np
import pytest
import torch

from largebatch.optim import CLARS, LAMB, LARS, TVLARS

STEPS = 25
# A convolution, a matrix with a norm above 30 (clipping at 10 bites), one that starts at zero, a bias and a scalar.
SHAPES = {"conv": (6, 3, 3, 3), "large": (12, 8), "zero": (4, 5), "bias": (7,), "scalar": ()}
GRADIENT_SCALES = {"tiny": 1e-8, "normal": 1.0, "huge": 1e8}


def start(seed=0):
    rng = np.random.default_rng(seed)
    weights = {name: np.array(rng.normal(size=shape)) for name, shape in SHAPES.items()}
    weights["large"] *= 4
    weights["zero"] *= 0
    weights["scalar"] += 2  # a single number that crosses zero loses its digits, in any fp32 implementation
    return {name: weight.astype(np.float32) for name, weight in weights.items()}


def gradients(scale, seed=1):
    """Return one dict a step; the conv gradient of step 3 is zero, so that both norms are zero once."""
    rng = np.random.default_rng(seed)
    steps = [
        {name: np.array(rng.normal(size=shape) * scale).astype(np.float32) for name, shape in SHAPES.items()}
        for _ in range(STEPS)
    ]
    steps[3]["conv"] *= 0
    for step in steps:
        step["scalar"] = np.abs(step["scalar"])  # as above
    return steps


def learning_rate(base, step):
    """Return a learning rate that changes every step, so that its place in the momentum buffer matters."""
    return base * (1 + 0.5 * math.sin(step))


SAMPLE_NORMS = {"conv": 13.0, "large": 20.0, "zero": 6.0, "bias": 0.0, "scalar": 2.0}  # for CLARS, at scale 1


def length(array):
    return math.sqrt(sum(x * x for x in array.ravel().tolist()))


def reference_lars(
    weights,
    steps,
    lr,
    momentum=0.9,
    weight_decay=0.0,
    trust_coefficient=1e-3,
    adapt_1d=False,
    decay_1d=False,
    norm_clip=None,
    nesterov=False,
    denominator="norm_of_sum",
    lr_in_momentum=False,
    max_ratio=math.inf,
    larc=False,
    eps=0.0,
    maximize=False,
    adapt=None,
    phi=lambda t: 1.0,
    given_norms=None,
):
    weights = {name: weight.astype(np.float64) for name, weight in weights.items()}
    buffers = {name: np.zeros_like(weight) for name, weight in weights.items()}
    stats = []
    for t, grads in enumerate(steps, start=1):
        stats.append({})
        for name, w in weights.items():
            raw = grads[name].astype(np.float64)
            matrix, lr_now = len(SHAPES[name]) > 1, learning_rate(lr, t)
            decay = weight_decay if matrix or decay_1d else 0.0
            g = (-raw if maximize else raw) + decay * w
            q = 1.0
            if (matrix or adapt_1d) if adapt is None else adapt:
                w_norm, g_norm = length(w), length(g)
                if given_norms is not None:
                    g_norm = given_norms[name]
                if denominator == "sum_of_norms":
                    g_norm = (length(raw) if given_norms is None else given_norms[name]) + decay * w_norm
                if norm_clip is not None:
                    w_norm, g_norm = min(w_norm, norm_clip), min(g_norm, norm_clip)
                if w_norm > 0 and g_norm > 0:
                    q = trust_coefficient * phi(t) * w_norm / (g_norm + eps)
                q = min(q / lr_now if larc else q, max_ratio)
                stats[-1][name] = (length(w), length(raw), q)
            inside, outside = (lr_now, 1.0) if lr_in_momentum else (1.0, lr_now)
            buffers[name] = momentum * buffers[name] + inside * q * g
            move = inside * q * g + momentum * buffers[name] if nesterov else buffers[name]
            weights[name] = w - outside * move
    return weights, stats


def reference_lamb(
    weights,
    steps,
    lr,
    betas=(0.9, 0.999),
    eps=1e-6,
    weight_decay=0.01,
    bias_correction=True,
    adapt_1d=False,
    decay_1d=False,
    norm_clip=None,
    max_ratio=math.inf,
    maximize=False,
    adapt=None,
):
    weights = {name: weight.astype(np.float64) for name, weight in weights.items()}
    m = {name: np.zeros_like(weight) for name, weight in weights.items()}
    v = {name: np.zeros_like(weight) for name, weight in weights.items()}
    stats = []
    for t, grads in enumerate(steps, start=1):
        stats.append({})
        for name, w in weights.items():
            g = -grads[name].astype(np.float64) if maximize else grads[name].astype(np.float64)
            matrix = len(SHAPES[name]) > 1
            m[name] = betas[0] * m[name] + (1 - betas[0]) * g
            v[name] = betas[1] * v[name] + (1 - betas[1]) * g**2
            correct1 = 1 - betas[0] ** t if bias_correction else 1.0
            correct2 = 1 - betas[1] ** t if bias_correction else 1.0
            u = (m[name] / correct1) / (np.sqrt(v[name] / correct2) + eps)
            if matrix or decay_1d:
                u = u + weight_decay * w
            q = 1.0
            if (matrix or adapt_1d) if adapt is None else adapt:
                w_norm = length(w) if norm_clip is None else min(length(w), norm_clip)
                if w_norm > 0 and length(u) > 0:
                    q = w_norm / length(u)
                q = min(q, max_ratio)
                stats[-1][name] = (length(w), length(g), q)
            weights[name] = w - learning_rate(lr, t) * q * u
    return weights, stats


# Options of each way of stepping, and the type it is tested in: the fused step on CPU requires fp32.
WAYS = {
    "fused": ({"fused": True}, torch.float32),
    "foreach": ({"foreach": True}, torch.float32),
    "for-loop": ({"foreach": False}, torch.float64),
}
WITH_A_CLOCK = {**WAYS, "capturable": ({"capturable": True}, torch.float32)}  # counts steps on the device
each_way = pytest.mark.parametrize(("way", "dtype"), WAYS.values(), ids=WAYS)
each_way_with_a_clock = pytest.mark.parametrize(("way", "dtype"), WITH_A_CLOCK.values(), ids=WITH_A_CLOCK)
each_scale = pytest.mark.parametrize("scale", GRADIENT_SCALES.values(), ids=GRADIENT_SCALES)


@pytest.fixture(autouse=True)
def no_fallback(recwarn):
    yield
    assert [str(warning.message) for warning in recwarn if "takes the unfused step" in str(warning.message)] == []


def run(optimizer_class, weights, steps, dtype, lr, sample_norms=None, **options):
    parameters = {name: torch.nn.Parameter(torch.tensor(weight, dtype=dtype)) for name, weight in weights.items()}
    optimizer = optimizer_class(parameters.items(), lr=lr, **options)
    stats = []
    for t, grads in enumerate(steps, start=1):
        optimizer.param_groups[0]["lr"] = learning_rate(lr, t)
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(grads[name], dtype=dtype)
        if sample_norms:
            optimizer.set_sample_norms({parameters[name]: torch.tensor(norm) for name, norm in sample_norms.items()})
        optimizer.step()
        columns = optimizer.layer_stats()
        rows = zip(*(columns[key].tolist() for key in ("weight_norm", "gradient_norm", "trust_ratio")), strict=True)
        stats.append(dict(zip(optimizer.layer_names, rows, strict=True)))
    return {name: parameter.detach().numpy() for name, parameter in parameters.items()}, stats


def assert_same(ours, reference, dtype):
    (weights, stats), (expected, expected_stats) = ours, reference
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for name, weight in weights.items():
        difference = length(weight - expected[name]) / length(expected[name])
        assert difference < tolerance, f"{name} is off by {difference}"
    for row, expected_row in zip(stats, expected_stats, strict=True):
        assert row.keys() == expected_row.keys()
        for layer in row:
            assert row[layer] == pytest.approx(expected_row[layer], rel=1e-5, abs=0)  # statistics are fp32


LARS_OPTIONS = {
    "defaults": {},
    "plain": {"momentum": 0.0},
    "momentum": {"momentum": 0.5},
    "decay": {"weight_decay": 5e-2},
    "trust_coefficient": {"trust_coefficient": 0.02},
    "adapt_1d": {"adapt_1d": True, "weight_decay": 5e-2},
    "decay_1d": {"decay_1d": True, "weight_decay": 5e-2},
    "adapt_and_decay_1d": {"adapt_1d": True, "decay_1d": True, "weight_decay": 5e-2},
    "norm_clip": {"norm_clip": 10.0, "weight_decay": 5e-2},
    "norm_clip_all": {"norm_clip": 0.5, "adapt_1d": True},
    "nesterov": {"nesterov": True, "weight_decay": 5e-4},
    "sum_of_norms": {"denominator": "sum_of_norms", "weight_decay": 0.5},
    "sum_of_norms_adapt_1d": {"denominator": "sum_of_norms", "weight_decay": 0.5, "adapt_1d": True},
    "lr_in_momentum": {"lr_in_momentum": True, "weight_decay": 5e-2},
    "lr_in_momentum_nesterov": {"lr_in_momentum": True, "nesterov": True},
    "max_ratio": {"max_ratio": 1e-3, "trust_coefficient": 0.02},
    "larc": {"larc": True, "max_ratio": 1.0, "trust_coefficient": 0.5, "weight_decay": 5e-2},
    "eps": {"eps": 0.5, "weight_decay": 5e-2},
    "maximize": {"maximize": True, "weight_decay": 5e-2},
    "adapt_all": {"adapt": True},
    "adapt_none": {"adapt": False},
    "paper": {"denominator": "sum_of_norms", "lr_in_momentum": True, "weight_decay": 5e-2},
}


@each_way
@each_scale
@pytest.mark.parametrize("options", LARS_OPTIONS.values(), ids=LARS_OPTIONS)
def test_lars_follows_its_formula(options, scale, way, dtype):
    weights, steps = start(), gradients(scale)
    ours = run(LARS, weights, steps, dtype, lr=2.0, **options, **way)
    assert_same(ours, reference_lars(weights, steps, lr=2.0, **options), dtype)


CLARS_OPTIONS = {  # decay only with the denominator that bounds it
    key: options if "weight_decay" not in options else {**options, "denominator": "sum_of_norms"}
    for key, options in LARS_OPTIONS.items()
}


@each_way
@each_scale
@pytest.mark.parametrize("options", CLARS_OPTIONS.values(), ids=CLARS_OPTIONS)
def test_clars_follows_its_formula(options, scale, way, dtype):
    """The mean norms of the samples' gradients are given; one of them is zero."""
    weights, steps = start(), gradients(scale)
    norms = {name: float(np.float32(norm * scale)) for name, norm in SAMPLE_NORMS.items()}
    ours = run(CLARS, weights, steps, dtype, lr=2.0, sample_norms=norms, **options, **way)
    expected = reference_lars(weights, steps, lr=2.0, given_norms=norms, **options)
    assert_same(ours, expected, dtype)


# options of phi, and phi by the paper's formula
PHI_OPTIONS = {
    "defaults": ({}, lambda t: 1 / (1 + math.exp(1e-3 * t))),
    "steep": ({"lmbda": 0.3}, lambda t: 1 / (1 + math.exp(0.3 * t))),
    "alpha": ({"lmbda": 0.1, "alpha": 0.1}, lambda t: 1 / (0.1 + math.exp(0.1 * t))),
    "delay": ({"lmbda": 1.0, "delay": 12.5}, lambda t: 1 / (1 + math.exp(t - 12.5))),
    "floor": ({"lmbda": 0.5, "gamma_min": 0.064}, lambda t: 1 / (1 + math.exp(0.5 * t)) + 0.064),
    "published": (  # with the program's other settings
        {"lmbda": 1e-2, "alpha": 0.1, "norm_clip": 10.0, "weight_decay": 5e-4},
        lambda t: 1 / (0.1 + math.exp(1e-2 * t)),
    ),
    "adapt_1d": (
        {"lmbda": 0.2, "adapt_1d": True, "decay_1d": True, "weight_decay": 5e-2},
        lambda t: 1 / (1 + math.exp(0.2 * t)),
    ),
    "nesterov": ({"lmbda": 0.2, "nesterov": True, "momentum": 0.8}, lambda t: 1 / (1 + math.exp(0.2 * t))),
}


@each_way_with_a_clock
@each_scale
@pytest.mark.parametrize(("options", "phi"), PHI_OPTIONS.values(), ids=PHI_OPTIONS)
def test_tvlars_follows_its_formula(options, phi, scale, way, dtype):
    weights, steps = start(), gradients(scale)
    of_phi = ("lmbda", "alpha", "delay", "gamma_min")
    shared = {key: value for key, value in options.items() if key not in of_phi}
    ours = run(TVLARS, weights, steps, dtype, lr=4.0, **options, **way)
    assert_same(ours, reference_lars(weights, steps, lr=4.0, phi=phi, **shared), dtype)


LAMB_OPTIONS = {
    "defaults": {},
    "betas_and_eps": {"betas": (0.8, 0.95), "eps": 1e-3},
    "no_decay": {"weight_decay": 0.0},
    "no_bias_correction": {"bias_correction": False},
    "adapt_1d": {"adapt_1d": True, "weight_decay": 0.1},
    "decay_1d": {"decay_1d": True, "weight_decay": 0.1},
    "norm_clip": {"norm_clip": 10.0},
    "published": {"bias_correction": False, "norm_clip": 10.0, "adapt_1d": True, "decay_1d": True},
    "max_ratio": {"max_ratio": 0.3},
    "maximize": {"maximize": True},
    "adapt_none": {"adapt": False},
}


@each_way_with_a_clock
@each_scale
@pytest.mark.parametrize("options", LAMB_OPTIONS.values(), ids=LAMB_OPTIONS)
def test_lamb_follows_its_formula(options, scale, way, dtype):
    weights, steps = start(), gradients(scale)
    ours = run(LAMB, weights, steps, dtype, lr=0.02, **options, **way)
    assert_same(ours, reference_lamb(weights, steps, lr=0.02, **options), dtype)


@pytest.mark.parametrize("way", [way for way, dtype in WAYS.values() if dtype == torch.float32])
def test_norms_of_a_large_layer_are_accurate(way):
    """The error of a plain fp32 norm of so many elements is 4e-5 on CPU, too much for a trajectory."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(512, 512, 3, 3, generator=generator))
    small = torch.nn.Parameter(torch.randn(3, 5, generator=generator))
    for parameter in (weight, small):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    expected = [1e-3 * (p.detach().double().norm() / p.grad.double().norm()).item() for p in (weight, small)]
    optimizer = LARS([weight, small], lr=1.0, **way)
    optimizer.step()
    assert optimizer.layer_stats()["trust_ratio"].tolist() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("way", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=lambda way: str(way))
@pytest.mark.parametrize("build", [LARS, TVLARS, LAMB])
def test_a_gradient_that_is_not_finite_reaches_the_weights(build, way):
    """Limits must not hide a divergence, because training detects it in the weights."""
    for bad in (math.nan, math.inf):
        weight = torch.nn.Parameter(torch.ones(4, 3))
        weight.grad = torch.full((4, 3), 0.5)
        weight.grad[2, 1] = bad
        optimizer = build([weight], lr=0.1, norm_clip=10.0, max_ratio=1.0, **way)
        optimizer.step()
        optimizer.step()
        assert weight.isnan().any() or weight.isinf().any()
