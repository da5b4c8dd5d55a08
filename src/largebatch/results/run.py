"""A run's result in Python: ``from largebatch import load_run``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from largebatch.config.options import problems_of
from largebatch.config.schema import Config
from largebatch.config.typed import load_config
from largebatch.data.augment import augmented_torch
from largebatch.data.images import centre, decode, pixels_of
from largebatch.errors import UserError, choices
from largebatch.models.build import build_backbone, build_model
from largebatch.runs.folder import RunFolder, newest_first
from largebatch.runs.metrics import Row, read_rows
from largebatch.runs.table import find_run
from largebatch.training.checkpoint import DamagedError, load_checkpoint

CHECKPOINTS = ("last", "best")
_CPU = torch.device("cpu")
T = TypeVar("T")


@dataclass(frozen=True)
class LoadedRun:
    """The result of a run, from one of its checkpoints.

    Attributes:
        folder: the run folder.
        config: the run's configuration.
        step: optimizer step of the checkpoint.
        classes: names of the classes, by label.
        shape: channels, height and width of the network's images.
        mean, std: statistics of each channel that normalise images, of pixels in 0..1.
        saved: content of the checkpoint, on the CPU.
    """

    folder: RunFolder
    config: Config
    step: int
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    saved: dict[str, Any] = field(repr=False)

    @property
    def weights(self) -> dict[str, Tensor]:
        """State dict of the model whose metrics the run logged: with ``ema_decay`` of the averaged weights."""
        return cast(dict[str, Tensor], self.saved.get("averaged", self.saved["model"]))

    @property
    def summary(self) -> dict[str, Any]:
        """Content of ``summary.json``: the last and best metrics, and facts. Empty for an unfinished run."""
        return self.folder.read_summary()

    @property
    def metrics(self) -> list[Row]:
        """Rows of metrics, each a dict from name to number."""
        return read_rows(self.folder.metrics)

    def model(self) -> nn.Module:
        """Return the classifier in evaluation mode on the CPU, from images [B, C, H, W] to logits [B, classes].

        In mode ``bt``, it is the backbone with the linear layer of the probe.

        Raises:
            UserError: in mode ``bt``, the checkpoint is from before the probe.
        """
        if self.config.mode.name == "bt":
            return nn.Sequential(self.backbone(), self.probe_head())
        with self._as_configured():
            network = build_model(self.config.model, len(self.classes), self.shape[0], self.shape[1])
            network.load_state_dict(self.weights)
        return network.eval()

    def backbone(self) -> nn.Module:
        """Return the network without its classifier, in evaluation mode on the CPU: images to features [B, F]."""
        prefix = "backbone." if self.config.mode.name == "bt" else ""
        with self._as_configured():
            network, _ = build_backbone(self.config.model, self.shape)
            network.load_state_dict({name: self.weights[prefix + name] for name in network.state_dict()})
        return network.eval()

    @contextmanager
    def _as_configured(self) -> Iterator[None]:
        """Turn an error from the construction of the network into a ``UserError`` that names the configuration."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # any model can be given
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{self.folder.config}: the checkpoint isn't of this network ({reason})") from error

    def probe_head(self) -> nn.Linear:
        """Return the linear layer of mode ``bt``'s probe.

        Raises:
            UserError: the checkpoint is from before the probe.
        """
        probe = self.saved.get("probe")
        if not probe:
            raise UserError(f"{self.folder.config}: mode.name=bt: the checkpoint isn't of this mode")
        if not probe["optimizer"]["state"]:
            raise UserError(
                f"{self.folder.path}: the checkpoint of step {self.step} is from before the probe, so it has no "
                "classifier. Fix: finish the run; or take the backbone alone"
            )
        outputs, inputs = probe["head"]["weight"].shape
        head = nn.Linear(inputs, outputs)
        head.load_state_dict(probe["head"])
        return head.eval()

    def transform(self, image: Path | str | Image.Image) -> Tensor:
        """Return the network's input, float32 [C, H, W], for an image file or an image of PIL.

        The shorter side is resized, the centre cropped, and the pixels normalised, as in the run's evaluations.

        Raises:
            UserError: the file can't be read as an image.
        """
        pixels = self.decoded(str(image)) if not isinstance(image, Image.Image) else self._pixels(pixels_of, image)
        return self.normalised(pixels[None])[0]

    def decoded(self, path: str) -> Tensor:
        """Return uint8 [C, H, W] of an image file, resized and cropped as in the run's evaluations.

        Raises:
            UserError: the file can't be read as an image.
        """
        return self._pixels(decode, path)

    def _pixels(self, read: Callable[[T, int, int], NDArray[np.uint8]], image: T) -> Tensor:
        channels, side, _ = self.shape
        pixels = torch.tensor(read(image, channels, self.config.dataset.resize_size or side))
        return centre(pixels[None], side)[0]

    def normalised(self, pixels: Tensor) -> Tensor:
        """Return float32 [B, C, H, W], the network's input for pixels uint8 [B, C, H, W]."""
        return augmented_torch(pixels, None, None, torch.tensor(self.mean), torch.tensor(self.std))


def load_run(run: Path | str, checkpoint: str = "last", runs_dir: Path | str = "runs") -> LoadedRun:
    """Return the result of a run.

    Args:
        run: the run's folder, or the beginning of its name or last eight digits.
        checkpoint: ``last``, or ``best`` for the best on validation images (of runs with ``tracker.checkpoints``).
        runs_dir: folder of the runs that names refer to.

    Raises:
        UserError: there is no such run or checkpoint, or it can't be read.
    """
    if checkpoint not in CHECKPOINTS:
        raise UserError(f"checkpoint={checkpoint}: {choices(checkpoint, CHECKPOINTS)}")
    folder = find_run(str(run), Path(runs_dir))
    path = folder.best_checkpoint
    if checkpoint == "last":
        path = next(iter(newest_first(folder.checkpoints)), folder.checkpoints / "step-*.pt")
    if not path.exists():
        raise UserError(
            f"{folder.path}: has no {checkpoint} checkpoint. Fix: "
            + (
                "train the run"
                if checkpoint == "last"
                else "train with tracker.checkpoints=true dataset.val_fraction=0.1"
            )
        )
    try:
        saved, _ = load_checkpoint(path, _CPU)
        images, content = saved["images"], saved["data"]
    except DamagedError as error:
        raise UserError(f"{path} {error}. Fix: run the same command with rerun=true") from error
    except KeyError as error:
        raise UserError(
            f"{path}: has no entry {error}: an earlier version wrote it. Fix: run the same command with rerun=true"
        ) from error
    config = load_config(folder.config)
    if problems := problems_of(config):
        raise UserError("\n".join(f"{folder.config}: {problem}" for problem in problems))
    return LoadedRun(
        folder,
        config,
        saved["step"],
        tuple(name for name, *_ in content["classes"]),
        cast(tuple[int, int, int], tuple(images["shape"])),
        tuple(images["mean"]),
        tuple(images["std"]),
        saved,
    )
