"""Cost of CLARS's norms: a forward and backward pass with SampleNorms against one without.

ResNet-18, ten classes, batch 128, fp32, 2 threads. Times alternate in one process; medians, and ratios to the plain
step of the same repeat. Memory is the peak of a fresh process for each way, above its memory before the first step
(Linux).
`python benchmarks/clars.py [--repeats 15] [--smallest]`
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from shared import parsed, print_table
from torch.nn import functional as F
from torchvision import models

from largebatch.optim.sample_norms import SampleNorms

# name: method (None: without), sample_size, micro-batch (None: the whole batch)
WAYS = {
    "plain": (None, 1, None),
    "hooks, sample_size 1": ("hooks", 1, None),
    "hooks, sample_size 32": ("hooks", 32, None),
    "plain, 4 micro-batches of 32": (None, 32, 32),
    "passes, sample_size 32": ("passes", 32, 32),
}


def build_step(way: str, size: int, batch: int) -> Callable[[], None]:
    """Return a function that does one step's forward and backward passes on images [batch, 3, size, size]."""
    method, sample_size, micro_batch = WAYS[way]
    torch.manual_seed(0)
    model = models.resnet18(num_classes=10)
    images, labels = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))
    sample_norms = SampleNorms(model, sample_size, method=method) if method else None
    micro_batch = micro_batch or batch
    accumulation = batch // micro_batch

    def step() -> None:
        for part, answers in zip(images.split(micro_batch), labels.split(micro_batch), strict=True):
            (F.cross_entropy(model(part), answers) / accumulation).backward()
        if sample_norms:
            sample_norms.means()
        model.zero_grad(set_to_none=True)

    return step


def times(ways: list[str], size: int, batch: int, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of a step of each way, one a repeat, in reversed order every other repeat."""
    steps = {way: build_step(way, size, batch) for way in ways}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for step in steps.values():
        step()
    for repeat in range(repeats):
        for way in ways if repeat % 2 == 0 else reversed(ways):
            started = time.perf_counter()
            steps[way]()
            seconds[way].append(time.perf_counter() - started)
    return seconds


def peak(way: str, size: int, batch: int) -> float:
    """Return this process's peak in MiB over three steps, above its peak before the first."""
    step = build_step(way, size, batch)
    before = most_resident()
    for _ in range(3):
        step()
    return (most_resident() - before) / 1024


def most_resident() -> int:
    """Return this process's peak in KiB; getrusage's peak includes the parent's."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1])


def peak_in_fresh_process(way: str, size: int, batch: int) -> float:
    command = [sys.executable, __file__, "--peak", way, "--sizes", str(size), "--batch", str(batch)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def report(ways: list[str], size: int, batch: int, repeats: int) -> None:
    seconds = times(ways, size, batch, repeats)
    memory = {way: peak_in_fresh_process(way, size, batch) for way in ways}
    rows = []
    for way in ways:
        median = statistics.median(seconds[way])
        ratio = statistics.median(a / b for a, b in zip(seconds[way], seconds["plain"], strict=True))
        mebibytes = [f"{memory[way]:.0f}", f"{memory[way] / memory['plain']:.2f}" if memory["plain"] else "-"]
        rows.append([way, f"{1000 * median:.1f}", f"{ratio:.2f}", *mebibytes])
    print_table([f"images of {size}x{size}", "ms", "x plain", "MiB", "x plain"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=15, help="15 by default")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[32, 64], help="image sizes in pixels; 32 64 by default"
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="plain must be among them")
    parser.add_argument("--batch", type=int, default=128, help="images a step, a multiple of 32; 128 by default")
    parser.add_argument("--peak", choices=WAYS, help=argparse.SUPPRESS)
    given = parsed(parser, repeats=1, sizes=[32], batch=2, ways=["plain", "hooks, sample_size 1"])
    torch.set_num_threads(2)
    if given.peak:
        print(peak(given.peak, given.sizes[0], given.batch))
        return
    for size in given.sizes:
        report(given.ways, size, given.batch, given.repeats)


if __name__ == "__main__":
    main()
