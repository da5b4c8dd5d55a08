"""Speed of decoding JPEGs with a random resized crop: ours beside torchvision's and timm's loaders, in images/s a core.

Every loader reads files, decodes, crops and resizes to 224 pixels (bilinear) and collates batches of 64, in one process
with one thread: the work of a decoding process, until a batch goes to the device. torchvision's chain flips and
normalises too; timm flips, and normalises on the device; ours does both there. Turns alternate, in reversed order every
other repeat. Speeds are images per second of CPU time, medians [quartiles], so other programs on the machine disturb
them less.
`python benchmarks/decoding.py [--images 2000] [--repeats 11] [--out FILE.json] [--smallest]`

The JPEGs are made for it in a temporary folder: noise with the spectrum of photographs, quality 92, half of them with
4:2:0 colours, a third upright. One row of ours reads them from four Arrow shards instead (dataset=arrow).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import numpy as np
import pyarrow
import torch
from PIL import Image
from shared import interleaved, parsed, print_table, quartiles
from torch.utils.data import DataLoader, RandomSampler
from torchvision import datasets, transforms

from largebatch.config.arrow import find_rows
from largebatch.config.epochs import Epochs
from largebatch.data import FileImages
from largebatch.data import regions as regions_module
from largebatch.data.encoded import EncodedImages, RowImages
from largebatch.data.file_crops import FileCrop, random_box, reduction_of
from largebatch.data.images import in_mode, planes
from largebatch.data.resizing import resized_planes
from largebatch.data.sampling import global_batches
from largebatch.data.stream import stream

BATCH, SIDE, CORES = 64, 224, 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP = FileCrop((0.08, 1.0), (3 / 4, 4 / 3), "bilinear", SIDE)
TORCHVISION = "torchvision"
FROM_SHARDS = ", from shards"
FIELDS = 8  # noise that images are parts of
SHARDS, ROWS = 4, 100  # Arrow shards, and images of a record batch as Hugging Face datasets writes them

Turn = Callable[[], float]  # returns its seconds of CPU time


# -- the files


def make_files(root: Path, count: int, width: int, height: int) -> list[str]:
    """Make ``count`` JPEGs in two class folders. Return their paths."""
    rng = np.random.default_rng(0)
    fields = [_field(rng, width, height) for _ in range(min(FIELDS, count))]
    paths = []
    for number in range(count):
        folder = root / "train" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        shift = rng.integers(0, (height, width))
        pixels = np.roll(fields[number % len(fields)], shift, (0, 1))  # the noise is periodic
        if number % 3 == 0:
            pixels = pixels.transpose(1, 0, 2)
        paths.append(str(folder / f"{number}.jpg"))
        Image.fromarray(np.ascontiguousarray(pixels)).save(paths[-1], quality=92, subsampling=2 * (number // 2 % 2))
    return paths


def _field(rng: np.random.Generator, width: int, height: int) -> np.ndarray[Any, Any]:
    """Return uint8 [height, width, 3] whose amplitudes fall as 1 / frequency, with correlated colours."""
    waves = np.fft.rfft2(rng.standard_normal((3, height, width)))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    noise = np.fft.irfft2(waves / frequency, s=(height, width))
    noise = 0.4 * noise + noise.mean(0)
    levels = (noise - noise.mean()) / noise.std() * 55 + 120
    return levels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def make_shards(root: Path, paths: list[str]) -> RowImages:
    """Copy the JPEGs to Arrow shards, as a training and a test set."""
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    types = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["a", "b"]}}
    described = json.dumps({"info": {"features": types}})
    schema = pyarrow.schema({"image": kind, "label": pyarrow.int64()}, {"huggingface": described})
    for split in ("train", "test"):
        (root / split).mkdir(parents=True)
        files = [f"data-{i:05d}-of-{SHARDS:05d}.arrow" for i in range(SHARDS)]
        (root / split / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in files]}))
        for i, name in enumerate(files):
            part = range(len(paths) * i // SHARDS, len(paths) * (i + 1) // SHARDS) if split == "train" else range(2)
            images = [{"bytes": Path(paths[row]).read_bytes(), "path": paths[row]} for row in part]
            table = pyarrow.table([pyarrow.array(images, kind), [row % 2 for row in part]], schema=schema)
            with pyarrow.ipc.new_stream(str(root / split / name), schema) as shard:
                shard.write_table(table, ROWS)
    train, _ = find_rows("arrow", root)
    return RowImages(train.files, train.places, 3, SIDE)


# -- the loaders


def torchvision_loader(root: Path, images: int) -> Any:
    crop = transforms.RandomResizedCrop(SIDE, CROP.scale, CROP.ratio)
    tail = [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    data = datasets.ImageFolder(str(root / "train"), transforms.Compose([crop, *tail]))
    return DataLoader(data, BATCH, sampler=RandomSampler(data, num_samples=images))


def timm_loader(root: Path, images: int) -> Any:
    from timm.data import ImageDataset, create_loader

    data = ImageDataset(str(root / "train"))
    size = (3, SIDE, SIDE)
    loader = create_loader(
        data, size, BATCH, is_training=True, num_workers=0, persistent_workers=False, interpolation="bilinear",
        color_jitter=None, mean=MEAN, std=STD, device=torch.device("cpu"), pin_memory=False,
    )  # fmt: skip

    def some() -> Iterator[Any]:
        return itertools.islice(iter(loader.loader), images // BATCH)  # without the part on the device

    return some


def our_batches(images: EncodedImages) -> Iterator[Any]:
    steps = global_batches(Epochs(len(images), BATCH, "carry"), 0, 0)
    return stream(images, (CROP.rows(indices, 0, step) for step, indices in steps), batch=BATCH, workers=0, crop=CROP)


def turns_of(root: Path, paths: list[str], images: int) -> dict[str, Turn]:
    def timed(batches: Callable[[], Any]) -> Turn:
        def turn() -> float:
            begin = time.process_time()
            for _ in batches():
                pass
            return time.process_time() - begin

        return turn

    by_torchvision, by_timm = torchvision_loader(root, images), timm_loader(root, images)
    ours, in_shards = our_batches(FileImages(tuple(paths), 3, SIDE)), our_batches(make_shards(root / "shards", paths))

    def some_of_ours() -> Iterator[Any]:
        return itertools.islice(ours, images // BATCH)

    def without_regions() -> Iterator[Any]:
        with mock.patch.object(regions_module, "_decoder", return_value=None):
            yield from some_of_ours()

    turns = {
        TORCHVISION: timed(lambda: by_torchvision),
        "timm": timed(by_timm),
        "ours, Pillow": timed(without_regions),
    }
    if has_nvimgcodec():
        turns["ours, nvImageCodec"] = timed(some_of_ours)
    from_files = list(turns)[-1]
    turns[f"{from_files}{FROM_SHARDS}"] = timed(lambda: itertools.islice(in_shards, images // BATCH))
    return turns


def has_nvimgcodec() -> bool:
    return regions_module._decoder() is not None


# -- the parts of ours


def parts_of(paths: list[str]) -> dict[str, float]:
    """Return the milliseconds of CPU time of each part for an image: means over files."""
    names = ("read", "header and box", "decode", "resize", "hand over")
    seconds = dict.fromkeys(names, 0.0)
    mark = time.process_time()

    def end(name: str) -> None:
        nonlocal mark
        now = time.process_time()
        seconds[name] += now - mark
        mark = now

    for first in range(0, len(paths), BATCH):
        decoded_images = []
        for number, path in enumerate(paths[first : first + BATCH], first):
            mark = time.process_time()
            data = Path(path).read_bytes()
            end("read")
            opened = Image.open(path)
            box = random_box(Random(number), *opened.size, CROP.scale, CROP.ratio)
            end("header and box")
            resize = decoded(data, opened, box)
            end("decode")
            decoded_images.append(resize())
            end("resize")
        shared = torch.from_numpy(np.stack(decoded_images)).share_memory_()
        torch.cat([shared, shared[:0]])
        end("hand over")
    return {name: 1000 * spent / len(paths) for name, spent in seconds.items()}


def decoded(data: bytes, opened: Image.Image, box: regions_module.Box) -> Callable[[], np.ndarray[Any, Any]]:
    """Decode a crop as ``FileCrop`` does. Return a function that resizes it."""
    if (reduction := reduction_of(box, SIDE)) > 1:
        opened.draft(None, (opened.width // reduction, opened.height // reduction))
        image, scaled = in_mode(opened, "RGB"), [edge / reduction for edge in box]
        return lambda: planes(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, scaled))
    pixels = regions_module.decoded_region(data, box)
    if pixels is None:
        pixels = np.asarray(in_mode(opened, "RGB").crop(box))
    return lambda: resized_planes(pixels, SIDE, CROP.interpolation)


# -- reporting


def measured(width: int, height: int, given: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        paths = make_files(Path(folder), given.images, width, height)
        turns = turns_of(Path(folder), paths, given.turn)
        seconds = interleaved(turns, given.repeats)
        speeds = {name: quartiles([given.turn / one for one in of_turns]) for name, of_turns in seconds.items()}
        size = statistics.fmean(os.stat(path).st_size for path in paths) / 1000
        return {"kilobytes": size, "images_per_second": speeds, "parts": parts_of(paths[: given.turn])}


def show(title: str, found: dict[str, Any]) -> None:
    speeds = found["images_per_second"]
    yardstick = speeds[TORCHVISION][1]
    rows = [
        (name, "{1:,.0f} [{0:,.0f}-{2:,.0f}]".format(*speed), f"{speed[1] / yardstick:.2f}", f"{CORES * speed[1]:,.0f}")
        for name, speed in speeds.items()
    ]
    heading = f"{title}, {found['kilobytes']:.0f} kB"
    print_table([heading, "images/s a core", "x torchvision", f"{CORES} cores, extrapolated"], rows)
    (from_shards,) = (name for name in speeds if name.endswith(FROM_SHARDS))
    ratio = speeds[from_shards][1] / speeds[from_shards.removesuffix(FROM_SHARDS)][1]
    print(f"from shards / from files: {ratio:.2f}\n")
    whole = sum(found["parts"].values())
    parts = [(name, f"{spent:.2f}", f"{spent / whole:.0%}") for name, spent in found["parts"].items()]
    print_table([f"parts of ours, {title}", "ms", "share"], parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=2000, help="files of each size; 2000 by default")
    parser.add_argument("--turn", type=int, default=512, help="images of a turn; 512 by default")
    parser.add_argument("--repeats", type=int, default=11, help="11 by default")
    parser.add_argument("--sizes", nargs="+", default=["500x375", "1024x768"], help="WIDTHxHEIGHT")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    given = parsed(parser, images=130, turn=64, repeats=1, sizes=["64x48"])
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    about = {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    about |= {"pillow": Image.__version__, "date": str(date.today()), "images": given.images, "repeats": given.repeats}
    print(", ".join(f"{key} {value}" for key, value in about.items()), "\n")
    if not has_nvimgcodec():
        print("nvidia.nvimgcodec isn't installed and is left out\n")
    found: dict[str, Any] = dict(about)
    for size in given.sizes:
        width, height = map(int, size.split("x"))
        found[size] = measured(width, height, given)
        show(size, found[size])
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
