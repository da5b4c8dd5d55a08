"""Cost of Barlow Twins' exact loss: time against the loss of each micro-batch, and memory.

ResNet-18 on random images of 32x32, LARS. Time: a global batch of 512 at once and in 4 micro-batches, with mode.exact
true and false. All turns alternate in one process, in reversed order every other repeat; medians [quartiles]; ratios
of turns in the same repeat last. Memory: peak of a fresh process (VmHWM) over one step of a batch of 512, and of 8,192
in micro-batches of 512.
`python benchmarks/barlow_twins.py [--device cuda] [--width 1024] [--repeats 7] [--tables time memory] [--smallest]`
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the launcher does for a run; read when torch is loaded

import torch
from accumulation import programs_steps
from shared import parsed, print_table, quartiles
from training_step import configuration, interleaved, ratio, set_up_run, timed

from largebatch.machine import distributed

ACCUMULATION = 4


def overrides(given: argparse.Namespace, batch: int, micro_batch: int, exact: bool) -> list[str]:
    widths = f"mode.projector=[{given.width},{given.width},{given.width}]"
    sizes = [f"batch_size={batch}", f"micro_batch={micro_batch}", f"precision={given.precision}", "compile=false"]
    return ["mode=bt", widths, "mode.knn_every=0", f"mode.exact={exact}", *sizes]


def print_times(given: argparse.Namespace, device: torch.device) -> None:
    arithmetic, turns = None, {}
    with tempfile.TemporaryDirectory() as folder:
        for accumulation in (1, ACCUMULATION):
            for exact in (True, False):
                config = configuration(*overrides(given, given.batch, given.batch // accumulation, exact))
                phase = set_up_run(config, Path(folder) / str(len(turns)), device, arithmetic)
                arithmetic = phase.run.arithmetic
                turn = timed(lambda phase=phase: programs_steps(phase), given.steps, device)
                turns[name_of(accumulation, given.batch, exact)] = turn
        seconds = interleaved(turns, given.repeats)
    table = []
    for name, of_turns in seconds.items():
        low, median, high = (1000 * q / given.steps for q in quartiles(of_turns))
        table.append([name, f"{median:.0f} [{low:.0f}-{high:.0f}]", f"{1000 * given.batch / median:,.0f}"])
    print(f"projector {3 * [given.width]}, {arithmetic}\n")
    print_table(["", "ms a step", "images/s"], table)
    for accumulation in (1, ACCUMULATION):
        exact, alone = (name_of(accumulation, given.batch, exact) for exact in (True, False))
        print(f"{exact} takes {ratio(seconds, exact, alone):.3f} x {alone}")


def name_of(accumulation: int, batch: int, exact: bool) -> str:
    return f"exact={str(exact).lower()}, {accumulation} x {batch // accumulation}"


def print_memory(given: argparse.Namespace) -> None:
    large, small = given.large, given.small
    embeddings = 2 * large * given.width * 4
    rows, peaks = [], {}
    for batch in (small, large):
        command = [sys.executable, __file__, "--one-step", str(batch), "--width", str(given.width)]
        command += ["--device", given.device, "--precision", given.precision, "--threads", str(given.threads)]
        command += ["--small", str(small)]
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        before, peaks[batch] = (int(number) for number in answer.split())
        rows.append(
            [f"{batch:,} in micro-batches of {small}", f"{before / 2**20:,.0f}", f"{peaks[batch] / 2**20:,.0f}"]
        )
    print_table(["one exact step", "MiB before it", "MiB at its peak"], rows)
    whole, aside = peaks[large] / peaks[small], (peaks[large] - embeddings) / peaks[small]
    print(f"embeddings of both views: {embeddings / 2**20:,.0f} MiB")
    print(f"peak {whole:.2f} x that of {small}; embeddings aside {aside:.2f} x")


def one_step(given: argparse.Namespace, device: torch.device) -> None:
    """Print the bytes held before a step and at its peak."""
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(*overrides(given, given.one_step, given.small, True))
        phase = set_up_run(config, Path(folder) / "run", device)
        before = held(device, "VmRSS")
        next(programs_steps(phase))
        print(before, held(device, "VmHWM"))


def held(device: torch.device, field: str) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated() if field == "VmRSS" else torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", status).group(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; 2 by default")
    parser.add_argument("--precision", choices=("fp32", "bf16", "auto"), default="fp32", help="fp32 by default")
    parser.add_argument(
        "--width", type=int, default=1024, help="width of the projector's three layers; 1024 by default"
    )
    parser.add_argument("--batch", type=int, default=512, help="images a step; 512 by default")
    parser.add_argument("--steps", type=int, default=1, help="counted steps of a turn; 1 by default")
    parser.add_argument("--repeats", type=int, default=7, help="7 by default")
    parser.add_argument("--tables", nargs="+", choices=("time", "memory"), default=("time", "memory"))
    parser.add_argument("--large", type=int, default=8192, help="large batch of the memory table; 8192 by default")
    parser.add_argument(
        "--small", type=int, default=512, help="small batch there, and micro-batch of both; 512 by default"
    )
    parser.add_argument("--one-step", type=int, help=argparse.SUPPRESS)
    given = parsed(parser, width=16, batch=8, steps=1, repeats=1, large=16, small=8)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(given.threads)
    *_, device = distributed.start(given.device)
    if given.one_step:
        one_step(given, device)
        return
    where = torch.cuda.get_device_name() if given.device == "cuda" else f"cpu, {given.threads} threads"
    print(f"{where}, torch {torch.__version__}, python {platform.python_version()}\n")
    if "time" in given.tables:
        print_times(given, device)
        print()
    if "memory" in given.tables:
        print_memory(given)


if __name__ == "__main__":
    main()
