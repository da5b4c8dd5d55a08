"""Construction of the torch optimizer, and its learning rate."""

from __future__ import annotations

import importlib
import inspect
import random
from typing import Any, cast

import torch
from numpy import random as numpy_random
from torch import nn

from largebatch.config.optimizer_libraries import CustomOptimizer, LibraryOptimizer, PytorchOptimizer
from largebatch.config.schema import Config
from largebatch.errors import UserError, choices, require
from largebatch.models.build import head_names


def _spare_compiler_import() -> None:
    """Keep torch from importing torch.compile (2 s, a third of a short run) with the first optimizer.

    ``torch.optim`` exempts some methods of ``Optimizer`` from compilation, and imports the compiler at their first
    call. No optimizer is compiled here, so this marks each method as already exempt. The mark has no effect in a torch
    version that does this differently.
    """
    for method in vars(torch.optim.Optimizer).values():
        exempted = getattr(method, "__wrapped__", None)
        if exempted is not None and not hasattr(exempted, "__dynamo_disable"):
            setattr(exempted, "__dynamo_disable", exempted)


def resolved_lr(config: Config) -> float:
    """Return the full learning rate: ``optimizer.lr``, scaled to the batch size."""
    return config.lr_scaling.scaled(config.optimizer.lr, config.batch_size)


def build_optimizer(config: Config, model: nn.Module, steps_per_epoch: float, steps: int = 0) -> torch.optim.Optimizer:
    """Return the optimizer over the model's named trainable parameters.

    Args:
        config: the run's configuration.
        model: the model.
        steps_per_epoch: optimizer steps per epoch.
        steps: optimizer steps of the main training.

    Raises:
        UserError: if the library doesn't know the name, the optimizer refuses an option, or as ``Custom.call``.
    """
    _spare_compiler_import()
    given = config.optimizer
    parameters: list[Any] = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    lr_1d = given.learning_rate_1d()
    own_lr = {} if lr_1d is None else {"lr": config.lr_scaling.scaled(lr_1d, config.batch_size)}
    few = [one for one in parameters if own_lr and one[1].ndim <= 1]
    names = head_names(config.model, model) if given.head_options and config.mode.name == "clf" else ()
    head = [one for one in parameters if one[1].ndim > 1 and one[0].startswith(tuple(f"{name}." for name in names))]
    if few or head:
        apart = {name for name, _ in (*few, *head)}
        parameters = [{"params": [one for one in parameters if one[0] not in apart]}]
        parameters += [{"params": few, **own_lr}] if few else []
        parameters += [{"params": head, **given.head_options}] if head else []
    options = given.arguments(config.batch_size, steps_per_epoch, steps)
    if isinstance(given, CustomOptimizer):
        return _custom_optimizer(given, parameters, options | {"lr": resolved_lr(config)})
    try:
        if isinstance(given, LibraryOptimizer):
            return _library_optimizer(given, model, {"lr": resolved_lr(config), **options}, own_lr)
        module, _, name = given.target.partition(":")
        optimizer: type[torch.optim.Optimizer] = getattr(importlib.import_module(module), name)
        return optimizer(parameters, lr=resolved_lr(config), **options)  # type: ignore[call-arg]
    except (TypeError, ValueError, AttributeError, AssertionError, ImportError) as error:
        raise UserError(f"optimizer.name={given.name}: {error}") from error


def _custom_optimizer(given: CustomOptimizer, parameters: list[Any], options: dict[str, Any]) -> torch.optim.Optimizer:
    optimizer = given.call(parameters, **options)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"{given.key}: returns a {type(optimizer).__name__}. Allowed: a torch.optim.Optimizer")
    if not all("lr" in group for group in optimizer.param_groups):
        raise UserError(
            f"{given.key}: its parameter groups have no lr, which the schedule sets. Fix: put lr into the defaults"
        )
    if "train_mode" in optimizer.param_groups[0]:
        cast(Any, optimizer).train()  # some schedule-free optimizers begin in evaluation mode
    return optimizer


def _library_optimizer(
    given: LibraryOptimizer, model: nn.Module, options: dict[str, Any], own_lr: dict[str, float]
) -> torch.optim.Optimizer:
    """Return the library's optimizer. Biases and norm parameters have no decay, and ``own_lr`` if it isn't empty."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    many, few = ([p for p in parameters if (p.ndim > 1) == wanted] for wanted in (True, False))
    groups = [*([{"params": many}] if many else []), *([{"params": few, "weight_decay": 0.0, **own_lr}] if few else [])]
    optimizer: torch.optim.Optimizer
    if isinstance(given, PytorchOptimizer):
        require("optimizers")
        import pytorch_optimizer

        names: list[str] = pytorch_optimizer.get_supported_optimizers()
        if given.name not in names:
            raise given.unknown(names)
        kind: Any = pytorch_optimizer.load_optimizer(given.name)
        known = inspect.signature(kind).parameters  # the classes ignore other keyword arguments
        for name in options.keys() - known.keys():
            raise UserError(
                f"optimizer.options.{name}={options[name]}: {given.name} has no such option; "
                f"{choices(name, [name for name in known if name not in ('params', 'lr', 'weight_decay', 'kwargs')])}"
            )
        optimizer = kind(groups, **options)
        return optimizer
    import timm.optim

    names = timm.optim.list_optimizers()
    if given.name not in names:
        raise given.unknown(names)
    # timm makes the same groups of a model itself, with the exceptions that timm's models declare.
    optimizer = timm.optim.create_optimizer_v2(groups if own_lr else model, opt=given.name, **options)
    return optimizer


def seed_step(seed: int) -> None:
    """Seed all global random generators for an optimizer's step, in the same way in every process."""
    torch.manual_seed(seed)
    numpy_random.seed(seed % 2**32)
    random.seed(seed)
