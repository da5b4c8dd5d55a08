"""Construction of the torch optimizer, and its learning rate."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from largebatch.config.optimizers import CustomOptimizer, TimmOptimizer
from largebatch.config.schema import Config
from largebatch.errors import UserError


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
        UserError: if timm doesn't know the name, the optimizer refuses an option, or as ``Custom.call``.
    """
    _spare_compiler_import()
    given = config.optimizer
    parameters: list[Any] = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    lr_1d = given.learning_rate_1d()
    if lr_1d is not None:
        few = [(name, p) for name, p in parameters if p.ndim <= 1]
        many = [(name, p) for name, p in parameters if p.ndim > 1]
        parameters = [{"params": many}]
        if few:
            parameters.append({"params": few, "lr": config.lr_scaling.scaled(lr_1d, config.batch_size)})
    options = given.arguments(config.batch_size, steps_per_epoch, steps)
    if isinstance(given, CustomOptimizer):
        return _custom_optimizer(given, parameters, options | {"lr": resolved_lr(config)})
    try:
        if isinstance(given, TimmOptimizer):
            return _timm_optimizer(config, given, model, parameters, options)
        module, _, name = given.target.partition(":")
        optimizer: type[torch.optim.Optimizer] = getattr(importlib.import_module(module), name)
        return optimizer(parameters, lr=resolved_lr(config), **options)  # type: ignore[call-arg]
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer.name={given.name}: {error}") from error


def _custom_optimizer(given: CustomOptimizer, parameters: list[Any], options: dict[str, Any]) -> torch.optim.Optimizer:
    optimizer = given.call(parameters, **options)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"{given.key}: returns a {type(optimizer).__name__}. Allowed: a torch.optim.Optimizer")
    if not all("lr" in group for group in optimizer.param_groups):
        raise UserError(
            f"{given.key}: its parameter groups have no lr, which the schedule sets. Fix: put lr into the defaults"
        )
    return optimizer


def _timm_optimizer(
    config: Config, given: TimmOptimizer, model: nn.Module, parameters: list[Any], options: dict[str, Any]
) -> torch.optim.Optimizer:
    """Return timm's optimizer. Biases and norms have no decay, as in timm's parameter groups, with ``lr_1d`` too."""
    import timm.optim

    name = given.name
    what: Any = model
    if given.learning_rate_1d() is not None:
        what = [{**group, "params": [p for _, p in group["params"]]} for group in parameters]
        what[1:] = [{**few, "weight_decay": 0.0} for few in what[1:]]

    names: list[str] = timm.optim.list_optimizers()
    if name not in names:
        raise given.unknown(names)
    optimizer: torch.optim.Optimizer = timm.optim.create_optimizer_v2(what, opt=name, lr=resolved_lr(config), **options)
    return optimizer
