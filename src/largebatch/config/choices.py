"""Which options an optimizer, a schedule, a rate rule and a mode have, and whether they are given and no others."""

from __future__ import annotations

from dataclasses import fields
from typing import TypeAlias

from largebatch.config.schema import Config, ModeConfig, OptimizerConfig, ScheduleConfig
from largebatch.errors import choices

_LARS = (
    "weight_decay", "momentum", "nesterov", "trust_coefficient", "denominator", "eps", "adapt_1d", "decay_1d",
    "norm_clip", "max_ratio", "larc", "lr_in_momentum",
)  # fmt: skip
_ADAM = ("weight_decay", "betas", "eps", "amsgrad")
# Which options an optimizer has beside lr. The names are the keyword arguments of its class, apart from TVLARS's delay
# and CLARS's sample_size.
OPTIMIZER_OPTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "largebatch": {
        "lars": _LARS,
        "tvlars": (*_LARS, "lmbda", "alpha", "delay_epochs", "gamma_min"),
        "clars": (*_LARS, "sample_size"),
        "lamb": ("weight_decay", "betas", "eps", "bias_correction", "adapt_1d", "decay_1d", "norm_clip", "max_ratio"),
    },
    "torch": {
        "sgd": ("weight_decay", "momentum", "nesterov"),
        "adam": _ADAM,
        "adamw": _ADAM,
        "adagrad": ("weight_decay", "eps", "lr_decay"),
        "rmsprop": ("weight_decay", "momentum", "alpha", "eps", "centered"),
    },
}
TIMM_OPTIMIZER_OPTIONS = ("weight_decay", "options")
SCHEDULE_OPTIONS = {
    "constant": (),
    "cosine": ("final_factor",),
    "warmup_cosine": ("warmup_epochs", "warmup_steps", "final_factor"),
    "warmup_poly": ("warmup_epochs", "warmup_steps", "final_factor", "power"),
}
MODE_OPTIONS = {"clf": (), "bt": tuple(option.name for option in fields(ModeConfig) if option.name != "name")}
_MAY_BE_NONE = ("norm_clip", "max_ratio", "warmup_epochs", "warmup_steps")
# Optimizers of torch and timm whose update is a gradient over its own recent size, or a sign: all that the theory
# behind lr_scaling.rule=surge is about. Why others aren't here: docs/lr_scaling.md.
SURGE_OPTIMIZERS = (
    "adam", "adamw", "rmsprop", "adamwlegacy", "nadam", "nadamlegacy", "nadamw", "lion", "rmsproptf", "bnbadam",
    "bnbadam8bit", "bnbadamw", "bnbadamw8bit", "bnblion", "bnblion8bit", "fusedadam", "fusedadamw",
)  # fmt: skip
_NOT_SURGE_OPTIONS = ("amsgrad", "centered")  # they divide by something else than the recent size


def check_optimizer(config: Config) -> list[str]:
    optimizer = config.optimizer
    if optimizer.library == "timm":
        return _check_options("optimizer", optimizer, TIMM_OPTIMIZER_OPTIONS)
    options = OPTIMIZER_OPTIONS.get(optimizer.library, {})
    if optimizer.name not in options:
        return [f"optimizer.name={optimizer.name}: {choices(optimizer.name, options)}; choose it with optimizer=NAME"]
    problems = _check_options("optimizer", optimizer, options[optimizer.name])
    if optimizer.name == "clars" and config.compile is True:
        problems.append("compile=true: clars measures gradient norms by hooks, which compiled passes don't call")
    return problems


def check_lr_scaling(config: Config) -> list[str]:
    scaling, optimizer = config.lr_scaling, config.optimizer
    if scaling.rule != "surge":
        given = {"noise_scale": scaling.noise_scale, "force": scaling.force or None}
        return [
            f"lr_scaling.{key}={value}: only lr_scaling.rule=surge has it; leave it out, or set that rule"
            for key, value in given.items()
            if value is not None
        ]
    problems = []
    if scaling.noise_scale is None:
        problems.append(
            "lr_scaling.noise_scale=null: lr_scaling.rule=surge needs the gradient noise scale, a number of samples; "
            "docs/lr_scaling.md says how to measure it"
        )
    changed = [key for key in _NOT_SURGE_OPTIONS if getattr(optimizer, key) or optimizer.options.get(key)]
    if not scaling.force and (optimizer.name not in SURGE_OPTIMIZERS or changed):
        used = " with ".join([optimizer.name, *changed])
        problems.append(
            f"lr_scaling.rule=surge: its theory is of updates like a sign, as Adam's, and {used} has another; "
            f"covered: {', '.join(SURGE_OPTIMIZERS)}, without {' or '.join(_NOT_SURGE_OPTIONS)}. Choose "
            "lr_scaling.rule=linear, sqrt or none, or set lr_scaling.force=true to use the rule without a theory"
        )
    return problems


def check_schedule(config: Config) -> list[str]:
    schedule = config.schedule
    if schedule.name not in SCHEDULE_OPTIONS:
        return []  # said by _check_names
    problems = _check_options("schedule", schedule, SCHEDULE_OPTIONS[schedule.name])
    if schedule.name.startswith("warmup") and (schedule.warmup_epochs is None) == (schedule.warmup_steps is None):
        problems.append(
            f"schedule.warmup_epochs={schedule.warmup_epochs} and schedule.warmup_steps={schedule.warmup_steps}: "
            "give one of the two and set the other to null"
        )
    if schedule.warmup_steps and config.steps and schedule.warmup_steps > config.steps:
        problems.append(
            f"schedule.warmup_steps={schedule.warmup_steps}: longer than the training, steps={config.steps}"
        )
    if schedule.warmup_epochs and config.epochs and schedule.warmup_epochs > config.epochs:
        problems.append(
            f"schedule.warmup_epochs={schedule.warmup_epochs:g}: longer than the training, epochs={config.epochs}"
        )
    return problems


_Options: TypeAlias = OptimizerConfig | ScheduleConfig | ModeConfig


def check_mode(config: Config) -> list[str]:
    mode = config.mode
    if mode.name not in MODE_OPTIONS:
        return []  # said by _check_names
    problems = _check_options("mode", mode, MODE_OPTIONS[mode.name])
    if mode.name != "bt":
        return problems
    if mode.projector is not None and (not mode.projector or min(mode.projector) < 1):
        problems.append(f"mode.projector={mode.projector}: must be one or more widths of at least 1")
    views = config.dataset.views
    if views.min_area > 1:
        problems.append(f"dataset.views.min_area={views.min_area}: must be at most 1")
    for key in ("jitter", "gray", "blur", "solarize"):
        given = getattr(views, key)
        two = key in ("blur", "solarize")
        if (two and len(given) != 2) or not all(0 <= p <= 1 for p in (given if two else [given])):
            problems.append(
                f"dataset.views.{key}={given}: must be {'two probabilities' if two else 'a probability'} from 0 to 1"
            )
    if config.batch_size == 1:
        problems.append("batch_size=1: mode=bt correlates the images of a batch, so there must be at least 2")
    elif mode.exact is False and 1 in (config.batch_size // (config.cluster.processes or 1), config.micro_batch):
        problems.append(
            "mode.exact=false: correlates the images of each micro-batch of a process, so there must be at least 2 in "
            f"each; batch_size={config.batch_size}, micro_batch={config.micro_batch}"
        )
    if config.optimizer.name == "clars" and mode.exact is False:
        problems.append(
            "mode.exact=false: clars measures the gradient norms of samples, which then pass twice in one backward "
            "pass; set mode.exact=true"
        )
    return problems


def _check_options(group: str, given: _Options, allowed: tuple[str, ...]) -> list[str]:
    problems = []
    always = ("name", "library", "lr", "lr_1d")
    for option in fields(given):
        value = getattr(given, option.name)
        if option.name in always or (value is None or value == {}) == (option.name not in allowed):
            continue
        if option.name in allowed:
            if option.name not in (*_MAY_BE_NONE, "options"):
                problems.append(f"{group}.{option.name}=null: {given.name} needs a value")
        else:
            problems.append(
                f"{group}.{option.name}={value}: {given.name} has no such option; {choices(option.name, allowed)}"
                if allowed
                else f"{group}.{option.name}={value}: {given.name} has no options"
            )
    return problems
