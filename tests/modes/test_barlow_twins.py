"""Barlow Twins' model and loss, backbones without classifier, and batches that don't divide evenly."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import TINY, configuration
from torch import Tensor, nn

from largebatch.config.batch import plan_training
from largebatch.data import load_data
from largebatch.errors import UserError
from largebatch.models.build import build_backbone, build_model
from largebatch.modes import bt

IMAGE = (3, 32, 32)


def small_model(*overrides: str) -> bt.BarlowTwins:
    torch.manual_seed(0)
    backbone, features = build_backbone(configuration("model=smallcnn", *overrides).model, (1, 8, 8))
    return bt.BarlowTwins(backbone, features, [12, 10, 6])


def some_images(n: int) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))


# -- model and loss


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_each_view_has_its_own_batch_statistics(norm: str) -> None:
    model = small_model(f"model.norm={norm}").train()
    apart, together = copy.deepcopy(model), copy.deepcopy(model)
    one, two = some_images(7), 3 * some_images(7) + 1
    got = model(torch.cat([one, two]))
    assert got.shape == (14, 6)
    expected = torch.cat([apart.projector(apart.backbone(view)) for view in (one, two)])
    assert torch.equal(got, expected)
    for name, buffer in apart.named_buffers():
        assert torch.equal(dict(model.named_buffers())[name], buffer), name
    as_one = together.projector(together.backbone(torch.cat([one, two])))
    assert (got - as_one).abs().max() > 0.1


def test_a_stage_is_batch_norm_relu_and_linear() -> None:
    torch.manual_seed(0)
    stage, values = bt.Stage(6, 4).train(), 5 * torch.randn(9, 6) + 2
    nn.init.uniform_(stage.norm.weight, 0.5, 1.5)
    nn.init.normal_(stage.norm.bias)
    deviation = (values.var(0, correction=0) + 1e-5).sqrt()
    normed = (values - values.mean(0)) / deviation * stage.norm.weight + stage.norm.bias
    expected = normed.clamp(min=0) @ stage.linear.weight.T
    torch.testing.assert_close(stage(values), expected)
    torch.testing.assert_close(stage.from_standardised(bt.standardised(values)), expected)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["micro_batch=1"], "batch_norm_size=1: model.name=resnet18"),
        (["mode.lr_backbone=0.1", "mode.eval_batch_size=1"], "mode.eval_batch_size=1: model.name=resnet18"),
        (["mode.lr_backbone=0.1", "mode.eval_batch_size=3", "micro_batch=2"], "mode.eval_batch_size=3: model.name"),
        (["mode.eval_batch_size=1"], ""),
        (["micro_batch=1", "dataset.image_size=64"], ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_batch_norm_over_one_value_is_refused_before_training(overrides: list[str], message: str) -> None:
    """Fine-tuning has groups of images too: three images in groups of at most two are one and two."""
    config = configuration(*TINY, "mode=bt", "model=resnet18", "batch_size=8", "precision=fp32", *overrides)
    plan_training(config, 1)
    data = load_data(config.dataset, 0)
    if message:
        with pytest.raises(UserError, match=message):
            bt.build_model(config, data)
    else:
        bt.build_model(config, data)


@pytest.mark.parametrize("widths", [[8], [8, 6], [12, 8, 6]], ids=str)
def test_projector_has_linear_layers_of_the_given_widths_without_bias(widths: list[int]) -> None:
    projector = bt.Projector(5, widths)
    assert projector(torch.randn(4, 5)).shape == (4, widths[-1])
    shapes = [tuple(layer.weight.shape) for layer in projector.modules() if isinstance(layer, nn.Linear)]
    assert shapes == list(zip(widths, [5, *widths], strict=False))
    norms = [layer.num_features for layer in projector.modules() if isinstance(layer, nn.BatchNorm1d)]
    assert norms == widths[:-1]
    parameters = sum(parameter.numel() for parameter in projector.parameters())
    assert parameters == sum(a * b for a, b in shapes) + 2 * sum(norms)


def in_float64(one: Tensor, two: Tensor, lmbda: float) -> tuple[float, float, float]:
    """Return loss, on-diagonal and off-diagonal part of two views' embeddings, computed number by number."""
    columns = []
    for view in (one, two):
        columns.append([])
        for column in view.double().T.tolist():
            mean = sum(column) / len(column)
            deviation = math.sqrt(sum((value - mean) ** 2 for value in column) / len(column) + 1e-5)
            columns[-1].append([(value - mean) / deviation for value in column])
    on_diagonal, off_diagonal = 0.0, 0.0
    for i, first in enumerate(columns[0]):
        for j, second in enumerate(columns[1]):
            correlation = sum(a * b for a, b in zip(first, second, strict=True)) / len(first)
            if i == j:
                on_diagonal += (1 - correlation) ** 2
            else:
                off_diagonal += correlation**2
    return on_diagonal + lmbda * off_diagonal, on_diagonal, off_diagonal


@pytest.mark.parametrize("images", [2, 5, 16])
def test_loss_of_a_micro_batch_equals_the_formula(images: int) -> None:
    config = configuration("mode=bt", "mode.lmbda=0.02", "mode.loss_scale=0.3")
    model = small_model().train()
    views = torch.cat([some_images(images), 0.7 * some_images(images).flip(2) + 0.1])
    value, totals = bt.loss(config, model, views, torch.zeros(images).long())
    one, two = copy.deepcopy(model).double()(views.double()).detach().chunk(2)
    expected = in_float64(one, two, 0.02)
    assert float(value.detach()) == pytest.approx(0.3 * expected[0], rel=1e-5)
    assert totals.dtype == torch.float64
    assert not totals.requires_grad
    assert totals.tolist() == pytest.approx(
        [images * 0.3 * expected[0], images * expected[1], images * expected[2], images], rel=1e-5
    )


def test_loss_is_computed_in_fp32_under_autocast() -> None:
    config = configuration("mode=bt")
    embeddings = torch.randn(32, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value, _ = bt.loss(config, lambda images: images, embeddings, torch.zeros(16))
    one, two = embeddings.chunk(2)
    assert value.dtype == torch.float32
    scale = config.mode.loss_scale
    assert float(value) == pytest.approx(scale * in_float64(one, two, 0.005)[0], rel=1e-5)


def test_loss_is_0_for_equal_uncorrelated_views_and_d_for_constant_views() -> None:
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    correlation = bt.standardised(signs).T @ bt.standardised(signs) / 4
    assert float(bt.barlow_loss(correlation, 0.1)[0]) == pytest.approx(0, abs=1e-6)
    constant = bt.standardised(torch.full((4, 2), 0.5))
    assert float(bt.barlow_loss(constant.T @ constant / 4, 0.1)[0]) == 2


def test_train_metrics_are_means_over_images() -> None:
    parts = (torch.tensor(5.0), torch.tensor(3.0), torch.tensor(20.0))
    others = (torch.tensor(8.0), torch.tensor(6.0), torch.tensor(20.0))
    totals = bt.counted(0.1, parts, 30) + bt.counted(0.1, others, 10)
    assert bt.train_metrics(totals.tolist()) == pytest.approx(
        {"train/loss": 0.575, "train/on_diagonal": 3.75, "train/off_diagonal": 20.0}
    )


# -- backbones


@pytest.mark.parametrize(
    ("model", "features"),
    [
        (["model=smallcnn"], 64),
        (["model=resnet18"], 512),
        (["model=resnet50", "model.stem=cifar"], 2048),
        (["model=effb0"], 1280),
        (["model=timm", "model.name=resnet10t"], 512),
        (["model=timm", "model.name=test_vit", "+model.options.img_size=32"], 64),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_backbone_is_the_model_without_its_classifier(model: list[str], features: int) -> None:
    config = configuration(*model).model
    torch.manual_seed(0)
    backbone, width = build_backbone(config, IMAGE)
    assert width == features
    assert backbone.training
    torch.manual_seed(0)
    whole = build_model(config, num_classes=1, channels=3)
    for name, buffer in whole.named_buffers():  # running statistics keep their initial values
        assert torch.equal(dict(backbone.named_buffers())[name], buffer), name
    images = torch.randn(3, *IMAGE)
    found = backbone.eval()(images)
    assert found.shape == (3, features)
    ours, theirs = (dict(network.named_parameters()) for network in (backbone, whole))
    gone = set(theirs) - set(ours)
    assert {name.split(".")[0] for name in gone} <= {"fc", "classifier", "head"}
    assert sorted(tuple(theirs[name].shape) for name in gone) == [(1,), (1, features)]
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    weight, bias = (next(theirs[name] for name in gone if name.endswith(end)) for end in ("weight", "bias"))
    torch.testing.assert_close(found @ weight.T + bias, whole.eval()(images), rtol=1e-4, atol=1e-5)


def test_timm_s_pooling_is_kept() -> None:
    model = ("model=timm", "model.name=resnet10t", "+model.options.global_pool=catavgmax")
    assert build_backbone(configuration(*model).model, IMAGE)[1] == 1024


def test_a_model_without_a_feature_vector_is_rejected() -> None:
    model = ("model=timm", "model.name=resnet10t", "+model.options.global_pool=''")
    with pytest.raises(UserError, match=r"model\.name=resnet10t: .*\[2, 512, 1, 1\].*model\.options\.global_pool"):
        build_backbone(configuration(*model).model, IMAGE)


def test_a_model_that_rejects_the_images_is_named_with_their_size() -> None:
    config = configuration("mode=bt", "model=timm", "model.name=efficientformer_l1").model
    with pytest.raises(UserError, match=r"model\.name=efficientformer_l1: can't take images of 3x32x32"):
        build_backbone(config, (3, 32, 32))
