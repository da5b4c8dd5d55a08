"""Training of run folders one after the other in one process: ``python train_folders.py RUN_DIR ...``.

``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT`` make it a rank of several processes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from largebatch.config.schema import Config
from largebatch.config.typed import load_config, to_yaml
from largebatch.machine import distributed
from largebatch.runs.folder import RunFolder
from largebatch.tracking.console import Console
from largebatch.training.profile import StartClock
from largebatch.training.worker import train


def create(path: Path, config: Config) -> RunFolder:
    """Create a run's folder with its frozen configuration."""
    path.mkdir(parents=True)
    folder = RunFolder(path)
    folder.config.write_text(to_yaml(config))
    return folder


def train_folder(folder: RunFolder, rank: int = 0, processes: int = 1) -> None:
    """Train from the newest checkpoint to the end."""
    with Console(folder.log, speaking=rank == 0) as console:
        train(load_config(folder.config), folder, rank, processes, torch.device("cpu"), console, StartClock())


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank, processes, _ = distributed.start("cpu")
    for place in sys.argv[1:]:
        train_folder(RunFolder(Path(place)), rank, processes)
    distributed.stop()
