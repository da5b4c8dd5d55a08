"""What augmented batches cost on CPU: ours beside the PIL pipeline, torchvision v2 and kornia, in images a second.

Everything takes turns in one process, the order reversed every other time; medians [quartiles]; ratios last.
`python benchmarks/input_pipeline.py [--sizes 32 64] [--repeats 11] [--tables two_views] [--out FILE.json]`

Images are random and in memory, so nothing is decoded. A turn of ours is a few batches in this process, the drawing of
random numbers included. A turn of a DataLoader is an epoch of some batches more, timed from the arrival of the last of
these to the end of the epoch: its workers, which live on, are busy all that time, and idle in the others' turns. The
limit is the conversion of the same bytes from uint8 to float32.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the launcher does for a run; read when torch is loaded

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from tabulate import tabulate
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms
from torchvision.transforms import functional, v2

from largebatch.data import augment, augment_cpu
from largebatch.data.draws import draw

BATCH, WORKERS = 512, 2
IMAGES = 20_000
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PADDING, ROTATION = 4, 15
RUN_IN = 4  # batches of a loader before those that are timed: what two workers have begun by then
BICUBIC = transforms.InterpolationMode.BICUBIC

YARDSTICK = f"PIL per image, {WORKERS} workers"
LIMIT = "limit: uint8 to float32"

Turn = Callable[[], float]  # gives its seconds
Batch = Callable[[Tensor], object]  # of indices int64 [BATCH]


@dataclass(frozen=True)
class Pixels:
    """The same images twice: [N, S, S, 3] as PIL wants them and [N, 3, S, S]."""

    for_pil: np.ndarray[Any, Any]
    planes: Tensor

    @staticmethod
    def random(side: int) -> Pixels:
        pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, side, side, 3), dtype=np.uint8)
        return Pixels(pixels, torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous())


# -- turns


class PerImage(Dataset[Any]):
    """Each image through ``transform``, as a PIL image or as a tensor."""

    def __init__(self, pixels: Pixels, transform: Callable[[Any], Any], pil: bool) -> None:
        self.pixels, self.transform, self.pil = pixels, transform, pil

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, i: int) -> Any:
        return self.transform(Image.fromarray(self.pixels.for_pil[i]) if self.pil else self.pixels.planes[i])


def loader_turn(pixels: Pixels, transform: Callable[[Any], Any], *, workers: int, batches: int, pil: bool) -> Turn:
    data = PerImage(pixels, transform, pil)
    run_in = RUN_IN if workers else 0
    sampler = RandomSampler(data, num_samples=(run_in + batches) * BATCH)
    loader = DataLoader(data, BATCH, sampler=sampler, num_workers=workers, persistent_workers=workers > 0)

    def turn() -> float:
        arriving = iter(loader)
        for _ in range(run_in):
            next(arriving)
        begin = time.perf_counter()
        for _ in arriving:
            pass
        return time.perf_counter() - begin

    return turn


def batches_turn(make: Batch, batches: int) -> Turn:
    def turn() -> float:
        begin = time.perf_counter()
        for indices in torch.randperm(IMAGES)[: batches * BATCH].split(BATCH):
            make(indices)
        return time.perf_counter() - begin

    return turn


# -- classification: crop, flip, rotation


def classification_turns(pixels: Pixels, side: int, batches: int) -> dict[str, Turn]:
    crop = [transforms.RandomCrop(side, padding=PADDING), transforms.RandomHorizontalFlip()]
    chain = [*crop, transforms.RandomRotation(ROTATION), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    on_pil = transforms.Compose(chain)
    moved = [v2.RandomCrop(side, padding=PADDING), v2.RandomHorizontalFlip(), v2.RandomRotation(ROTATION)]
    on_tensors = v2.Compose([*moved, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    turns = {
        YARDSTICK: loader_turn(pixels, on_pil, workers=WORKERS, batches=batches, pil=True),
        "PIL per image, 0 workers": loader_turn(pixels, on_pil, workers=0, batches=batches, pil=True),
        f"torchvision v2 per image, {WORKERS} workers": loader_turn(
            pixels, on_tensors, workers=WORKERS, batches=batches, pil=False
        ),
    }
    if has_kornia():
        import kornia.augmentation as K

        moved = [K.RandomCrop((side, side), padding=PADDING), K.RandomHorizontalFlip(), K.RandomRotation(15.0, p=1.0)]
        chain = K.AugmentationSequential(
            *moved, K.Normalize(torch.tensor(MEAN), torch.tensor(STD)), data_keys=["input"]
        )
        turns["kornia batched"] = batches_turn(lambda indices: chain(as_unit(pixels, indices)), batches)

    generator = torch.Generator().manual_seed(0)
    mean, std = torch.tensor(MEAN), torch.tensor(STD)

    def ours(way: Callable[..., Tensor], rotation: float = ROTATION) -> Turn:
        def make(indices: Tensor) -> Tensor:
            draws = draw(generator, BATCH, padding=PADDING, flip=True, rotation=rotation, side=side)
            return way(pixels.planes, indices, draws, mean, std)

        return batches_turn(make, batches)

    turns["ours, torch eager"] = ours(augment.augmented_torch)
    turns["ours, torch.compile"] = ours(torch.compile(augment.augmented_torch, dynamic=False))
    if no_kernel := augment_cpu.why_not():
        print(f"ours in C++ is left out: {no_kernel}\n")
    else:
        turns["ours, C++"] = ours(augment_cpu.augmented)
        turns["ours, C++, without rotation"] = ours(augment_cpu.augmented, rotation=0)
    return {**turns, LIMIT: limit_turn(pixels, batches)}


def limit_turn(pixels: Pixels, batches: int) -> Turn:
    images = pixels.planes[:BATCH]
    result = torch.empty(images.shape)
    return batches_turn(lambda indices: result.copy_(images), batches)


def has_kornia() -> bool:
    if importlib.util.find_spec("kornia"):
        return True
    print("kornia isn't installed and is left out\n")
    return False


def as_unit(pixels: Pixels, indices: Tensor) -> Tensor:
    return pixels.planes[indices].float().mul_(1 / 255)


def differing_pixels(pixels: Pixels, side: int) -> float:
    """The share of a batch's pixels that are not those of the PIL chain with the same parameters."""
    options = {"padding": PADDING, "flip": True, "rotation": ROTATION, "side": side}
    table = draw(torch.Generator().manual_seed(1), BATCH, **options)
    again = torch.Generator().manual_seed(1)  # for the angles, which are drawn after corners and flips
    torch.randint(0, 2 * PADDING + 1, (2, BATCH), generator=again)
    torch.rand(BATCH, generator=again)
    angles = ((2 * torch.rand(BATCH, generator=again, dtype=torch.float64) - 1) * ROTATION).tolist()

    ours = augment.augmented(pixels.planes, torch.arange(BATCH), table, torch.zeros(3), torch.full((3,), 1 / 255))
    differing = 0
    for i, (top, left, flip, *_) in enumerate(table.table.tolist()):
        image = functional.pad(Image.fromarray(pixels.for_pil[i]), PADDING)
        image = functional.crop(image, top, left, side, side)
        image = functional.rotate(functional.hflip(image) if flip else image, angles[i])
        differing += int((ours[i].permute(1, 2, 0).round().numpy() != np.asarray(image)).any(2).sum())
    return differing / (BATCH * side**2)


# -- two views: resized crop, flip, colours, blur, solarisation


def pil_view(side: int, blur: float, solarize: float) -> Callable[[Image.Image], Tensor]:
    """The published view of Barlow Twins, with its probabilities of blur and solarisation."""

    def blurred(image: Image.Image) -> Image.Image:
        if random.random() >= blur:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

    def solarized(image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image) if random.random() < solarize else image

    crop = [transforms.RandomResizedCrop(side, interpolation=BICUBIC), transforms.RandomHorizontalFlip()]
    jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
    colours = [jitter, transforms.RandomGrayscale(0.2), blurred, solarized]
    return transforms.Compose([*crop, *colours, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


def v2_view(side: int, blur: float, solarize: float) -> Callable[[Tensor], Tensor]:
    crop = [v2.RandomResizedCrop(side, interpolation=BICUBIC), v2.RandomHorizontalFlip()]
    jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
    blurred = v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], p=blur)
    colours = [jitter, v2.RandomGrayscale(0.2), blurred, v2.RandomSolarize(128, p=solarize)]
    return v2.Compose([*crop, *colours, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


def kornia_view(side: int, blur: float, solarize: float) -> Callable[[Tensor], Tensor]:
    import kornia.augmentation as K

    crop = [K.RandomResizedCrop((side, side), (0.08, 1.0), resample="bicubic"), K.RandomHorizontalFlip()]
    blurred, solarized = K.RandomGaussianBlur((9, 9), (0.1, 2.0), p=blur), K.RandomSolarize(0.1, 0.0, p=solarize)
    colours = [K.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8), K.RandomGrayscale(p=0.2), blurred, solarized]
    normalise = K.Normalize(torch.tensor(MEAN), torch.tensor(STD))
    return K.AugmentationSequential(*crop, *colours, normalise, data_keys=["input"])


def two_views_turns(pixels: Pixels, side: int, batches: int) -> dict[str, Turn]:
    from largebatch.data import views, views_cpu

    def both(
        make_view: Callable[[int, float, float], Callable[[Any], Tensor]],
    ) -> Callable[[Any], tuple[Tensor, Tensor]]:
        first, second = make_view(side, 1.0, 0.0), make_view(side, 0.1, 0.2)
        return lambda image: (first(image), second(image))

    turns = {
        YARDSTICK: loader_turn(pixels, both(pil_view), workers=WORKERS, batches=batches, pil=True),
        f"torchvision v2 per image, {WORKERS} workers": loader_turn(
            pixels, both(v2_view), workers=WORKERS, batches=batches, pil=False
        ),
    }
    if has_kornia():
        in_kornia = both(kornia_view)
        turns["kornia batched"] = batches_turn(lambda indices: in_kornia(as_unit(pixels, indices)), batches)

    generator = torch.Generator().manual_seed(0)
    mean, std = torch.tensor(MEAN), torch.tensor(STD)

    def ours(way: Callable[..., Tensor]) -> Turn:
        def make(indices: Tensor) -> list[Tensor]:
            draws = [views.draw(generator, BATCH, side, view) for view in views.VIEWS]
            return [way(pixels.planes, indices, one, mean, std) for one in draws]

        return batches_turn(make, batches)

    turns["ours, torch eager"] = ours(views.view_torch)
    if no_kernel := views_cpu.why_not():
        print(f"ours in C++ is left out: {no_kernel}\n")
    else:
        turns["ours, C++"] = ours(views.view)
    return {**turns, LIMIT: limit_turn(pixels, batches)}


# -- measuring and reporting


def interleaved(turns: dict[str, Turn], repeats: int) -> dict[str, list[float]]:
    """Seconds of each turn, after one that isn't counted."""
    for turn in turns.values():
        turn()
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    gc.disable()
    for repeat in range(repeats):
        for name in list(turns) if repeat % 2 == 0 else reversed(turns):
            seconds[name].append(turns[name]())
        gc.collect()
    gc.enable()
    return seconds


def rows(turns: dict[str, Turn], repeats: int, images: int) -> list[dict[str, Any]]:
    """Images a second, as quartiles, of turns of ``images`` each, and their ratios."""
    seconds = interleaved(turns, repeats)
    rates = {
        name: statistics.quantiles([images / one for one in of_turns], method="inclusive")
        for name, of_turns in seconds.items()
    }
    return [
        {
            "pipeline": name,
            "images_per_second": quartiles,
            "against_pil": quartiles[1] / rates[YARDSTICK][1],
            "of_the_limit": quartiles[1] / rates[LIMIT][1],
        }
        for name, quartiles in rates.items()
    ]


def classification_rows(side: int, repeats: int, batches: int = 8) -> dict[str, Any]:
    pixels = Pixels.random(side)
    found = rows(classification_turns(pixels, side, batches), repeats, batches * BATCH)
    return {"rows": found, "differing_pixels": differing_pixels(pixels, side)}


def two_views_rows(side: int, repeats: int, batches: int = 4) -> dict[str, Any]:
    """Of images; each becomes two views. The limit is for one of them."""
    return {"rows": rows(two_views_turns(Pixels.random(side), side, batches), repeats, batches * BATCH)}


def show(title: str, result: dict[str, Any]) -> None:
    headers = [title, "images/s", "of the limit", "x PIL"]
    table = [
        [
            row["pipeline"],
            "{1:,.0f} [{0:,.0f}-{2:,.0f}]".format(*row["images_per_second"]),
            f"{100 * row['of_the_limit']:.1f} %",
            f"{row['against_pil']:.2f}",
        ]
        for row in result["rows"]
    ]
    aligned = ("left", "right", "right", "right")
    print(tabulate(table, headers, tablefmt="github", disable_numparse=True, colalign=aligned), "\n")
    if "differing_pixels" in result:
        print(
            f"Pixels that differ from the PIL chain's at equal parameters: {100 * result['differing_pixels']:.3f} %\n"
        )


TABLES = {"classification": classification_rows, "two_views": two_views_rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64], help="of the images, in pixels")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--threads", type=int, default=2, help="of this process; 2 by default")
    parser.add_argument("--repeats", type=int, default=11, help="at least 2; 11 by default")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(given.threads)
    about = {"cores": os.cpu_count(), "threads": given.threads, "python": platform.python_version()}
    about |= {"torch": torch.__version__, "date": str(date.today()), "batch": BATCH, "repeats": given.repeats}
    print(", ".join(f"{key} {value}" for key, value in about.items()), "\n")
    found: dict[str, Any] = dict(about)
    for name in given.tables:
        found[name] = {}
        for side in given.sizes:
            found[name][side] = TABLES[name](side, given.repeats)
            show(f"{name.replace('_', ' ')}, {side}x{side}", found[name][side])
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
