"""CLARS with sample norms measured on a model."""

import itertools

import pytest
import torch

from largebatch.optim import CLARS, LARS, SampleNorms

SAMPLES = 16


def small_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.Linear(8, 3)
    )


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SAMPLES, 2, 4, 4, generator=generator), torch.randint(0, 3, (SAMPLES,), generator=generator)


def loss(model, images, labels):
    return torch.nn.functional.cross_entropy(model(images), labels)


def trust_ratios(model, images, labels, sample_size, scale=1.0):
    """Return the trust ratios of CLARS, or of LARS if sample_size is None."""
    model.zero_grad()
    if sample_size is None:
        loss(model, images, labels).backward()
        optimizer = LARS(model.parameters(), lr=0.0)
    else:
        optimizer = CLARS(model.parameters(), lr=0.0)
        norms = SampleNorms(model, sample_size, parameters=optimizer.layers)
        (loss(model, images, labels) * scale).backward()
        optimizer.set_sample_norms(norms.means(scale))
        norms.remove()
    optimizer.step()
    return optimizer.layer_stats()["trust_ratio"]


def test_the_trust_ratio_is_the_formula():
    model, (images, labels) = small_model(), batch()
    ratios = trust_ratios(model, images, labels, 1).tolist()
    layers = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    sums = [0.0] * len(layers)
    for i in range(SAMPLES):  # one sample at a time, by torch alone
        gradients = torch.autograd.grad(loss(model, images[i : i + 1], labels[i : i + 1]), layers)
        sums = [total + gradient.double().norm().item() for total, gradient in zip(sums, gradients, strict=True)]
    for ratio, total, layer in zip(ratios, sums, layers, strict=True):
        assert ratio == pytest.approx(1e-3 * layer.detach().double().norm().item() / (total / SAMPLES), rel=1e-5)


def test_the_trust_ratio_grows_with_the_size_of_the_groups_up_to_lars():
    model, (images, labels) = small_model(), batch()
    by_size = [trust_ratios(model, images, labels, size) for size in (1, 2, 4, 8, 16, None)]
    for smaller, larger in itertools.pairwise(by_size[:-1]):
        assert (smaller < larger).all()
    torch.testing.assert_close(by_size[-2], by_size[-1], rtol=1e-5, atol=0)


def test_equal_samples_have_the_trust_ratio_of_lars():
    model, (images, labels) = small_model(), batch()
    images, labels = images[:1].expand_as(images), labels[:1].expand_as(labels)
    torch.testing.assert_close(
        trust_ratios(model, images, labels, 1), trust_ratios(model, images, labels, None), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_scale_of_the_loss_does_not_change_the_trust_ratio(scale):
    model, (images, labels) = small_model(), batch()
    torch.testing.assert_close(
        trust_ratios(model, images, labels, 1, scale), trust_ratios(model, images, labels, 1), rtol=1e-5, atol=0
    )


def test_a_step_without_its_norms_raises_and_changes_nothing():
    model, (images, labels) = small_model(), batch()
    optimizer = CLARS(model.named_parameters(), lr=0.1)
    norms = SampleNorms(model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    loss(model, images, labels).backward()
    with pytest.raises(RuntimeError, match=r"no sample norms of 0\.weight for this step"):
        optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    optimizer.set_sample_norms(norms.means())
    optimizer.step()
    with pytest.raises(RuntimeError, match="for this step"):  # the norms were for one step only
        optimizer.step()


def test_training_reduces_the_loss():
    """A wrong step size of one layer would show in the end."""
    model, (images, labels) = small_model(), batch()
    optimizer = CLARS(model.named_parameters(), lr=1.0, trust_coefficient=0.01)
    norms = SampleNorms(model, parameters=optimizer.layers)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        value = loss(model, images, labels)
        value.backward()
        losses.append(value.item())
        optimizer.set_sample_norms(norms.means())
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]
