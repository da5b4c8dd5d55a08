"""From the configuration to a torch optimizer, its rate and its schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from largebatch import optim
from largebatch.config.choices import OPTIMIZER_OPTIONS
from largebatch.config.schema import Config, ScheduleConfig
from largebatch.errors import UserError, choices

_CLASSES: dict[str, type[torch.optim.Optimizer]] = {
    "lars": optim.LARS,
    "tvlars": optim.TVLARS,
    "clars": optim.CLARS,
    "lamb": optim.LAMB,
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}


def _spare_compiler_import() -> None:
    """Keep torch from importing torch.compile's machinery (2 s, a third of a short run) when an optimizer is made.

    ``torch.optim`` exempts some methods of ``Optimizer`` from compilation, and imports the compiler for that at their
    first call. No optimizer is compiled here, so each method is marked as its own exempt form; where torch should come
    to do this differently, the mark has no effect.
    """
    for method in vars(torch.optim.Optimizer).values():
        exempted = getattr(method, "__wrapped__", None)
        if exempted is not None and not hasattr(exempted, "__dynamo_disable"):
            setattr(exempted, "__dynamo_disable", exempted)


def resolved_lr(config: Config) -> float:
    """The full learning rate: ``optimizer.lr``, scaled."""
    return scaled_lr(config, config.optimizer.lr)


def scaled_lr(config: Config, lr: float) -> float:
    """``lr`` from ``lr_scaling.base_batch`` to ``batch_size``, by ``lr_scaling.rule``.

    The surge rule (arXiv 2405.14578, theorem 3) is ``lr(B) = lr_max / (0.5 * (sqrt(N / B) + sqrt(B / N)))`` with the
    gradient noise scale N. With the rate at the base batch b given, lr_max falls out:
    ``lr(B) = lr(b) * sqrt(B / b) * (b + N) / (B + N)``.
    """
    scaling, batch = config.lr_scaling, config.batch_size
    base, noise = scaling.base_batch, scaling.noise_scale or 0.0
    factor = {
        "none": 1.0,
        "linear": batch / base,
        "sqrt": math.sqrt(batch / base),
        "surge": math.sqrt(batch / base) * (base + noise) / (batch + noise),
    }
    return lr * factor[scaling.rule]


def resolved_options(config: Config, steps_per_epoch: int) -> dict[str, Any]:
    """The keyword arguments of the optimizer's class, beside parameters and ``lr``."""
    given = config.optimizer
    if given.library == "timm":
        return {"weight_decay": given.weight_decay or 0.0, **given.options}
    options = {name: getattr(given, name) for name in OPTIMIZER_OPTIONS[given.library][given.name]}
    if given.name == "tvlars":
        options["delay"] = round(options.pop("delay_epochs") * steps_per_epoch)
        if options["gamma_min"] == "auto":
            options["gamma_min"] = 0.001 * config.batch_size / 256
    options.pop("sample_size", None)  # the training's, which measures the norms
    if "betas" in options:
        options["betas"] = tuple(options["betas"])
    return options


def build_optimizer(config: Config, model: nn.Module, steps_per_epoch: int) -> torch.optim.Optimizer:
    """The optimizer over the model's trainable parameters, which carry their names.

    Raises:
        UserError: for a name that timm doesn't know, or options that the optimizer refuses.
    """
    _spare_compiler_import()
    given = config.optimizer
    parameters: list[Any] = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if given.lr_1d is not None:
        few = [(name, p) for name, p in parameters if p.ndim <= 1]
        many = [(name, p) for name, p in parameters if p.ndim > 1]
        parameters = [{"params": many}]
        if few:
            parameters.append({"params": few, "lr": scaled_lr(config, given.lr_1d)})
    options = resolved_options(config, steps_per_epoch)
    try:
        if given.library == "timm":
            return _timm_optimizer(config, model, parameters, options)
        return _CLASSES[given.name](parameters, lr=resolved_lr(config), **options)  # type: ignore[call-arg]
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer.name={given.name}: {error}") from error


def _timm_optimizer(
    config: Config, model: nn.Module, parameters: list[Any], options: dict[str, Any]
) -> torch.optim.Optimizer:
    """Without ``lr_1d`` timm groups the parameters itself; its rule, no decay for biases and norms, is kept with it."""
    import timm.optim

    name = config.optimizer.name
    what: Any = model
    if config.optimizer.lr_1d is not None:
        what = [{**group, "params": [p for _, p in group["params"]]} for group in parameters]
        what[1:] = [{**few, "weight_decay": 0.0} for few in what[1:]]

    names: list[str] = timm.optim.list_optimizers()
    if name not in names:
        raise UserError(f"optimizer.name={name}: timm has no such optimizer; {choices(name, names)}")
    optimizer: torch.optim.Optimizer = timm.optim.create_optimizer_v2(what, opt=name, lr=resolved_lr(config), **options)
    return optimizer


def warmup_steps(config: ScheduleConfig, steps_per_epoch: int) -> int:
    if config.warmup_steps is not None:
        return config.warmup_steps
    return round((config.warmup_epochs or 0) * steps_per_epoch)


def schedule_factor(config: ScheduleConfig, total_steps: int, warmup: int) -> Callable[[int], float]:
    """The part of the full rate at optimizer step t = 0, 1, ... ``total_steps`` - 1.

    Warm-up of W steps: ``(t + 1) / W``. After it, with progress ``s = (t - W) / (total_steps - W)`` and final factor f:

    - cosine: ``f + (1 - f) * (1 + cos(pi * s)) / 2``
    - poly: ``f + (1 - f) * (1 - s) ** power``

    Raises:
        UserError: when the warm-up leaves no step after it.
    """
    if total_steps and warmup >= total_steps:
        key = "warmup_epochs" if config.warmup_steps is None else "warmup_steps"
        raise UserError(
            f"schedule.{key}={getattr(config, key):g}: {warmup} steps of warm-up, but the training has {total_steps}; "
            "warm up for less, or train longer"
        )
    final, power = config.final_factor or 0.0, config.power or 1.0

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(total_steps - warmup, 1)  # without a step the rate is asked for all the same
        if config.name == "constant":
            return 1.0
        if config.name == "warmup_poly":
            return final + (1 - final) * math.pow(1 - min(progress, 1.0), power)
        return final + (1 - final) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2

    return factor
