"""Settings in which these optimizers equal torch's, timm's, or each other."""

import pytest
import timm.optim
import torch

from largebatch.optim import LAMB, LARS, TVLARS

STEPS = 25


def weights(shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def train(build, shapes, scale=1.0, dtype=torch.float32):
    """Return the parameters after 25 steps with fixed gradients and a changing learning rate."""
    parameters = weights(shapes, dtype)
    optimizer = build(parameters)
    base = optimizer.param_groups[0]["lr"]
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = base * (1 - step / STEPS)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=dtype) * scale
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def assert_close(first, second, tolerance=1e-6):
    for one, other in zip(first, second, strict=True):
        assert torch.linalg.vector_norm(one - other) <= tolerance * torch.linalg.vector_norm(other)


MATRICES = [(6, 3, 3, 3), (12, 8)]
VECTORS = [(7,), (), (12,)]


@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_is_timms_without_decay(nesterov):
    """With decay both differ: ||g + wd*w|| here, ||g|| + wd*||w|| in timm."""
    ours = train(lambda p: LARS(p, lr=2.0, nesterov=nesterov), MATRICES)
    options = {"momentum": 0.9, "trust_coeff": 1e-3, "always_adapt": True, "nesterov": nesterov}
    theirs = train(lambda p: timm.optim.Lars(p, lr=2.0, foreach=False, **options), MATRICES)
    assert_close(ours, theirs)


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lamb_is_timms_without_its_gradient_clipping(weight_decay, bias_correction):
    options = {"weight_decay": weight_decay, "bias_correction": bias_correction}
    ours = train(lambda p: LAMB(p, lr=0.02, **options), MATRICES)
    unclipped = {"max_grad_norm": None, "always_adapt": True, "foreach": False}
    theirs = train(lambda p: timm.optim.Lamb(p, lr=0.02, **options, **unclipped), MATRICES)
    assert_close(ours, theirs)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("lr", [0.002, 2.0])  # with a clip, only the small lr is the limit
def test_lars_with_decay_is_timms_with_its_denominator(lr, clip, nesterov):
    shared = {"lr": lr, "momentum": 0.9, "weight_decay": 0.3, "nesterov": nesterov}
    variant = {"denominator": "sum_of_norms", "eps": 1e-8, "adapt_1d": True, "decay_1d": True}
    larc = {"larc": True, "max_ratio": 1.0} if clip else {}
    shapes = [*MATRICES, (7,), (12,)]
    ours = train(lambda p: LARS(p, trust_coefficient=0.02, **shared, **variant, **larc), shapes)
    options = {"trust_coeff": 0.02, "always_adapt": True, "trust_clip": clip, "foreach": False}
    theirs = train(lambda p: timm.optim.Lars(p, **shared, **options), shapes)
    assert_close(ours, theirs)


def test_groups_with_their_own_options_are_timms_groups():
    """timm scales and decays all parameters of a group with decay, for any dimensions."""

    def groups(parameters, **own):
        return [
            {"params": parameters[::2], "weight_decay": 0.3, **({"adapt": True, "decay_1d": True} if own else {})},
            {"params": parameters[1::2], "weight_decay": 0.0, **({"adapt": False} if own else {})},
        ]

    shapes = [*MATRICES, (7,), (12,)]
    variant = {"denominator": "sum_of_norms", "eps": 1e-8}
    ours = train(lambda p: LARS(groups(p, own=True), lr=0.5, **variant), shapes)
    theirs = train(lambda p: timm.optim.Lars(groups(p), lr=0.5, momentum=0.9, foreach=False), shapes)
    assert_close(ours, theirs)


def test_lambc_is_timms_with_its_clip():
    options = {"lr": 0.02, "weight_decay": 0.1}
    ours = train(lambda p: LAMB(p, max_ratio=1.0, **options), MATRICES)
    unclipped = {"max_grad_norm": None, "always_adapt": True, "foreach": False}
    theirs = train(lambda p: timm.optim.Lamb(p, trust_clip=True, **unclipped, **options), MATRICES)
    assert_close(ours, theirs)
    assert not torch.equal(ours[0], train(lambda p: LAMB(p, **options), MATRICES)[0])


def test_lr_in_momentum_matters_if_the_learning_rate_changes():
    """With a constant learning rate, both forms are equal; with a changing learning rate they differ."""

    def constant(p, **options):
        return LARS(p, lr=0.5, weight_decay=0.1, **options)

    def at_a_constant_lr(**options):
        (weight,) = weights([(12, 8)])
        optimizer = constant([weight], **options)
        generator = torch.Generator().manual_seed(1)
        for _ in range(STEPS):
            weight.grad = torch.randn(12, 8, generator=generator)
            optimizer.step()
        return [weight.detach()]

    assert_close(at_a_constant_lr(lr_in_momentum=True), at_a_constant_lr())
    inside = train(lambda p: constant(p, lr_in_momentum=True), MATRICES)
    outside = train(constant, MATRICES)
    assert (inside[0] - outside[0]).norm() > 1e-3 * outside[0].norm()


@pytest.mark.parametrize("optimizer", [LARS, LAMB])
def test_maximize_is_descent_on_the_negative(optimizer):
    options = {"lr": 0.1, "weight_decay": 0.1}
    up = train(lambda p: optimizer(p, maximize=True, **options), MATRICES + VECTORS)
    down = train(lambda p: optimizer(p, **options), MATRICES + VECTORS, scale=-1.0)
    assert_close(up, down)


def test_fused_foreach_and_one_by_one_steps_are_equal():
    for optimizer in (LARS, TVLARS, LAMB):
        ways = [
            train(lambda p, way=way, optimizer=optimizer: optimizer(p, lr=0.1, weight_decay=0.1, **way), MATRICES)
            for way in ({"fused": True}, {"foreach": True}, {"foreach": False})
        ]
        assert_close(ways[0], ways[1])
        assert_close(ways[1], ways[2])


@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_of_excluded_parameters_is_sgd(nesterov):
    options = {"momentum": 0.9, "weight_decay": 0.1, "nesterov": nesterov}
    ours = train(lambda p: LARS(p, lr=0.02, decay_1d=True, **options), VECTORS)
    theirs = train(lambda p: torch.optim.SGD(p, lr=0.02, **options), VECTORS)
    assert_close(ours, theirs)


def test_lars_does_not_decay_excluded_parameters():
    ours = train(lambda p: LARS(p, lr=0.02, weight_decay=0.1), VECTORS)
    theirs = train(lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9), VECTORS)
    assert_close(ours, theirs)


def test_lars_from_zero_weights_takes_a_plain_sgd_step():
    ours, theirs = torch.nn.Parameter(torch.zeros(4, 5)), torch.nn.Parameter(torch.zeros(4, 5))
    ours.grad = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    theirs.grad = ours.grad.clone()
    LARS([ours], lr=0.1, weight_decay=0.1).step()
    torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=0.1).step()
    assert torch.equal(ours, theirs)


def test_lars_with_zero_gradients_coasts_like_sgd():
    """A zero gradient must not make the ratio infinite; the momentum continues."""
    ours, theirs = torch.nn.Parameter(torch.zeros(4, 5)), torch.nn.Parameter(torch.zeros(4, 5))
    optimizers = LARS([ours], lr=0.1), torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    for step in range(5):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = torch.full((4, 5), 1.0 if step == 0 else 0.0)
            optimizer.step()
    assert_close([ours.detach()], [theirs.detach()])
    assert ours.abs().min() > 0.3


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lamb_of_excluded_parameters_is_adamw(weight_decay):
    """With a factor of 1, the step is w -= lr*(r + wd*w), as in AdamW."""
    options = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": weight_decay}
    ours = train(lambda p: LAMB(p, lr=0.02, decay_1d=True, **options), VECTORS)
    theirs = train(lambda p: torch.optim.AdamW(p, lr=0.02, **options), VECTORS)
    assert_close(ours, theirs)


@pytest.mark.parametrize("constant_one", [{"alpha": 1.0, "gamma_min": 0.5}, {"alpha": 0.0}])
@pytest.mark.parametrize("nesterov", [False, True])
def test_tvlars_with_phi_one_is_lars_bit_for_bit(nesterov, constant_one):
    options = {"lr": 2.0, "weight_decay": 1e-2, "norm_clip": 5.0, "nesterov": nesterov}
    tvlars = train(lambda p: TVLARS(p, lmbda=0.0, **constant_one, **options), MATRICES + VECTORS)
    lars = train(lambda p: LARS(p, **options), MATRICES + VECTORS)
    assert all(torch.equal(one, other) for one, other in zip(tvlars, lars, strict=True))


def test_tvlars_with_phi_constant_is_lars_with_another_coefficient():
    tvlars = train(lambda p: TVLARS(p, lr=2.0, lmbda=0.0, alpha=3.0), MATRICES)
    lars = train(lambda p: LARS(p, lr=2.0, trust_coefficient=1e-3 / 4), MATRICES)
    assert all(torch.equal(one, other) for one, other in zip(tvlars, lars, strict=True))


@pytest.mark.parametrize("scale", [2.0**-20, 1e-6, 1e6])
@pytest.mark.parametrize("optimizer", [LARS, TVLARS])
def test_the_scale_of_the_loss_does_not_change_the_step(optimizer, scale):
    """With adapt_1d every parameter is scaled; without decay only the ratio depends on the gradient's length."""
    plain = train(lambda p: optimizer(p, lr=2.0, adapt_1d=True), MATRICES + VECTORS)
    scaled = train(lambda p: optimizer(p, lr=2.0, adapt_1d=True), MATRICES + VECTORS, scale)
    assert_close(scaled, plain)


@pytest.mark.parametrize("kappa", [2.0, 10.0, 100.0])
def test_lars_on_a_quadratic_is_stable_up_to_its_known_boundary(kappa):
    """Without momentum, f = x'Hx/2 never rises iff rho <= 3*sqrt(3)*k*(k+1)/(k^2+k+1)^1.5, k the condition number.

    The worst point has the part (2k+1)/((k+1)(k^2+k+1)) of its squared length along the steepest direction.
    """
    curvature = torch.tensor([[kappa, 1.0]], dtype=torch.float64)
    part = (2 * kappa + 1) / ((kappa + 1) * (kappa**2 + kappa + 1))
    boundary = 3 * 3**0.5 * kappa * (kappa + 1) / (kappa**2 + kappa + 1) ** 1.5

    def change(rho):
        point = torch.nn.Parameter(torch.tensor([[part**0.5, (1 - part) ** 0.5]], dtype=torch.float64))
        before = (curvature * point**2).sum().item()
        point.grad = (curvature * point).detach()
        LARS([point], lr=1.0, momentum=0.0, trust_coefficient=rho).step()
        return (curvature * point**2).sum().item() - before

    assert change(boundary * 0.999) < 0 < change(boundary * 1.001)
