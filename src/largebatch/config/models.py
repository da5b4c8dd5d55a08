"""Options of each model. To add a model, add its name to ``MODELS`` and its builder to ``models/build.py``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from largebatch.config.custom import Custom
from largebatch.config.options import option

INITS = ("default", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal")


@dataclass
class ModelConfig:
    """Options of every model."""

    name: str = MISSING
    init: str = option("default", allowed=INITS)  # of convolution and linear weights; default: the library's

    @property
    def has_batch_norm(self) -> bool:
        """True if training normalises over the images of a micro-batch. The worker checks a model that says False."""
        return True


@dataclass
class SmallCnn(ModelConfig):
    """Network of four convolutions, for small images."""

    norm: str = option("group", allowed=("group", "batch"))

    @property
    def has_batch_norm(self) -> bool:
        return self.norm == "batch"


@dataclass
class TinyCnn(ModelConfig):
    """Network of three strided convolutions, for tiny images and one core."""

    @property
    def has_batch_norm(self) -> bool:
        return False


@dataclass
class EfficientNet(ModelConfig):
    """torchvision's EfficientNet-B0."""

    stem: str = option("imagenet", allowed=("imagenet", "cifar"))  # cifar: 3x3, stride 1, no pooling


@dataclass
class ResNet(EfficientNet):
    """torchvision's ResNets."""

    zero_init_residual: bool = False  # start each block as the identity


@dataclass
class TimmModel(ModelConfig):
    """Any timm model, by its timm name. ``options`` are keyword arguments of ``timm.create_model``."""

    library: str = option("timm", allowed=("timm",))
    options: dict[str, Any] = field(default_factory=dict)
    batch_norm: bool = True  # false: the model has no batch norm, so that every division of a batch has one name

    @property
    def has_batch_norm(self) -> bool:
        return self.batch_norm


@dataclass
class CustomModel(Custom, ModelConfig):
    """Any ``torch.nn.Module``: ``target(num_classes=..., **options)``."""

    group = "model"
    required = ("num_classes",)
    offered = ("in_channels", "image_size")

    batch_norm: bool = True  # as for timm

    @property
    def has_batch_norm(self) -> bool:
        return self.batch_norm


MODELS: dict[str, type[ModelConfig]] = {
    "smallcnn": SmallCnn,
    "tinycnn": TinyCnn,
    "resnet18": ResNet,
    "resnet34": ResNet,
    "resnet50": ResNet,
    "effb0": EfficientNet,
}
LIBRARIES: dict[str, type[ModelConfig]] = {"timm": TimmModel, "custom": CustomModel}
