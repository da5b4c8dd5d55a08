"""Checks of a configuration before the run starts, without torch or the data."""

from __future__ import annotations

from dataclasses import MISSING, replace
from typing import Any

from largebatch.config.batch import plan_batch, plan_training
from largebatch.config.custom import custom_choices
from largebatch.config.epochs import lr_factor, plan_epochs, planned_steps
from largebatch.config.options import problems_of
from largebatch.config.schema import ClusterConfig, Config, InstrumentsConfig
from largebatch.config.slurm import has_control_character, slurm_problems
from largebatch.errors import UserError


def validate(config: Config) -> None:
    """Raise one ``UserError`` that lists every problem of ``config``."""
    problems = [
        *problems_of(config),
        *(problem for choice in custom_choices(config) for problem in choice.problems_in_source()),
        *config.dataset.problems(config),
        *config.model.problems(config),
        *config.optimizer.problems(config),
        *config.lr_scaling.problems(config.optimizer),
        *config.schedule.problems(config),
        *config.batch_schedule.problems(config),
        *config.mode.problems(config),
        *_check_length(config),
        *_check_cluster(config.cluster),
        *_check_runs_dir(config),
        *_check_batch(config),
        *_check_space(config),
        *_check_instruments(config),
        *_check_early_stopping(config),
        *_check_start(config),
    ]
    if problems:
        raise UserError("\n".join(problems))


def check_training(config: Config, images: int | None) -> None:
    """Check batch and warm-up against ``images`` training images; None if their number is unknown.

    Raises:
        UserError: if the batch is larger than the training set, the warm-up as long as the training, or a step of
            ``checkpoint.keep_at`` after its end.
    """
    schedule = config.schedule
    if images is not None:
        epochs = plan_epochs(config, images)
        lr_factor(config, epochs)
        config.checkpoint.kept_steps(planned_steps(config, epochs))
        return
    for unit, training in ("steps", config.steps), ("epochs", config.epochs):
        schedule.check_warmup(getattr(schedule, f"warmup_{unit}", None) or 0, training or 0, unit)


def _check_length(config: Config) -> list[str]:
    if config.epochs is not None and config.steps is not None:
        return [
            f"epochs={config.epochs} and steps={config.steps}: only one may be set. "
            "Fix: leave one out, or set it to null if a preset sets it"
        ]
    return []


# Keys without a meaning on SLURM, and the fix.
_LOCAL_KEYS = {"devices": "leave it out, since SLURM chooses the GPUs", "parallel": "set cluster.array_parallelism"}
_SHARED_KEYS = ("name", "processes", "device", "threads", "hang_seconds", "numa_binding")


def _check_cluster(cluster: ClusterConfig) -> list[str]:
    if cluster.name == "local":
        default = ClusterConfig()
        return [
            f"cluster.{key}={value}: only cluster=slurm has this key. Fix: leave it out, or set cluster=slurm"
            for key, value in vars(cluster).items()
            if key not in (*_SHARED_KEYS, *_LOCAL_KEYS) and value != getattr(default, key)
        ]
    problems = [
        f"cluster.{key}={getattr(cluster, key)}: only cluster=local has this key. Fix: {fix}"
        for key, fix in _LOCAL_KEYS.items()
        if getattr(cluster, key) is not None
    ]
    problems += slurm_problems(cluster)
    given, nodes, each = cluster.processes, cluster.nodes, cluster.processes_per_node
    if given is not None and nodes >= 1 and (given % nodes or each not in (None, given // nodes)):
        problems.append(
            f"cluster.processes={given}: must be cluster.nodes={nodes} times cluster.processes_per_node"
            f"{f'={each}' if each else ''}. Fix: leave cluster.processes out"
        )
    return problems


def _check_runs_dir(config: Config) -> list[str]:
    if has_control_character(config.runs_dir):
        return [f"runs_dir={config.runs_dir!r}: has a line break or another control character. Fix: another folder"]
    return []


def _check_batch(config: Config) -> list[str]:
    processes, together = config.cluster.processes, config.optimizer.samples_together
    sizes = (config.batch_size, config.micro_batch, config.batch_norm_size, processes, together)
    if any(isinstance(size, int) and size < 1 for size in sizes):
        return []  # problems_of names it
    try:
        if processes is None:
            plan_batch(config.batch_size, 1, config.micro_batch, together, config.mode.images_together)
        else:
            plan_training(replace(config), processes)
    except UserError as error:
        return [str(error)]
    return []


def _check_instruments(config: Config) -> list[str]:
    instruments, problems = config.instruments, []
    if instruments.noise_scale and config.mode.loss_over_global_batch:
        problems.append(
            f"instruments.noise_scale=true: not allowed with mode={config.mode.name} mode.exact=true, because that "
            "loss isn't a mean over images. Fix: mode.exact=false, or instruments.noise_scale=false"
        )
    if instruments.sharpness_every is not None and config.mode.name != "clf":
        problems.append(
            f"instruments.sharpness_every={instruments.sharpness_every}: not allowed with mode={config.mode.name}, "
            "because that loss isn't a mean over images. Allowed: mode=clf. Fix: instruments.sharpness_every=null"
        )
    default = InstrumentsConfig.sharpness_samples
    if instruments.sharpness_every is None and instruments.sharpness_samples != default:
        problems.append(
            f"instruments.sharpness_samples={instruments.sharpness_samples}: only instruments.sharpness_every has "
            "this key. Fix: instruments.sharpness_every=1, or leave it out"
        )
    return problems


def _check_early_stopping(config: Config) -> list[str]:
    key = f"early_stopping={config.early_stopping}"
    if config.early_stopping is None:
        return []
    if config.mode.name != "clf":
        return [
            f"{key}: not allowed with mode={config.mode.name}, whose probe needs a pre-training of a known length. "
            "Allowed: mode=clf. Fix: early_stopping=null"
        ]
    if config.dataset.val_fraction == 0:
        return [
            f"{key}: needs validation images, because the test set must not decide when to stop. "
            "Fix: dataset.val_fraction=0.1"
        ]
    return []


def _check_start(config: Config) -> list[str]:
    key = f"start_from={config.start_from}"
    if config.start_from is None:
        return []
    if config.mode.name != "clf":
        return [f"{key}: not allowed with mode={config.mode.name}. Allowed: mode=clf. Fix: start_from=null"]
    if config.model.weights is not None or config.model.pretrained:
        other = "model.pretrained=true" if config.model.pretrained else f"model.weights={config.model.weights}"
        return [f"{key} and {other}: only one may be set, because both choose the first weights"]
    return []


def _check_space(config: Config) -> list[str]:
    """Return a problem for each key of the search space that the run lacks, or whose value isn't in its space."""
    problems = []
    for key, declared in config.space.items():
        value: Any = config
        for part in key.split("."):
            value = value.get(part, MISSING) if isinstance(value, dict) else getattr(value, part, MISSING)
        numbers = isinstance(declared, list) and not any(isinstance(one, bool | str | list) for one in declared)
        if value is MISSING:
            problems.append(f"space: the run has no key {key}. Fix: declare it only in the cases that have it")
        elif not isinstance(declared, list) or len(declared) < 2 or (numbers and not _is_range(declared)):
            problems.append(f"space: {key}={declared}: invalid. Allowed: [low, high] for numbers, else all values")
        elif not _is_in(value, declared, numbers):
            problems.append(f"{key}={value}: outside of its declared space {declared}. Fix: widen the space")
    return problems


def _is_range(numbers: list[Any]) -> bool:
    return len(numbers) == 2 and numbers[0] < numbers[1]


def _is_in(value: Any, declared: list[Any], numbers: bool) -> bool:
    """Return True if ``value`` is in a range of numbers, with 0.1 % for the rounding of drawn values, or in a list."""
    if not numbers:
        return value in declared
    margin = 1e-3 * max(map(abs, declared))
    return isinstance(value, int | float) and declared[0] - margin <= value <= declared[1] + margin
