"""VR-LARS and VR-LAMB: 25 steps compared with scalar references in float64, and training of a model."""

import copy

import numpy as np
import pytest
import torch
from test_clars import batch, loss, small_model
from test_trajectories import (
    SHAPES,
    assert_same,
    each_way,
    gradients,
    learning_rate,
    reference_lamb,
    reference_lars,
    start,
)

from largebatch.optim import LAMB, LARS, VRLAMB, VRLARS, SampleSquares

GROUPS = 8
CASES = {
    "vrlars": (VRLARS, 0.5, {}),
    "vrlars_options": (VRLARS, 0.5, {"gsnr_min": 0.4, "weight_decay": 5e-2, "nesterov": True, "adapt_1d": True}),
    "vrlamb": (VRLAMB, 0.01, {}),
    "vrlamb_options": (VRLAMB, 0.01, {"gsnr_min": 0.0, "gsnr_beta": 0.5, "adapt_1d": True, "max_ratio": 1.0}),
    "vrlamb_without_average": (VRLAMB, 0.01, {"gsnr_beta": 0.0, "bias_correction": False}),
}


def groups_of(step, seed):
    """Return GROUPS gradients for each parameter, whose mean is the parameter's gradient of the step."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, gradient in step.items():
        mean = gradient.astype(np.float64)
        noise = rng.normal(size=(GROUPS, *mean.shape)) * 3 * (np.abs(mean).mean() + 1e-3)
        found[name] = mean + noise - noise.mean(0)
    return found


def reference_factors(gradient, groups, gsnr_min):
    """Return ``clip(r / mean(r), gsnr_min, 1)`` element by element."""
    columns = groups.reshape(GROUPS, -1).T.tolist()
    ratios = []
    for mean, column in zip(gradient.astype(np.float64).ravel().tolist(), columns, strict=True):
        ratios.append(mean**2 / (sum((value - mean) ** 2 for value in column) / GROUPS))
    average = sum(ratios) / len(ratios)
    factors = [min(max(ratio / average if average else 0.0, gsnr_min), 1.0) for ratio in ratios]
    return np.array(factors).reshape(groups.shape[1:])


def reference(kind, weights, steps, groups, lr, gsnr_min=0.1, gsnr_beta=None, adapt_1d=False, **options):
    """Return LARS's or LAMB's reference for gradients that are scaled here."""
    beta = (0.9 if gsnr_beta is None else gsnr_beta) if kind is VRLAMB else 0.0
    averages = dict.fromkeys(SHAPES, 0.0)
    scaled = []
    for t, (step, own) in enumerate(zip(steps, groups, strict=True), start=1):
        scaled.append({name: gradient.astype(np.float64) for name, gradient in step.items()})
        for name, shape in SHAPES.items():
            if len(shape) > 1 or adapt_1d:
                averages[name] = beta * averages[name] + (1 - beta) * reference_factors(step[name], own[name], gsnr_min)
                scaled[-1][name] = averages[name] / (1 - beta**t) * scaled[-1][name]
    build = reference_lamb if kind is VRLAMB else reference_lars
    return build(weights, scaled, lr, adapt_1d=adapt_1d, **options)


@each_way
@pytest.mark.parametrize(("kind", "lr", "options"), CASES.values(), ids=CASES)
def test_25_steps_equal_the_reference(kind, lr, options, way, dtype):
    weights, steps = start(), gradients(1.0)
    groups = [groups_of(step, seed) for seed, step in enumerate(steps)]
    parameters = {name: torch.nn.Parameter(torch.tensor(weight, dtype=dtype)) for name, weight in weights.items()}
    optimizer = kind(parameters.items(), lr=lr, **options, **way)
    stats = []
    for t, (step, own) in enumerate(zip(steps, groups, strict=True), start=1):
        optimizer.param_groups[0]["lr"] = learning_rate(lr, t)
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(step[name], dtype=dtype)
        squares = {parameters[name]: torch.tensor((own[name] ** 2).mean(0), dtype=dtype) for name in SHAPES}
        optimizer.set_mean_squares(squares)
        optimizer.step()
        columns = optimizer.layer_stats()
        rows = zip(*(columns[key].tolist() for key in ("weight_norm", "gradient_norm", "trust_ratio")), strict=True)
        stats.append(dict(zip(optimizer.layer_names, rows, strict=True)))
        for name, parameter in parameters.items():  # p.grad is left as it was
            assert torch.equal(parameter.grad, torch.tensor(step[name], dtype=dtype))
    ours = {name: parameter.detach().numpy() for name, parameter in parameters.items()}, stats
    assert_same(ours, reference(kind, weights, steps, groups, lr, **options), dtype)


@pytest.mark.parametrize(("ours", "plain"), [(VRLARS, LARS), (VRLAMB, LAMB)])
def test_equal_groups_leave_the_gradient_as_it_is(ours, plain):
    """Without variance all elements have the same ratio."""
    model, (images, labels) = small_model(), batch()
    images, labels = images[:1].expand_as(images), labels[:1].expand_as(labels)
    other = copy.deepcopy(model)
    norms = SampleSquares(model, 4)
    loss(model, images, labels).backward()
    loss(other, images, labels).backward()
    optimizer = ours(model.named_parameters(), lr=0.1)
    optimizer.set_mean_squares(norms.means())
    optimizer.step()
    plain(other.named_parameters(), lr=0.1).step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "options"), [(VRLARS, {"lr": 0.3, "trust_coefficient": 0.01}), (VRLAMB, {"lr": 0.02})]
)
def test_training_reduces_the_loss_and_resumes_bit_for_bit(kind, options):
    model, (images, labels) = small_model(), batch()
    optimizer = kind(model.named_parameters(), **options)
    norms = SampleSquares(model, 2, parameters=optimizer.layers)
    losses = []

    def train(model, optimizer, norms, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            value = loss(model, images, labels)
            value.backward()
            losses.append(value.item())
            optimizer.set_mean_squares(norms.means())
            optimizer.step()

    train(model, optimizer, norms, 40)
    norms.remove()
    resumed = copy.deepcopy(model)
    again = kind(resumed.named_parameters(), **options)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, SampleSquares(model, 2, parameters=optimizer.layers), 40)
    assert losses[-1] < 0.2 * losses[0]
    train(resumed, again, SampleSquares(resumed, 2, parameters=again.layers), 40)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), resumed.parameters(), strict=True))


def test_a_step_without_its_mean_squares_raises():
    optimizer = VRLARS([("weight", torch.nn.Parameter(torch.ones(2, 2)))], lr=0.1)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2, 2)
    with pytest.raises(RuntimeError, match=r"VRLARS has no mean squares of weight for this step.*SampleSquares"):
        optimizer.step()


@pytest.mark.parametrize(
    ("kind", "options"), [(VRLARS, {"gsnr_min": 1.0}), (VRLAMB, {"gsnr_min": -0.1}), (VRLAMB, {"gsnr_beta": 1.0})]
)
def test_options_out_of_range_raise(kind, options):
    with pytest.raises(ValueError, match=r"gsnr_.* must be at least 0 and below 1"):
        kind([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1, **options)
