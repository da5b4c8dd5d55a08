"""A model's figures on the validation and test sets."""

from __future__ import annotations

from torch import Tensor, nn

from largebatch import distributed
from largebatch.data import Split, eval_batches
from largebatch.memory import is_out_of_memory
from largebatch.micro_batch import release_memory
from largebatch.state import Run

_AT_ONCE = (256, 1024)  # images: a micro-batch that fits with gradients fits without, within these bounds


def evaluate(run: Run, model: nn.Module) -> dict[str, float]:
    """Figures on the whole validation and test sets, over all processes."""
    distributed.share_buffers(model)
    model.eval()
    figures: dict[str, float] = {}
    for name, split in (("val", run.data.val), ("test", run.data.test)):
        if split is not None:
            totals = distributed.sum_over_processes(_totals(run, model, split)).tolist()
            figures |= run.mode.evaluation_figures(name, totals)
    return figures


def _totals(run: Run, model: nn.Module, split: Split) -> Tensor:
    """The mode's totals of this process's part; with ``micro_batch=auto`` in smaller batches where memory is short."""
    size = min(max(run.batch.micro_batch, _AT_ONCE[0]), _AT_ONCE[1])
    while True:
        batches = eval_batches(
            split, run.data.mean, run.data.std, rank=run.rank, processes=run.processes, batch=size,
            device=run.device, workers=run.config.dataset.workers, channels_last=run.arithmetic.channels_last,
        )  # fmt: skip
        try:
            with run.autocast:
                totals: Tensor = run.mode.evaluate(model, batches, run.device)
            return totals
        except (RuntimeError, MemoryError) as error:
            if run.config.micro_batch != "auto" or size == 1 or not is_out_of_memory(error):
                raise
        size //= 2
        release_memory(run.device)
