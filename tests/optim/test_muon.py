"""Muon and AdaMuon against formulas in float64, timm's iteration in bf16, and torch.optim.AdamW."""

import copy
import io
import math

import pytest
import torch
from conftest import configuration
from timm.optim.muon import Muon as TimmMuon
from timm.optim.muon import zeropower_via_newtonschulz
from torch.utils._python_dispatch import TorchDispatchMode

from largebatch.optim import AdaMuon, Muon
from largebatch.optim.newton_schulz import COEFFICIENTS, STEPS, orthogonalise
from largebatch.training.optimization import build_optimizer

# A ResNet's kinds of matrices: square, wide, tall, very wide, and of few rows.
SHAPES = [(64, 64), (64, 576), (576, 64), (16, 147), (128, 32), (3, 40), (64, 576), (32, 64)]


def plain(matrix, dtype):
    """Iterate one matrix in ``dtype`` as the formula says."""
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype)
    x = x.mT if x.shape[0] > x.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


def matrices(kind):
    torch.manual_seed(0)
    found = []
    for m, n in SHAPES:
        matrix = torch.randn(m, n)
        if kind != "gaussian":  # as gradients of few images: few directions, and a rest
            matrix = torch.randn(m, 2) @ torch.randn(2, n) + float(kind) * matrix
        found.append(matrix)
    return found


def relative(one, other):
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("kind", ["gaussian", "1e-1", "1e-3", "1e-6", "0"])
def test_the_iteration_is_the_formula(kind):
    given = matrices(kind)
    before = [matrix.clone() for matrix in given]
    for matrix, found in zip(given, orthogonalise(given), strict=True):
        assert found.shape == matrix.shape
        assert relative(found, plain(matrix, torch.float32)) < 1e-4
        assert relative(found, plain(matrix, torch.float64)) < 1e-4
    assert all(map(torch.equal, given, before))


@pytest.mark.parametrize("kind", ["gaussian", "1e-1", "1e-3"])
def test_the_iteration_in_bf16_is_timm_s(kind):
    given = matrices(kind)
    for matrix, found in zip(given, orthogonalise(given, torch.bfloat16), strict=True):
        assert relative(found, zeropower_via_newtonschulz(matrix, STEPS, [COEFFICIENTS])) < 0.02


def test_singular_values_are_near_1_and_a_zero_matrix_stays_zero():
    given = matrices("gaussian")
    for matrix, found in zip(given, orthogonalise(given), strict=True):
        large = torch.linalg.svdvals(matrix) > 0.01 * matrix.norm()
        values = torch.linalg.svdvals(found)[large]
        assert float(values.min()) > 0.6
        assert float(values.max()) < 1.25
    assert not orthogonalise([torch.zeros(3, 5)])[0].any()
    assert orthogonalise([]) == []


class Products(TorchDispatchMode):
    """Count batched products of matrices."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "bmm" in func.name()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_of_a_shape_share_each_product(dtype):
    def products(shapes):
        with Products() as counted:
            orthogonalise([torch.randn(shape) for shape in shapes], dtype)
        return counted.count

    assert products([(8, 32)] * 5 + [(32, 8)] * 3) == products([(8, 32)])
    assert products([(8, 32), (8, 8)]) == products([(8, 32)]) + products([(8, 8)])


# -- the step


def network(seed=0):
    """Return a network with each kind of parameter: two of them are matrices for Muon, the last by its group."""
    torch.manual_seed(seed)
    return torch.nn.ModuleDict(
        {
            "grey": torch.nn.Conv2d(1, 4, 3),
            "conv": torch.nn.Conv2d(4, 6, 3),
            "hidden": torch.nn.Linear(12, 5),
            "head": torch.nn.Linear(5, 3),
        }
    )


def groups(model, **options):
    head = [("head.weight", model["head"].weight)]
    rest = [(name, p) for name, p in model.named_parameters() if name != "head.weight"]
    return [{"params": rest, **options}, {"params": head, "orthogonal": False}]


def set_gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def train(model, optimizer, steps):
    for step in steps:
        set_gradients(model, step)
        optimizer.step()


MATRICES = ("conv.weight", "hidden.weight")


def expected_matrices(model, steps, *, lr, decay, momentum, nesterov, original, adaptive=False):
    """Return the matrices after ``steps`` steps, in float64."""
    weights = {name: dict(model.named_parameters())[name].detach().double() for name in MATRICES}
    state = {name: (torch.zeros_like(weight), torch.zeros_like(weight)) for name, weight in weights.items()}
    twin = copy.deepcopy(model)
    for step in range(steps):
        set_gradients(twin, step)
        for name, weight in weights.items():
            gradient = dict(twin.named_parameters())[name].grad.double()
            v, s = state[name]
            v = momentum * v + (1 - momentum) * gradient
            u = momentum * v + (1 - momentum) * gradient if nesterov else v
            o = plain(u.flatten(1), torch.float64).view_as(weight)
            m, n = len(weight), weight[0].numel()
            scale = math.sqrt(max(1, m / n)) if original else 0.2 * math.sqrt(max(m, n))
            if adaptive:
                s = 0.95 * s + 0.05 * o**2
                o = o / (s.sqrt() + 1e-8)
                o, scale = o / o.norm(), 0.2 * math.sqrt(m * n)
            weights[name] = weight - lr * (decay * weight + scale * o)
            state[name] = v, s
    return weights


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("original", [True, False])
def test_twenty_steps_of_muon_are_the_formula(nesterov, original):
    model = network()
    numbers = {"lr": 0.02, "momentum": 0.9, "nesterov": nesterov}
    expected = expected_matrices(model, 20, decay=0.3, original=original, **numbers)
    scale = "original" if original else "match_rms_adamw"
    train(model, Muon(groups(model), weight_decay=0.3, adjust_lr_fn=scale, **numbers), range(20))
    for name, weight in expected.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].double(), weight, rtol=1e-4, atol=1e-5)


def test_twenty_steps_of_adamuon_are_the_formula():
    model = network()
    numbers = {"lr": 0.02, "momentum": 0.9, "nesterov": True}
    expected = expected_matrices(model, 20, decay=0.3, original=False, adaptive=True, **numbers)
    train(model, AdaMuon(groups(model), weight_decay=0.3, **numbers), range(20))
    for name, weight in expected.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].double(), weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [Muon, AdaMuon])
def test_all_other_parameters_take_the_steps_of_adamw(build):
    model = network()
    theirs = copy.deepcopy(model)
    others = {name: p for name, p in theirs.named_parameters() if name not in MATRICES}
    split = [
        {"params": [p for p in others.values() if p.ndim <= 1], "weight_decay": 0.0},
        {"params": [p for p in others.values() if p.ndim > 1]},
    ]
    train(theirs, torch.optim.AdamW(split, lr=0.01, betas=(0.9, 0.95), weight_decay=0.3), range(5))
    train(model, build(groups(model), lr=0.01, weight_decay=0.3), range(5))
    for name, parameter in others.items():
        torch.testing.assert_close(dict(model.named_parameters())[name], parameter, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("algorithm", ["muon", "adamuon"])
def test_steps_are_timm_s_up_to_its_bf16(algorithm):
    """timm's iteration is always in bf16, so the way of 20 steps differs by about a hundredth."""
    model = network()
    theirs, before = copy.deepcopy(model), copy.deepcopy(model)
    options = {"lr": 0.02, "weight_decay": 0.1, "nesterov": True, "betas": (0.9, 0.95)}
    theirs_only = {"ns_coefficients": "original", "algo": algorithm, "eps": 1e-8}
    train(theirs, TimmMuon([dict(theirs.named_parameters())[n] for n in MATRICES], **options, **theirs_only), range(20))
    train(model, {"muon": Muon, "adamuon": AdaMuon}[algorithm](groups(model), **options), range(20))
    for name in MATRICES:
        start, one, other = (dict(m.named_parameters())[name].detach() for m in (before, model, theirs))
        assert relative(one - start, other - start) < 0.02


@pytest.mark.parametrize("build", [Muon, AdaMuon])
def test_state_dict_continues_bit_for_bit(build):
    unbroken = network()
    optimizer = build(groups(unbroken), lr=0.01)
    train(unbroken, optimizer, range(4))
    file = io.BytesIO()
    torch.save((unbroken.state_dict(), optimizer.state_dict()), file)
    train(unbroken, optimizer, range(4, 9))
    resumed = network(seed=1)
    second = build(groups(resumed), lr=0.5)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed.load_state_dict(weights)
    second.load_state_dict(state)
    train(resumed, second, range(4, 9))
    assert all(map(torch.equal, unbroken.parameters(), resumed.parameters()))


@pytest.mark.parametrize("build", [Muon, AdaMuon])
def test_the_memory_format_changes_only_rounding(build):
    first, last = network(), network().to(memory_format=torch.channels_last)
    train(first, build(groups(first), lr=0.01), range(5))
    optimizer = build(groups(last), lr=0.01)
    for step in range(5):
        set_gradients(last, step)
        for parameter in last.parameters():
            parameter.grad = (
                parameter.grad.clone().as_strided_(parameter.shape, parameter.stride()).copy_(parameter.grad)
            )
        optimizer.step()
    assert last["conv"].weight.is_contiguous(memory_format=torch.channels_last)
    for one, other in zip(first.parameters(), last.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("build", [Muon, AdaMuon])
def test_any_strides_of_parameters_and_gradients_take_the_same_step(build):
    """A 3-D convolution in channels last, a permuted 2-D one, and a matrix of no elements."""
    torch.manual_seed(0)
    volumes = torch.randn(8, 4, 2, 2, 3).to(memory_format=torch.channels_last_3d)
    given = [volumes, torch.randn(3, 3, 6, 12).permute(3, 2, 0, 1), torch.randn(0, 5)]
    odd = [torch.nn.Parameter(one.clone()) for one in given]
    plain_ones = [torch.nn.Parameter(one.clone(memory_format=torch.contiguous_format)) for one in given]
    for parameters in (odd, plain_ones):
        optimizer = build(parameters, lr=0.01)
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = (parameter.detach() + 0.1) ** 2
            optimizer.step()
    assert not odd[1].is_contiguous()
    for one, other in zip(odd, plain_ones, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_parameters_without_a_gradient_stay_and_gradients_stay():
    model = network()
    optimizer = Muon(groups(model), lr=0.1)
    set_gradients(model, 0)
    model["hidden"].weight.grad = None
    before = copy.deepcopy(model)
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert torch.equal(model["hidden"].weight, before["hidden"].weight)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is None if gradient is None else torch.equal(parameter.grad, gradient)
    assert float(optimizer.step(lambda: torch.tensor(3.0))) == 3


@pytest.mark.parametrize(
    "wrong",
    [{"lr": -1.0}, {"weight_decay": math.nan}, {"momentum": 1.0}, {"betas": (0.9, 1.0)}, {"adjust_lr_fn": "kimi"}],
)
def test_a_wrong_number_is_an_error_also_in_a_group(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Muon(network().parameters(), **{"lr": 0.1, **wrong})
    optimizer = Muon([{"params": [torch.ones(2, 2)]}], lr=0.1)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        optimizer.add_param_group({"params": [torch.ones(2, 2)], **wrong})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("split", [(), ("optimizer.lr_1d=0.1",)])
def test_the_configured_classifier_takes_adamw_s_step(split):
    from largebatch.models.build import build_model

    config = configuration("optimizer=muon", "model=resnet18", *split)
    model = build_model(config.model, 10, 3)
    optimizer = build_optimizer(config, model, steps_per_epoch=1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    by_muon = {n for n, p in model.named_parameters() if "momentum_buffer" in optimizer.state[p]}
    assert by_muon == {name for name, p in model.named_parameters() if p.ndim == 4}
    assert {n for n, p in model.named_parameters() if "exp_avg" in optimizer.state[p]} == {
        name for name, p in model.named_parameters() if p.ndim != 4
    }
