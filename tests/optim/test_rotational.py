"""Rotational Lion against a reference in float64, neuron by neuron, and its norms and angles."""

import copy
import io
import math

import numpy as np
import pytest
import torch

from largebatch.optim import RotationalLion

LR, STEPS = 0.003, 20
# Neurons: of a convolution, of a matrix, of single weights, and of zeros. The last two and the bias take Lion's step.
SHAPES = {"conv": (4, 3, 3, 3), "matrix": (5, 16), "single": (3, 1), "zero": (2, 4), "bias": (5,)}
OPTIONS = {
    "defaults": {},
    "nesterov": {"betas": (0.98**2, 0.98), "weight_decay": 0.3},
    "mean_stays": {"zero_mean": False, "eps": 1e-3},
    "exact_angle": {"norm_beta": 0.0},
}


def start(dtype):
    rng = np.random.default_rng(0)
    weights = {name: torch.tensor(rng.normal(size=shape), dtype=dtype) for name, shape in SHAPES.items()}
    weights["zero"] *= 0
    return {name: torch.nn.Parameter(weight) for name, weight in weights.items()}


def set_gradients(parameters, step):
    rng = np.random.default_rng(100 + step)
    for parameter in parameters.values():
        parameter.grad = torch.tensor(rng.normal(size=parameter.shape), dtype=parameter.dtype)


def train(parameters, optimizer, steps):
    for step in steps:
        set_gradients(parameters, step)
        optimizer.step()


def reference_neuron(w, gradients, betas=(0.9, 0.99), weight_decay=1.0, norm_beta=0.9, zero_mean=True, eps=1e-8):
    """Return a neuron's weights after these gradients, as plain numbers; ``w`` isn't constant."""

    def length(x):
        return math.sqrt(sum(value * value for value in x))

    def centred(x):
        return [value - sum(x) / len(x) for value in x] if zero_mean else list(x)

    def resized(x, size):
        return [value * size / length(x) for value in x]

    beta1, beta2 = betas
    norm, mean_square, m = length(w), 0.0, [0.0] * len(w)
    w = resized(centred(w), norm)
    angle = math.sqrt(math.pi / 2) * math.sqrt(2 * LR * weight_decay)
    angle *= math.sqrt((1 - beta1) ** 2 + beta1**2 * (1 - beta2) / (1 + beta2))
    for t, g in enumerate(gradients, start=1):
        u = [math.copysign(1, beta1 * a + (1 - beta1) * b) for a, b in zip(m, g, strict=True)]
        m = [beta2 * a + (1 - beta2) * b for a, b in zip(m, g, strict=True)]
        d = centred(u)
        along = sum(a * b for a, b in zip(d, w, strict=True)) / norm**2
        d = [a - along * b for a, b in zip(d, w, strict=True)]
        mean_square = norm_beta * mean_square + (1 - norm_beta) * length(d) ** 2
        step = angle * norm / (math.sqrt(mean_square / (1 - norm_beta**t)) + eps)
        w = resized([a - step * b for a, b in zip(w, d, strict=True)], norm)
    return w


def lion(w, gradients, betas=(0.9, 0.99), **_):
    m = np.zeros_like(w)
    for g in gradients:
        w = w - LR * np.sign(betas[0] * m + (1 - betas[0]) * g)
        m = betas[1] * m + (1 - betas[1]) * g
    return w


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_twenty_steps_are_the_formula(options, dtype, tolerance):
    parameters = start(dtype)
    before = {name: parameter.detach().double().numpy().copy() for name, parameter in parameters.items()}
    gradients = {name: [] for name in SHAPES}
    for step in range(STEPS):
        set_gradients(parameters, step)
        for name, parameter in parameters.items():
            gradients[name].append(parameter.grad.double().numpy())
    optimizer = RotationalLion(parameters.items(), lr=LR, **options)
    train(parameters, optimizer, range(STEPS))
    turned = ["conv", "matrix"] if options.get("zero_mean", True) else ["conv", "matrix", "single"]
    for name, parameter in parameters.items():
        if name in turned:
            expected = [
                reference_neuron(w.ravel().tolist(), [g[neuron].ravel().tolist() for g in gradients[name]], **options)
                for neuron, w in enumerate(before[name])
            ]
        else:
            expected = lion(before[name], gradients[name], **options)
        found = parameter.detach().double().numpy()
        np.testing.assert_allclose(found, np.reshape(expected, found.shape), rtol=tolerance, atol=tolerance)


def test_norms_and_means_stay_and_each_step_turns_by_the_angle():
    parameters = start(torch.float64)
    norms = {name: parameters[name].detach().flatten(1).norm(dim=1) for name in ("conv", "matrix")}
    optimizer = RotationalLion(parameters.items(), lr=LR, norm_beta=0.0)
    angle = math.atan(math.sqrt(math.pi * LR * (0.1**2 + 0.9**2 * 0.01 / 1.99)))
    train(parameters, optimizer, [0])
    for step in range(1, 10):
        before = {name: parameters[name].detach().flatten(1).clone() for name in norms}
        train(parameters, optimizer, [step])
        for name, norm in norms.items():
            now = parameters[name].detach().flatten(1)
            torch.testing.assert_close(now.norm(dim=1), norm)
            torch.testing.assert_close(now.mean(dim=1), torch.zeros(len(now), dtype=now.dtype), rtol=0, atol=1e-12)
            cosine = torch.nn.functional.cosine_similarity(now, before[name])
            torch.testing.assert_close(cosine.acos(), torch.full_like(cosine, angle), rtol=1e-5, atol=0)


def test_state_dict_continues_bit_for_bit():
    unbroken = start(torch.float32)
    optimizer = RotationalLion(unbroken.items(), lr=LR)
    train(unbroken, optimizer, range(4))
    file = io.BytesIO()
    torch.save(({name: p.detach() for name, p in unbroken.items()}, optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed = {name: torch.nn.Parameter(weight) for name, weight in weights.items()}
    second = RotationalLion(resumed.items(), lr=0.5, norm_beta=0.0)
    second.load_state_dict(state)
    train(unbroken, optimizer, range(4, 9))
    train(resumed, second, range(4, 9))
    assert all(torch.equal(unbroken[name], resumed[name]) for name in SHAPES)


def test_parameters_without_a_gradient_stay_and_gradients_stay():
    parameters = start(torch.float32)
    set_gradients(parameters, 0)
    parameters["conv"].grad = None
    before = copy.deepcopy(parameters)
    gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    optimizer = RotationalLion(parameters.items(), lr=LR)
    assert float(optimizer.step(lambda: torch.tensor(3.0))) == 3
    changed = {name for name, parameter in parameters.items() if not torch.equal(parameter, before[name])}
    assert changed == set(SHAPES) - {"conv"}
    assert all(torch.equal(parameters[name].grad, gradient) for name, gradient in gradients.items())


@pytest.mark.parametrize(
    "wrong", [{"lr": -1.0}, {"weight_decay": 0.0}, {"betas": (0.9, 1.0)}, {"norm_beta": 1.0}, {"eps": math.nan}]
)
def test_a_wrong_number_is_an_error_also_in_a_group(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RotationalLion([torch.ones(2, 2)], **{"lr": 0.1, **wrong})
    optimizer = RotationalLion([{"params": [torch.ones(2, 2)]}], lr=0.1)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        optimizer.add_param_group({"params": [torch.ones(2, 2)], **wrong})
    assert len(optimizer.param_groups) == 1
