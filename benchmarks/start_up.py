"""Cost of starting: the launcher's answers, and a fresh worker process a run against training in place.

Turns alternate; medians; ratios last. `python benchmarks/start_up.py [--repeats 5] [--smallest]`
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from shared import parsed, print_table

from largebatch.launch.composition import compose_grid, store_defaults
from largebatch.launch.local import claim
from largebatch.launch.plan import make_plan

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
RUN = ("tracker=none", "steps=1", "eval_every=1000")

# Two runs in one process; the second needs no imports. Prints its seconds.
IN_PLACE = """
import sys, time
from largebatch.training import worker
worker.die_with_parent = lambda: None
worker.main([sys.argv[1]])
started = time.perf_counter()
worker.main([sys.argv[2]])
print("seconds", time.perf_counter() - started)
"""


def seconds(*command: str, cwd: Path) -> float:
    started = time.perf_counter()
    subprocess.run(command, cwd=cwd, capture_output=True, check=False)
    return time.perf_counter() - started


def frozen_runs(folder: Path) -> list[Path]:
    """Return three run folders as the launcher prepares them for workers."""
    store_defaults()
    plan = make_plan(compose_grid([*RUN, "seed=1,2,3", f"runs_dir={folder}"], ROOT / "conf"))
    for run in plan:
        assert claim(run) is None
    return [run.folder.path for run in plan]


def measure(folder: Path, repeat: int) -> dict[str, float]:
    worker, first, second = frozen_runs(folder / str(repeat))
    in_place = [PYTHON, "-c", IN_PLACE, str(first), str(second)]
    printed = subprocess.run(in_place, capture_output=True, text=True, check=True).stdout
    launch = str(ROOT / "launch.py")
    return {
        "python -c pass": seconds(PYTHON, "-c", "pass", cwd=folder),
        "python launch.py --help": seconds(PYTHON, launch, "--help", cwd=folder),
        "python launch.py optimizer=larss": seconds(PYTHON, launch, "optimizer=larss", cwd=folder),
        "import torch": seconds(PYTHON, "-c", "import torch", cwd=folder),
        "a run of one step, fresh worker": seconds(PYTHON, "-m", "largebatch.training.worker", str(worker), cwd=folder),
        "a run of one step, in place": float(printed.rpartition("seconds")[2]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="5 by default")
    given = parsed(parser, repeats=1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(Path(folder), repeat) for repeat in range(given.repeats)]
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    table = [[name, f"{value:.2f}", f"{value / medians['import torch']:.2f}"] for name, value in medians.items()]
    print_table(["", "s", "x import torch"], table)
    spared = medians["a run of one step, fresh worker"] - medians["a run of one step, in place"]
    print(f"training in place would save {spared:.2f} s a run, {spared / medians['import torch']:.2f} x import torch")


if __name__ == "__main__":
    main()
