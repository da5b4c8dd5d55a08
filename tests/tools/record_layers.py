"""Layer statistics through a run's recorder, in its own process: ``python record_layers.py FOLDER``.

A run of 2,500 steps with a layer row at each step has three times as many rows as W&B gets. The first 70 are recorded.
The set of layers changes after step 40; a gradient norm is infinite and a trust ratio NaN.
"""

import math
import sys
from pathlib import Path

import torch
from one_run import configuration

from largebatch.runs.folder import RunFolder
from largebatch.tracking.console import Console
from largebatch.tracking.recorder import Recorder
from largebatch.tracking.rows import COLUMNS, Layer

FACTS = {"steps": 2500, "steps_per_epoch": 10}


def statistics(step: int, layers: int) -> dict[str, torch.Tensor]:
    weights = step + torch.arange(layers) / 4  # exact in fp32
    gradients = torch.full((layers,), math.inf if step == 6 else 0.5)
    ratios = torch.full((layers,), math.nan if step == 9 else 0.25)
    return dict(zip(COLUMNS, (weights, gradients, ratios, ratios / weights), strict=True))


def record(folder: RunFolder) -> None:
    config = configuration(layers_every=1, mode="offline")
    with Console(folder.log, speaking=False) as console, Recorder(config, folder, 0, FACTS, console) as recorder:
        for step in range(1, 71):
            layers = [Layer("conv1.weight", 4), Layer("head.bias", 1)][: 2 if step <= 40 else 1]
            recorder.layers(step, layers, statistics(step, len(layers)))
            if step == 50:
                recorder.rows_to_write()()
        recorder.row({"step": 75, "epoch": 7.5, "examples": 75, "wall_seconds": 1.0, "train/loss": 1.0})
        recorder.finish("finished", 75, "", 1.0, "")


if __name__ == "__main__":
    record(RunFolder(Path(sys.argv[1])))
