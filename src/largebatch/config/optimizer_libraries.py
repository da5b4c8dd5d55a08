"""Options of optimizers that a library has under a name, and of users' own optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from omegaconf import MISSING

from largebatch.config.custom import Custom
from largebatch.config.optimizers import OPTIMIZERS, OptimizerConfig
from largebatch.config.options import option
from largebatch.errors import UserError, choices

if TYPE_CHECKING:
    from largebatch.config.schema import Config


@dataclass
class LibraryOptimizer(OptimizerConfig):
    """An optimizer of a library, by its name there. ``options`` are its other keyword arguments."""

    # What some optimizers need of a step that a training step doesn't have.
    MISSING_IN_STEP: ClassVar[dict[str, str]] = {
        "adahessian": "second derivatives of the loss",
        "sophiah": "second derivatives of the loss",
        "alig": "a closure that returns the loss",
    }

    library: str = MISSING
    weight_decay: float = option(0.0, least=0)  # not of parameters of one dimension
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(self, batch_size: int, steps_per_epoch: float, steps: int = 0) -> dict[str, Any]:
        return {"weight_decay": self.weight_decay, **self.options}

    def problems(self, config: Config) -> list[str]:
        needed = self.MISSING_IN_STEP.get(self.name)
        without = f"optimizer.name={self.name}: needs {needed}, which steps don't have. Fix: another optimizer"
        return super().problems(config) + ([without] if needed else [])

    def unknown(self, names: Iterable[str]) -> UserError:
        """Return the error for a name that the library doesn't have. ``names`` are the library's."""
        return UserError(
            f"optimizer.name={self.name}: {self.library} has no such optimizer; {choices(self.name, names)}"
        )


@dataclass
class TimmOptimizer(LibraryOptimizer):
    """Any timm optimizer, by its timm name."""

    # timm names of optimizers with a sign-like update. docs/lr_scaling.md explains the choice.
    SIGN_LIKE: ClassVar[tuple[str, ...]] = (
        "adam", "adamw", "rmsprop", "adamwlegacy", "nadam", "nadamlegacy", "nadamw", "lion", "rmsproptf", "bnbadam",
        "bnbadam8bit", "bnbadamw", "bnbadamw8bit", "bnblion", "bnblion8bit", "fusedadam", "fusedadamw",
    )  # fmt: skip

    library: str = option("timm", allowed=("timm",))

    def beyond_surge(self) -> str:
        changed = [name for name in ("amsgrad", "centered") if self.options.get(name)]
        return "" if self.name in self.SIGN_LIKE and not changed else " with ".join([self.name, *changed])


@dataclass
class PytorchOptimizer(LibraryOptimizer):
    """Any optimizer of the package pytorch_optimizer, by its name there. The extra ``optimizers`` installs it."""

    AVERAGING: ClassVar[tuple[str, ...]] = ("schedulefreesgd", "schedulefreeadamw", "schedulefreeradam", "splus")

    library: str = option("pytorch_optimizer", allowed=("pytorch_optimizer",))

    def problems(self, config: Config) -> list[str]:
        averages_twice = config.ema_decay is not None and self.name in self.AVERAGING
        return super().problems(config) + ([self.two_averages(config)] if averages_twice else [])


@dataclass
class CustomOptimizer(Custom, OptimizerConfig):
    """Any ``torch.optim.Optimizer``: ``target(params, lr=..., **options)``."""

    group = "optimizer"
    positional = ("params",)
    required = ("lr",)
    keys = ("weight_decay",)

    weight_decay: float | None = option(None, least=0)  # None: the class's default

    def arguments(self, batch_size: int, steps_per_epoch: float, steps: int = 0) -> dict[str, Any]:
        return {} if self.weight_decay is None else {"weight_decay": self.weight_decay}


# How papers write the names of the presets' methods.
PUBLISHED_NAMES = {
    "adafactor": "Adafactor",
    "adan": "Adan",
    "kron": "PSGD Kron",
    "lion": "Lion",
    "novograd": "NovoGrad",
    "radam": "RAdam",
    "schedulefreeadamw": "Schedule-Free AdamW",
    "schedulefreesgd": "Schedule-Free SGD",
    "shampoo": "Shampoo",
    "soap": "SOAP",
}

LIBRARIES: dict[str, type[OptimizerConfig]] = {
    "timm": TimmOptimizer,
    "pytorch_optimizer": PytorchOptimizer,
    "custom": CustomOptimizer,
}


def structure(optimizer: Mapping[str, Any]) -> dict[str, str]:
    """Return the options that make another algorithm: booleans, choices by name, and bounds that are on or off.

    Numbers are tuned and aren't part of it.

    Args:
        optimizer: the optimizer's part of a configuration; a missing option has its default.
    """
    found = {}
    kind = LIBRARIES.get(str(optimizer.get("library"))) or OPTIMIZERS.get(optimizer["name"], TimmOptimizer)
    for field_ in fields(kind):
        value = optimizer.get(field_.name, field_.default)
        if field_.metadata.get("switch"):
            found[field_.name] = "off" if value is None else "on"
        elif field_.type in ("bool", "str") and field_.name not in ("name", "library"):
            found[field_.name] = _in_words(value)
    options = optimizer.get("options") or {}
    return found | {name: _in_words(value) for name, value in options.items() if isinstance(value, bool | str)}


def _in_words(value: bool | str) -> str:
    return value if isinstance(value, str) else str(value).lower()
