"""A run's worker that waits for W&B for so many seconds at its end: ``python worker.py RUN_DIR SECONDS``."""

import sys

from largebatch.tracking import wandb_run
from largebatch.train import main

if __name__ == "__main__":
    wandb_run.FINISH_TIMEOUT = float(sys.argv[2])
    sys.exit(main(sys.argv[1:2]))
