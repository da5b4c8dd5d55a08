"""Everything that docs/performance.md says about a GPU, in one command and at most eight minutes.

`python benchmarks/gpu.py [--parts training optimizer ...] [--device cuda] [--smallest]`

Each part is a process of its own with a time limit. A part that fails says so, and the others carry on. Rates are those
of the program's own loop (`training.loop` after `set_up`), without a precision key. Rows of short runs have
compile=false, which is what compile=auto decides for them; the others have compile=auto. Peak memory is torch's, for
tensors.

| part | |
|---|---|
| `ceilings` | bytes a second of a copy, operations a second of a bf16 product |
| `training` | images a second at each batch size, for both stems, ResNet-50, Barlow Twins and accumulation |
| `loops` | the program, a bare hand-written loop and a loop as in published programs (`training_step.py`) |
| `optimizer` | a step of each optimizer, and the fewest bytes it must move (`optimizer_step.py`) |
| `muon` | a step of Muon, of timm's and of SGD (`muon_step.py`) |
| `noise_scale` | a step with and without `instruments.noise_scale` (`accumulation.py`) |
| `nvjpeg` | decoding whole JPEGs on the GPU; `decoding.py` decodes such JPEGs on a CPU core |
| `augmentation` | a batch of augmented images: by default, with the recipes' keys, and two views |
| `evaluation` | an evaluation of 10,000 images, the first and later ones |
| `start_up` | from the command to the first training step |
| `profile` | the share of each phase of a step |
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from accumulation import programs_steps
from shared import parsed, print_table
from training_step import configuration, finish, program_turn, set_up_run, timed

from largebatch.machine import distributed

HERE = Path(__file__).resolve().parent
PRODUCT = 8192  # rows and columns
CIFAR, IMAGENET = "model.stem=cifar", "model.stem=imagenet"
BT = ("mode=bt", "mode.projector=[2048,2048,2048]", "mode.knn_every=0")
RESNET50 = ("model=resnet50", "dataset.image_size=224", "dataset.num_classes=1000", "dataset.train_size=2048")
# The keys of experiment=cifar10_recipe and imagenet_recipe that change images.
CIFAR_RECIPE = (
    "dataset.rotation=0", "dataset.rand_augment.operations=1", "dataset.erasing.probability=0.25", "mode.cutmix=1",
    "mode.mix_probability=0.5", "mode.mix_per=pair",
)  # fmt: skip
IMAGENET_RECIPE = (
    "dataset.image_size=224", "dataset.train_size=2048", "dataset.crop_padding=0", "dataset.rotation=0",
    "dataset.resized_crop.scale=[0.08,1]", "dataset.color_jitter.brightness=0.4", "dataset.color_jitter.contrast=0.4",
    "dataset.color_jitter.saturation=0.4", "mode.mixup=0.2",
)  # fmt: skip
NOISE_SCALE = (
    "--noise-scale", "--precision", "auto", "--stem", "cifar", "--batch", "1024", "--steps", "25", "--repeats", "3",
)  # fmt: skip
LIMITS = {"training": 240, "optimizer": 120, "loops": 90}  # seconds; 60 for the others

SHORT = "compile=false"  # as compile=auto decides for a short run

Row = tuple[str, int, tuple[str, ...]]  # name, batch size, overrides
ROWS: tuple[Row, ...] = (
    *((f"ResNet-18, CIFAR stem, batch {batch:,}", batch, (CIFAR, SHORT)) for batch in (1024, 512, 4096, 16384)),
    ("the same, batch 32,768 in micro-batches of 1,024", 32768, (CIFAR, SHORT, "micro_batch=1024")),
    *((f"ResNet-18, ImageNet stem, batch {batch:,}", batch, (IMAGENET, SHORT)) for batch in (4096, 512, 16384)),
    ("Barlow Twins, ResNet-18, CIFAR stem, batch 1,024", 1024, (CIFAR, SHORT, *BT)),
    ("ResNet-50, 224x224, batch 256", 256, (SHORT, *RESNET50)),
    ("ResNet-18, CIFAR stem, batch 1,024, 100 epochs: compiled", 1024, (CIFAR,)),
    ("Barlow Twins, ResNet-18, CIFAR stem, batch 1,024, 100 epochs: compiled", 1024, (CIFAR, *BT)),
)


def ceilings(device: torch.device, small: bool) -> None:
    size, side = (2**12, 64) if small else (2**30, PRODUCT)
    source, factor = torch.zeros(size, device=device), torch.randn(side, side, device=device, dtype=torch.bfloat16)
    copy, product = (
        seconds(lambda: source.clone(), device, 3 if small else 20),
        seconds(lambda: factor @ factor, device, 3 if small else 20),
    )
    print_table(
        ["", ""],
        [
            ["copy [TB/s], bytes read and written", f"{8 * size / copy / 1e12:.2f}"],
            ["bf16 product [TFLOP/s]", f"{2 * side**3 / product / 1e12:.0f}"],
        ],
    )


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the mean time of ``work`` after an uncounted call."""
    work()
    finish(device)
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    finish(device)
    return (time.perf_counter() - started) / repeats


def training(device: torch.device, small: bool) -> None:
    print("| | images/s | ms a step | GiB | set-up and first turn [s] | arithmetic |")
    print("|---|--:|--:|--:|--:|---|")
    for name, batch, overrides in ROWS:
        try:
            cells = rate(device, batch, overrides, small)
        except Exception as error:  # the other rows are still wanted
            traceback.print_exc(limit=3, file=sys.stdout)
            cells = [f"failed: {type(error).__name__}", "", "", "", ""]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def rate(device: torch.device, batch: int, overrides: tuple[str, ...], small: bool) -> list[str]:
    """Return images a second, milliseconds a step, peak memory and seconds before a second turn, as texts."""
    if small:
        batch = max(2, batch // 1024)
        overrides = tuple(o for o in overrides if "224" not in o and "compile" not in o and "2048" not in o)
        overrides = tuple(o.replace("micro_batch=1024", "micro_batch=16") for o in overrides)
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    steps = 1 if small else max(4, min(60, 65_536 // batch))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        sizes = () if any("train_size" in o for o in overrides) or small else ("dataset.train_size=65536",)
        phase = set_up_run(configuration(f"batch_size={batch}", *sizes, *overrides), Path(folder) / "run", device)
        pretrains = phase.run.config.mode.views > 1  # without an evaluation, at which program_turn's time ends
        turn = timed(lambda: programs_steps(phase), steps, device) if pretrains else program_turn(phase, steps)
        turn()
        before = time.perf_counter() - started
        took = min(turn() for _ in range(1 if small else 3))
        memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if gpu else "-"
        rates = [f"{steps * batch / took:,.0f}", f"{1000 * took / steps:.2f}"]
        return [*rates, memory, f"{before:.1f}", str(phase.run.arithmetic)]


def evaluation(device: torch.device, small: bool) -> None:
    sizes = ["dataset.test_size=100"] if small else ["dataset.test_size=10000"]
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(CIFAR, "batch_size=16" if small else "batch_size=1024", *sizes)
        phase = set_up_run(config, Path(folder) / "run", device)
        times = []
        for _ in range(2 if small else 4):
            started = time.perf_counter()
            phase.evaluate()
            finish(device)
            times.append(time.perf_counter() - started)
    print_table(["", "s"], [["first", f"{times[0]:.3f}"], ["later, the fastest", f"{min(times[1:]):.3f}"]])


def nvjpeg(device: torch.device, small: bool) -> None:
    from decoding import make_files  # its imports are of extras
    from torchvision.io import decode_jpeg, read_file

    count, width, height = (8, 64, 48) if small else (256, 500, 375)
    with tempfile.TemporaryDirectory() as folder:
        files = [read_file(path) for path in make_files(Path(folder), count, width, height)]
    spent = seconds(lambda: decode_jpeg(files, device=device), device, 1 if small else 5)
    print_table(["torchvision's decode_jpeg", "images/s"], [[f"{width}x{height}", f"{count / spent:,.0f}"]])


def augmentation(device: torch.device, small: bool) -> None:
    table = []
    for name, batch, overrides in (
        ("classification, batch 1,024", 1024, ()),
        ("CIFAR-10's recipe, batch 1,024", 1024, CIFAR_RECIPE),
        ("ImageNet's recipe, 224x224, batch 256", 256, IMAGENET_RECIPE),
        ("two views, batch 1,024", 1024, BT),
    ):
        if small:
            batch = 16
            overrides = tuple(o.replace("2048", "64").replace("224", "32") for o in overrides)
        with tempfile.TemporaryDirectory() as folder:
            config = configuration(CIFAR, f"batch_size={batch}", *overrides)
            phase = set_up_run(config, Path(folder) / "run", device)
            batches = phase.batches()
            spent = seconds(lambda batches=batches: next(batches), device, 2 if small else 50)
            table.append([name, f"{1000 * spent:.2f}"])
    print_table(["", "ms a batch, draws on the host included"], table)


def launched(device: torch.device, small: bool, *overrides: str) -> tuple[Path, float]:
    """Run ``launch.py``. Return a folder with the run's log and profile, and the time at which it was called."""
    runs = Path(tempfile.mkdtemp())
    sizes = ["model=smallcnn", "batch_size=16"] if small else ["model=resnet18", CIFAR, "batch_size=1024"]
    called = time.time()
    command = [sys.executable, str(HERE.parent / "launch.py"), "dataset=synthetic", *sizes, f"runs_dir={runs}"]
    subprocess.run(
        [*command, "tracker=none", "tracker.log_every=1", f"cluster.device={device.type}", *overrides],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return next(runs.glob("*/config.yaml")).parent, called


def start_up(device: torch.device, small: bool) -> None:
    run, called = launched(device, small, "steps=3")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    status = json.loads((run / "status.json").read_text())
    parts = json.loads((run / "summary.json").read_text())["start_seconds"]
    parts = {"launcher": status["started"] - parts["imports"] - called} | parts
    parts["first step"] = next(row["wall_seconds"] for row in rows if row["step"] == 1)
    parts["command to the end of step 1"] = sum(parts.values())
    parts["command to the end of the run of 3 steps"] = status["updated"] - called
    print_table(["", "s"], [[part, f"{spent:.1f}"] for part, spent in parts.items()])


def profile(device: torch.device, small: bool) -> None:
    run, _ = launched(device, small, "steps=30", "profile=true")
    print((run / "profile" / "shares.txt").read_text())


def script(name: str, *options: str) -> Callable[[torch.device, bool], None]:
    def run(device: torch.device, small: bool) -> None:
        if small:
            print(f"{name} has a smallest size of its own")
        else:
            subprocess.run([sys.executable, str(HERE / name), "--device", device.type, *options], check=True)

    return run


PARTS: dict[str, Callable[[torch.device, bool], None]] = {
    "ceilings": ceilings,
    "training": training,
    "loops": script("training_step.py", "--stem", "cifar", "--batch", "1024", "--steps", "20", "--repeats", "3"),
    "optimizer": script("optimizer_step.py"),
    "muon": script("muon_step.py", "--models", "resnet18", "resnet50", "--repeats", "5"),
    "noise_scale": script("accumulation.py", *NOISE_SCALE),
    "nvjpeg": nvjpeg,
    "augmentation": augmentation,
    "evaluation": evaluation,
    "start_up": start_up,
    "profile": profile,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="all by default")
    parser.add_argument("--here", action="store_true", help="run the parts in this process")
    given = parsed(parser, device="cpu")
    if given.here:
        *_, device = distributed.start(given.device)
        for part in given.parts:
            PARTS[part](device, given.smallest)
        return
    name = torch.cuda.get_device_name() if given.device == "cuda" else platform.machine()
    about = [name, f"{os.cpu_count()} cores", f"torch {torch.__version__}", f"Python {platform.python_version()}"]
    print(", ".join([*about, str(date.today())]), flush=True)
    failed = [part for part in given.parts if not ran(part, given)]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def ran(part: str, given: argparse.Namespace) -> bool:
    """Run a part in a process of its own. Return False if it failed."""
    print(f"\n## {part}\n", flush=True)
    size = ["--smallest"] if given.smallest else ["--device", given.device]
    command = [sys.executable, __file__, "--here", "--parts", part, *size]
    started = time.perf_counter()
    try:
        code = subprocess.run(command, timeout=LIMITS.get(part, 60), check=False).returncode
        outcome = "" if code == 0 else f"failed: exit code {code}, "
    except subprocess.TimeoutExpired:
        outcome = "failed: over its time limit, "
    print(f"\n({outcome}{time.perf_counter() - started:.0f} s)", flush=True)
    return not outcome


if __name__ == "__main__":
    main()
