"""Time of `largebatch report` for many runs, and size of its page.

Writes N run folders with real files (configurations from the launcher, metrics rows and layer statistics by the
recorder's classes, for the layers of a ResNet-18), then times the real command.
`python benchmarks/report.py [N] [--keep FOLDER] [--smallest]`
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from shared import parsed, print_table

from largebatch.config.identity import run_name
from largebatch.config.schema import Config
from largebatch.config.typed import from_composed, to_yaml
from largebatch.launch.composition import compose_grid, store_defaults
from largebatch.models.resnet import resnet
from largebatch.runs.folder import RunFolder
from largebatch.runs.metrics import MetricsLog, Row, read_rows, write_table
from largebatch.tracking.layers import LayerLog
from largebatch.tracking.recorder import summarise
from largebatch.tracking.rows import COLUMNS, Layer

ROOT = Path(__file__).resolve().parent.parent
EPOCHS, ROWS, LAYER_ROWS = 100, 200, 500
GRID = [
    "dataset=cifar10", "model=resnet18", "epochs=100", "dataset.val_fraction=0.1",
    "optimizer=lars,lamb,tvlars,clars", "schedule=constant,warmup_cosine", "batch_size=512,1024,4096,16384",
    "optimizer.lr=1,2,4,8", "seed=range(5)",
]  # fmt: skip


def write_run(runs_dir: Path, config: Config, layers: list[Layer]) -> None:
    folder = RunFolder(runs_dir / run_name(config))
    folder.path.mkdir(parents=True)
    folder.config.write_text(to_yaml(config))
    draw = random.Random(folder.name)
    epoch_steps = max(45000 // config.batch_size, 1)
    steps = EPOCHS * epoch_steps
    log = MetricsLog(folder.metrics, 0)
    for row in rows(config, draw, epoch_steps):
        log.write(row)
    log.close()
    write_layers(folder, layers, steps, draw)
    found = read_rows(folder.metrics)
    write_table(found, folder.metrics_table)
    facts: dict[str, Any] = {
        "lr": config.optimizer.lr, "steps": steps, "steps_per_epoch": epoch_steps, "processes": 1, "precision": "fp32",
        "device": "cpu (x86_64)", "test_images": 10000, "git_commit": "0" * 40, "git_dirty": False,
        "versions": {"python": "3.11.7", "torch": torch.__version__},
    }  # fmt: skip
    summary = facts | summarise(found) | {"state": "finished", "step": steps, "wall_seconds": 600.0}
    folder.summary.write_text(json.dumps(summary, indent=1))
    folder.update_status(state="finished", message="", step=steps, steps=steps)


def rows(config: Config, draw: random.Random, epoch_steps: int) -> list[Row]:
    """Return ``ROWS`` rows: a training row and an evaluation for each epoch."""
    best = draw.uniform(0.85, 0.95)
    found = []
    for i in range(1, ROWS + 1):
        epoch = math.ceil(i * EPOCHS / ROWS)
        accuracy = best * (1 - math.exp(-epoch / 20)) + draw.gauss(0, 0.01)
        where: Row = {
            "step": epoch * epoch_steps - (i % 2) * (epoch_steps > 1), "epoch": float(epoch),
            "examples": epoch * 45000, "wall_seconds": 6.0 * epoch,
        }  # fmt: skip
        if i % 2:
            where |= {"train/loss": 2 * (1 - accuracy), "train/accuracy": accuracy, "optim/lr": config.optimizer.lr}
            where |= {"perf/images_per_second": draw.gauss(7000, 100), "perf/step_ms": 70.0}
            where |= {"optim/phi": math.exp(-epoch / 50)} if config.optimizer.name == "tvlars" else {}
        else:
            for split in ("val", "test"):
                where |= {f"{split}/loss": 1 - accuracy, f"{split}/accuracy": accuracy, f"{split}/top5": 0.99}
        found.append(where)
    return found


def write_layers(folder: RunFolder, layers: list[Layer], steps: int, draw: random.Random) -> None:
    log = LayerLog(folder.layers, 0, lambda row: None)
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    every = max(steps // LAYER_ROWS, 1)
    for step in range(every, steps + 1, every):
        log.add(step, layers, {name: torch.rand(len(layers), generator=generator) + 0.01 for name in COLUMNS})
    log.to_write()()


def main() -> None:
    parser = argparse.ArgumentParser(description="Time `largebatch report` on generated runs.")
    parser.add_argument("runs", type=int, nargs="?", default=500, help="at most 640; default: 500")
    parser.add_argument("--keep", type=Path, help="write the runs here and keep them")
    options = parsed(parser, runs=2)
    store_defaults()
    layers = [Layer(name, weight.ndim) for name, weight in resnet("resnet18", 10).named_parameters()]
    with tempfile.TemporaryDirectory() as temporary:
        runs_dir = (options.keep or Path(temporary)) / "runs"
        for job in compose_grid(GRID, ROOT / "conf")[: options.runs]:
            write_run(runs_dir, from_composed(job.tree), layers)
        size = sum(path.stat().st_size for path in runs_dir.rglob("*")) / 1e6
        print(f"{options.runs} runs of {ROWS} metric rows, {len(layers)} layers at {LAYER_ROWS} steps: {size:,.0f} MB")
        table = []
        for kind in ("html", "md", "csv", "parquet"):
            out = Path(temporary) / f"report.{kind}"
            command = [sys.executable, "-m", "largebatch.cli", "report", str(runs_dir), "--out", str(out)]
            started = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            table.append([kind, f"{time.perf_counter() - started:.1f}", f"{out.stat().st_size / 1e6:.2f}"])
        print_table(["format", "seconds", "MB"], table)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(f"peak memory of the largest: {peak:,.0f} MiB")


if __name__ == "__main__":
    main()
