"""Cost of launching: a large grid's plan, parallel runs, the launcher's part of a run, the status of many runs.

Medians of alternating turns. `python benchmarks/launching.py [--repeats 3] [--smallest]`
"""

from __future__ import annotations

import argparse
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

from shared import parsed, print_table

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
# Runs of some seconds of training.
GRID = ("-m", "steps=60", "eval_every=20", "batch_size=128", "tracker=none", "cluster.threads=1")
SHORT = ("tracker=none", "steps=1", "eval_every=1000", "cluster.threads=1")
LARGE = ("-m", "optimizer=lars,tvlars", "batch_size=256,512", "dry_run=true")  # four runs a seed


def seconds(*command: str) -> float:
    started = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def launch(folder: Path, *overrides: str) -> float:
    return seconds(PYTHON, str(ROOT / "launch.py"), *overrides, f"runs_dir={folder}")


def packing(folder: Path, repeat: int, runs: int) -> tuple[float, float]:
    """Return the grid's seconds, one run after the other and two at a time."""
    grid = (*GRID, f"seed=range({runs})")
    alone = launch(folder / f"alone-{repeat}", *grid, "cluster.parallel=1")
    return alone, launch(folder / f"packed-{repeat}", *grid, "cluster.parallel=2")


def overhead(folder: Path, repeat: int, runs: int) -> float:
    """Return the seconds that the launcher, its start included, adds to each run of a grid over a bare worker."""
    grid = folder / f"grid-{repeat}"
    by_launcher = launch(grid, "-m", f"seed=range({runs})", *SHORT)
    for run in grid.glob("digits-*"):
        for name in ("checkpoints", "metrics.jsonl", "summary.json"):
            path = run / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    bare = sum(seconds(PYTHON, "-m", "largebatch.training.worker", str(run)) for run in sorted(grid.glob("digits-*")))
    return (by_launcher - bare) / runs


def many_runs(folder: Path, count: int) -> None:
    """Copy a finished run; a third of the copies are marked as running, so that their locks are checked."""
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
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="3 by default")
    parser.add_argument("--planned", type=int, default=1000, help="runs in the dry run; 1,000 by default")
    parser.add_argument("--runs", type=int, default=12, help="runs of the grid that runs; 12 by default")
    parser.add_argument(
        "--short-runs", type=int, default=4, help="runs of one step, for the launcher's part; 4 by default"
    )
    parser.add_argument("--listed", type=int, default=1000, help="runs that status lists; 1,000 by default")
    given = parsed(parser, repeats=1, planned=4, runs=1, short_runs=1, listed=3)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        planned = launch(folder / "none", *LARGE, f"seed=range({given.planned // 4})")
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # of the only child so far
        times = [packing(folder, repeat, given.runs) for repeat in range(given.repeats)]
        alone, packed = (statistics.median(column) for column in zip(*times, strict=True))
        added = statistics.median(overhead(folder, repeat, given.short_runs) for repeat in range(given.repeats))
        many_runs(folder, given.listed)
        status = (PYTHON, "-m", "largebatch.cli", "status", str(folder / "many"))
        listed = statistics.median(seconds(*status) for _ in range(5))
    rows = {
        f"dry run of a grid of {given.planned:,}": f"{planned:.1f}",
        f"{given.runs} runs, one after the other": f"{alone:.1f}",
        f"{given.runs} runs, two at a time": f"{packed:.1f}",
        "added to a run by the launcher, beside its worker": f"{added:.2f}",
        f"largebatch status of {given.listed:,} runs": f"{listed:.2f}",
    }
    print_table(["", "s"], list(rows.items()))
    print(f"the dry run's peak memory is {peak:.0f} MiB")
    print(f"two at a time takes {statistics.median(b / a for a, b in times):.2f} x one after the other")


if __name__ == "__main__":
    main()
