"""Division of the global batch over processes and accumulation."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from largebatch.errors import UserError

if TYPE_CHECKING:
    from largebatch.config.schema import Config


@dataclass(frozen=True)
class BatchPlan:
    """Sizes of one optimizer step, in images.

    ``global_batch = processes * accumulation * micro_batch``. Each process makes ``accumulation`` forward and backward
    passes of one micro-batch each.

    Attributes:
        together: images that stay in one micro-batch: CLARS's samples per measured norm, and pairs of mixup.
        synchronised: True if the processes' micro-batches of one pass share their batch statistics (``sync_bn``).
    """

    global_batch: int
    processes: int
    micro_batch: int
    together: int = 1
    synchronised: bool = False

    @property
    def per_process(self) -> int:
        return self.global_batch // self.processes

    @property
    def accumulation(self) -> int:
        return self.per_process // self.micro_batch

    @property
    def group(self) -> int:
        """Number of images that batch norm normalises over."""
        return self.micro_batch * (self.processes if self.synchronised else 1)

    def groups(self, images: int) -> int:
        """Return the number of groups of at most ``group`` images in a batch of ``images``."""
        return -(-images // self.group)

    def pieces(self, rank: int, images: int | None = None) -> tuple[slice, ...]:
        """Return the micro-batches of process ``rank`` as parts of a batch of ``images`` (None: ``global_batch``).

        Groups of images with common batch statistics are consecutive, and their sizes differ by at most ``together``.
        So batch statistics depend on ``group`` and not on the number of processes. Without ``synchronised``, a group is
        a micro-batch of one process, and in a small batch some processes may have none. With it, every process has a
        part of each group.
        """
        return _pieces(self, rank, self.global_batch if images is None else images)


@functools.lru_cache(maxsize=64)
def _pieces(plan: BatchPlan, rank: int, images: int) -> tuple[slice, ...]:
    number, together = plan.groups(images), plan.together
    groups = [_share(range(images // together), at, number) for at in range(number)]
    if plan.synchronised:
        mine = [_share(group, rank, plan.processes) for group in groups]
    else:
        mine = [groups[at] for at in _share(range(number), rank, plan.processes)]
    return tuple(slice(piece.start * together, piece.stop * together) for piece in mine)


def _share(whole: range, number: int, parts: int) -> range:
    """Return part ``number`` of ``whole``. Sizes of the parts differ by at most one."""
    return whole[number * len(whole) // parts : (number + 1) * len(whole) // parts]


def has_batch_statistics(config: Config) -> bool:
    """Return True if the images of a micro-batch are normalised or correlated together, so that its size matters."""
    normalises = config.model.has_batch_norm and not config.model.freeze
    return normalises or config.mode.loss_per_micro_batch


def plan_training(config: Config, processes: int) -> BatchPlan:
    """Divide the global batch, and set ``config.batch_norm_size`` if the size of a micro-batch matters.

    A given ``batch_norm_size`` sets the micro-batch, else it follows from the division.

    Raises:
        UserError: if a division leaves a remainder, or ``batch_norm_size`` has no effect or contradicts another key.
    """
    size, together = config.batch_norm_size, config.optimizer.samples_together
    pair = config.mode.images_together
    given = _for_growth(config, processes)
    if not has_batch_statistics(config):
        if size is not None:
            raise UserError(f"batch_norm_size={size}: {config.model.name} has no batch norm here. Fix: leave it out")
        return plan_batch(config.batch_size, processes, given, together, pair)
    sharing = processes if config.sync_bn else 1
    if sharing > 1 and config.mode.loss_per_micro_batch:
        raise UserError(
            f"sync_bn=true: not allowed with mode.exact=false on {processes} processes, because batch norm is over all "
            "processes and the loss over each. Fix: mode.exact=true, or sync_bn=false"
        )
    micro_batch = given if size is None else _micro_batch(config, size, processes, sharing)
    plan = plan_batch(config.batch_size, processes, micro_batch, together, pair, synchronised=config.sync_bn)
    config.batch_norm_size = plan.group
    return plan


def _for_growth(config: Config, processes: int) -> int | str | None:
    """Return ``micro_batch``, with ``batch_schedule`` at most the first batch's share of a process.

    The passes of the norm test have the configured size on any number of processes, because it is an estimate's.

    Raises:
        UserError: if a batch size of the schedule can't be divided into such micro-batches, as many in each process.
    """
    growth = config.batch_schedule
    if growth.first is None:
        return config.micro_batch
    first = growth.first
    if growth.measures:
        return _small_batch(config, first, processes)
    if config.batch_norm_size is not None:
        micro_batch = config.batch_norm_size // (processes if config.sync_bn else 1)
    else:
        share = first // processes
        micro_batch = min(config.micro_batch, share) if isinstance(config.micro_batch, int) else share
    for size in (*growth.sizes, first):
        if not micro_batch or size % (micro_batch * processes):
            common, rest = divmod(math.gcd(*growth.sizes, first, config.batch_size), processes)
            fix = f"batch sizes that are multiples of {processes}" if rest else f"micro_batch={common}"
            if config.batch_norm_size is not None and not rest:
                fix = f"batch_norm_size={common * (processes if config.sync_bn else 1)}"
            raise UserError(
                f"batch_schedule: a batch of {size} images can't be divided over {processes} process(es) of equal "
                f"micro-batches of {micro_batch}. Fix: {fix}"
            )
    return micro_batch


def _small_batch(config: Config, first: int, processes: int) -> int:
    """Return the micro-batch of the norm test.

    Raises:
        UserError: if it doesn't divide the first batch's share of a process, or another key sets the micro-batch.
    """
    small = config.batch_schedule.small
    key = f"batch_schedule.small_batch={small}"
    if first % (small * processes):
        fix = f"batch_schedule.start that is a multiple of {processes}"
        if first % processes == 0:
            fix = f"batch_schedule.small_batch={math.gcd(small, first // processes)}, or fewer processes"
        raise UserError(
            f"{key}: batch_schedule.start={first} can't be divided over {processes} process(es) of equal passes of "
            f"{small} images. Fix: {fix}"
        )
    if isinstance(config.micro_batch, int) and config.micro_batch < small:
        fix = f"batch_schedule.small_batch={config.micro_batch} (another run)"
        raise UserError(f"micro_batch={config.micro_batch}: {key} images are one pass. Fix: {fix}, or leave it out")
    group = small * (processes if config.sync_bn else 1)
    if config.batch_norm_size not in (None, group):
        raise UserError(
            f"batch_norm_size={config.batch_norm_size}: batch norm is over {group} images, because {key} images are "
            "one pass. Fix: leave it out, and set batch_schedule.small_batch"
        )
    return small


def _micro_batch(config: Config, size: int, processes: int, sharing: int) -> int:
    """Return the micro-batch that makes batch norm normalise over ``size`` images.

    Raises:
        UserError: if there is none, or ``micro_batch`` has another value.
    """
    share = plan_batch(config.batch_size, processes, None).per_process
    micro_batch = size // sharing
    if size % sharing or micro_batch > share or share % micro_batch:
        over = "the global batch" if config.sync_bn else f"the {share} images of each process"
        nearest = sharing * _nearest_divisor(share, max(micro_batch, 1))
        raise UserError(
            f"batch_norm_size={size}: doesn't divide {over} (batch_size={config.batch_size} over {processes} "
            f"process(es), sync_bn={str(config.sync_bn).lower()}). Fix: batch_norm_size={nearest}"
            + (", or sync_bn=true" if processes > 1 and not config.sync_bn else "")
        )
    measures = config.batch_schedule.measures  # micro_batch is then an upper limit
    if isinstance(config.micro_batch, int) and min(config.micro_batch, share) != micro_batch and not measures:
        raise UserError(
            f"micro_batch={config.micro_batch}: batch_norm_size={size} needs micro-batches of {micro_batch} images. "
            "Fix: leave out one of the two"
        )
    return micro_batch


def plan_batch(
    global_batch: int,
    processes: int,
    micro_batch: int | str | None,
    samples_together: int = 1,
    pair: int = 1,
    *,
    synchronised: bool = False,
) -> BatchPlan:
    """Divide ``global_batch`` over ``processes``, and each share into micro-batches of ``micro_batch`` images.

    Args:
        micro_batch: None and ``auto`` leave the share whole. Training finds the size for ``auto``.
        samples_together: must divide the micro-batch, because a micro-batch holds whole groups of CLARS's samples.
        pair: the same for images that are mixed with each other.

    Raises:
        UserError: if a division leaves a remainder. The message names the nearest sizes without a remainder.
    """
    if global_batch % processes:
        fix = f"batch_size={_nearest_multiples(global_batch, processes)}"
        raise UserError(f"batch_size={global_batch}: can't be divided over {processes} processes. Fix: {fix}")
    share = global_batch // processes
    size = min(micro_batch, share) if isinstance(micro_batch, int) else share
    if share % size:
        near = _nearest_multiples(global_batch, processes * size)
        nearest = _nearest_divisor(share, size)
        raise UserError(
            f"micro_batch={size}: doesn't divide the {share} images of each process (batch_size={global_batch} "
            f"over {processes} process(es)). Fix: micro_batch={nearest}, or batch_size={near}"
        )
    if size % samples_together:
        raise UserError(
            f"optimizer.sample_size={samples_together}: doesn't divide the micro-batch of {size} images. "
            f"Fix: optimizer.sample_size={_nearest_divisor(size, samples_together)}"
        )
    together = math.lcm(samples_together, pair)
    if size % together:
        near = _nearest_multiples(global_batch, processes * together)
        raise UserError(
            f"batch_size={global_batch}: mode.mixup and mode.cutmix mix pairs of images, and a micro-batch of {size} "
            f"images on each of {processes} process(es) doesn't hold whole "
            f"{'pairs' if samples_together == 1 else f'groups of {together}'}. "
            f"Fix: batch_size={near}, and a micro-batch that is a multiple of {together}"
        )
    return BatchPlan(global_batch, processes, size, together, synchronised)


def _nearest_divisor(size: int, wanted: int) -> int:
    return min((d for d in range(1, size + 1) if size % d == 0), key=lambda d: abs(d - wanted))


def _nearest_multiples(size: int, unit: int) -> str:
    below = size // unit * unit
    return " or ".join(str(n) for n in (below, below + unit) if n > 0)
