"""Division of the global batch over processes and accumulation."""

from __future__ import annotations

from dataclasses import dataclass

from largebatch.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """Sizes of one optimizer step, in images.

    ``global_batch = processes * accumulation * micro_batch``. Each process makes ``accumulation`` forward and backward
    passes of one micro-batch each.
    """

    global_batch: int
    processes: int
    accumulation: int
    micro_batch: int

    @property
    def per_process(self) -> int:
        return self.accumulation * self.micro_batch


def plan_batch(
    global_batch: int, processes: int, micro_batch: int | str | None, samples_together: int = 1
) -> BatchPlan:
    """Divide ``global_batch`` over ``processes``, and each share into micro-batches of ``micro_batch`` images.

    Args:
        micro_batch: None and ``auto`` leave the share whole. Training finds the size for ``auto``.
        samples_together: must divide the micro-batch, because a micro-batch holds whole groups of CLARS's samples.

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
    return BatchPlan(global_batch, processes, share // size, size)


def plan_small_batch(batch: int, images: int, processes: int, micro_batch: int) -> BatchPlan:
    """Divide up to ``batch`` of the ``images``, in micro-batches of at most ``micro_batch``.

    The batch needn't be divisible: the remainder over ``processes`` is left out. Each process takes at least one image.
    The micro-batch is the largest that divides a process's share.
    """
    share = max(min(batch, images) // processes, 1)
    piece = max(size for size in range(1, min(share, micro_batch) + 1) if share % size == 0)
    return BatchPlan(share * processes, processes, share // piece, piece)


def _nearest_divisor(size: int, wanted: int) -> int:
    return min((d for d in range(1, size + 1) if size % d == 0), key=lambda d: abs(d - wanted))


def _nearest_multiples(size: int, unit: int) -> str:
    below = size // unit * unit
    return " or ".join(str(n) for n in (below, below + unit) if n > 0)
