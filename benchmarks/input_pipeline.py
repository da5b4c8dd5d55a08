"""Speed of augmented batches on CPU: ours beside the PIL pipeline, torchvision v2 and kornia, in images a second.

All turns alternate in one process, in reversed order every other repeat; medians [quartiles]; ratios last.
`python benchmarks/input_pipeline.py [--sizes 32 64] [--repeats 11] [--tables two_views] [--out FILE.json]
[--smallest]`

Images are random and in memory, so nothing is decoded. A turn of ours is a few batches in this process, with their
random draws. A turn of a DataLoader is an epoch with some more batches, timed from the arrival of the last of these to
the epoch's end: its persistent workers are busy all the time, and idle in other turns. The limit is the conversion of
the same bytes from uint8 to float32.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import random
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
from shared import interleaved, parsed, print_table, quartiles
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms
from torchvision.transforms import functional, v2

from largebatch.config.datasets import DatasetConfig
from largebatch.data import augment, augment_cpu
from largebatch.data.draws import draw, draw_view

WORKERS = 2
IMAGES = 20_000
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PADDING, ROTATION = 4, 15
RUN_IN = 4  # uncounted batches of a loader: two workers have started as many by then
BICUBIC = transforms.InterpolationMode.BICUBIC

YARDSTICK = f"PIL per image, {WORKERS} workers"
LIMIT = "limit: uint8 to float32"

Turn = Callable[[], float]  # returns its seconds
Batch = Callable[[Tensor], object]  # of indices int64 [batch]


@dataclass(frozen=True)
class Pixels:
    """The same images twice, [N, S, S, 3] for PIL and [N, 3, S, S], and the batch size."""

    for_pil: np.ndarray[Any, Any]
    planes: Tensor
    batch: int

    @staticmethod
    def random(side: int, batch: int) -> Pixels:
        pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, side, side, 3), dtype=np.uint8)
        return Pixels(pixels, torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), batch)


# -- turns


class PerImage(Dataset[Any]):
    """Images after ``transform``, which gets a PIL image or a tensor."""

    def __init__(self, pixels: Pixels, transform: Callable[[Any], Any], pil: bool) -> None:
        self.pixels, self.transform, self.pil = pixels, transform, pil

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, i: int) -> Any:
        return self.transform(Image.fromarray(self.pixels.for_pil[i]) if self.pil else self.pixels.planes[i])


def loader_turn(pixels: Pixels, transform: Callable[[Any], Any], *, workers: int, batches: int, pil: bool) -> Turn:
    data = PerImage(pixels, transform, pil)
    run_in = RUN_IN if workers else 0
    sampler = RandomSampler(data, num_samples=(run_in + batches) * pixels.batch)
    loader = DataLoader(data, pixels.batch, sampler=sampler, num_workers=workers, persistent_workers=workers > 0)

    def turn() -> float:
        arriving = iter(loader)
        for _ in range(run_in):
            next(arriving)
        begin = time.perf_counter()
        for _ in arriving:
            pass
        return time.perf_counter() - begin

    return turn


def batches_turn(pixels: Pixels, make: Batch, batches: int) -> Turn:
    def turn() -> float:
        begin = time.perf_counter()
        for indices in torch.randperm(IMAGES)[: batches * pixels.batch].split(pixels.batch):
            make(indices)
        return time.perf_counter() - begin

    return turn


# -- classification: crop, flip, rotation


def classification_turns(pixels: Pixels, side: int, batches: int, with_compile: bool) -> dict[str, Turn]:
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
        turns["kornia batched"] = batches_turn(pixels, lambda indices: chain(as_unit(pixels, indices)), batches)

    generator = torch.Generator().manual_seed(0)
    mean, std = torch.tensor(MEAN), torch.tensor(STD)

    def ours(way: Callable[..., Tensor], rotation: float = ROTATION) -> Turn:
        def make(indices: Tensor) -> Tensor:
            draws = draw(generator, pixels.batch, padding=PADDING, flip=True, rotation=rotation, side=side)
            return way(pixels.planes, indices, draws, mean, std)

        return batches_turn(pixels, make, batches)

    turns["ours, torch eager"] = ours(augment.augmented_torch)
    if with_compile:
        turns["ours, torch.compile"] = ours(torch.compile(augment.augmented_torch, dynamic=False))
    if no_kernel := augment_cpu.why_not():
        print(f"ours in C++ is left out: {no_kernel}\n")
    else:
        turns["ours, C++"] = ours(augment_cpu.augmented)
        turns["ours, C++, without rotation"] = ours(augment_cpu.augmented, rotation=0)
    return {**turns, LIMIT: limit_turn(pixels, batches)}


def limit_turn(pixels: Pixels, batches: int) -> Turn:
    images = pixels.planes[: pixels.batch]
    result = torch.empty(images.shape)
    return batches_turn(pixels, lambda indices: result.copy_(images), batches)


def has_kornia() -> bool:
    if importlib.util.find_spec("kornia"):
        return True
    print("kornia isn't installed and is left out\n")
    return False


def as_unit(pixels: Pixels, indices: Tensor) -> Tensor:
    return pixels.planes[indices].float().mul_(1 / 255)


def differing_pixels(pixels: Pixels, side: int) -> float:
    """Return the share of a batch's pixels that differ from the PIL chain's with the same parameters."""
    batch, options = pixels.batch, {"padding": PADDING, "flip": True, "rotation": ROTATION, "side": side}
    table = draw(torch.Generator().manual_seed(1), batch, **options)
    again = torch.Generator().manual_seed(1)  # for the angles, drawn after corners and flips
    torch.randint(0, 2 * PADDING + 1, (2, batch), generator=again)
    torch.rand(batch, generator=again)
    angles = ((2 * torch.rand(batch, generator=again, dtype=torch.float64) - 1) * ROTATION).tolist()

    ours = augment.augmented(pixels.planes, torch.arange(batch), table, torch.zeros(3), torch.full((3,), 1 / 255))
    differing = 0
    for i, (top, left, flip, *_) in enumerate(table.table.tolist()):
        image = functional.pad(Image.fromarray(pixels.for_pil[i]), PADDING)
        image = functional.crop(image, top, left, side, side)
        image = functional.rotate(functional.hflip(image) if flip else image, angles[i])
        differing += int((ours[i].permute(1, 2, 0).round().numpy() != np.asarray(image)).any(2).sum())
    return differing / (batch * side**2)


# -- two views: resized crop, flip, colours, blur, solarisation


def pil_view(side: int, blur: float, solarize: float) -> Callable[[Image.Image], Tensor]:
    """Return the published view of Barlow Twins with these probabilities of blur and solarisation."""

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
        turns["kornia batched"] = batches_turn(pixels, lambda indices: in_kornia(as_unit(pixels, indices)), batches)

    generator = torch.Generator().manual_seed(0)
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    config = DatasetConfig(name="random")

    def ours(way: Callable[..., Tensor]) -> Turn:
        def make(indices: Tensor) -> list[Tensor]:
            draws = [draw_view(generator, pixels.batch, side, config, view) for view in range(2)]
            return [way(pixels.planes, indices, one, mean, std) for one in draws]

        return batches_turn(pixels, make, batches)

    turns["ours, torch eager"] = ours(augment.augmented_torch)
    if no_kernel := augment_cpu.why_not(draw_view(generator, 1, side, config, view=0)):
        print(f"ours in C++ is left out: {no_kernel}\n")
    else:
        turns["ours, C++"] = ours(augment_cpu.augmented)
    return {**turns, LIMIT: limit_turn(pixels, batches)}


# -- measuring and reporting


def rows(turns: dict[str, Turn], repeats: int, images: int) -> list[dict[str, Any]]:
    """Return quartiles of images a second, for turns of ``images`` images, and ratios."""
    seconds = interleaved(turns, repeats)
    rates = {name: quartiles([images / one for one in of_turns]) for name, of_turns in seconds.items()}
    return [
        {
            "pipeline": name,
            "images_per_second": found,
            "against_pil": found[1] / rates[YARDSTICK][1],
            "of_the_limit": found[1] / rates[LIMIT][1],
        }
        for name, found in rates.items()
    ]


def classification_rows(side: int, given: argparse.Namespace, batches: int = 8) -> dict[str, Any]:
    pixels = Pixels.random(side, given.batch)
    turns = classification_turns(pixels, side, batches, with_compile=not given.smallest)
    found = rows(turns, given.repeats, batches * given.batch)
    return {"rows": found, "differing_pixels": differing_pixels(pixels, side)}


def two_views_rows(side: int, given: argparse.Namespace, batches: int = 4) -> dict[str, Any]:
    """Return rates of images, each with two views; the limit converts one view."""
    turns = two_views_turns(Pixels.random(side, given.batch), side, batches)
    return {"rows": rows(turns, given.repeats, batches * given.batch)}


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
    print_table(headers, table)
    if "differing_pixels" in result:
        print(
            f"Pixels that differ from the PIL chain's at equal parameters: {100 * result['differing_pixels']:.3f} %\n"
        )


TABLES = {"classification": classification_rows, "two_views": two_views_rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[32, 64], help="image sizes in pixels; 32 64 by default"
    )
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--threads", type=int, default=2, help="threads of this process; 2 by default")
    parser.add_argument("--repeats", type=int, default=11, help="11 by default")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("--batch", type=int, default=512, help="images of a batch; 512 by default")
    given = parsed(parser, sizes=[8], batch=4, repeats=1)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(given.threads)
    about = {"cores": os.cpu_count(), "threads": given.threads, "python": platform.python_version()}
    about |= {"torch": torch.__version__, "date": str(date.today()), "batch": given.batch, "repeats": given.repeats}
    print(", ".join(f"{key} {value}" for key, value in about.items()), "\n")
    found: dict[str, Any] = dict(about)
    for name in given.tables:
        found[name] = {}
        for side in given.sizes:
            found[name][side] = TABLES[name](side, given)
            show(f"{name.replace('_', ' ')}, {side}x{side}", found[name][side])
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
