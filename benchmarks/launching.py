"""What launching costs: a large grid's plan, runs two at a time against one after the other, the launcher's part of a
run, and the status of many runs.

Ratios are of medians, taken in turns. `python benchmarks/launching.py [repeats]`
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
RUNS = 12
# Some seconds of training each, beside the worker's start.
GRID = (
    "-m", f"seed=range({RUNS})", "steps=60", "eval_every=20", "batch_size=128", "tracker=none", "cluster.threads=1",
)  # fmt: skip
SHORT = ("tracker=none", "steps=1", "eval_every=1000", "cluster.threads=1")
LARGE = ("-m", "seed=range(250)", "optimizer=lars,tvlars", "batch_size=256,512", "dry_run=true")


def seconds(*command: str) -> float:
    started = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def launch(folder: Path, *overrides: str) -> float:
    return seconds(PYTHON, str(ROOT / "launch.py"), *overrides, f"runs_dir={folder}")


def packing(folder: Path, repeat: int) -> tuple[float, float]:
    """Seconds of the grid one run after the other, and two at a time."""
    alone = launch(folder / f"alone-{repeat}", *GRID, "cluster.parallel=1")
    return alone, launch(folder / f"packed-{repeat}", *GRID, "cluster.parallel=2")


def overhead(folder: Path, repeat: int) -> float:
    """Seconds that the launcher, its start included, adds to each run of a grid of four over bare workers of them."""
    grid = folder / f"grid-{repeat}"
    by_launcher = launch(grid, "-m", "seed=range(4)", *SHORT)
    for run in grid.glob("digits-*"):
        for name in ("checkpoints", "metrics.jsonl", "summary.json"):
            path = run / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    bare = sum(seconds(PYTHON, "-m", "largebatch.training.worker", str(run)) for run in sorted(grid.glob("digits-*")))
    return (by_launcher - bare) / 4


def many_runs(folder: Path, count: int) -> None:
    """Copies of a finished run; a third of them say that they are at work, whose lock is looked at then."""
    launch(folder / "one", *SHORT)
    (run,) = (folder / "one").glob("digits-*")
    shutil.rmtree(run / "checkpoints")
    for number in range(count):
        copy = folder / "many" / f"{run.name[:-8]}{number:08x}"
        shutil.copytree(run, copy)
        if number % 3 == 0:
            status = json.loads((copy / "status.json").read_text())
            (copy / "status.json").write_text(json.dumps(status | {"state": "running"}))


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        planned = launch(folder / "none", *LARGE)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # of the largest child, the only one yet
        print(f"the dry run of a grid of 1,000 {planned:.1f} s, {peak:.0f} MiB", flush=True)
        times = [packing(folder, repeat) for repeat in range(repeats)]
        alone, packed = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(b / a for a, b in times)
        print(f"{RUNS} runs one after the other {alone:.1f} s, two at a time {packed:.1f} s: {ratio:.2f}", flush=True)
        added = statistics.median(overhead(folder, repeat) for repeat in range(repeats))
        print(f"the launcher adds {added:.2f} s to a run, beside its worker", flush=True)
        many_runs(folder, 1000)
        listed = statistics.median(
            seconds(PYTHON, "-m", "largebatch.cli", "status", str(folder / "many")) for _ in range(5)
        )
        print(f"largebatch status of 1,000 runs {listed:.2f} s", flush=True)


if __name__ == "__main__":
    main()
