"""Options of each mode. ``largebatch.modes`` has a module with the name of each mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from omegaconf import MISSING

from largebatch.config.options import option

if TYPE_CHECKING:
    from largebatch.config.schema import Config


@dataclass
class ModeConfig:
    """Options of every mode.

    ``label`` is its name in reports, ``views`` the number of random views of each image that training takes, and
    ``progress`` the metric, after ``val/`` or ``test/``, that the main training improves.
    """

    label: ClassVar[str] = ""
    views: ClassVar[int] = 1
    progress: ClassVar[str] = "accuracy"

    name: str = MISSING

    @property
    def loss_over_global_batch(self) -> bool:
        """True if the loss isn't a mean over images but a function of the global batch of all processes."""
        return False

    @property
    def loss_per_micro_batch(self) -> bool:
        """True if the loss isn't a mean over images but a function of each micro-batch of a process."""
        return False

    @property
    def mixing(self) -> Clf | None:
        """Options of mixup and CutMix; None if both are off."""
        return None

    @property
    def images_together(self) -> int:
        """Number of images of a batch that must be in one micro-batch: a pair that is mixed, or single images."""
        return 1 if self.mixing is None else 2

    def length(self, dataset_epochs: int) -> int:
        """Return the number of epochs to train if neither ``epochs`` nor ``steps`` is given."""
        return dataset_epochs

    def problems(self, config: Config) -> list[str]:
        """Return one line for each conflict with the rest of the configuration."""
        if 0 in (config.epochs, config.steps):
            key = "epochs" if config.epochs == 0 else "steps"
            return [f"{key}=0: zero training steps are only allowed with mode=bt (metrics of an untrained backbone)"]
        return []


@dataclass
class Clf(ModeConfig):
    """Classification with cross-entropy."""

    label = "classification"

    label_smoothing: float = option(0.0, least=0, below=1)  # part of each label that is spread over all classes
    # Mixup and CutMix, as in timm: the alpha of Beta(alpha, alpha), from which the mixing ratio is drawn; 0: off.
    mixup: float = option(0.0, least=0, most=100)
    cutmix: float = option(0.0, least=0, most=100)
    mix_probability: float = option(1.0, least=0, most=1)  # of mixing a batch, pair or image
    mix_switch: float = option(0.5, least=0, most=1)  # probability of CutMix if both are on
    mix_per: str = option("batch", allowed=("batch", "pair", "image"))  # one ratio for each

    @property
    def mixing(self) -> Clf | None:
        return None if self.mixup == self.cutmix == 0 else self


@dataclass
class Bt(ModeConfig):
    """Barlow Twins (arXiv 2103.03230), then a probe on its features; ``docs/barlow_twins.md``."""

    label = "Barlow Twins"
    views = 2
    progress = "knn_accuracy"

    default_epochs: int = option(240, least=1)  # of pre-training, without `epochs` and `steps`
    projector: list[int] = option([128, 128, 128], least=1)  # widths of the projector's linear layers
    lmbda: float = option(0.005, least=0)  # weight of the off-diagonal terms of the loss
    loss_scale: float = option(0.001, above=0)  # factor of the loss
    exact: bool = True  # compute the loss over the global batch; false: over each micro-batch
    knn_every: int = option(10, least=0)  # epochs between nearest-neighbour evaluations of frozen features; 0: none
    knn_neighbours: int = option(20, least=1)
    knn_temperature: float = option(0.07, above=0)  # weight of a neighbour: exp(cosine similarity / temperature)
    # The linear probe, or fine-tuning.
    eval_epochs: int = option(100, least=1)
    eval_batch_size: int = option(256, least=1)  # global
    eval_augmentation: bool = False  # train on crops, flips and rotations; false: compute features once
    lr_classifier: float = option(0.3, above=0)  # learning rate of the probe's linear layer
    lr_backbone: float = option(0.0, least=0)  # of the backbone; 0: freeze it (linear probe); above 0: fine-tune it
    eval_weight_decay: float = option(1e-6, least=0)

    @property
    def loss_over_global_batch(self) -> bool:
        return self.exact

    @property
    def loss_per_micro_batch(self) -> bool:
        return not self.exact

    def length(self, dataset_epochs: int) -> int:
        return self.default_epochs

    def problems(self, config: Config) -> list[str]:
        if config.batch_size == 1:
            return ["batch_size=1: mode=bt correlates the images of a batch. Fix: batch_size=2 or more"]
        share = config.batch_size // (config.cluster.processes or 1)
        if not self.exact and 1 in (share, config.micro_batch, config.batch_norm_size):
            return [
                "mode.exact=false: correlates the images of each micro-batch, which needs at least 2 images "
                f"(batch_size={config.batch_size}, micro_batch={config.micro_batch}). "
                "Fix: mode.exact=true, or larger micro-batches"
            ]
        return []


MODES: dict[str, type[ModeConfig]] = {"clf": Clf, "bt": Bt}
