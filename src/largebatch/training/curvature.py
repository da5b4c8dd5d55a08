"""The sharpness of a run (``instruments.sharpness_every``): its fixed batch, and its measurement."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn

from largebatch.errors import UserError, one_line
from largebatch.instruments.fixed_loss import FixedLoss
from largebatch.instruments.preconditioner import inverse_preconditioner, is_known
from largebatch.instruments.sharpness import sharpness
from largebatch.machine.precision import allow_tf32
from largebatch.runs.metrics import Row
from largebatch.seeding import derive_seed
from largebatch.training.micro_batch import release_memory
from largebatch.training.state import Run, Training

_AT_ONCE = (32, 256)  # bounds of the images per pass; a second derivative needs more memory than training
_NO_SECOND = ("not implemented", "differentiate twice")  # in torch's messages


def fixed_loss(run: Run, network: nn.Module, model: nn.Module, mode: ModuleType) -> FixedLoss:
    """Return the mode's training loss over training images that the seed chooses, without augmentation.

    Args:
        network: a copy of the model, which the result keeps.
        model: the model; its parameters that require a gradient count.
    """
    config, train = run.config, run.data.train
    total = min(config.instruments.sharpness_samples, len(train))
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "sharpness", "images"))
    chosen = torch.randperm(len(train), generator=generator)[:total]
    size = min(max(run.batch.micro_batch, _AT_ONCE[0]), _AT_ONCE[1])
    parts = list(run.loader.evaluate(train, size, chosen))
    images = torch.cat([part for part, _ in parts]) if parts else torch.empty(0, *run.data.image, device=run.device)
    labels = torch.cat([part for _, part in parts]) if parts else torch.empty(0, dtype=torch.int64, device=run.device)

    def loss(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        value: Tensor = mode.loss(config, network, images, labels)[0]
        return value

    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return FixedLoss(network, names, loss, images, labels, total, size)


def announce(run: Run, loss: FixedLoss, optimizer: torch.optim.Optimizer, say: Callable[[str], None]) -> None:
    """Log the number of images, and if the optimizer's preconditioner isn't known."""
    every = run.config.instruments.sharpness_every
    say(f"instruments.sharpness_every={every}: measures on {loss.total:,} training images")
    if not is_known(optimizer):
        say(f"sharpness/preconditioned is left out: optimizer={run.config.optimizer.name} has no known preconditioner")


def measured_sharpness(run: Run, training: Training) -> Row:
    """Return the sharpness at the present weights as metrics. Every process must call this.

    Nothing of the training changes: the measurement has its own network and its own random numbers.

    Raises:
        UserError: the network has an operation without a second derivative.
    """
    loss, config = training.fixed_loss, run.config
    if loss is None:
        return {}
    started = time.perf_counter()
    parameters = [p for p in training.model.parameters() if p.requires_grad]
    taken = training.step > 0 and training.loss_scale.taken
    inverse = inverse_preconditioner(training.optimizer, parameters) if taken else None
    allow_tf32(False)
    try:
        with torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):
            loss.move_to(training.model)
            found = sharpness(loss, inverse, derive_seed(config.seed, "sharpness"))
    except RuntimeError as error:
        if not any(words in str(error) for words in _NO_SECOND):
            raise
        raise UserError(
            f"instruments.sharpness_every={config.instruments.sharpness_every}: model.name={config.model.name} has an "
            f"operation without a second derivative ({one_line(error)}). Fix: instruments.sharpness_every=null"
        ) from error
    finally:
        allow_tf32(config.tf32)
    release_memory(run.device)
    return found | {"perf/sharpness_seconds": time.perf_counter() - started}
