"""What CLARS's norms cost: a forward and backward pass with SampleNorms against one without.

ResNet-18, ten classes, batch 128, fp32, 2 threads. Times are interleaved in one process, medians and ratios to the
plain step within a repeat; memory is the peak of a fresh process a way, above what it had with the model built (Linux).
`python benchmarks/clars.py [repeats]`
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F
from torchvision import models

from largebatch.optim.sample_norms import SampleNorms

BATCH = 128
# name: method (None: without), sample_size, micro-batch
WAYS = {
    "plain": (None, 1, BATCH),
    "hooks, sample_size 1": ("hooks", 1, BATCH),
    "hooks, sample_size 32": ("hooks", 32, BATCH),
    "plain, 4 micro-batches of 32": (None, 32, 32),
    "passes, sample_size 32": ("passes", 32, 32),
}


def build_step(way: str, size: int) -> Callable[[], None]:
    """A function that does one step's forward and backward passes on images [128, 3, size, size]."""
    method, sample_size, micro_batch = WAYS[way]
    torch.manual_seed(0)
    model = models.resnet18(num_classes=10)
    images, labels = torch.randn(BATCH, 3, size, size), torch.randint(10, (BATCH,))
    sample_norms = SampleNorms(model, sample_size, method=method) if method else None
    accumulation = BATCH // micro_batch

    def step() -> None:
        for part, answers in zip(images.split(micro_batch), labels.split(micro_batch), strict=True):
            (F.cross_entropy(model(part), answers) / accumulation).backward()
        if sample_norms:
            sample_norms.means()
        model.zero_grad(set_to_none=True)

    return step


def times(size: int, repeats: int) -> dict[str, list[float]]:
    """Seconds a step, one of each way a repeat, in turn forwards and backwards."""
    steps = {way: build_step(way, size) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for step in steps.values():
        step()
    for repeat in range(repeats):
        for way in list(WAYS) if repeat % 2 == 0 else reversed(WAYS):
            started = time.perf_counter()
            steps[way]()
            seconds[way].append(time.perf_counter() - started)
    return seconds


def peak(way: str, size: int) -> float:
    """MiB of this process at its peak over three steps, above what it had at most before the first."""
    step = build_step(way, size)
    before = most_resident()
    for _ in range(3):
        step()
    return (most_resident() - before) / 1024


def most_resident() -> int:
    """KiB of this process at its peak; getrusage's figure would start from that of the parent."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1])


def peak_in_fresh_process(way: str, size: int) -> float:
    command = [sys.executable, __file__, "--peak", way, str(size)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def report(size: int, repeats: int) -> None:
    seconds = times(size, repeats)
    memory = {way: peak_in_fresh_process(way, size) for way in WAYS}
    print(f"images of {size}x{size}")
    for way in WAYS:
        median = statistics.median(seconds[way])
        ratio = statistics.median(a / b for a, b in zip(seconds[way], seconds["plain"], strict=True))
        print(
            f"  {way:30} {1000 * median:7.1f} ms  {ratio:5.2f} x plain   "
            f"{memory[way]:6.0f} MiB  {memory[way] / memory['plain']:5.2f} x plain"
        )


def main() -> None:
    torch.set_num_threads(2)
    if sys.argv[1:2] == ["--peak"]:
        print(peak(sys.argv[2], int(sys.argv[3])))
        return
    for size in (32, 64):
        report(size, repeats=int(sys.argv[1]) if len(sys.argv) > 1 else 15)


if __name__ == "__main__":
    main()
