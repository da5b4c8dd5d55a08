"""Speed-up by processes: two of one thread against one of one thread and one of two, at the same global batch.

The program itself (`python launch.py ...`), ResNet-18 on random images of 32x32, LARS. Runs alternate, in reversed
order every other repeat. A run's speed is the median of `perf/images_per_second` over the rows of its `metrics.jsonl`
after four steps of warm-up. The tables have medians [quartiles] over repeats, and ratios of runs in the same repeat
last. The limit is two independent runs at once, each of half the batch: cores may share more than memory.
`python benchmarks/scaling.py [--precision fp32 auto] [--repeats 5] [--smallest]`

With `--device cuda` it compares two GPUs with one, without that limit. `--smallest` runs only the limit and two
processes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from shared import parsed, print_table, quartiles

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 4  # steps; the program itself skips the first
ROWS_EVERY = 2  # steps
# name: runs at once, processes of each, threads of each
WAYS = {
    "cpu": {
        "1 process of 1 thread": (1, 1, 1),
        "1 process of 2 threads": (1, 1, 2),
        "limit: 2 runs of 1 thread": (2, 1, 1),
        "2 processes of 1 thread": (1, 2, 1),
    },
    "cuda": {"1 GPU": (1, 1, 2), "2 GPUs": (1, 2, 2)},
}


def images_per_second(given: argparse.Namespace, precision: str, way: tuple[int, int, int], runs: Path) -> float:
    """Return the speed of all runs of a way, from their rows. Exits with the program's output if a run fails."""
    at_once, processes, threads = way
    command = [
        sys.executable, str(ROOT / "launch.py"), "dataset=synthetic", "dataset.train_size=10000",
        "dataset.test_size=256", "model=resnet18", f"model.stem={given.stem}", "optimizer=lars", "optimizer.lr=0.1",
        f"batch_size={given.batch // at_once}", f"steps={WARM_UP + given.steps}", f"precision={precision}",
        "tracker=none", f"tracker.log_every={ROWS_EVERY}", "eval_every=1000000", "checkpoint.every_seconds=1e9",
        "compile=false", f"cluster.device={given.device}", f"cluster.processes={processes}",
        f"cluster.threads={threads}",
    ]  # fmt: skip
    started = [
        subprocess.Popen(
            [*command, f"runs_dir={runs / str(number)}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for number in range(at_once)
    ]
    for process in started:
        printed, _ = process.communicate()
        if process.returncode:
            sys.exit(f"{' '.join(command)}\n{printed}")
    return sum(median_rate(metrics) for metrics in runs.glob("*/*/metrics.jsonl"))


def median_rate(metrics: Path) -> float:
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    name = "perf/images_per_second"
    return statistics.median(row[name] for row in rows if name in row and row["step"] > WARM_UP)


def measure(given: argparse.Namespace, precision: str) -> dict[str, list[float]]:
    """Return images a second of each way, one a repeat."""
    ways = {name: WAYS[given.device][name] for name in given.ways}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(given.repeats):
        for name in list(ways) if repeat % 2 == 0 else reversed(ways):
            with tempfile.TemporaryDirectory(prefix="largebatch-") as runs:
                rates[name].append(images_per_second(given, precision, ways[name], Path(runs)))
    return rates


def show(precision: str, rates: dict[str, list[float]]) -> None:
    table = []
    for name, values in rates.items():
        low, median, high = quartiles(values)
        table.append([name, f"{median:,.0f} [{low:,.0f}-{high:,.0f}]"])
    print_table([f"precision={precision}", "images/s"], table)
    *others, last = rates
    for other in others:
        factor = statistics.median(a / b for a, b in zip(rates[last], rates[other], strict=True))
        print(f"{last} against {other}: {factor:.2f} times faster")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--stem", choices=("imagenet", "cifar"), default="imagenet")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16", "auto"), default=["fp32"])
    parser.add_argument("--batch", type=int, help="images a step; 256 by default, on GPUs 4096")
    parser.add_argument("--steps", type=int, help="counted steps of a run; 8 by default, on GPUs 400")
    parser.add_argument("--repeats", type=int, default=5, help="5 by default")
    given = parsed(parser, batch=8, steps=2, repeats=1)
    on_gpus = given.device == "cuda"
    given.batch = given.batch or (4096 if on_gpus else 256)
    given.steps = given.steps or (400 if on_gpus else 8)
    given.ways = list(WAYS[given.device])[-2 if given.smallest else 0 :]
    print(f"{given.device}, {os.cpu_count()} cores, {given.stem} stem, batch {given.batch}, {given.repeats} repeats\n")
    for precision in given.precision:
        show(precision, measure(given, precision))


if __name__ == "__main__":
    main()
