"""Cost of a training step from end to end: the program's loop, a bare loop, and a loop as in published programs.

ResNet-18 on random images of 32x32. All turns alternate in one process, in reversed order every other repeat; medians
[quartiles]; ratios of turns in the same repeat last.
`python benchmarks/training_step.py [--stem both] [--device cuda] [--precision auto] [--repeats 9] [--out FILE.json]
[--smallest]`

A turn is some steps after an uncounted step, to the end of the last step's work on the device.

- `largebatch` is `largebatch.training.loop.loop` after `set_up`, continued from turn to turn: data, augmentation,
  forward and backward, LARS, schedule, metrics of every tenth step and of a turn's last step, layer statistics every
  twentieth step, and their files. Its time ends when the evaluation after its last step starts; it saves no
  checkpoints.
- `bare loop` calls the same model, augmentation, loss and optimizer in the same arithmetic, and nothing else.
- `as published` applies PIL transforms to each image in a DataLoader of two workers (`--workers`), computes in fp32,
  steps a LARS that loops over tensors and reads their norms, and reads loss and accuracy every step. Its workers live
  for an epoch. A turn is part of an epoch with more batches to come, so that workers are as busy as in a long epoch;
  the time to start them is printed separately. All threads wait passively, which published programs don't request and
  which helps them here.
- `model alone` is forward and backward of one fixed batch: the limit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the launcher does for a run; read when torch is loaded

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from shared import parsed, print_table, quartiles
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

from largebatch.config.schema import Config
from largebatch.config.typed import from_composed
from largebatch.data.augment import augmented
from largebatch.data.draws import draw
from largebatch.data.stream import to_device
from largebatch.launch.composition import by_force, store_defaults
from largebatch.machine import distributed
from largebatch.machine.precision import Arithmetic
from largebatch.models.build import build_model
from largebatch.runs.folder import RunFolder
from largebatch.tracking.console import Console
from largebatch.tracking.recorder import Recorder
from largebatch.training.facts import gather_facts
from largebatch.training.loop import Session, loop
from largebatch.training.phase import MainPhase
from largebatch.training.profile import StepClock
from largebatch.training.set_up import set_up
from largebatch.training.state import Run
from largebatch.training.stop import StepBoundary

ROOT = Path(__file__).resolve().parent.parent
IMAGES, SIDE, CLASSES = 20_000, 32, 10
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PADDING, ROTATION = 4, 15
LR, DECAY, MOMENTUM, TRUST = 0.1, 5e-4, 0.9, 1e-3
AHEAD = 2  # batches that each worker of a DataLoader prefetches

OURS, OURS_FP32, BARE, PUBLISHED = "largebatch", "largebatch, precision=fp32", "bare loop", "as published"
ALONE = "limit: model alone"

Turn = Callable[[], float]  # returns its seconds
Steps = Generator[None, None, None]  # each next() is a training step


# -- turns


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(begin: Callable[[], Steps], steps: int, device: torch.device) -> Turn:
    """Return a turn: ``begin`` starts, takes an uncounted step, and then ``steps`` timed steps."""

    def turn() -> float:
        with contextlib.closing(begin()) as taken:
            next(taken)
            finish(device)
            started = time.perf_counter()
            for _ in range(steps):
                next(taken)
            finish(device)
            return time.perf_counter() - started

    return turn


def interleaved(turns: dict[str, Turn], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each turn, after an uncounted turn."""
    for turn in turns.values():
        turn()
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for repeat in range(repeats):
        for name in list(turns) if repeat % 2 == 0 else reversed(turns):
            seconds[name].append(turns[name]())
    return seconds


def ratio(seconds: dict[str, list[float]], one: str, other: str) -> float:
    """Return the median over repeats of the time of ``one`` divided by that of ``other``."""
    return statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))


# -- the program


def configuration(*overrides: str) -> Config:
    """Return the configuration of ``python launch.py`` with ``overrides``, for steps on this benchmark's images."""
    store_defaults()
    sizes = ["dataset=synthetic", f"dataset.train_size={IMAGES}", "dataset.test_size=2", f"dataset.image_size={SIDE}"]
    method = ["model=resnet18", "optimizer=lars", f"optimizer.lr={LR}", "tracker=none", "steps=1000000000"]
    rare = ["eval_every=1000000000", "checkpoint.every_seconds=1e9"]
    changes = by_force([*sizes, *method, *rare, *overrides], ROOT / "conf")
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        return from_composed(compose(config_name="config", overrides=changes))


def set_up_run(config: Config, path: Path, device: torch.device, arithmetic: Arithmetic | None = None) -> MainPhase:
    """Return a run at step 0 with its folder at ``path``; ``arithmetic`` by default as the program chooses."""
    path.mkdir()
    folder = RunFolder(path)
    if arithmetic is not None:
        folder.update_status(arithmetic=asdict(arithmetic))
    return set_up(config, folder, 0, 1, device, Console(folder.log, speaking=False), None)


class Stopwatch(StepClock):
    """Measures the ``seconds`` from the end of a loop's first step to its first pause, after waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(0.0, device)
        self._started: float | None = None
        self.seconds = 0.0

    def step(self, images: int) -> None:
        super().step(images)
        if self._started is None:
            finish(self._device)
            self._started = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        with super().paused():  # which waits for the device
            self.seconds = self.seconds or time.perf_counter() - self._started
            yield


def program_turn(phase: MainPhase, steps: int) -> Turn:
    run, training = phase.run, phase.training
    console = Console(run.folder.log, speaking=False)
    facts = gather_facts(run, training, phase.total_steps)
    recorder = Recorder(run.config, run.folder, 0, facts, console)

    def turn() -> float:
        stopwatch = Stopwatch(run.device)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        phase.end = training.step + 1 + steps
        saving = run.config.checkpoint
        boundary = StepBoundary(saving.every_seconds, saving.every_steps, rank=0)
        state, message = loop(phase, Session(recorder, None, stopwatch, console, boundary))
        for number, handler in handlers.items():  # the boundary has set its own handlers
            signal.signal(number, handler)
        if state == "preempted":
            raise KeyboardInterrupt
        if state != "finished":
            raise RuntimeError(f"{state}: {message}")
        return stopwatch.seconds

    return turn


# -- what it is compared with


def bare_loop(phase: MainPhase) -> Steps:
    run, training = phase.run, phase.training
    network, optimizer, pixels, labels = training.network, training.optimizer, *pixels_and_labels(run)
    mean, std = torch.tensor(run.data.mean, device=run.device), torch.tensor(run.data.std, device=run.device)
    batch, generator = run.batch.global_batch, torch.Generator().manual_seed(0)
    totals = torch.zeros(2, device=run.device)
    training.model.train()
    while True:
        for indices in torch.randperm(IMAGES)[: IMAGES // batch * batch].split(batch):
            where = to_device(indices, run.device)
            draws = draw(generator, batch, padding=PADDING, flip=True, rotation=ROTATION, side=SIDE).to(run.device)
            images = augmented(pixels, where, draws, mean, std, channels_last=run.arithmetic.channels_last)
            answers = labels[where]
            with run.autocast:
                logits = network(images).float()
                loss = F.cross_entropy(logits, answers)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            totals += torch.stack([loss.detach() * batch, (logits.argmax(dim=1) == answers).sum()])
            yield


def pixels_and_labels(run: Run) -> tuple[Tensor, Tensor]:
    """Return the training set's pixels and labels on the run's device."""
    return run.data.train.images.pixels.to(run.device), run.data.train.labels.to(run.device)


def model_alone(phase: MainPhase) -> Steps:
    run, training = phase.run, phase.training
    pixels, labels = pixels_and_labels(run)
    images = (pixels[: run.batch.global_batch] / 255).to(memory_format=run.arithmetic.memory_format)
    answers = labels[: run.batch.global_batch]
    training.model.train()
    while True:
        with run.autocast:
            loss = F.cross_entropy(training.network(images).float(), answers)
        loss.backward()
        training.optimizer.zero_grad()
        yield


class PILImages(Dataset[Any]):
    """Images as in torchvision's CIFAR-10: an array, and a PIL image for each item."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self.pixels = random.integers(0, 256, (IMAGES, SIDE, SIDE, 3), dtype=np.uint8)
        self.labels = random.integers(0, CLASSES, IMAGES).tolist()
        moved = [transforms.RandomCrop(SIDE, padding=PADDING), transforms.RandomHorizontalFlip()]
        moved.append(transforms.RandomRotation(ROTATION))
        self.transform = transforms.Compose([*moved, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[i])), self.labels[i]


class Published:
    """Training as in published programs."""

    def __init__(self, config: Config, steps: int, workers: int, device: torch.device) -> None:
        self.device, self.batch = device, config.batch_size
        self.model = build_model(config.model, CLASSES, 3).to(device)
        self.momenta = {p: torch.zeros_like(p) for p in self.model.parameters()}
        images = PILImages()
        shuffled = RandomSampler(images, num_samples=(1 + steps + AHEAD * workers) * self.batch)
        self.loader = DataLoader(
            images, self.batch, sampler=shuffled, num_workers=workers, pin_memory=device.type == "cuda"
        )
        self.seconds_to_first_batch: list[float] = []

    def epoch(self) -> Steps:
        self.model.train()
        total, correct, count = 0.0, 0, 0
        asked = time.perf_counter()
        for images, labels in self.loader:
            if count == 0:
                self.seconds_to_first_batch.append(time.perf_counter() - asked)
            images, labels = images.to(self.device), labels.to(self.device)
            self.model.zero_grad()
            logits = self.model(images)
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            self.lars()
            total += loss.item()
            correct += (logits.argmax(dim=1) == labels).sum().item()
            count += len(labels)
            yield

    @torch.no_grad()
    def lars(self) -> None:
        for p, momentum in self.momenta.items():
            gradient = p.grad
            if p.ndim > 1:
                weight_norm, gradient_norm = p.norm().item(), gradient.norm().item()
                gradient = gradient + DECAY * p
                if weight_norm > 0 and gradient_norm > 0:
                    gradient = gradient * (TRUST * weight_norm / (gradient_norm + DECAY * weight_norm))
            momentum.mul_(MOMENTUM).add_(gradient)
            p.add_(momentum, alpha=-LR)


# -- measuring and reporting


def measure(stem: str, given: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    batch = given.batch or (64 if stem == "cifar" and given.device == "cpu" else 512)
    steps = given.steps or (200 if given.device == "cuda" else 4)
    overrides = [f"model.stem={stem}", f"batch_size={batch}", f"compile={str(given.compile).lower()}"]
    config = configuration(*overrides, f"precision={given.precision}")
    ours = set_up_run(config, folder / "auto", device)
    ours_fp32 = set_up_run(configuration(*overrides, "precision=fp32"), folder / "fp32", device)
    bare = set_up_run(config, folder / "bare", device, ours.run.arithmetic)
    alone = set_up_run(config, folder / "alone", device, ours.run.arithmetic)
    published = Published(config, steps, given.workers, device)
    turns = {
        OURS: program_turn(ours, steps),
        BARE: timed(lambda: bare_loop(bare), steps, device),
        PUBLISHED: timed(published.epoch, steps, device),
        OURS_FP32: program_turn(ours_fp32, steps),
        ALONE: timed(lambda: model_alone(alone), steps, device),
    }
    seconds = interleaved(turns, given.repeats)
    return {
        "batch": batch,
        "steps": steps,
        "arithmetic": {OURS: str(ours.run.arithmetic), OURS_FP32: str(ours_fp32.run.arithmetic)},
        "images_per_second": {
            name: quartiles([steps * batch / one for one in of_turns]) for name, of_turns in seconds.items()
        },
        "seconds_to_first_batch": statistics.median(published.seconds_to_first_batch),
        "ratios": {
            "largebatch takes, times a bare loop": ratio(seconds, OURS, BARE),
            "largebatch is faster than as published, times": ratio(seconds, PUBLISHED, OURS),
            f"precision={given.precision} is faster than fp32, times": ratio(seconds, OURS_FP32, OURS),
            "largebatch takes, times the model alone": ratio(seconds, OURS, ALONE),
        },
    }


def show(stem: str, result: dict[str, Any]) -> None:
    arithmetic = "; ".join(f"{name}: {value}" for name, value in result["arithmetic"].items())
    print(f"{stem} stem, batch {result['batch']}, turns of {result['steps']} steps; {arithmetic}\n")
    table = [
        [name, "{1:,.0f} [{0:,.0f}-{2:,.0f}]".format(*rates), f"{1000 * result['batch'] / rates[1]:.1f}"]
        for name, rates in result["images_per_second"].items()
    ]
    print_table(["", "images/s", "ms a step"], table)
    print(f"not counted: the published program's first batch, {result['seconds_to_first_batch']:.2f} s an epoch\n")
    for name, value in result["ratios"].items():
        print(f"{name:48} {value:.3f}")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; 2 by default")
    parser.add_argument("--stem", choices=("imagenet", "cifar", "both"), default="imagenet")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto by default")
    parser.add_argument(
        "--workers", type=int, default=2, help="workers of the published program's loader; 2 by default"
    )
    parser.add_argument("--batch", type=int, help="images a step; 512 by default, with the CIFAR stem on CPU 64")
    parser.add_argument("--steps", type=int, help="counted steps of a turn; 4 by default, on a GPU 200")
    parser.add_argument("--repeats", type=int, default=9, help="9 by default")
    parser.add_argument("--compile", action="store_true", help="compile the models, except the published program's")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    given = parsed(parser, batch=8, steps=1, repeats=1, workers=1, precision="fp32")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(given.threads)
    *_, device = distributed.start(given.device)
    about = {"device": torch.cuda.get_device_name() if given.device == "cuda" else platform.machine()}
    about |= {"cores": os.cpu_count(), "threads": given.threads, "python": platform.python_version()}
    about |= {"torch": torch.__version__, "date": str(date.today()), "repeats": given.repeats}
    about |= {"workers": given.workers, "compile": given.compile}
    print(", ".join(f"{key} {value}" for key, value in about.items()), "\n")
    found: dict[str, Any] = dict(about)
    for stem in ("imagenet", "cifar") if given.stem == "both" else (given.stem,):
        with tempfile.TemporaryDirectory() as folder:
            found[stem] = measure(stem, given, device, Path(folder))
        show(stem, found[stem])
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
