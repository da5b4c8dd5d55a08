"""One rank of a run. Rank 1 has little memory from its second step. in_little_memory.py starts it."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

from conftest import configuration
from in_little_memory import MIB, WIDE

from largebatch.config.typed import to_yaml
from largebatch.data import batches
from largebatch.training import worker

RANK = int(os.environ["RANK"])
FEW = ("steps=4", "micro_batch=auto")


def limit_from_the_second_step_on() -> None:
    """Limit the memory when step 2 requests its images, as if another program took it."""
    asked = batches.global_batches

    def steps(*arguments: object) -> object:
        for step, indices in asked(*arguments):  # type: ignore[arg-type]
            if step == 1:
                taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (taken + 60 * MIB, resource.RLIM_INFINITY))
            yield step, indices

    batches.global_batches = steps  # type: ignore[assignment]


folder = Path(sys.argv[1]) / "run"
if RANK == 0:
    folder.mkdir()
    (folder / "partial").write_text(to_yaml(configuration(*WIDE, *FEW, "cluster.processes=2", "cluster.device=cpu")))
    (folder / "partial").rename(folder / "config.yaml")
while not (folder / "config.yaml").exists():
    pass
if RANK == 1:
    limit_from_the_second_step_on()
sys.exit(worker.main([str(folder)]))
