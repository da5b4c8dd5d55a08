"""LARS, TVLARS, LAMB and MERIT behave as optimizers of torch.optim."""

import copy
import io
import math

import pytest
import torch

from largebatch.optim import LAMB, LARS, MERIT, TVLARS

ALL = pytest.mark.parametrize(
    "build",
    [
        lambda params, **options: LARS(params, lr=0.5, weight_decay=1e-2, **options),
        lambda params, **options: TVLARS(params, lr=0.5, weight_decay=1e-2, lmbda=0.1, delay=4, **options),
        lambda params, **options: LAMB(params, lr=0.01, **options),
        lambda params, **options: MERIT(params, lr=0.01, **options),
    ],
    ids=["lars", "tvlars", "lamb", "merit"],
)


def small_model(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3)).to(dtype)


def backward(model, step):
    """Compute gradients of a loss that depends on the model and the step number only."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(16, 6, generator=generator).to(next(model.parameters()).dtype)
    labels = torch.randint(0, 3, (16,), generator=generator)
    model.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    return loss


def train(model, optimizer, steps):
    for step in steps:
        backward(model, step)
        optimizer.step()


def assert_equal(first, second):
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_state_dict_continues_bit_for_bit(build, dtype):
    """The state goes through a file into a new optimizer with other hyper-parameters."""
    unbroken = small_model(dtype=dtype)
    optimizer = build(unbroken.named_parameters())
    train(unbroken, optimizer, range(7))
    file = io.BytesIO()
    torch.save((unbroken.state_dict(), optimizer.state_dict()), file)
    train(unbroken, optimizer, range(7, 20))

    resumed = small_model(seed=1, dtype=dtype)
    second = build(resumed.named_parameters(), adapt_1d=True)
    file.seek(0)
    weights, state = torch.load(file)
    resumed.load_state_dict(weights)
    second.load_state_dict(state)
    train(resumed, second, range(7, 20))
    assert_equal(unbroken, resumed)
    assert str(second.state_dict()) == str(optimizer.state_dict())


@ALL
def test_a_deep_copy_continues_bit_for_bit(build):
    model = small_model()
    optimizer = build(model.parameters())
    train(model, optimizer, range(3))
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    assert all(value.isnan().all() for value in twin_optimizer.layer_stats().values())
    train(model, optimizer, range(3, 6))
    train(twin, twin_optimizer, range(3, 6))
    assert_equal(model, twin)


@ALL
def test_closure(build):
    """The step calls the closure once, with gradients enabled, and returns its loss."""
    plain, model = small_model(), small_model()
    optimizer = build(model.parameters())
    losses = [optimizer.step(lambda step=step: backward(model, step)) for step in range(3)]
    assert losses[0] == backward(small_model(), 0)
    train(plain, build(plain.parameters()), range(3))
    assert_equal(plain, model)


@ALL
def test_gradients_are_not_changed(build):
    model = small_model()
    optimizer = build(model.parameters(), adapt_1d=True, decay_1d=True, norm_clip=0.1)
    train(model, optimizer, range(2))
    backward(model, 2)
    before = [parameter.grad.clone() for parameter in model.parameters()]
    optimizer.step()
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, gradient)


@ALL
def test_lr_is_read_from_the_group_at_each_step(build):
    model = small_model()
    optimizer = build(model.parameters())
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2], gamma=0.0)
    for step in range(4):
        before = copy.deepcopy(model.state_dict())
        train(model, optimizer, [step])
        moved = any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert moved == (step < 2)
        schedule.step()


@ALL
def test_parameters_without_gradient_are_skipped(build):
    model = small_model()
    optimizer = build(model.named_parameters())
    model[0].requires_grad_(False)
    before = copy.deepcopy(model[0].state_dict())
    train(model, optimizer, range(3))
    assert all(torch.equal(value, before[name]) for name, value in model[0].state_dict().items())
    stats = optimizer.layer_stats()
    assert optimizer.layer_names == ["0.weight", "2.weight"]
    for value in stats.values():
        assert value[0].isnan()
        assert value[1] > 0


@ALL
def test_a_group_added_later_may_have_options_of_its_own(build):
    model = small_model()
    optimizer = build(model[0].named_parameters(prefix="first"))
    backward(model, 0)
    optimizer.step()
    last = {"params": model[2].named_parameters(prefix="last"), "lr": 0.0}
    optimizer.add_param_group(last)
    optimizer.add_param_group({"params": model[1].named_parameters(prefix="norm"), "adapt_1d": True})
    before = model[2].weight.clone()
    train(model, optimizer, range(1, 3))
    assert torch.equal(model[2].weight, before)
    assert optimizer.layer_names == ["first.weight", "last.weight", "norm.weight", "norm.bias"]
    assert optimizer.layer_stats()["trust_ratio"].shape == (4,)
    twin, state = small_model(), copy.deepcopy(optimizer.state_dict())
    second = build(twin[0].named_parameters(prefix="first"))
    second.add_param_group({"params": twin[2].named_parameters(prefix="last")})
    second.add_param_group({"params": twin[1].named_parameters(prefix="norm")})
    twin.load_state_dict(model.state_dict())
    second.load_state_dict(state)
    train(model, optimizer, range(3, 6))
    train(twin, second, range(3, 6))
    assert_equal(model, twin)


def test_a_group_added_later_has_the_optimizers_step_count():
    model = small_model()
    optimizer = TVLARS(model[0].parameters(), lr=0.5, momentum=0.0, trust_coefficient=1.0, lmbda=0.2)
    train(model, optimizer, range(5))
    optimizer.add_param_group({"params": model[2].parameters()})
    backward(model, 5)
    weight = model[2].weight
    norms = torch.linalg.vector_norm(weight.detach()) / torch.linalg.vector_norm(weight.grad)
    optimizer.step()
    assert optimizer.layer_stats()["trust_ratio"][1].item() == pytest.approx(optimizer.phi(6) * norms.item(), rel=1e-5)


def test_phi_advances_while_a_parameter_has_no_gradient():
    """TVLARS counts optimizer steps, so phi doesn't restart for a layer that was frozen for a while."""
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = TVLARS([weight], lr=0.1, momentum=0.0, trust_coefficient=1.0, lmbda=0.5)
    for _ in range(9):
        optimizer.step()
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    assert optimizer.layer_stats()["trust_ratio"].item() == pytest.approx(optimizer.phi(10), rel=1e-6)


def test_lamb_corrects_the_bias_of_each_parameters_own_moments():
    """The first gradient has the same effect at any step, as in AdamW."""
    early, late = torch.nn.Parameter(torch.ones(3, 3)), torch.nn.Parameter(torch.ones(3, 3))
    optimizer = LAMB([early, late], lr=0.1)
    early.grad = torch.full((3, 3), 2.0)
    optimizer.step()
    first = early.detach().clone()
    early.grad, late.grad = None, torch.full((3, 3), 2.0)
    optimizer.step()
    assert torch.equal(late, first)


@ALL
def test_layer_stats(build):
    """NaN before the first step, then the norms of the weight before the step and of the gradient itself."""
    model = small_model()
    optimizer = build(model.parameters(), norm_clip=0.01)
    assert optimizer.layer_names == ["param_0", "param_4"]  # counted over all parameters
    for value in optimizer.layer_stats().values():
        assert value.shape == (2,)
        assert value.isnan().all()
    train(model, optimizer, range(2))
    backward(model, 2)
    layers = [model[0].weight, model[2].weight]
    expected = {
        "weight_norm": [layer.detach().double().norm().item() for layer in layers],
        "gradient_norm": [layer.grad.double().norm().item() for layer in layers],
    }
    optimizer.step()
    stats = optimizer.layer_stats()
    assert stats.keys() == {"weight_norm", "gradient_norm", "trust_ratio"}
    for key, values in expected.items():
        assert stats[key].tolist() == pytest.approx(values, rel=1e-6)


def test_no_layers_at_all():
    optimizer = LARS([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    assert optimizer.layer_names == []
    assert all(value.shape == (0,) for value in optimizer.layer_stats().values())


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_follow_the_fp32_trajectory(build, dtype):
    """Only the stored weight is rounded, even for gradients whose squares vanish in fp16."""
    generator = torch.Generator().manual_seed(0)
    rows = [(torch.randn(16, 16, generator=generator) * 2e-5).to(dtype) for _ in range(10)]
    half = torch.nn.Parameter(torch.randn(16, 16, generator=generator).to(dtype))
    full = torch.nn.Parameter(half.detach().float())
    half_optimizer, full_optimizer = build([half]), build([full])
    for row in rows:
        full.data.copy_(half.data)  # the same start for each step, so that one rounding is the only difference
        half.grad, full.grad = row.clone(), row.float()
        half_optimizer.step()
        full_optimizer.step()
        assert half.dtype == dtype
        assert torch.equal(half, full.to(dtype))
    state = half_optimizer.state[half]
    assert all(value.dtype == torch.float32 for value in state.values() if isinstance(value, torch.Tensor))
    for key, value in half_optimizer.layer_stats().items():
        assert value.tolist() == pytest.approx(full_optimizer.layer_stats()[key].tolist(), rel=1e-6)


@ALL
def test_channels_last_weights_take_the_same_steps(build):
    generator = torch.Generator().manual_seed(0)
    start, gradient = torch.randn(4, 3, 5, 5, generator=generator), torch.randn(4, 3, 5, 5, generator=generator)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        weight = torch.nn.Parameter(start.clone().to(memory_format=memory_format))
        optimizer = build([weight])
        for _ in range(3):
            weight.grad = gradient.to(memory_format=memory_format)
            optimizer.step()
        results.append(weight.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)


@ALL
def test_sparse_and_complex_gradients_raise_with_the_parameters_name(build):
    before = torch.ones(3, 2)
    dense, embedding = torch.nn.Parameter(before.clone()), torch.nn.Embedding(5, 2, sparse=True)
    optimizer = build([("dense", dense), ("embedding", embedding.weight)])
    dense.grad = torch.ones(3, 2)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="embedding is sparse"):
        optimizer.step()
    assert torch.equal(dense, before)
    wave = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    wave.grad = torch.ones_like(wave)
    with pytest.raises(RuntimeError, match="wave is complex"):
        build([("wave", wave)]).step()


BAD_EVERYWHERE = [
    ("lr", -0.1),
    ("lr", math.nan),
    ("lr", math.inf),
    ("lr", "fast"),
    ("lr", torch.ones(2)),
    ("max_ratio", 0.0),
    ("max_ratio", math.nan),
    ("adapt", "yes"),
    ("fused", "always"),
]
BAD_LARS = [
    *BAD_EVERYWHERE,
    ("momentum", 1.0),
    ("momentum", -0.1),
    ("momentum", math.nan),
    ("weight_decay", -1e-4),
    ("weight_decay", math.nan),
    ("trust_coefficient", 0.0),
    ("trust_coefficient", math.nan),
    ("norm_clip", 0.0),
    ("norm_clip", math.nan),
    ("eps", -1e-8),
    ("denominator", "sum"),
]
BAD_TVLARS = [
    *BAD_LARS,
    ("lmbda", -1e-3),
    ("lmbda", math.nan),
    ("alpha", -1.0),
    ("alpha", math.inf),
    ("delay", -1),
    ("delay", math.nan),
    ("gamma_min", -0.1),
    ("gamma_min", "auto"),
]
BAD_LAMB = [
    *BAD_EVERYWHERE,
    ("betas", (0.9, 1.0)),
    ("betas", (-0.1, 0.9)),
    ("betas", (0.9, math.nan)),
    ("betas", 0.9),
    ("betas", (0.9,)),
    ("eps", -1e-8),
    ("weight_decay", -0.1),
    ("norm_clip", -10.0),
]


@pytest.mark.parametrize(
    ("optimizer", "option", "value"),
    [
        *((LARS, option, value) for option, value in BAD_LARS),
        *((TVLARS, option, value) for option, value in BAD_TVLARS),
        *((LAMB, option, value) for option, value in BAD_LAMB),
    ],
)
def test_an_invalid_hyper_parameter_raises_with_its_name(optimizer, option, value):
    """Set for all groups, or in one group."""
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match=option):
        optimizer([parameter], **{"lr": 0.1, option: value})
    with pytest.raises(ValueError, match=option):
        optimizer([{"params": [parameter], option: value}], lr=0.1)


@ALL
def test_foreach_and_fused_exclude_each_other(build):
    with pytest.raises(ValueError, match="foreach=True and fused=True"):
        build([torch.nn.Parameter(torch.ones(2, 2))], foreach=True, fused=True)


def test_larc_needs_a_limit():
    with pytest.raises(ValueError, match="max_ratio"):
        LARS([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1, larc=True)


def test_nesterov_needs_momentum():
    with pytest.raises(ValueError, match="nesterov"):
        LARS([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1, momentum=0.0, nesterov=True)


def test_an_invalid_group_is_not_added():
    optimizer = LARS([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1)
    with pytest.raises(ValueError, match="momentum"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, 2))], "momentum": 2.0})
    assert len(optimizer.param_groups) == 1
