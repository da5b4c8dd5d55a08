"""The configuration of a run.

Each data set, model, optimizer, schedule and mode has its own dataclass, selected by ``name``. The presets in ``conf/``
set only the options that differ from the dataclass's defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from largebatch.config import datasets, models, optimizer_libraries, schedules
from largebatch.config.batch_schedule import BatchScheduleConfig
from largebatch.config.datasets import DATASETS, DatasetConfig
from largebatch.config.lr_scaling import LrScalingConfig
from largebatch.config.models import MODELS, ModelConfig
from largebatch.config.modes import MODES, ModeConfig
from largebatch.config.optimizers import OPTIMIZERS, OptimizerConfig
from largebatch.config.options import option
from largebatch.config.schedules import SCHEDULES, ScheduleConfig
from largebatch.errors import UserError


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
# Dataclasses of choices by group and library. Their names are the library's, or the user's.
LIBRARIES: dict[str, dict[str, Any]] = {
    "dataset": datasets.LIBRARIES,
    "model": models.LIBRARIES,
    "optimizer": optimizer_libraries.LIBRARIES,
    "schedule": schedules.LIBRARIES,
    "mode": {},
}
