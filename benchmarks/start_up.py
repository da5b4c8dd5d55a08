"""What starting costs: the launcher's answers, and a fresh worker process a run against training in place.

Interleaved in one go; medians; ratios last. `python benchmarks/start_up.py [repeats]`
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
RUN = ("tracker=none", "steps=1", "eval_every=1000")

# Two runs in one process: the second finds everything imported. Prints its seconds.
IN_PLACE = """
import sys, time
from largebatch.training import worker
train.die_with_parent = lambda: None
worker.main([sys.argv[1]])
started = time.perf_counter()
worker.main([sys.argv[2]])
print("seconds", time.perf_counter() - started)
"""


def seconds(*command: str, cwd: Path) -> float:
    started = time.perf_counter()
    subprocess.run(command, cwd=cwd, capture_output=True, check=False)
    return time.perf_counter() - started


def frozen_run(folder: Path, seed: int) -> Path:
    """A run folder as the launcher leaves it to a worker."""
    command = [PYTHON, str(ROOT / "launch.py"), *RUN, f"seed={seed}", f"runs_dir={folder}"]
    subprocess.run(command, capture_output=True, check=True)
    (run,) = folder.glob(f"*-s{seed}-*")
    for name in ("checkpoints/step-00000001.pt", "metrics.jsonl", "summary.json"):
        (run / name).unlink()
    return run


def measure(folder: Path, repeat: int) -> dict[str, float]:
    worker, first, second = (frozen_run(folder / str(repeat), seed) for seed in (1, 2, 3))
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
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(Path(folder), repeat) for repeat in range(repeats)]
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    for name, value in medians.items():
        print(f"{name:36} {value:6.2f} s   {value / medians['import torch']:5.2f} x import torch")
    spared = medians["a run of one step, fresh worker"] - medians["a run of one step, in place"]
    print(f"training in place would spare {spared:.2f} s a run, {spared / medians['import torch']:.2f} x import torch")


if __name__ == "__main__":
    main()
