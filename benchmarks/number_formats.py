"""Speed of the program's steps in each number format and memory format, side by side.

ResNet-18 on random images of 32x32, LARS. All turns alternate in one process, in reversed order every other repeat;
medians [quartiles]; ratios of turns in the same repeat.
`python benchmarks/number_formats.py [--stem cifar] [--device cuda] [--precision fp32 bf16 fp16] [--repeats 9]
[--smallest]`

A turn is that of `largebatch` in `training_step.py`. On GPUs, fp32 has turns with TF32 too.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import warnings
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the launcher does for a run; read when torch is loaded

import torch
from shared import parsed, print_table, quartiles
from training_step import Turn, configuration, interleaved, program_turn, ratio, set_up_run

from largebatch.machine import distributed
from largebatch.machine.precision import Arithmetic, allow_tf32


def with_tf32(turn: Turn, allowed: bool) -> Turn:
    def allowing() -> float:
        allow_tf32(allowed)
        return turn()

    return allowing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; 2 by default")
    parser.add_argument("--stem", choices=("imagenet", "cifar"), default="imagenet")
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=("fp32", "bf16", "fp16"),
        default=["fp32", "bf16"],
        help="default: fp32 bf16",
    )
    parser.add_argument("--batch", type=int, help="images a step; 512 by default, with the CIFAR stem on CPU 64")
    parser.add_argument("--steps", type=int, help="counted steps of a turn; 4 by default, on a GPU 100")
    parser.add_argument("--repeats", type=int, default=9, help="9 by default")
    given = parsed(parser, batch=8, steps=1, repeats=1)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(given.threads)
    *_, device = distributed.start(given.device)
    batch = given.batch or (64 if given.stem == "cifar" and given.device == "cpu" else 512)
    steps = given.steps or (100 if given.device == "cuda" else 4)
    config = configuration(f"model.stem={given.stem}", f"batch_size={batch}", "compile=false")

    with tempfile.TemporaryDirectory() as folder:
        turns: dict[str, Turn] = {}
        for arithmetic in (Arithmetic(precision, last) for precision in given.precision for last in (False, True)):
            for tf32 in (False, True) if given.device == "cuda" and arithmetic.precision == "fp32" else (False,):
                name = f"{arithmetic}{', TF32' if tf32 else ''}"
                turn = program_turn(set_up_run(config, Path(folder) / name, device, arithmetic), steps)
                turns[name] = with_tf32(turn, tf32)
        rule = set_up_run(config, Path(folder) / "auto", device).run.arithmetic
        seconds = interleaved(turns, given.repeats)

    where = torch.cuda.get_device_name() if given.device == "cuda" else f"{platform.machine()}, {given.threads} threads"
    print(f"{where}, torch {torch.__version__}, python {platform.python_version()}, {date.today()}")
    print(f"{given.stem} stem, batch {batch}, {steps} steps a turn, {given.repeats} repeats; auto: {rule}\n")
    first = next(iter(turns))
    table = []
    for name, of_turns in seconds.items():
        low, median, high = (steps * batch / q for q in reversed(quartiles(of_turns)))
        speed = f"{median:,.0f} [{low:,.0f}-{high:,.0f}]"
        table.append([name, speed, f"{1000 * batch / median:.1f}", f"{ratio(seconds, first, name):.2f}"])
    print_table(["", "images/s", "ms a step", f"faster than {first}"], table)


if __name__ == "__main__":
    main()
