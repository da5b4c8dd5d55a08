"""Options of each model. To add a model, add its name to ``MODELS`` and its builder to ``models/build.py``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from omegaconf import MISSING

from largebatch.config.custom import Custom
from largebatch.config.options import option
from largebatch.errors import UserError, choices

if TYPE_CHECKING:
    from largebatch.config.schema import Config

INITS = ("default", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal")


@dataclass
class ModelConfig:
    """Options of every model. ``published`` is True if its library has pre-trained weights."""

    published: ClassVar[bool] = False

    name: str = MISSING
    init: str = option("default", allowed=INITS)  # of convolution and linear weights; default: the library's
    # Weights to start from: a finished run (folder, or beginning of its name), or a file of torch or safetensors.
    weights: str | None = None
    weights_hash: str | None = None  # of the content of that file; the launcher sets it
    pretrained: bool = False  # start from the library's pre-trained weights
    freeze: bool = False  # train only the head; the rest stays in evaluation mode

    @property
    def has_batch_norm(self) -> bool:
        """True if training normalises over the images of a micro-batch. The worker checks a model that says False."""
        return True

    def problems(self, config: Config) -> list[str]:
        """Return one line for each conflict between options, or with the mode."""
        problems = []
        if self.weights is not None and self.pretrained:
            problems.append(f"model.weights={self.weights} and model.pretrained=true: only one may be set")
        if self.weights is None and self.weights_hash is not None:
            problems.append(f"model.weights_hash={self.weights_hash}: needs model.weights. Fix: leave it out")
        if self.pretrained and not self.published:
            names = [name for name, kind in MODELS.items() if kind.published]
            problems.append(
                f"model.pretrained=true: {self.name} has no pre-trained weights. Allowed: {', '.join(names)}, and "
                "most models of model=timm"
            )
        if self.freeze and self.weights is None and not self.pretrained:
            problems.append("model.freeze=true: the frozen weights would be random. Fix: set model.weights=RUN too")
        if self.freeze and config.mode.name == "bt":
            problems.append("model.freeze=true: mode=bt trains the backbone. Fix: mode=clf, or model.freeze=false")
        return problems


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

    published = True

    stem: str = option("imagenet", allowed=("imagenet", "cifar"))  # cifar: 3x3, stride 1, no pooling


@dataclass
class ResNet(EfficientNet):
    """torchvision's ResNets."""

    zero_init_residual: bool = False  # start each block as the identity


@dataclass
class TimmModel(ModelConfig):
    """Any timm model, by its timm name. ``options`` are keyword arguments of ``timm.create_model``."""

    published = True

    library: str = option("timm", allowed=("timm",))
    options: dict[str, Any] = field(default_factory=dict)
    batch_norm: bool = True  # false: the model has no batch norm, so that every division of a batch has one name

    @property
    def has_batch_norm(self) -> bool:
        return self.batch_norm

    def problems(self, config: Config) -> list[str]:
        given = self.options.get("pretrained")
        found = [] if given is None else [f"model.options.pretrained={given}: not allowed. Fix: model.pretrained=true"]
        return super().problems(config) + found

    def unknown(self, names: Iterable[str]) -> UserError:
        """Return the error for a name that timm doesn't have. ``names`` are timm's."""
        return UserError(f"model.name={self.name}: timm has no such model; {choices(self.name, names)}")


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
