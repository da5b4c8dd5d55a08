"""Checks of a configuration that need neither torch nor the data: all problems of a run at once, before it starts."""

from __future__ import annotations

import math
from dataclasses import MISSING, Field, fields
from typing import Any

from largebatch.config.batch import plan_batch
from largebatch.config.choices import (
    MODE_OPTIONS,
    OPTIMIZER_OPTIONS,
    SCHEDULE_OPTIONS,
    check_lr_scaling,
    check_mode,
    check_optimizer,
    check_schedule,
)
from largebatch.config.schema import ClusterConfig, Config
from largebatch.errors import UserError, choices

DATASETS = ("digits", "cifar10", "cifar100", "tinyimagenet", "imagefolder", "imagenet", "synthetic")
MODELS = {
    "largebatch": ("smallcnn",),
    "torchvision": ("resnet18", "resnet34", "resnet50", "effb0"),
    "timm": None,  # any; timm knows them
}
INITS = ("default", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal")


def validate(config: Config) -> None:
    """Raise one ``UserError`` that lists every problem of ``config``."""
    problems = [
        *_check_numbers(config),
        *_check_names(config),
        *_check_model(config),
        *check_optimizer(config),
        *check_lr_scaling(config),
        *check_schedule(config),
        *check_mode(config),
        *_check_length(config),
        *_check_cluster(config.cluster),
        *_check_batch(config),
    ]
    if problems:
        raise UserError("\n".join(problems))


# key: (smallest allowed value, whether that value itself is allowed)
_NUMBERS: dict[str, tuple[float, bool]] = {
    "batch_size": (1, True),
    "micro_batch": (1, True),
    "epochs": (0, True),
    "steps": (0, True),
    "seed": (0, True),
    "eval_every": (1, True),
    "dataset.workers": (0, True),
    "dataset.train_size": (1, True),
    "dataset.test_size": (1, True),
    "dataset.num_classes": (2, True),
    "dataset.image_size": (1, True),
    "dataset.crop_padding": (0, True),
    "dataset.rotation": (0, True),
    "dataset.default_epochs": (1, True),
    "optimizer.lr": (0, False),
    "dataset.views.min_area": (0, False),
    "optimizer.lr_1d": (0, True),
    "optimizer.weight_decay": (0, True),
    "optimizer.momentum": (0, True),
    "optimizer.eps": (0, True),
    "optimizer.trust_coefficient": (0, False),
    "optimizer.norm_clip": (0, False),
    "optimizer.max_ratio": (0, False),
    "optimizer.sample_size": (1, True),
    "optimizer.alpha": (0, True),
    "optimizer.lmbda": (0, True),
    "optimizer.delay_epochs": (0, True),
    "optimizer.lr_decay": (0, True),
    "lr_scaling.base_batch": (1, True),
    "lr_scaling.noise_scale": (0, False),
    "schedule.warmup_epochs": (0, True),
    "schedule.warmup_steps": (0, True),
    "schedule.final_factor": (0, True),
    "schedule.power": (0, False),
    "mode.default_epochs": (1, True),
    "mode.lmbda": (0, True),
    "mode.loss_scale": (0, False),
    "mode.knn_every": (0, True),
    "mode.knn_neighbours": (1, True),
    "mode.knn_temperature": (0, False),
    "mode.eval_epochs": (1, True),
    "mode.eval_batch_size": (1, True),
    "mode.lr_classifier": (0, False),
    "mode.lr_backbone": (0, True),
    "mode.eval_weight_decay": (0, True),
    "cluster.processes": (1, True),
    "cluster.threads": (1, True),
    "cluster.parallel": (1, True),
    "cluster.nodes": (1, True),
    "cluster.processes_per_node": (1, True),
    "cluster.gpus_per_node": (0, True),
    "cluster.cpus_per_node": (1, True),
    "cluster.memory_gb": (0, False),
    "cluster.time_limit": (1, True),
    "cluster.array_parallelism": (1, True),
    "cluster.max_requeues": (0, True),
    "cluster.signal_seconds": (1, True),
    "checkpoint.every_seconds": (0, True),
    "checkpoint.every_steps": (1, True),
    "tracker.log_every": (1, True),
    "tracker.layers_every": (0, True),
}


def _check_numbers(config: Config) -> list[str]:
    problems = []
    for key, (least, inclusive) in _NUMBERS.items():
        value = _value(config, key)
        if isinstance(value, str):
            if value != "auto":
                problems.append(f"{key}={value}: must be an integer of at least {least:g}, or auto")
        elif value is not None and not (math.isfinite(value) and (value > least or (inclusive and value == least))):
            kind = "an integer" if isinstance(value, int) else "a finite number"
            problems.append(f"{key}={value}: must be {kind} {'of at least' if inclusive else 'above'} {least:g}")
    optimizer = config.optimizer
    if optimizer.momentum is not None and optimizer.momentum >= 1:
        problems.append(f"optimizer.momentum={optimizer.momentum}: must be below 1")
    if optimizer.nesterov and not optimizer.momentum:
        problems.append("optimizer.nesterov=true: needs optimizer.momentum above 0")
    if optimizer.larc and optimizer.max_ratio is None:
        problems.append("optimizer.larc=true: needs optimizer.max_ratio, LARC's own is 1")
    for beta in optimizer.betas or []:
        if not 0 <= beta < 1:
            problems.append(f"optimizer.betas={optimizer.betas}: both must be at least 0 and below 1")
            break
    if optimizer.betas is not None and len(optimizer.betas) != 2:
        problems.append(f"optimizer.betas={optimizer.betas}: must be two numbers")
    floor = optimizer.gamma_min
    if floor is not None and floor != "auto" and (isinstance(floor, str) or not (math.isfinite(floor) and floor >= 0)):
        problems.append(f"optimizer.gamma_min={floor}: must be a finite number of at least 0, or auto")
    if not 0 <= config.dataset.val_fraction < 1:
        problems.append(f"dataset.val_fraction={config.dataset.val_fraction}: must be at least 0 and below 1")
    if not config.dataset.rotation <= 180:
        problems.append(f"dataset.rotation={config.dataset.rotation}: must be at most 180 degrees")
    return problems


def _value(config: Config, key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = getattr(node, part)
    return node


def _check_names(config: Config) -> list[str]:
    named: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "dataset.name": (config.dataset.name, DATASETS),
        "dataset.channels": (config.dataset.channels, (1, 3)),
        "model.library": (config.model.library, tuple(MODELS)),
        "model.init": (config.model.init, INITS),
        "optimizer.library": (config.optimizer.library, (*OPTIMIZER_OPTIONS, "timm")),
        "lr_scaling.rule": (config.lr_scaling.rule, ("none", "linear", "sqrt", "surge")),
        "schedule.name": (config.schedule.name, tuple(SCHEDULE_OPTIONS)),
        "mode.name": (config.mode.name, tuple(MODE_OPTIONS)),
        "cluster.name": (config.cluster.name, ("local", "slurm")),
        "cluster.device": (config.cluster.device, ("auto", "cpu", "cuda")),
        "tracker.name": (config.tracker.name, ("wandb", "none")),
        "dataset.location": (config.dataset.location, ("auto", "device", "host")),
        "dataset.on_error": (config.dataset.on_error, ("stop", "skip")),
        "tracker.mode": (config.tracker.mode, ("auto", "online", "offline", "disabled")),
        "precision": (config.precision, ("auto", "fp32", "bf16")),
        "compile": (config.compile, (True, False, "auto")),
    }
    problems = [
        f"{key}={given}: {choices(str(given), [str(name).lower() for name in allowed])}"
        for key, (given, allowed) in named.items()
        if given not in allowed
    ]
    denominator, denominators = config.optimizer.denominator, _denominators(config.optimizer.name)
    if denominator not in (None, *denominators):
        problems.append(f"optimizer.denominator={denominator}: {choices(denominator, denominators)}")
    channels = config.dataset.channels
    for key in ("mean", "std"):
        values = getattr(config.dataset, key)
        if values is not None and len(values) != channels:
            problems.append(f"dataset.{key}={values}: must have one number a channel (dataset.channels={channels})")
    if any(value <= 0 for value in config.dataset.std or []):
        problems.append(f"dataset.std={config.dataset.std}: must be above 0")
    return problems


def _denominators(optimizer: str) -> tuple[str, str]:
    return ("sample_norms" if optimizer == "clars" else "norm_of_sum", "sum_of_norms")


def _check_model(config: Config) -> list[str]:
    model, problems = config.model, []
    names = MODELS.get(model.library)
    if names is not None and model.name not in names:
        problems.append(f"model.name={model.name}: {choices(model.name, names)}; any timm model with model=timm")
    stems = ("imagenet", "cifar") if model.library == "torchvision" else ()
    norms = ("group", "batch") if model.library == "largebatch" else ()
    for key, given, allowed in (("stem", model.stem, stems), ("norm", model.norm, norms)):
        if allowed and given not in allowed:
            problems.append(f"model.{key}={given}: {choices(given, allowed)}")
        elif not allowed and given is not None:
            problems.append(f"model.{key}={given}: {model.name} has no such choice")
    if model.zero_init_residual is not None and (model.library != "torchvision" or model.name == "effb0"):
        problems.append(f"model.zero_init_residual={str(model.zero_init_residual).lower()}: only ResNets have it")
    if model.options and model.library != "timm":
        problems.append(f"model.options={model.options}: only timm's models take further options")
    return problems


def _check_length(config: Config) -> list[str]:
    if config.epochs is not None and config.steps is not None:
        return [
            f"epochs={config.epochs} and steps={config.steps}: give one of the two "
            "(where a preset gives the other, set that one to null)"
        ]
    if 0 in (config.epochs, config.steps) and config.mode.name != "bt":
        key = "epochs" if config.epochs == 0 else "steps"
        return [f"{key}=0: only mode=bt can do without training, for the figures of an untrained backbone"]
    return []


_LOCAL_KEYS = {"devices": "SLURM chooses the GPUs", "parallel": "cluster.array_parallelism is SLURM's"}
_SHARED_KEYS = ("name", "processes", "device", "threads")


def _check_cluster(cluster: ClusterConfig) -> list[str]:
    if cluster.name == "local":
        return [
            f"cluster.{key.name}={getattr(cluster, key.name)}: only cluster=slurm has it; choose that, or leave it out"
            for key in fields(ClusterConfig)
            if key.name not in (*_SHARED_KEYS, *_LOCAL_KEYS) and getattr(cluster, key.name) != _default(key)
        ]
    problems = [
        f"cluster.{key}={getattr(cluster, key)}: only cluster=local has it; {why}"
        for key, why in _LOCAL_KEYS.items()
        if getattr(cluster, key) is not None
    ]
    given, nodes, each = cluster.processes, cluster.nodes, cluster.processes_per_node
    if given is not None and nodes >= 1 and (given % nodes or each not in (None, given // nodes)):
        problems.append(
            f"cluster.processes={given}: isn't cluster.nodes={nodes} times cluster.processes_per_node={each or '...'}; "
            "leave it out"
        )
    if cluster.time_limit is not None and cluster.signal_seconds >= 60 * cluster.time_limit:
        problems.append(
            f"cluster.signal_seconds={cluster.signal_seconds}: must be shorter than cluster.time_limit="
            f"{cluster.time_limit} (minutes), or a run is asked to make way as soon as it begins"
        )
    return problems


def _default(key: Field[Any]) -> Any:
    return key.default if key.default_factory is MISSING else key.default_factory()


def _check_batch(config: Config) -> list[str]:
    problems = []
    processes = config.cluster.processes
    sizes = (config.batch_size, config.micro_batch, config.optimizer.sample_size)
    sizes_ok = all(not isinstance(size, int) or size >= 1 for size in sizes)
    if sizes_ok and (processes is None or processes >= 1):
        try:
            plan_batch(config.batch_size, processes or 1, config.micro_batch, config.optimizer.sample_size)
        except UserError as error:
            problems.append(str(error))
    size = config.dataset.train_size
    if size is not None and 0 <= config.dataset.val_fraction < 1:
        left = round(size * (1 - config.dataset.val_fraction))
        if config.batch_size > left:
            without = " after the validation part" if config.dataset.val_fraction else ""
            problems.append(
                f"batch_size={config.batch_size}: larger than the training set; "
                f"{config.dataset.name} has {left} images{without}, so at most that"
            )
    return problems
