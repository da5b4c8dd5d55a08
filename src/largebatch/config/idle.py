"""Notes about options that do nothing at a run's batch size and length. The launcher and the report show them."""

from __future__ import annotations

import math
from collections.abc import Iterator

from largebatch.config.epochs import plan_epochs, planned_steps
from largebatch.config.modes import Bt, Clf
from largebatch.config.optimizers import Adagrad, Clars, Measured, Tvlars
from largebatch.config.schedules import CustomSchedule, ScheduleConfig
from largebatch.config.schema import Config

_FLAT = 0.2  # phi that varies by less is a constant factor
_HALF = 0.5  # of phi's start: the fall that a note asks for
_LONG = 1 / 3  # of the training: a longer warm-up
_NO_DECAY = 1e-6  # relative change over the run
_BEGINNING = 0.1  # part of the averaged weights that are still those of the start
# Options that turn a group of the augmentation on.
_SWITCHES = {
    "resized_crop": "scale=[0.08,1]", "color_jitter": "brightness=0.4", "rand_augment": "operations=2",
    "erasing": "probability=0.25",
}  # fmt: skip
_RANGE = 10  # of phi's exponent over the training, so that phi falls to its floor


def planned_length(config: Config) -> tuple[int, float] | None:
    """Return the steps of the main training and of an epoch. None if the number of images isn't known yet.

    Raises:
        UserError: as ``plan_epochs``.
    """
    if config.dataset.train_images is None:
        return None
    epochs = plan_epochs(config, config.dataset.train_images)
    return planned_steps(config, epochs), epochs.steps


def idle_options(config: Config, steps: int, steps_per_epoch: float) -> list[str]:
    """Return one sentence for each idle option: key and value, consequence, fix.

    Args:
        config: its optimizer, schedule, learning-rate scaling, batch size, mode and augmentation count.
        steps: optimizer steps of the main training.
        steps_per_epoch: optimizer steps per epoch, maybe a fraction.
    """
    if steps < 2:
        return []
    whole = steps  # with a growing batch, schedules count steps of batch_size
    if config.batch_schedule.first is not None and config.epochs:
        whole = round(config.epochs * steps_per_epoch)
    return [
        *_flat_phi(config, steps, steps_per_epoch),
        *_warmup(config.schedule, whole, steps_per_epoch),
        *_schedule_decay(config.schedule, whole, steps_per_epoch),
        *_weight_decay(config, steps),
        *_groups(config),
        *_average(config, steps),
        *_early_stopping(config, whole, steps_per_epoch),
        *_augmentation(config),
    ]


def _flat_phi(config: Config, steps: int, steps_per_epoch: float) -> Iterator[str]:
    optimizer = config.optimizer
    if not isinstance(optimizer, Tvlars):
        return
    options = optimizer.arguments(config.batch_size, steps_per_epoch, steps)

    def ends(lmbda: float) -> tuple[float, float]:
        """Return phi at the first and the last step, by the equation of ``largebatch.optim.TVLARS``."""
        exponents = (min(lmbda * (step - options["delay"]), 700.0) for step in (1, steps))
        first, last = (options["gamma_min"] + 1 / max(options["alpha"] + math.exp(x), 1e-300) for x in exponents)
        return first, last

    first, last = ends(options["lmbda"])
    if last <= _HALF * first:
        return
    if first < (1 + _FLAT) * last:
        factor = (first + last) / 2
        consequence = f"so TVLARS is LARS at {factor:.2g} times the learning rate"
        if optimizer.learning_rate_1d() is None and not optimizer.adapt_1d and not 0.95 < factor < 1.05:
            consequence += f", with {1 / factor:.2g} times that learning rate for biases and norm scales"
    else:
        consequence = f"less than {_HALF:.0%} of its start, so TVLARS differs little from LARS"
    key = "lmbda" if optimizer.lmbda_relative is None else "lmbda_relative"
    fix = f"optimizer.lmbda_relative={_RANGE}" + (f" or optimizer.lmbda={_RANGE / steps:.1g}" if key == "lmbda" else "")
    steep = ends(_RANGE / steps)
    if steep[1] > _HALF * steep[0]:
        fix = "lower optimizer.delay_epochs, optimizer.gamma_min or optimizer.alpha"
    yield (
        f"optimizer.{key}={getattr(optimizer, key):g}: phi falls only from {first:.3f} to {last:.3f} in {steps:,} "
        f"steps, {consequence}. Fix: {fix}"
    )


def _warmup(schedule: ScheduleConfig, steps: int, steps_per_epoch: float) -> Iterator[str]:
    warmup = schedule.warmup(steps_per_epoch)
    given = getattr(schedule, "warmup_steps", None) or getattr(schedule, "warmup_epochs", None)
    if not given:
        return
    if warmup <= 1:
        yield (
            f"{schedule.warmup_key()}: at most one step, so the first step already has the full learning rate. "
            "Fix: schedule.warmup_steps=2 or more, or a schedule without warm-up"
        )
    elif warmup > _LONG * steps:
        yield (
            f"{schedule.warmup_key()}: {warmup:,} of {steps:,} steps are warm-up, so more than a third of the training "
            f"has less than the full learning rate. Fix: {given * _LONG * steps / warmup:.3g} or less, or train longer"
        )


def _schedule_decay(schedule: ScheduleConfig, steps: int, steps_per_epoch: float) -> Iterator[str]:
    decays = type(schedule).decay is not ScheduleConfig.decay and not isinstance(schedule, CustomSchedule)
    if not decays or steps - schedule.warmup(steps_per_epoch) < 2:
        return
    if abs(1 - schedule.factor(steps, steps_per_epoch)(steps - 1)) < _NO_DECAY:
        options = vars(schedule)
        key, fix = (
            ("gamma", "schedule.gamma=0.1") if "gamma" in options else ("final_factor", "schedule.final_factor=0")
        )
        if abs(1 - options[key]) >= _NO_DECAY:
            key = next(name for name in ("power", "decay_fraction", "milestones") if name in options)
            fix = fix if key == "power" else "train longer"
        value = options[key] if isinstance(options[key], list) else f"{options[key]:g}"
        yield (
            f"schedule.{key}={value}: the learning rate changes by less than {_NO_DECAY:g} after the warm-up, "
            f"so the schedule is constant. Fix: {fix}, or a constant schedule"
        )


def _weight_decay(config: Config, steps: int) -> Iterator[str]:
    optimizer = config.optimizer
    decay = getattr(optimizer, "weight_decay", None) or 0.0
    whole = config.lr_scaling.scaled(optimizer.lr, config.batch_size) * decay * steps
    if 0 < whole < _NO_DECAY:
        yield (
            f"optimizer.weight_decay={decay:g}: learning rate * decay * steps is {whole:.1g}, so the weights don't "
            "decay. Fix: optimizer.weight_decay=0, or a larger decay"
        )
    if isinstance(optimizer, Adagrad) and 0 < optimizer.lr_decay * steps < _NO_DECAY:
        yield (
            f"optimizer.lr_decay={optimizer.lr_decay:g}: the learning rate falls by {optimizer.lr_decay * steps:.1g} "
            "over the run, so it doesn't decay. Fix: optimizer.lr_decay=0, or a larger decay"
        )


def _groups(config: Config) -> Iterator[str]:
    optimizer = config.optimizer
    if isinstance(optimizer, Measured) and optimizer.sample_size >= config.batch_size:
        if isinstance(optimizer, Clars):
            effect = "CLARS divides by the norm of the mean gradient, as LARS does"
        else:
            effect = f"its gradients have no variance and {optimizer.label} doesn't scale them"
        yield (
            f"optimizer.sample_size={optimizer.sample_size}: one group is the whole batch, so {effect}. "
            "Fix: optimizer.sample_size=1, or another part of the batch"
        )


def _average(config: Config, steps: int) -> Iterator[str]:
    if config.ema_decay is not None and config.ema_decay**steps > _BEGINNING:
        fix = f"ema_decay={1 - _RANGE / steps:.2g} or less, or " if steps > 2 * _RANGE else ""
        yield (
            f"ema_decay={config.ema_decay:g}: after {steps:,} steps, {config.ema_decay**steps:.0%} of the averaged "
            f"weights are still the initial weights. Fix: {fix}train longer, or no ema_decay"
        )


def _early_stopping(config: Config, steps: int, steps_per_epoch: float) -> Iterator[str]:
    evaluations = math.ceil(steps / steps_per_epoch / config.eval_every - 1e-9)
    if config.early_stopping is not None and config.early_stopping + 1 >= evaluations:
        yield (
            f"early_stopping={config.early_stopping}: the run has {evaluations:,} evaluation(s), so it never stops "
            "early. Fix: a smaller value, or a smaller eval_every"
        )


def _augmentation(config: Config) -> Iterator[str]:
    mode = config.mode
    for name, switch in _SWITCHES.items():
        group = getattr(config.dataset, name)
        if group.is_on and isinstance(mode, Bt) and not mode.eval_augmentation:
            yield (
                f"dataset.{name}: does nothing, because mode=bt trains on dataset.views, and its probe without "
                "augmentation. Fix: mode.eval_augmentation=true, or leave it out"
            )
        elif not group.is_on and group != type(group)():
            yield f"dataset.{name}: its options do nothing, because it is off. Fix: dataset.{name}.{switch}"
    if isinstance(mode, Clf) and mode.mixing is None:
        for key in ("mix_probability", "mix_switch", "mix_per"):
            if (value := getattr(mode, key)) != getattr(Clf, key):
                yield f"mode.{key}={value}: does nothing without mode.mixup or mode.cutmix. Fix: mode.mixup=0.2"
