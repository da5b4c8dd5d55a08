"""Models: two small networks, ResNets, torchvision's and timm's models; their stems and weight initialisation."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, cast

import torch
from torch import Tensor, nn

from largebatch.config.models import CustomModel, EfficientNet, ModelConfig, ResNet, SmallCnn, TimmModel, TinyCnn
from largebatch.errors import UserError
from largebatch.models.resnet import resnet


def build_model(config: ModelConfig, num_classes: int, channels: int, image_size: int | None = None) -> nn.Module:
    """Build a classifier from float images [B, channels, H, W] to logits [B, num_classes], randomly initialised.

    ``config.init`` draws the weights of convolutions and linear layers; biases and norm layers don't change. Only a
    user's own class gets ``image_size``, the number of pixels of a side.

    Raises:
        UserError: for a name that timm doesn't know, arguments that timm rejects, or as ``Custom.call``.
    """
    if isinstance(config, TimmModel):
        model = _timm(config, num_classes, channels)
    elif isinstance(config, CustomModel):
        model = _custom(config, num_classes, channels, image_size)
    elif isinstance(config, SmallCnn):
        model = _smallcnn(config, num_classes, channels)
    elif isinstance(config, TinyCnn):
        model = _tinycnn(num_classes, channels)
    else:
        assert isinstance(config, EfficientNet)
        model = _torchvision_family(config, num_classes, channels)
    if config.init != "default":
        for module in model.modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
                getattr(nn.init, f"{config.init}_")(module.weight)  # Kaiming: ReLU's gain
    return model


def build_backbone(config: ModelConfig, image: tuple[int, int, int]) -> tuple[nn.Module, int]:
    """Build a model without its classifier, from images [B, *image] to features [B, F]; return it and F.

    Raises:
        UserError: as ``build_model``, and for a timm model that returns no vector of features.
    """
    model = build_model(config, num_classes=1, channels=image[0], image_size=image[1])
    if isinstance(config, TimmModel):
        cast(Any, model).reset_classifier(0)
    else:
        names = head_names(config, model)
        if not names:
            raise UserError(
                f"model.name={config.name}: has no layer named head, classifier or fc, which mode=bt takes away to get "
                "features. Fix: give the last layer of the class such a name"
            )
        setattr(model, names[0], nn.Identity())
    features = tried(config, model, image)
    if features.ndim != 2:
        raise UserError(
            f"model.name={config.name}: its features of two images have the shape {list(features.shape)}, and Barlow "
            "Twins needs one vector per image; choose a model with pooling (model.options.global_pool)"
        )
    return model, features.shape[1]


def head_names(config: ModelConfig, model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules that make logits from features; none if the model doesn't name them."""
    if isinstance(config, TimmModel):
        named = cast(Any, model).pretrained_cfg.get("classifier") or ()
        return (named,) if isinstance(named, str) else tuple(named)
    return tuple(name for name in ("head", "classifier", "fc") if hasattr(model, name))[:1]


def tried(config: ModelConfig, model: nn.Module, image: tuple[int, int, int]) -> Tensor:
    """Return the outputs of ``model`` for two images, without a change of running statistics.

    Raises:
        UserError: if the model can't take such images.
    """
    model.eval()
    try:
        with torch.no_grad():
            outputs = model(torch.zeros(2, *image))
        if not isinstance(outputs, Tensor):
            raise TypeError(f"it returns a {type(outputs).__name__} instead of a tensor")
    except Exception as error:  # any model can be given
        if isinstance(config, CustomModel):
            error.add_note(f"{config.key}, with images of {'x'.join(map(str, image))}")
            raise
        raise UserError(
            f"model.name={config.name}: can't take images of {'x'.join(map(str, image))} ({str(error).strip()}). "
            "Fix: another dataset.image_size or model; many timm models take +model.options.img_size="
            f"{image[1]}"
        ) from error
    finally:
        model.train()
    return outputs


def check_batch_norm(
    config: ModelConfig, model: nn.Module, image: tuple[int, int, int], size: int | None, given: str = ""
) -> None:
    """Raise ``UserError`` if batch norm over ``size`` images would get a single value per channel.

    ``given``: the key and value that give this size. Default: ``batch_norm_size``.
    """
    if size != 1:
        return
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            copy.deepcopy(model).train()(torch.zeros(1, *image))
    except ValueError as error:
        key = given.partition("=")[0] or "batch_norm_size, micro_batch"
        raise UserError(
            f"{given or 'batch_norm_size=1'}: model.name={config.name} has batch norm over one value per channel with "
            f"images of {'x'.join(map(str, image))} ({error}). Fix: a larger {key} or dataset.image_size"
        ) from error


def _smallcnn(config: SmallCnn, num_classes: int, channels: int) -> nn.Module:
    """Build four 3x3 convolutions (65,834 parameters on grey images with ten classes) and global average pooling.

    All parts are smooth (GELU, average pooling), so that rounding differences between one process and two stay below
    1e-5. With ReLU and max pooling they switch units and grow to 1e-2 within 20 steps of SGD.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    inputs = channels
    for number, outputs in enumerate((32, 32, 64, 64), start=1):
        layers[f"conv{number}"] = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)
        layers[f"norm{number}"] = nn.GroupNorm(8, outputs) if config.norm == "group" else nn.BatchNorm2d(outputs)
        layers[f"gelu{number}"] = nn.GELU()
        if number == 2:
            layers["pool"] = nn.AvgPool2d(2, ceil_mode=True)
        inputs = outputs
    layers |= {"average": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "head": nn.Linear(inputs, num_classes)}
    return nn.Sequential(layers)


def _tinycnn(num_classes: int, channels: int) -> nn.Module:
    """Build three strided convolutions (26,234 parameters on grey images with ten classes), smooth like ``smallcnn``.

    On one core it trains ten times as many images per second as ``smallcnn``.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    inputs = channels
    for number, (outputs, kernel) in enumerate(((16, 5), (32, 3), (64, 3)), start=1):
        layers[f"conv{number}"] = nn.Conv2d(inputs, outputs, kernel, stride=2, padding=kernel // 2, bias=False)
        layers[f"norm{number}"] = nn.GroupNorm(4, outputs)
        layers[f"gelu{number}"] = nn.GELU()
        inputs = outputs
    # Images of 16x16 already have 2x2 features.
    layers |= {"average": nn.AdaptiveAvgPool2d(2), "flatten": nn.Flatten(), "head": nn.Linear(4 * inputs, num_classes)}
    return nn.Sequential(layers)


def _torchvision_family(config: EfficientNet, num_classes: int, channels: int) -> nn.Module:
    """Build a ResNet (equal to torchvision's weight for weight) or torchvision's EfficientNet-B0, with its stem."""
    cifar = config.stem == "cifar"
    if isinstance(config, ResNet):
        network = resnet(config.name, num_classes, zero_init_residual=config.zero_init_residual)
        network.conv1 = _stem_convolution(network.conv1, channels, cifar=cifar)
        if cifar:
            network.maxpool = nn.Identity()
        return network
    from torchvision.models import efficientnet_b0  # 1.2 s to import

    efficientnet: Any = efficientnet_b0(num_classes=num_classes)
    efficientnet.features[0][0] = _stem_convolution(efficientnet.features[0][0], channels, cifar=cifar)
    return cast(nn.Module, efficientnet)


def _stem_convolution(original: nn.Conv2d, channels: int, *, cifar: bool) -> nn.Conv2d:
    """Return the network's first convolution for ``channels`` inputs; with the CIFAR stem 3x3 and of stride 1."""
    if not cifar and channels == original.in_channels:
        return original
    size, stride, padding = (3, 1, 1) if cifar else (original.kernel_size, original.stride, original.padding)
    stem = nn.Conv2d(channels, original.out_channels, size, stride, padding, bias=original.bias is not None)  # type: ignore[arg-type]
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")  # torchvision's own, for both families
    return stem


def _custom(config: CustomModel, num_classes: int, channels: int, image_size: int | None) -> nn.Module:
    model = config.call(num_classes=num_classes, in_channels=channels, image_size=image_size)
    if not isinstance(model, nn.Module):
        raise UserError(f"{config.key}: returns a {type(model).__name__}. Allowed: a torch.nn.Module")
    return model


def _timm(config: TimmModel, num_classes: int, channels: int) -> nn.Module:
    import timm  # 0.7 to 3 s to import

    if not timm.is_model(config.name):
        raise config.unknown(timm.list_models())
    try:
        network: nn.Module = timm.create_model(
            config.name, num_classes=num_classes, in_chans=channels, **config.options
        )
    except Exception as error:  # a model can raise anything
        given = f" with model.options={config.options}" if config.options else ""
        raise UserError(f"model.name={config.name}{given}: timm rejects it: {error}") from error
    return network
