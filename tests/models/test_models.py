"""Shapes, stems and sizes of models, and the initialisation of their weights."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import ROOT, configuration
from torch import nn

from largebatch.errors import UserError
from largebatch.models.build import build_backbone, build_model, check_batch_norm, tried
from largebatch.models.resnet import RESNETS, resnet


def build(*overrides: str, num_classes: int = 10, channels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return build_model(configuration(*overrides).model, num_classes, channels)


def test_smallcnn_has_about_65k_parameters() -> None:
    assert 60_000 < sum(p.numel() for p in build("model=smallcnn", channels=1).parameters()) < 70_000


@pytest.mark.parametrize("size", [5, 8, 16, 64])
def test_tinycnn_takes_images_of_any_size(size: int) -> None:
    model = build("model=tinycnn", num_classes=7, channels=1)
    assert model(torch.randn(2, 1, size, size)).shape == (2, 7)
    backbone, features = build_backbone(configuration("model=tinycnn").model, (1, size, size))
    assert backbone(torch.randn(2, 1, size, size)).shape == (2, features) == (2, 256)


@pytest.mark.parametrize("size", [7, 8, 28, 64])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_smallcnn_takes_images_of_any_size(size: int, norm: str) -> None:
    model = build("model=smallcnn", f"model.norm={norm}", num_classes=7, channels=1)
    assert model(torch.randn(2, 1, size, size)).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "effb0"])
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("channels", [1, 3])
def test_torchvision_models_fit_classes_and_channels(name: str, stem: str, channels: int) -> None:
    model = build(f"model={name}", f"model.stem={stem}", num_classes=7, channels=channels).eval()
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    assert first.in_channels == channels
    assert first.stride == ((1, 1) if stem == "cifar" else (2, 2))
    assert model(torch.randn(2, channels, 32, 32)).shape == (2, 7)


def equal(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Return True if names, their order and all values are equal bit for bit."""
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def ours_and_torchvision_s(name: str, num_classes: int) -> tuple[nn.Module, nn.Module]:
    """Build both models with the same seed."""
    from torchvision import models

    torch.manual_seed(0)
    ours = resnet(name, num_classes)
    torch.manual_seed(0)
    return ours, getattr(models, name)(num_classes=num_classes)


@pytest.mark.parametrize("name", RESNETS)
def test_our_resnets_equal_torchvision_s_bit_for_bit(name: str) -> None:
    """Compare initial weights, outputs, gradients and running statistics."""
    ours, theirs = ours_and_torchvision_s(name, num_classes=7)
    assert equal(ours.state_dict(), theirs.state_dict())
    assert {n for n, _ in ours.named_modules()} == {n for n, _ in theirs.named_modules()}
    images = torch.randn(3, 3, 64, 64)
    outputs = [model(images) for model in (ours, theirs)]  # in training mode
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().mean().backward()
    gradients = [{n: p.grad for n, p in model.named_parameters()} for model in (ours, theirs)]
    assert equal(*gradients)
    assert equal(ours.state_dict(), theirs.state_dict())
    assert torch.equal(ours.eval()(images), theirs.eval()(images))


@pytest.mark.parametrize("name", RESNETS)
def test_initial_weights_equal_those_of_torchvision_s_constructor(name: str) -> None:
    """The CIFAR stem is drawn last, so that it doesn't change the other weights."""
    assert equal(build(f"model={name}").state_dict(), ours_and_torchvision_s(name, num_classes=10)[1].state_dict())
    _, theirs = ours_and_torchvision_s(name, num_classes=10)
    stem = nn.Conv2d(1, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    cifar = build(f"model={name}", "model.stem=cifar", channels=1).state_dict()
    assert equal(cifar, theirs.state_dict() | {"conv1.weight": stem.weight.detach()})


def test_a_resnet_is_built_without_torchvision_and_the_compiler() -> None:
    """Importing them takes longer than building the network."""
    program = """
import sys
from largebatch.config.models import ResNet
from largebatch.models.build import build_model
model = build_model(ResNet(name="resnet18"), 10, 3)
assert sum(p.numel() for p in model.parameters()) == 11_181_642
print([name for name in ("torchvision", "torch._dynamo") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout == "[]\n", result.stderr


def test_timm_models_by_name() -> None:
    model = build("model=timm", "model.name=resnet10t", "+model.options.drop_rate=0.25", num_classes=7, channels=1)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert getattr(model, "drop_rate") == 0.25  # noqa: B009


def test_an_unknown_timm_model_raises_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"model\.name=resnet18x: timm has no such model; .* did you mean resnet18"):
        build("model=timm", "model.name=resnet18x")


def test_options_that_timm_rejects_are_named() -> None:
    with pytest.raises(UserError, match=r"model\.options=.*depthh"):
        build("model=timm", "model.name=resnet10t", "+model.options.depthh=3")


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and isinstance(module.weight, nn.Parameter)
    }


@pytest.mark.parametrize("name", ["smallcnn", "tinycnn", "resnet18", "effb0"])
@pytest.mark.parametrize("init", ["xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal"])
def test_initialisation_draws_every_weight_with_the_papers_deviation(name: str, init: str) -> None:
    """Standard deviations in the papers: Xavier sqrt(2 / (fan_in + fan_out)), Kaiming sqrt(2 / fan_in)."""
    default, chosen = build(f"model={name}"), build(f"model={name}", f"model.init={init}")
    before, after = weights(default), weights(chosen)
    assert len(after) >= 4
    for layer, weight in after.items():
        assert not torch.equal(weight, before[layer]), layer
        fan_in, fan_out = weight[0].numel(), weight.shape[0] * weight[0, 0].numel()
        expected = math.sqrt(2 / (fan_in + fan_out)) if init.startswith("xavier") else math.sqrt(2 / fan_in)
        if weight.numel() > 2000:
            assert float(weight.detach().std()) == pytest.approx(expected, rel=0.1), layer
        bound = math.sqrt(3) * expected
        if init.endswith("uniform"):
            assert float(weight.detach().abs().max()) <= bound * 1.0001, layer
        elif weight.numel() > 2000:
            assert float(weight.detach().abs().max()) > bound, layer


def test_norm_layers_keep_their_initialisation() -> None:
    model = build("model=resnet18", "model.init=xavier_normal")
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all(bool((norm.weight == 1).all()) for norm in norms)


def test_a_model_that_does_not_take_the_images_is_refused_before_training() -> None:
    config = configuration("model=timm", "model.name=vit_tiny_patch16_224").model
    with pytest.raises(UserError, match=r"vit_tiny_patch16_224: can't take images of 3x32x32.*img_size=32"):
        tried(config, build_model(config, 4, 3), (3, 32, 32))


def test_batch_norm_over_one_value_is_refused_before_training() -> None:
    config = configuration("model=resnet18").model
    model = build_model(config, 4, 3)
    before = [buffer.clone() for buffer in model.buffers()]
    with pytest.raises(UserError, match=r"batch_norm_size=1: .*Fix: a larger batch_norm_size, micro_batch or dataset"):
        check_batch_norm(config, model, (3, 16, 16), 1)
    check_batch_norm(config, model, (3, 64, 64), 1)
    check_batch_norm(config, model, (3, 16, 16), 2)
    assert all(map(torch.equal, before, model.buffers()))
