"""The configuration of a run, and its construction from composed YAML.

Each data set, model, optimizer, schedule and mode has its own dataclass, selected by ``name``. The presets in ``conf/``
set only the options that differ from the dataclass's defaults.
"""

from __future__ import annotations

import copy
import functools
import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import SafeLoader, YAMLError

from largebatch.config import datasets, models, optimizer_libraries, schedules
from largebatch.config.batch_schedule import BatchScheduleConfig
from largebatch.config.custom import complete
from largebatch.config.datasets import DATASETS, DatasetConfig
from largebatch.config.lr_scaling import LrScalingConfig
from largebatch.config.models import MODELS, ModelConfig
from largebatch.config.modes import MODES, ModeConfig
from largebatch.config.optimizers import OPTIMIZERS, OptimizerConfig
from largebatch.config.options import option
from largebatch.config.schedules import SCHEDULES, ScheduleConfig
from largebatch.errors import UserError, choices, nearest


@dataclass
class ClusterConfig:
    name: str = option(MISSING, allowed=("local", "slurm"))
    processes: int | None = option(None, least=1)  # None: one per GPU, or one on CPU
    device: str = option("auto", allowed=("auto", "cpu", "cuda"))
    devices: list[int] | None = None  # indices of GPUs; None: all visible GPUs
    parallel: int | None = option(None, least=1)  # concurrent runs; None: as many as fit on the GPUs, 1 on CPU
    threads: int | None = option(None, least=1)  # CPU threads per process; None: an equal share of the cores
    hang_seconds: float = option(1800.0, above=0)  # a run fails if no rank progresses for so long
    # torchrun binds each process to CPUs near its GPU; needs numactl. None: no binding
    numa_binding: str | None = option(None, allowed=("node", "socket", "exclusive", "core-complex"))
    # SLURM only. `processes` is then nodes * processes_per_node.
    nodes: int = option(1, least=1)
    processes_per_node: int | None = option(None, least=1)  # None: one per GPU, or one on CPU
    partition: str | None = None  # None, here and in the options below: the cluster's default
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus_per_node: int | str | None = None  # a number, or with a type as a100:4
    cpus_per_node: int | None = option(None, least=1)
    memory_gb: float | None = option(None, above=0)  # per node
    # Minutes, or another of SLURM's forms such as 4:00:00 or 1-12. A requeued job resumes a longer run.
    time_limit: int | str | None = None
    job_name: str | None = None  # None: the run's name; of an array the sweep's name
    array_parallelism: int | None = option(None, least=1)  # concurrent runs; None: as many as SLURM allows
    setup: list[str] = field(default_factory=list)  # shell commands before the run, such as `module load`
    python: str | None = None  # command that starts Python on a node, perhaps in a container. None: this interpreter
    srun_args: list[str] = field(default_factory=list)  # options of srun, such as --container-image=IMAGE
    cpu_bind: str | None = None  # srun's binding of a node's task to CPUs, such as cores
    options: dict[str, Any] = field(default_factory=dict)  # other options of sbatch, without dashes
    wait: bool = False  # wait until all jobs have ended, instead of returning after submission
    max_requeues: int = option(100, least=0)  # automatic requeues per run
    signal_seconds: int = option(120, least=1)  # time before the limit at which SLURM signals the run to save and stop


@dataclass
class TrackerConfig:
    name: str = option(MISSING, allowed=("wandb", "tensorboard", "trackio", "none"))
    # auto: online with an API key and a reachable host, else offline
    mode: str = option("auto", allowed=("auto", "online", "offline", "disabled"))
    run_name: str | None = None  # in W&B. None: WANDB_NAME, else the run folder's name
    project: str | None = None  # None: WANDB_PROJECT, else largebatch
    entity: str | None = None  # None: WANDB_ENTITY, else the account's default
    group: str | None = None  # None: WANDB_RUN_GROUP, else the name of the run's sweep or grid, if it has one
    job_type: str | None = None  # None: WANDB_JOB_TYPE, else the mode's name
    tags: list[str] = field(default_factory=list)  # besides data set, model, optimizer, schedule and WANDB_TAGS
    notes: str | None = None  # None: WANDB_NOTES
    log_every: int = option(10, least=1)  # steps; each of the first 20 steps has a row too
    layers_every: int = option(20, least=0)  # steps between rows of layers.parquet, besides 1, 2, 5 and 10; 0: off
    images: bool = False  # log some augmented images of the first batch: images.png and the tracker
    alerts: bool = False  # W&B alerts you when a run diverges or fails
    predictions: bool = False  # show the final predictions of the test images, and the confusion matrix
    console: bool = False  # W&B shows the run's output
    git: bool = False  # W&B shows the git remote and commit
    checkpoints: bool = False  # keep the best on validation images; W&B uploads the last and the best


@dataclass
class CheckpointConfig:
    every_seconds: float = option(10.0, least=0)
    every_steps: int | None = option(None, least=1)  # instead of every_seconds
    # Checkpoints that newer ones don't replace: optimizer steps, or parts of the training below 1
    keep_at: list[float] = field(default_factory=list)

    def kept_steps(self, steps: int) -> frozenset[int]:
        """Return the steps of ``keep_at`` in a training of ``steps`` steps.

        Raises:
            UserError: if a step is no whole number, or not in the training.
        """
        for given in self.keep_at:
            if not 0 < given < 1 and (given < 1 or given % 1 or given > steps):
                raise UserError(
                    f"checkpoint.keep_at={given:g}: must be an optimizer step up to the training's last, {steps:,}, or "
                    "a part of the training below 1"
                )
        return frozenset(int(given) if given >= 1 else max(round(given * steps), 1) for given in self.keep_at)


@dataclass
class InstrumentsConfig:
    noise_scale: bool = False  # measure the gradient noise scale, of the network and of each layer
    sharpness_every: int | None = option(None, least=1)  # epochs between measurements of the sharpness; None: off
    sharpness_samples: int = option(512, least=1)  # training images that the sharpness is measured on


@dataclass
class Config:
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    mode: ModeConfig = field(default_factory=ModeConfig)
    lr_scaling: LrScalingConfig = field(default_factory=LrScalingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    instruments: InstrumentsConfig = field(default_factory=InstrumentsConfig)
    batch_size: int = option(512, least=1)  # global: all processes and micro-batches together
    batch_schedule: BatchScheduleConfig = field(default_factory=BatchScheduleConfig)  # smaller batches at the start
    # Largest number of images per pass of a process. None: the process's whole share. auto: as many as fit into memory;
    # with batch norm the whole share, or batch_norm_size.
    micro_batch: int | str | None = option(None, least=1, words=("auto",))
    # Images that batch norm normalises over. None: the images of a pass, of all processes with sync_bn. Given, it sets
    # the micro-batch. Stays None for a network without batch norm.
    batch_norm_size: int | None = option(None, least=1)
    epochs: int | None = option(None, least=0)  # at most one of the two; None: the mode's or data set's default_epochs
    steps: int | None = option(None, least=0)
    clip_norm: float | None = option(None, above=0)  # largest norm of the whole gradient of a step; None: no limit
    # Part of the moving average of the weights that a step keeps. The average is evaluated and exported. None: off
    ema_decay: float | None = option(None, above=0, below=1)
    # RUN@STEP: start from the weights and the optimizer's state of a run in runs_dir after STEP optimizer steps
    start_from: str | None = None
    seed: int = option(0, least=0)
    # auto: bf16 on GPUs that have it, fp16 on older GPUs, fp32 on CPU and for networks under a million parameters
    precision: str = option("auto", allowed=("auto", "fp32", "bf16", "fp16"))
    tf32: bool = False  # fp32 products on GPUs round their inputs to TF32 (10 bits of mantissa)
    compile: bool | str = option("auto", allowed=(True, False, "auto"))  # torch.compile; auto: if it saves time
    cuda_graphs: bool = True  # start all kernels of a pass on a GPU with one call
    sync_bn: bool = False  # batch-norm statistics over all processes
    deterministic: bool = False  # deterministic CUDA kernels, for bit-exact repeats on a GPU
    # Epochs between evaluations, maybe a fraction; a run always ends with an evaluation
    eval_every: float = option(1.0, above=0)
    # Evaluations without a better validation accuracy after which the training stops. None: always the full length
    early_stopping: int | None = option(None, least=1)
    # Declared search space of the run's grid, by dotted key: [low, high] for numbers, else all values.
    space: dict[str, Any] = field(default_factory=dict)
    runs_dir: str = "runs"
    rerun: bool = False  # repeat a finished run from scratch
    dry_run: bool = False  # show the plan, start nothing
    profile: bool = False  # write a trace of ten steps, and a table of the time of each phase
    confirms: bool = False  # a run of `largebatch confirm`: it reports a setting and takes no part in choosing it


# Dataclasses by group and name.
CHOICES: dict[str, dict[str, Any]] = {
    "dataset": DATASETS,
    "model": MODELS,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "mode": MODES,
}
# Errors of OmegaConf. An integer above 1e308 in place of a float is an OverflowError.
REFUSED = (OmegaConfBaseException, OverflowError)
# YAML 1.1 reads 4:00:00 as 14,400, a number to the base 60. Here it stays text, as in SLURM's time limits.
_BASE_60 = ("tag:yaml.org,2002:str", re.compile("[0-9]+(:[0-5]?[0-9])+$"))
SafeLoader.yaml_implicit_resolvers = {
    first: [_BASE_60, *kinds] if first in "0123456789" else kinds
    for first, kinds in SafeLoader.yaml_implicit_resolvers.items()
}
# Dataclasses of choices by group and library. Their names are the library's, or the user's.
LIBRARIES: dict[str, dict[str, Any]] = {
    "dataset": datasets.LIBRARIES,
    "model": models.LIBRARIES,
    "optimizer": optimizer_libraries.LIBRARIES,
    "schedule": schedules.LIBRARIES,
    "mode": {},
}


def from_composed(composed: DictConfig | dict[str, Any]) -> Config:
    """Return the typed configuration of a composed or frozen tree, with all defaults and absolute paths.

    Raises:
        UserError: for an unknown key, a missing value or a value of the wrong type. The message names the key.
    """
    tree: Any = None
    schema = None
    try:
        tree = copy.deepcopy(composed)
        if isinstance(composed, DictConfig) or "${" in repr(composed):
            tree = OmegaConf.to_container(OmegaConf.create(composed), resolve=True)
        for key in ("cases", "trials"):  # keys of a grid, not of a run
            tree.pop(key, None)
        for group in CHOICES:
            if isinstance(given := tree.get(group), dict) and given.get("library") == "custom":
                complete(group, given)
        tree = _escaped(tree)
        schema, standard = _schema(*(_chosen(group, tree.get(group)) for group in CHOICES))
        config = OmegaConf.to_object(OmegaConf.merge(schema, _without(standard, tree)))
    except REFUSED as error:
        raise UserError(explain(error, tree, schema)) from None
    assert isinstance(config, Config)
    if config.epochs is None and config.steps is None:
        config.epochs = config.mode.length(config.dataset.default_epochs)
    config.runs_dir = str(Path(config.runs_dir).expanduser().absolute())
    if config.dataset.root:
        config.dataset.root = str(Path(config.dataset.root).expanduser().absolute())
    return config


def defaults(with_options: bool = False) -> dict[str, Any]:
    """Return the keys outside the groups of ``CHOICES``, with defaults. Hydra composes presets onto them.

    ``with_options`` adds the option names of all choices, for shell completion.
    """
    tree: Any = OmegaConf.to_container(OmegaConf.structured(Config))
    for group, kinds in CHOICES.items():
        del tree[group]
        if with_options:
            every = (*kinds.values(), *LIBRARIES[group].values())
            tree[group] = {option.name: None for kind in every for option in fields(kind)}
    return cast(dict[str, Any], tree)


def _chosen(group: str, given: Any) -> Any:
    """Return the dataclass that ``library`` or else ``name`` selects.

    Raises:
        UserError: if the name is missing or unknown.
    """
    if not isinstance(given, dict) or given.get("name") in (None, "???"):
        raise UserError(f"{group}.name has no value. Fix: choose a preset with {group}=NAME")
    if kind := LIBRARIES[group].get(str(given.get("library"))):
        return kind
    name = str(given["name"])
    if name not in CHOICES[group]:
        any_timm = f" ({group}=timm allows any timm name)" if "timm" in LIBRARIES[group] else ""
        raise UserError(f"{group}.name={name}: {choices(name, CHOICES[group])}{any_timm}")
    return CHOICES[group][name]


@functools.cache
def _schema(*kinds: Any) -> tuple[DictConfig, Any]:
    """Return the schema of a choice for each group, and its defaults as plain values."""
    schema: DictConfig = OmegaConf.structured(Config)
    for group, kind in zip(CHOICES, kinds, strict=True):
        schema[group] = OmegaConf.structured(kind)
    return schema, OmegaConf.to_container(schema)


def _without(defaults: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """Return ``tree`` without the values that are the defaults already, because OmegaConf merges them slowly."""
    found = {}
    for key, value in tree.items():
        default = defaults.get(key)
        if isinstance(default, dict) and isinstance(value, dict):
            if left := _without(default, value):
                found[key] = left
        elif key not in defaults or repr(value) != repr(default):  # 1, 1.0 and True are equal
            found[key] = value
    return found


def load_config(path: Path) -> Config:
    """Return the frozen configuration of a run folder.

    Raises:
        UserError: as ``read_frozen`` and ``from_composed``.
    """
    return from_composed(read_frozen(path))


def read_frozen(path: Path) -> DictConfig:
    """Return the content of a frozen ``config.yaml``.

    Raises:
        UserError: the file can't be read, or isn't a mapping in YAML.
    """
    try:
        frozen = OmegaConf.load(path)
    except (OSError, ValueError, RecursionError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: can't be read ({' '.join(str(error).split())})") from None
    if not isinstance(frozen, DictConfig):
        raise UserError(f"{path}: can't be read (it isn't a mapping of keys to values)")
    return frozen


def to_yaml(config: Config) -> str:
    """Return the configuration as YAML, with exactly the keys of its dataclasses, for ``load_config``."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(asdict(config))))


def _escaped(tree: Any) -> Any:
    """Return ``tree`` so that OmegaConf takes every string literally: ``${`` starts no interpolation."""
    if isinstance(tree, dict):
        return {key: _escaped(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_escaped(value) for value in tree]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", tree) if isinstance(tree, str) else tree


def explain(error: Exception, tree: dict[str, Any] | None = None, schema: DictConfig | None = None) -> str:
    """Return one line for an OmegaConf error: the key, its value and the problem.

    Args:
        error: the error.
        tree: the configuration with the value.
        schema: the schema with the allowed keys.
    """
    key = getattr(error, "full_key", None) or _culprit(tree or {}, schema)
    if schema is not None and re.match(r"Key '.*' (not in|is not in struct)", str(error)):
        return _unknown_key(key, tree or {}, schema)
    first_line = str(error).splitlines()[0]
    if "missing mandatory value" in first_line.lower():
        return f"{key} has no value. Fix: choose a preset for its group or set it"
    if "'None'" in first_line or "is not Optional" in first_line:
        return f"{key}=null: needs a value"
    value = OmegaConf.select(OmegaConf.create(tree or {}), key)
    if OmegaConf.is_dict(value) and value:
        return f"unknown key {key}.{next(iter(value))}: {key} is a value without keys of its own"
    return f"{key}: {first_line}" if value is None else f"{key}={value}: {first_line}"


def _culprit(tree: dict[str, Any], schema: DictConfig | None) -> str:
    """Return the first key whose value alone can't be merged, because OmegaConf names none for some values."""
    for key, value in tree.items() if schema is not None else ():
        parts = {key: {key: value}}
        if isinstance(value, dict) and is_dataclass(getattr(Config(), key, None)):
            parts = {f"{key}.{inner}": {key: {inner: one}} for inner, one in value.items()}
        for path, part in parts.items():
            try:
                OmegaConf.merge(schema, part)
            except REFUSED:
                return path
    return "?"


def _unknown_key(key: str, tree: dict[str, Any], schema: DictConfig) -> str:
    """Return the message for ``key``, with the key that was meant or the allowed keys of the known part of its path."""
    node: Any = schema
    path: list[str] = []
    for part in key.split("."):
        if part not in node:
            break
        node = node._get_node(part)
        path.append(part)
    value = OmegaConf.select(OmegaConf.create(tree), key)
    while not path and OmegaConf.is_dict(value) and value:
        last, value = next(iter(value.items()))
        key = part = f"{key}.{last}"
    allowed = choices("", map(str, node))
    near = (nearest(part, map(str, node)) if path else None) or nearest(key, _dotted(schema))
    if near and not path:
        return f"unknown key {key}; did you mean {near}={value}? {allowed}"
    known = f"{allowed}; did you mean {near}?" if near else allowed
    if len(path) == 1 and path[0] in CHOICES:
        return f"{key}={value}: {tree[path[0]]['name']} has no such option; {known}"
    return f"unknown key {key}{' in ' + '.'.join(path) if path else ''}; {known}"


def _dotted(schema: DictConfig, prefix: str = "") -> list[str]:
    """Return the dotted names of all keys, a mapping before its keys."""
    found = []
    for key in map(str, schema):
        node = schema._get_node(key)
        found.append(prefix + key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            found += _dotted(node, f"{prefix}{key}.")
    return found
