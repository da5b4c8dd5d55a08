"""Random resized crops from image files: the pixels of torchvision on PIL images, with either decoder of JPEGs."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from datafiles import make_imagefolder
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop, functional

from largebatch import native
from largebatch.config.augmentation import ColorJitterConfig, ResizedCropConfig, augmentation_problems
from largebatch.config.batch import plan_batch
from largebatch.config.datasets import ImageFolder
from largebatch.config.epochs import Epochs
from largebatch.data import BatchLoader, load_data, resizing
from largebatch.data import regions as regions_module
from largebatch.data.file_crops import FileCrop, random_box, reduction_of
from largebatch.data.regions import decoded_region
from largebatch.errors import UserError

INSTALLED = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.nvimgcodec") is not None
NEEDS_NVIMGCODEC = pytest.mark.skipif(not INSTALLED, reason="the extra decode isn't installed")
CROP = FileCrop((0.08, 1.0), (3 / 4, 4 / 3), "bicubic", side=24)
KINDS = ("colour", "grey", "progressive", "full colour", "rgb", "exif", "cmyk", "png", "transparent", "palette")


@pytest.fixture(params=["Pillow", pytest.param("nvImageCodec", marks=NEEDS_NVIMGCODEC)])
def decoder(request, monkeypatch):
    if request.param == "Pillow":
        monkeypatch.setattr(regions_module, "_decoder", lambda: None)
    return request.param


def picture(width: int, height: int) -> Image.Image:
    """Return a smooth image with some noise, as photographs are."""
    rng = np.random.default_rng(width)
    small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((width, height), 3)
    noisy = np.asarray(small) + rng.normal(0, 8, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def saved(folder: Path, kind: str, width: int = 75, height: int = 53) -> str:
    image, path = picture(width, height), folder / f"{kind}.jpg"
    exif = Image.Exif()
    exif[274] = 6  # turned by 90 degrees
    options = {
        "progressive": {"progressive": True}, "full colour": {"subsampling": 0}, "rgb": {"keep_rgb": True},
        "exif": {"exif": exif},
    }  # fmt: skip
    if kind in ("png", "transparent", "palette"):
        path = path.with_suffix(".png")
        image = image.convert({"png": "RGB", "transparent": "RGBA", "palette": "P"}[kind])
    image.convert({"grey": "L", "cmyk": "CMYK"}.get(kind, image.mode)).save(path, **options.get(kind, {}))
    return str(path)


def by_torchvision(path: str, crop: FileCrop, seed: int, mode: str = "RGB") -> np.ndarray:
    image = Image.open(path).convert(mode)
    left, top, right, bottom = random_box(Random(seed), *image.size, crop.scale, crop.ratio)
    size, interpolation = [crop.side, crop.side], InterpolationMode(crop.interpolation)
    cut = functional.resized_crop(image, top, left, bottom - top, right - left, size, interpolation)
    return functional.pil_to_tensor(cut).numpy()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("kind", KINDS)
def test_crops_equal_torchvisions_bit_for_bit(tmp_path, decoder, kind, interpolation):
    path, crop = saved(tmp_path, kind), replace(CROP, interpolation=interpolation, side=40)
    for seed in range(20):
        assert np.array_equal(crop.cut(path, 3, [seed])[0], by_torchvision(path, crop, seed))
        if kind == "grey":
            assert np.array_equal(crop.cut(path, 1, [seed])[0], by_torchvision(path, crop, seed, "L"))


@NEEDS_NVIMGCODEC
@pytest.mark.parametrize("kind", ["colour", "grey", "progressive", "full colour", "rgb", "exif"])
def test_parts_of_jpegs_are_decoded_without_the_rest(tmp_path, kind):
    data, random = Path(path := saved(tmp_path, kind)).read_bytes(), Random(0)
    whole = np.asarray(Image.open(path).convert("RGB"))
    for _ in range(50):
        left, top = random.randrange(75 - 16), random.randrange(53)
        right, bottom = random.randrange(left + 16, 76), random.randrange(top + 1, 54)
        found = decoded_region(data, (left, top, right, bottom))
        assert found is not None
        assert np.array_equal(found, whole[top:bottom, left:right])


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_compiled_resize_has_pillows_bytes(channels, interpolation):
    if reason := native.why_not(resizing._SOURCE):
        pytest.skip(reason)
    assert resizing.kernel_or_none() is not None
    rng = np.random.default_rng(0)
    for _ in range(60):
        height, width, side = rng.integers(1, [150, 150, 70]).tolist()
        pixels = rng.integers(0, 256, (height, width, 3)[: 2 + channels // 3], dtype=np.uint8)
        found = resizing.resized_planes(pixels, side, interpolation)
        assert np.array_equal(found, resizing._by_pillow(pixels, side, interpolation)), (height, width, side)
        part = pixels[height // 3 :, width // 3 :]
        found = resizing.resized_planes(part, side, interpolation)
        assert np.array_equal(found, resizing._by_pillow(part, side, interpolation)), (height, width, side)


def test_without_a_compiler_pillow_resizes(tmp_path, monkeypatch):
    path = saved(tmp_path, "colour")
    expected = CROP.cut(path, 3, [1])
    monkeypatch.setattr(resizing, "kernel_or_none", lambda: None)
    assert np.array_equal(CROP.cut(path, 3, [1]), expected)


def test_two_views_have_crops_of_their_own_from_one_file(tmp_path, decoder):
    path = saved(tmp_path, "colour")
    crops = CROP.cut(path, 3, [3, 4])
    assert crops.shape == (2, 3, 24, 24)
    assert np.array_equal(crops, np.concatenate([replace(CROP, side=24).cut(path, 3, [seed]) for seed in (3, 4)]))


@pytest.mark.parametrize(
    ("scale", "ratio"),
    [((0.35, 1.0), (3 / 4, 4 / 3)), ((0.9, 1.0), (0.5, 2.0)), ((0.8, 1.0), (0.2, 0.25)), ((0.8, 1.0), (4.0, 5.0))],
    ids=["usual", "some don't fit", "none fits, narrow", "none fits, wide"],
)
@pytest.mark.parametrize(("width", "height"), [(50, 38), (38, 50)])
def test_boxes_have_torchvisions_distribution(scale, ratio, width, height):
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(2000)]).double()
    boxes = [random_box(Random(seed), width, height, scale, ratio) for seed in range(10_000)]
    ours = torch.tensor([(top, left, bottom - top, right - left) for left, top, right, bottom in boxes]).double()
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), rtol=0, atol=0.9)
    torch.testing.assert_close(ours.std(0), theirs.std(0), rtol=0.08, atol=0.05)


def test_a_crop_four_times_the_result_is_taken_from_the_reduced_jpeg(tmp_path, decoder):
    """It stays near the unreduced crop. Smaller crops and other formats aren't reduced."""
    reductions = [reduction_of((5, 5, 5 + width, 205), 10) for width in (39, 40, 79, 80, 159, 160, 500)]
    assert reductions == [1, 2, 2, 4, 4, 8, 8]
    path, crop = saved(tmp_path, "colour", 301, 203), replace(CROP, scale=(0.5, 1.0))
    for seed in range(8):
        with Image.open(path) as image:
            box = random_box(Random(seed), *image.size, crop.scale, crop.ratio)
            reduction = reduction_of(box, crop.side)
            assert reduction > 1
            image.draft("RGB", (image.width // reduction, image.height // reduction))
            scaled = [edge / reduction for edge in box]
            expected = np.asarray(image.resize((24, 24), Image.Resampling.BICUBIC, scaled)).transpose(2, 0, 1)
        found = crop.cut(path, 3, [seed])[0]
        assert np.array_equal(found, expected)
        assert abs(found - by_torchvision(path, crop, seed).astype(float)).mean() < 1  # of 255
    lossless = str(tmp_path / "lossless.png")
    Image.open(path).save(lossless)
    assert np.array_equal(crop.cut(lossless, 3, [0])[0], by_torchvision(path, crop, 0))


def test_a_damaged_file_is_an_error_with_its_name(tmp_path, decoder):
    data = Path(path := saved(tmp_path, "colour")).read_bytes()
    for damaged in (data[: len(data) // 2], data[:-2], b"", b"text"):
        Path(path).write_bytes(damaged)
        with pytest.raises(UserError, match=r"colour\.jpg can't be read as an image"):
            CROP.cut(path, 3, [0])
    Path(path).write_bytes(data + b"more")  # after the image
    assert CROP.cut(path, 3, [0]).shape == (1, 3, 24, 24)


@NEEDS_NVIMGCODEC
def test_nothing_is_printed_when_libraries_of_gpus_are_missing():
    code = "import runpy, sys; print(runpy.run_path(sys.argv[1])['_decoder']() is not None)"
    command = [sys.executable, "-c", code, regions_module.__file__]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout + ended.stderr == "True\n"


def test_the_plan_refuses_crops_from_files_that_cannot_be_taken():
    def problems(views=1, **options):
        crop = ResizedCropConfig(options.pop("scale", None), source="file")
        dataset = ImageFolder(name="imagefolder", resized_crop=crop, crop_padding=0, rotation=0, **options)
        return augmentation_problems(dataset, views)

    (alone,) = problems()
    assert "does nothing without a resized crop. Fix: dataset.resized_crop.scale=[0.08,1]" in alone
    assert problems(views=2) == problems(scale=[0.2, 1.0]) == []
    for location in ("host", "device"):
        (refused,) = problems(scale=[0.2, 1.0], location=location)
        assert refused.startswith(f"dataset.location={location}: not allowed with dataset.resized_crop.source=file")
        assert refused.endswith("Fix: dataset.location=auto")


# -- batches


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    root = make_imagefolder(tmp_path_factory.mktemp("tree"), (24, 30), train_per_class=10, extension=".jpg")
    crop = ResizedCropConfig([0.2, 1.0], source="file")
    return ImageFolder(
        name="imagefolder", root=str(root), image_size=12, resize_size=14, workers=0, crop_padding=0, rotation=0,
        resized_crop=crop, color_jitter=ColorJitterConfig(0.4, 0.4),
    )  # fmt: skip


def batches(config, steps=3, micro_batch=12, processes=1, rank=0, start_step=0, views=1):
    split = load_data(config, seed=0).train
    loader = BatchLoader(config, (0.0,) * 3, (1 / 255,) * 3, torch.device("cpu"), rank, processes)
    plan = plan_batch(12, processes, micro_batch)
    found = loader.train(split, Epochs(30, 12, "carry"), plan, 0, start_step, views)
    images = [images.unflatten(0, (views, -1)) for images, _ in itertools.islice(found, steps * plan.accumulation)]
    return torch.cat(images, 1)  # [views, images of all steps, 3, 12, 12]


@pytest.mark.parametrize("views", [1, 2])
def test_images_are_equal_for_every_division_and_after_a_resume(config, views):
    whole = batches(config, views=views)
    assert whole.shape == (views, 36, 3, 12, 12)
    assert len({image.numpy().tobytes() for image in whole.flatten(0, 1)}) == 36 * views
    for workers in (1, 2):
        assert torch.equal(batches(replace(config, workers=workers), views=views, micro_batch=4), whole)
    assert torch.equal(batches(config, 1, start_step=2, views=views), whole[:, 24:])
    ranks = [batches(config, processes=2, micro_batch=6, rank=rank, views=views) for rank in (0, 1)]
    steps = [part for both in zip(*(rank.chunk(3, 1) for rank in ranks), strict=True) for part in both]
    assert torch.equal(torch.cat(steps, 1), whole)


def test_without_other_augmentation_images_are_the_crops(config):
    plain = replace(config, flip=False, color_jitter=ColorJitterConfig(), train_size=None)
    paths = load_data(plain, seed=0).train.images.paths
    crop = FileCrop((0.2, 1.0), (3 / 4, 4 / 3), "bicubic", 12)
    rows = crop.rows(torch.arange(30), 0, 0)
    assert len(set(rows[:, 1].tolist())) == 30
    expected = {crop.cut(path, 3, seeds).tobytes() for path in paths for seeds in rows[:12, 1:].tolist()}
    for image in batches(plain, 1)[0]:
        assert image.round().byte().numpy().tobytes() in expected


def test_images_stay_in_their_files_and_evaluations_keep_their_crop(config):
    lines: list[str] = []
    data, square = load_data(config, 0, say=lines.append), replace(config, resized_crop=ResizedCropConfig())
    assert (data.place, data.image) == ("files", (3, 12, 12))
    assert any("dataset.resized_crop.source=file, so images are decoded while training" in line for line in lines)
    decoded = load_data(square, 0)
    assert decoded.place == "host"
    assert (data.mean, data.std, data.content) == (decoded.mean, decoded.std, decoded.content)
    loader = BatchLoader(config, data.mean, data.std, torch.device("cpu"), 0, 1)
    pairs = zip(loader.evaluate(data.test, 4), loader.evaluate(decoded.test, 4), strict=True)
    assert all(torch.equal(ours, theirs) for (ours, _), (theirs, _) in pairs)
