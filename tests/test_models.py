"""Models: shapes, stems, sizes, and weight initialisation that really happens."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import configuration
from torch import nn

from largebatch.errors import UserError
from largebatch.models import build_model


def build(*overrides: str, num_classes: int = 10, channels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return build_model(configuration(*overrides).model, num_classes, channels)


def test_smallcnn_has_about_65k_parameters() -> None:
    assert 60_000 < sum(p.numel() for p in build("model=smallcnn", channels=1).parameters()) < 70_000


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


def test_imagenet_stem_is_torchvision_s_own() -> None:
    from torchvision import models

    torch.manual_seed(0)
    theirs = models.resnet18(num_classes=10).state_dict()
    ours = build("model=resnet18").state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_timm_models_by_name() -> None:
    model = build("model=timm", "model.name=resnet10t", "+model.options.drop_rate=0.25", num_classes=7, channels=1)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert getattr(model, "drop_rate") == 0.25  # noqa: B009


def test_an_unknown_timm_model_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"model\.name=resnet18x: timm has no such model; .* did you mean resnet18"):
        build("model=timm", "model.name=resnet18x")


def test_options_that_timm_refuses_are_named() -> None:
    with pytest.raises(UserError, match=r"model\.options=.*depthh"):
        build("model=timm", "model.name=resnet10t", "+model.options.depthh=3")


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and isinstance(module.weight, nn.Parameter)
    }


@pytest.mark.parametrize("name", ["smallcnn", "resnet18", "effb0"])
@pytest.mark.parametrize("init", ["xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal"])
def test_initialisation_changes_every_weight_and_has_its_spread(name: str, init: str) -> None:
    """Standard deviations by the papers' formulas: Xavier sqrt(2 / (fan_in + fan_out)), Kaiming sqrt(2 / fan_in)."""
    default, chosen = build(f"model={name}"), build(f"model={name}", f"model.init={init}")
    before, after = weights(default), weights(chosen)
    assert len(after) >= 5
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
