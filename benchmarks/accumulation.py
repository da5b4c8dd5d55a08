"""Cost of accumulation: the program's step in 1, 2 and 4 micro-batches, and a hand-written loop in 4.

ResNet-18 on random images of 32x32, LARS, a global batch of 512. All turns alternate in one process, in reversed order
every other repeat; medians [quartiles]; ratios of turns in the same repeat last.
`python benchmarks/accumulation.py [--noise-scale] [--device cuda] [--precision auto] [--repeats 11] [--smallest]`

The program's step is `phase.gradient` and `phase.update` on the batches of its loop, with the metrics of every tenth
step. The hand-written loop calls the same model, augmentation, loss and optimizer. All use the arithmetic that the
program chooses for the whole batch. A turn is some steps after an uncounted step.

`--noise-scale` replaces the hand-written loop by the program's step with `instruments.noise_scale=true`, in 1 and 4
micro-batches. A turn is then 25 steps: without accumulation, one of them passes half a batch a second time.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the launcher does for a run; read when torch is loaded

import torch
from shared import parsed, print_table, quartiles
from torch.nn import functional as F
from training_step import (
    IMAGES,
    PADDING,
    ROTATION,
    SIDE,
    Steps,
    configuration,
    interleaved,
    pixels_and_labels,
    ratio,
    set_up_run,
    timed,
)

from largebatch.data.augment import augmented
from largebatch.data.draws import draw
from largebatch.data.stream import to_device
from largebatch.machine import distributed
from largebatch.training.phase import MainPhase

ACCUMULATIONS = (1, 2, 4)
OURS, BY_HAND, WITH_NOISE = "largebatch", "by hand", "with noise_scale"


def programs_steps(phase: MainPhase) -> Steps:
    batches = phase.batches()
    while True:
        phase.training.step += 1
        phase.gradient(batches)
        phase.update(None)
        if phase.logs_after(phase.training.step):
            phase.train_rows()
        yield


def steps_by_hand(phase: MainPhase) -> Steps:
    run, training = phase.run, phase.training
    network, optimizer, pixels, labels = training.network, training.optimizer, *pixels_and_labels(run)
    mean, std = torch.tensor(run.data.mean, device=run.device), torch.tensor(run.data.std, device=run.device)
    batch, size, generator = run.batch.global_batch, run.batch.micro_batch, torch.Generator().manual_seed(0)
    totals = torch.zeros(2, device=run.device)
    training.model.train()
    while True:
        for indices in torch.randperm(IMAGES)[: IMAGES // batch * batch].split(batch):
            where = to_device(indices, run.device)
            draws = draw(generator, batch, padding=PADDING, flip=True, rotation=ROTATION, side=SIDE).to(run.device)
            for first in range(0, batch, size):
                part = slice(first, first + size)
                last = run.arithmetic.channels_last
                images = augmented(pixels, where[part], draws[part], mean, std, channels_last=last)
                answers = labels[where[part]]
                with run.autocast:
                    logits = network(images).float()
                    loss = F.cross_entropy(logits, answers)
                (loss * (size / batch)).backward()
                totals += torch.stack([loss.detach() * size, (logits.argmax(dim=1) == answers).sum()])
            optimizer.step()
            optimizer.zero_grad()
            yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; 2 by default")
    parser.add_argument("--stem", choices=("imagenet", "cifar"), default="imagenet")
    parser.add_argument("--precision", choices=("fp32", "bf16", "auto"), default="fp32", help="fp32 by default")
    parser.add_argument("--batch", type=int, default=512, help="images a step; 512 by default")
    parser.add_argument("--steps", type=int, help="counted steps of a turn; 2 by default, on a GPU 100, see above")
    parser.add_argument("--noise-scale", action="store_true", help="cost of instruments.noise_scale=true")
    parser.add_argument("--repeats", type=int, default=11, help="11 by default")
    given = parsed(parser, batch=8, steps=1, repeats=1)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(given.threads)
    *_, device = distributed.start(given.device)
    steps = given.steps or (25 if given.noise_scale else 100 if given.device == "cuda" else 2)
    overrides = [f"model.stem={given.stem}", f"batch_size={given.batch}", f"precision={given.precision}"]
    overrides.append("compile=false")

    with tempfile.TemporaryDirectory() as folder:
        arithmetic, turns = None, {}
        numbers = ACCUMULATIONS[::2] if given.noise_scale else ACCUMULATIONS
        more = [(WITH_NOISE, parts) for parts in numbers] if given.noise_scale else [(BY_HAND, numbers[-1])]
        for way, parts in [*((OURS, parts) for parts in numbers), *more]:
            noise = f"instruments.noise_scale={str(way == WITH_NOISE).lower()}"
            config = configuration(*overrides, f"micro_batch={given.batch // parts}", noise)
            phase = set_up_run(config, Path(folder) / str(len(turns)), device, arithmetic)
            arithmetic = phase.run.arithmetic
            steps_of = steps_by_hand if way == BY_HAND else programs_steps
            turns[way, parts] = timed(lambda of=steps_of, phase=phase: of(phase), steps, device)
        seconds = interleaved(turns, given.repeats)

    where = torch.cuda.get_device_name() if given.device == "cuda" else f"cpu, {given.threads} threads"
    print(f"{where}, torch {torch.__version__}, python {platform.python_version()}; {given.stem} stem, {arithmetic}\n")
    names = {(way, parts): f"{way}, {parts} x {given.batch // parts}" for way, parts in seconds}
    table = []
    for turn, of_turns in seconds.items():
        low, median, high = (1000 * q / steps for q in quartiles(of_turns))
        table.append([names[turn], f"{median:.1f} [{low:.1f}-{high:.1f}]", f"{1000 * given.batch / median:,.0f}"])
    print_table(["", "ms a step", "images/s"], table)
    compared = [((OURS, parts), (OURS, 1)) for parts in numbers[1:]]
    compared += [(turn, (OURS, turn[1] if turn[0] == WITH_NOISE else 1)) for turn in more]
    if not given.noise_scale:
        compared.append(((OURS, numbers[-1]), *more))
    for turn, other in compared:
        print(f"{names[turn]} takes {ratio(seconds, turn, other):.3f} x {names[other]}")


if __name__ == "__main__":
    main()
