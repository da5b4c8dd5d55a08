"""The one schema of a run, and how a composed YAML becomes it.

Every key with a default has it here; the presets in ``conf/`` fill in what a choice of data set, model, optimizer ...
means. ``None`` in an optimizer, model or schedule key means "this choice has no such option": setting one that the
chosen name doesn't know is an error (see ``validate.py``), never silently ignored.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from largebatch.errors import UserError, choices


@dataclass
class ViewsConfig:
    """The two views of Barlow Twins: by default the reference program's. A view is mirrored if ``dataset.flip``."""

    min_area: float = 0.08  # smallest part of an image's area that a crop may show
    jitter: float = 0.8  # probabilities: of brightness, contrast, saturation and hue being changed,
    gray: float = 0.2  # of colours being taken away,
    blur: list[float] = field(default_factory=lambda: [1.0, 0.1])  # of Gaussian blur, in the first and second view,
    solarize: list[float] = field(default_factory=lambda: [0.0, 0.2])  # of bright pixels being inverted, likewise


@dataclass
class DatasetConfig:
    name: str = MISSING
    root: str = "data"  # where the files are, or are downloaded to
    download: bool = True  # fetch what isn't there, if there is a network
    verify: bool = True  # check the files' checksums, where the data set has published ones
    workers: int = 2  # decoding processes a rank; only data sets that are decoded while training use them
    location: str = "auto"  # of the decoded pixels: device, host, or auto (the device where they fit)
    on_error: str = "stop"  # at an image that can't be read: stop, or skip (it is left out and counted)
    val_fraction: float = 0.0  # part of the training set held out for choosing settings; stratified, fixed by `seed`
    train_size: int | None = None  # images, where known beforehand; chosen for `synthetic`
    test_size: int | None = None
    num_classes: int | None = None  # likewise
    channels: int = 3  # 1 (grey) or 3
    image_size: int | None = None  # side in pixels that images are resized to; None keeps the data set's own
    mean: list[float] | None = None  # per channel, of pixels in 0..1; None measures them on training images
    std: list[float] | None = None
    crop_padding: int = 4  # random crop after padding by so many pixels; 0 is off
    flip: bool = True  # random horizontal flip
    rotation: float = 15.0  # random rotation, degrees to either side; 0 is off
    views: ViewsConfig = field(default_factory=ViewsConfig)
    default_epochs: int = 100  # length of training when neither `epochs` nor `steps` nor the mode says it


@dataclass
class ModelConfig:
    name: str = MISSING
    library: str = MISSING  # largebatch, torchvision or timm
    stem: str | None = None  # imagenet (as published) or cifar (3x3, stride 1, no pooling)
    zero_init_residual: bool | None = None  # ResNets: each block begins as the identity
    norm: str | None = None  # smallcnn: group or batch
    init: str = "default"  # of convolution and linear weights; default is the library's
    options: dict[str, Any] = field(default_factory=dict)  # passed on to timm.create_model


@dataclass
class OptimizerConfig:
    name: str = MISSING
    library: str = MISSING  # largebatch, torch or timm
    lr: float = MISSING  # at lr_scaling.base_batch when a scaling rule is chosen
    lr_1d: float | None = None  # of biases and norm parameters, scaled alike; None: lr
    weight_decay: float | None = None
    momentum: float | None = None
    nesterov: bool | None = None
    betas: list[float] | None = None
    eps: float | None = None
    trust_coefficient: float | None = None
    adapt_1d: bool | None = None  # scale biases and norm parameters layer-wise too
    decay_1d: bool | None = None  # decay them too
    norm_clip: float | None = None  # clip the norms of the trust ratio from above
    max_ratio: float | None = None  # clip the trust ratio itself
    denominator: str | None = None  # norm_of_sum (||g + wd*w||) or sum_of_norms (||g|| + wd*||w||); clars: sample_norms
    lr_in_momentum: bool | None = None  # lars, tvlars, clars: the rate inside the momentum buffer
    larc: bool | None = None  # likewise: divide the trust ratio by lr before max_ratio clips it
    sample_size: int | None = None  # clars: samples whose mean gradient's norm counts as one
    bias_correction: bool | None = None  # lamb
    lmbda: float | None = None  # tvlars: steepness of phi's decay, per optimizer step
    alpha: float | None = None  # tvlars: phi starts near 1/alpha; rmsprop: smoothing constant
    delay_epochs: float | None = None  # tvlars: epochs before phi is at its midpoint
    gamma_min: int | float | str | None = None  # tvlars: phi's floor; auto = 0.001 * batch_size / 256
    lr_decay: float | None = None  # adagrad
    centered: bool | None = None  # rmsprop
    amsgrad: bool | None = None  # adam, adamw
    options: dict[str, Any] = field(default_factory=dict)  # passed on to timm's optimizer


@dataclass
class LrScalingConfig:
    rule: str = "none"  # none, linear (lr * B/base), sqrt (lr * sqrt(B/base)) or surge (see docs/lr_scaling.md)
    base_batch: int = 256
    noise_scale: float | None = None  # surge: the gradient noise scale B_noise in samples, where the rate peaks
    force: bool = False  # surge: also for an optimizer that its theory doesn't cover


@dataclass
class ScheduleConfig:
    name: str = MISSING
    warmup_epochs: float | None = None  # exactly one of the two, for the schedules that warm up
    warmup_steps: int | None = None
    final_factor: float | None = None  # the rate at the end, as a part of the full rate
    power: float | None = None  # warmup_poly


@dataclass
class ModeConfig:
    """All but the name are Barlow Twins' (``bt``): see docs/barlow_twins.md."""

    name: str = MISSING
    default_epochs: int | None = None  # of pre-training, when neither `epochs` nor `steps` is given
    projector: list[int] | None = None  # widths of its linear layers
    lmbda: float | None = None  # weight of the off-diagonal terms of the loss
    loss_scale: float | None = None  # what the loss is multiplied by
    exact: bool | None = None  # the loss of the global batch under accumulation and over processes
    knn_every: int | None = None  # epochs between nearest-neighbour figures of frozen features; 0 is off
    knn_neighbours: int | None = None
    knn_temperature: float | None = None  # a neighbour's vote weighs exp(cosine similarity / temperature)
    eval_epochs: int | None = None  # of the linear probe, or of fine-tuning
    eval_batch_size: int | None = None  # global, of the same
    eval_augmentation: bool | None = None  # train it on crops, flips and rotations; false: features are computed once
    lr_classifier: float | None = None  # of the same: the linear layer's rate
    lr_backbone: float | None = None  # the backbone's rate: 0 freezes it (linear probe), above 0 fine-tunes it
    eval_weight_decay: float | None = None


@dataclass
class ClusterConfig:
    name: str = MISSING
    processes: int | None = None  # None: one a GPU, or one on CPU
    device: str = "auto"  # auto, cpu or cuda
    devices: list[int] | None = None  # which GPUs; None: all that are visible
    parallel: int | None = None  # runs of a grid at a time; None: as many as there are GPUs for, or one on CPU
    threads: int | None = None  # CPU threads a process; None: the cores, divided
    # The rest is of SLURM. Its `processes` are all: nodes * processes_per_node.
    nodes: int = 1
    processes_per_node: int | None = None  # None: one a GPU, or one on CPU
    partition: str | None = None  # None, here and below: what the cluster has for those who don't ask
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus_per_node: int | None = None
    cpus_per_node: int | None = None
    memory_gb: float | None = None  # a node
    time_limit: int | None = None  # minutes; a longer run goes on in a requeued job
    array_parallelism: int | None = None  # runs of a grid at a time; None: as many as SLURM lets
    setup: list[str] = field(default_factory=list)  # shell commands before the run: modules, variables
    options: dict[str, Any] = field(default_factory=dict)  # further options of sbatch, without their dashes
    wait: bool = False  # watch until all have ended, instead of returning once they are submitted
    max_requeues: int = 100  # times that a run may go on in a new job by itself
    signal_seconds: int = 120  # before the time limit: when the run is asked to save and make way


@dataclass
class TrackerConfig:
    name: str = MISSING
    mode: str = "auto"  # auto, online, offline or disabled; auto is online when a key and a reachable host are there
    project: str = "largebatch"
    entity: str | None = None
    group: str | None = None  # None: the name of the sweep, if the run is one of a named sweep's
    job_type: str | None = None  # None: the mode's name
    tags: list[str] = field(default_factory=list)  # beside data set, model, optimizer and schedule
    notes: str | None = None
    log_every: int = 10  # steps
    layers_every: int = 20  # steps between rows of layers.parquet; 0 is off
    images: bool = False  # keep some images of the first batch as the network sees them: images.png, and in W&B
    alerts: bool = False  # have W&B tell you of a run that diverges or fails
    checkpoints: bool = False  # keep the best on validation images too, and upload the last and the best to W&B


@dataclass
class CheckpointConfig:
    every_seconds: float = 10.0
    every_steps: int | None = None  # instead of by the clock


@dataclass
class Config:
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_scaling: LrScalingConfig = field(default_factory=LrScalingConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    mode: ModeConfig = field(default_factory=ModeConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    cases: list[Any] | None = None  # of a sweep: axes that belong together (docs/grids.md); a run has none
    trials: int | None = None  # of a sweep: points drawn from its intervals; likewise
    batch_size: int = 512  # global: over all processes and accumulation
    # Most images a process takes through the model at once; None: its whole share; auto: the most that fit into memory.
    micro_batch: int | str | None = None
    epochs: int | None = None  # one of the two; neither: dataset.default_epochs
    steps: int | None = None
    seed: int = 0
    precision: str = "auto"  # fp32, bf16 or auto: the faster one for this model on this device
    compile: bool | str = "auto"  # torch.compile: true, false or auto (on GPUs, for runs that are long enough)
    sync_bn: bool = False  # batch-norm statistics over all processes
    deterministic: bool = False  # deterministic CUDA kernels, for bit-exact repeats on a GPU
    eval_every: int = 1  # epochs between evaluations; the end is always evaluated
    runs_dir: str = "runs"
    rerun: bool = False  # repeat a finished run from scratch
    dry_run: bool = False  # show the plan, start nothing
    profile: bool = False  # write a trace of some steps, and a table of where their time goes


def from_composed(composed: DictConfig | dict[str, Any]) -> Config:
    """The typed configuration of a composed (or frozen) tree, its defaults filled in and its folders made absolute.

    Raises:
        UserError: for an unknown key, a value of the wrong type or a missing one; the message names the key.
    """
    try:
        # As plain values: a tree that Hydra composed on the schema would keep keys added by force (+typo=1).
        plain = OmegaConf.to_container(OmegaConf.create(composed), resolve=True)
        assert isinstance(plain, dict)
        plain |= {"cases": None, "trials": None}
        config = OmegaConf.to_object(OmegaConf.merge(_schema(), plain))
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from None
    assert isinstance(config, Config)
    if config.epochs is None and config.steps is None:
        config.epochs = config.mode.default_epochs or config.dataset.default_epochs
    if isinstance(config.optimizer.gamma_min, int):  # one number has one identity
        config.optimizer.gamma_min = float(config.optimizer.gamma_min)
    config.runs_dir = str(Path(config.runs_dir).expanduser().absolute())
    config.dataset.root = str(Path(config.dataset.root).expanduser().absolute())
    return config


@functools.cache
def _schema() -> DictConfig:
    schema: DictConfig = OmegaConf.structured(Config)
    return schema


def load_config(path: Path) -> Config:
    """The frozen configuration of a run folder."""
    frozen = OmegaConf.load(path)
    assert isinstance(frozen, DictConfig)
    return from_composed(frozen)


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def explain(error: OmegaConfBaseException) -> str:
    """One line for OmegaConf's complaint: the key, what was given, what is allowed."""
    key = error.full_key or "?"
    if re.match(r"Key '.*' (not in|is not in struct)", str(error)):
        return unknown_key(key)
    first_line = str(error).splitlines()[0]
    if "missing mandatory value" in first_line.lower():
        return f"{key} has no value: choose a preset for its group or set it"
    return f"{key}: {first_line}"


def unknown_key(key: str) -> str:
    """``"unknown key optimizer.lrr; allowed ..."`` with the keys at the place where the name leaves the schema."""
    node: Any = Config
    path: list[str] = []
    for part in key.split("."):
        fields = {f.name: f for f in dataclasses.fields(node)}
        if part not in fields:
            break
        path.append(part)
        factory: Any = fields[part].default_factory
        if not dataclasses.is_dataclass(factory):
            return f"unknown key {key}: {'.'.join(path)} is a value and holds no further keys"
        node = factory
    here = f" in {'.'.join(path)}" if path else ""
    return f"unknown key {key}; keys{here} {choices(part, [f.name for f in dataclasses.fields(node)])}"
