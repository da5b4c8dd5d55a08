"""Cost of a checkpoint for training: written in the background, or while training waits.

ResNet-18 with momentum, 89.5 MB. Interleaved; medians; ratios last.
`python benchmarks/checkpoint.py [--device cuda] [--folder ON_THE_DISK_IN_QUESTION] [--smallest]`
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from shared import parsed, print_table
from torch.nn import functional as F

from largebatch.models.resnet import resnet
from largebatch.training.checkpoint import CheckpointWriter, save_checkpoint


class Training:
    """A ResNet-18 for images of 32x32 with SGD and momentum, and a batch of noise."""

    def __init__(self, device: torch.device, batch: int) -> None:
        self.device = device
        self.model = resnet("resnet18", 10).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, fused=True)
        self.images = torch.randn(batch, 3, 32, 32, device=device)
        self.labels = torch.randint(10, (batch,), device=device)

    def step(self) -> None:
        F.cross_entropy(self.model(self.images), self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.synchronise()

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure(training: Training, writer: CheckpointWriter, folder: Path, repeat: int) -> dict[str, float]:
    """Measure each part once, in reversed order every other repeat."""
    found: dict[str, float] = {}

    def alone() -> None:
        found["a step"] = seconds(training.step)

    def synchronous() -> None:
        found["a save while training waits for the disk"] = seconds(
            lambda: save_checkpoint(folder / "synchronous", repeat, training.state())
        )

    def background() -> None:
        found["a save in the background: training waits"] = seconds(lambda: writer.save(repeat, training.state()))
        found["a step during the write"] = seconds(training.step)
        found["the write goes on after that step"] = seconds(writer.wait)

    order = [alone, synchronous, background]
    for part in order if repeat % 2 else reversed(order):
        part()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; 2 by default")
    parser.add_argument("--batch", type=int, default=64, help="images a step; 64 by default")
    parser.add_argument("--repeats", type=int, default=15, help="15 by default")
    parser.add_argument("--folder", type=Path, help="folder to write to; the system's temporary folder by default")
    given = parsed(parser, batch=2, repeats=1)
    torch.set_num_threads(given.threads)
    training = Training(torch.device(given.device), given.batch)
    training.step()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        with CheckpointWriter(Path(folder) / "background", training.device) as writer:
            first = seconds(lambda: writer.save(0, training.state()))
            writer.wait()
            rows = [measure(training, writer, Path(folder), repeat) for repeat in range(1, given.repeats + 1)]
        size = sum(path.stat().st_size for path in (Path(folder) / "background").glob("*.pt")) / 2
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    print(f"{size / 1e6:.1f} MB, {given.device}, {given.threads} threads, {given.batch} images a step\n")
    times = {"the first save in the background, which allocates": first} | medians
    print_table(["", "ms"], [[name, f"{1000 * value:.1f}"] for name, value in times.items()])
    stall = medians["a save in the background: training waits"]
    synchronous = medians["a save while training waits for the disk"]
    longer = statistics.median(row["a step during the write"] - row["a step"] for row in rows)
    print(f"a save in the background stops training for {stall / synchronous:.2f} x one that waits for the disk")
    print(f"a step during the write takes {1 + longer / medians['a step']:.2f} x one without")
    print(f"both together cost training {(stall + longer) / synchronous:.2f} x a save that waits for the disk")


if __name__ == "__main__":
    main()
