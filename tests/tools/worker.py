"""Worker with a short W&B ``finish`` limit (``impatient``), or that ``fails``: ``python worker.py RUN_DIR [HOW]``."""

import sys

from largebatch.tracking import wandb_run
from largebatch.training import worker
from largebatch.training.phase import MainPhase


def fail(*_: object) -> None:
    raise RuntimeError("as told")


if __name__ == "__main__":
    if "impatient" in sys.argv:
        wandb_run.FINISH_TIMEOUT = 1.5
    if "fails" in sys.argv:
        MainPhase.evaluate = fail  # type: ignore[assignment]
    sys.exit(worker.main(sys.argv[1:2]))
