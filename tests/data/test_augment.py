"""The batched augmentation, compared with torchvision's PIL functions, and C++ compared with torch."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from largebatch.data import augment, augment_cpu
from largebatch.data.draws import Draws, draw

WAYS = {"c++": augment_cpu.augmented, "torch": augment.augmented_torch}
both_ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def random_images(n, channels, side, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, side, side), dtype=torch.uint8, generator=generator)


def draws_for(n, side, seed=1, **options):
    return draw(torch.Generator().manual_seed(seed), n, side=side, **options)


def draw_of(angle, side, padding):
    """Return one draw: the first corner, no flip, and ``angle`` in degrees, by PIL's formula."""
    cos, sin, half = math.cos(math.radians(angle)), -math.sin(math.radians(angle)), side / 2
    first_row, first_column = half + (cos - sin) * (0.5 - half), half + (cos + sin) * (0.5 - half)
    rotation = [math.floor(number * 65536 + 0.5) for number in (cos, sin, -sin, first_row, first_column)]
    return Draws(padding, torch.tensor([[0, 0, 0, *rotation]], dtype=torch.int32))


def pixels_of(way, images, draws, indices=None):
    """Return the augmented pixels before normalisation."""
    channels = images.shape[1]
    result = way(images, indices, draws, torch.zeros(channels), torch.full((channels,), 1 / 255))
    assert (result - result.round()).abs().max() < 1e-3
    return result.round().to(torch.uint8)


def statistics(channels):
    return torch.tensor([0.1, 0.5, 0.9])[:channels], torch.tensor([0.2, 0.25, 0.3])[:channels]


def pil_chain(image, padding, draw, angle):
    """Apply RandomCrop(S, padding) -> RandomHorizontalFlip -> RandomRotation with these parameters."""
    from torchvision.transforms import functional

    top, left, flip = draw[:3].tolist()
    side = image.shape[-1]
    array = image.permute(1, 2, 0).numpy()
    pil = Image.fromarray(array[..., 0] if len(image) == 1 else array)
    pil = functional.crop(functional.pad(pil, padding), top, left, side, side)
    if flip:
        pil = functional.hflip(pil)
    array = np.array(functional.rotate(pil, angle))
    return torch.from_numpy(array).view(side, side, -1).permute(2, 0, 1)


@both_ways
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("side", "padding", "rotation"), [(8, 1, 10), (8, 9, 20), (32, 4, 0), (32, 4, 15), (64, 4, 15), (33, 0, 180)]
)
def test_equals_the_pil_chain(side, padding, rotation, channels, way):
    """Less than 0.1 % of the pixels of 200 images differ from PIL's at equal parameters."""
    images = random_images(200, channels, side)
    draws = draws_for(200, side, seed=1, padding=padding, flip=True, rotation=rotation)
    generator = torch.Generator().manual_seed(1)  # angles are drawn after corners and flips, in degrees
    torch.randint(0, 2 * padding + 1, (2, 200), generator=generator)
    torch.rand(200, generator=generator)
    angles = ((2 * torch.rand(200, generator=generator, dtype=torch.float64) - 1) * rotation).tolist()

    got = pixels_of(way, images, draws)
    chain = [pil_chain(images[i], padding, draws.table[i], angles[i]) for i in range(200)]
    assert got.shape == images.shape
    assert (got != torch.stack(chain)).any(1).double().mean() < 0.001


@both_ways
def test_rotation_fills_with_black_also_at_pixels_of_the_padded_image(way):
    white = torch.full((1, 1, 32, 32), 255, dtype=torch.uint8)
    got = pixels_of(way, white, draw_of(45.0, side=32, padding=4))[0, 0]
    # Pixel (28, 28) comes from row 33.7, column 16 of the crop: below it, but row 29.7 of the white image.
    assert got[28, 28] == 0
    assert got[26, 26] == 255  # row 30.8


@both_ways
def test_draws_of_zero_do_not_change_images(way):
    images = random_images(5, 3, 16)
    assert torch.equal(pixels_of(way, images, draws_for(5, 16, padding=0, flip=False, rotation=0)), images)
    assert torch.equal(pixels_of(way, images, None), images)


@both_ways
def test_equal_images_in_a_batch_get_different_draws(way):
    draws = draws_for(64, 32, padding=4, flip=True, rotation=15)
    got = pixels_of(way, random_images(2, 3, 32), draws, indices=torch.ones(64, dtype=torch.int64))
    assert len({picture.numpy().tobytes() for picture in got}) == 64


def test_draws_cover_their_ranges():
    table = draws_for(20_000, 32, padding=2, flip=True, rotation=15).table
    top, left, flip, cos, sin = table[:, :5].double().unbind(1)
    for corner in (top, left):
        assert torch.bincount(corner.long()).tolist() == pytest.approx([4000] * 5, rel=0.1)
    assert flip.mean() == pytest.approx(0.5, abs=0.02)
    angle = torch.atan2(-sin, cos).rad2deg()
    assert angle.min() == pytest.approx(-15, abs=0.05)
    assert angle.max() == pytest.approx(15, abs=0.05)
    assert angle.mean() == pytest.approx(0, abs=0.2)
    assert torch.corrcoef(torch.stack([top, left]))[0, 1].abs() < 0.03


@both_ways
def test_a_part_of_the_batch_gets_its_part_of_the_draws(way):
    """The batch is so large that torch takes it in slices."""
    images = random_images(700, 1, 32)
    draws = draws_for(700, 32, padding=1, flip=True, rotation=10)
    whole = pixels_of(way, images, draws)
    parts = [pixels_of(way, images[part], draws[part]) for part in (slice(0, 400), slice(400, 700))]
    assert torch.equal(whole, torch.cat(parts))


@both_ways
@pytest.mark.parametrize("channels_last", [False, True])
def test_normalisation_is_scalar_arithmetic(way, channels_last):
    images = random_images(2, 3, 4)
    mean, std = statistics(3)
    got = way(images, None, None, mean, std, channels_last=channels_last)
    assert got.dtype == torch.float32
    for c in range(3):
        expected = (images[:, c].double() / 255 - mean[c].double()) / std[c].double()
        torch.testing.assert_close(got[:, c].double(), expected, rtol=1e-5, atol=1e-5)


# -- C++ compared with torch


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [8, 32, 33, 64])
@pytest.mark.parametrize("padding", [0, 1, 4, 9])
@pytest.mark.parametrize("rotation", [0, 15, 180])
def test_cpp_and_torch_give_the_same_bits(channels, side, padding, rotation):
    images, indices = random_images(40, channels, side), torch.arange(60) * 7 % 40
    draws = draws_for(60, side, padding=padding, flip=True, rotation=rotation)
    for which, drawn in ((indices, draws), (None, draws[10:50]), (indices, None), (None, None)):
        for channels_last in (False, True):
            memory_format = torch.channels_last if channels_last else torch.contiguous_format
            given = (images, which, drawn, *statistics(channels))
            results = [way(*given, channels_last=channels_last) for way in WAYS.values()]
            assert torch.equal(*results)
            assert all(result.is_contiguous(memory_format=memory_format) for result in results)


def test_images_that_share_memory_are_augmented_alike():
    """For example a data set of one repeated image, whose images have a stride of 0."""
    images = random_images(1, 3, 8).expand(5, -1, -1, -1)
    draws = draws_for(5, 8, padding=2, flip=True, rotation=10)
    results = [pixels_of(way, given, draws) for way in WAYS.values() for given in (images, images.contiguous())]
    assert all(torch.equal(result, results[0]) for result in results)


@both_ways
def test_no_images_give_an_empty_batch(way):
    images, nothing = random_images(3, 3, 8), torch.zeros(0, dtype=torch.int64)
    draws = draws_for(0, 8, padding=2, flip=True, rotation=10)
    assert way(images, nothing, draws, *statistics(3)).shape == (0, 3, 8, 8)
    assert way(images[:0], None, None, *statistics(3)).shape == (0, 3, 8, 8)


def test_the_number_of_threads_does_not_change_the_result():
    images, draws = random_images(101, 3, 32), draws_for(101, 32, padding=4, flip=True, rotation=15)
    results = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(augment_cpu.augmented(images, None, draws, *statistics(3)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("index", [-1, 3, 2**40])
def test_an_index_out_of_range_raises(index):
    with pytest.raises(IndexError, match=r"0\.\.2"):
        augment_cpu.augmented(random_images(3, 1, 8), torch.tensor([0, index]), None, *statistics(1))


@pytest.mark.parametrize(
    "change",
    [
        {"pixels": random_images(3, 1, 8).float()},
        {"pixels": random_images(3, 1, 8)[:, :, :, :4]},
        {"pixels": random_images(3, 1, 8).transpose(2, 3)},
        {"indices": torch.tensor([0, 1], dtype=torch.int32)},
        {"draws": draws_for(3, 8, padding=1, flip=True, rotation=0)},
        {"mean": torch.zeros(3)},
        {"std": torch.ones(1, dtype=torch.float64)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_tensors_that_cpp_cannot_read_raise(change):
    fitting = {"pixels": random_images(3, 1, 8), "indices": torch.tensor([0, 1]), "draws": None}
    fitting |= dict(zip(("mean", "std"), statistics(1), strict=True))
    augment_cpu.augmented(**fitting)
    with pytest.raises(ValueError, match="expected"):
        augment_cpu.augmented(**fitting | change)


class Operations(TorchDispatchMode):
    """Records the names of torch's operations, and the devices of their arguments and results."""

    def __init__(self):
        super().__init__()
        self.names, self.devices = set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.add(function.overloadpacket.__name__)
        self.devices |= {tensor.device.type for tensor in (*args, result) if isinstance(tensor, torch.Tensor)}
        return result


def test_on_a_device_nothing_is_copied_from_the_host_or_read_back():
    """A meta tensor has no values: an operation that needs a value fails."""
    draws = draws_for(6, 8, padding=1, flip=True, rotation=10).to("meta")
    given = [tensor.to("meta") for tensor in (random_images(9, 3, 8), torch.arange(6), *statistics(3))]
    with Operations() as operations:
        result = augment.augmented(given[0], given[1], draws, *given[2:], channels_last=True)
    assert result.shape == (6, 3, 8, 8)
    assert "gather" in operations.names
    assert operations.devices == {"meta"}


# -- without a compiler


def test_without_a_working_compiler_torch_augments(compiler_fault):
    images = torch.arange(192).to(torch.uint8).view(1, 3, 8, 8).repeat(5, 1, 1, 1)
    given = images, None, draws_for(5, 8, padding=1, flip=True, rotation=10), *statistics(3)
    assert torch.equal(augment.augmented(*given), augment.augmented_torch(*given))
    assert compiler_fault in augment_cpu.why_not()


def test_this_machine_augments_in_cpp():
    assert augment_cpu.why_not() == ""
    with Operations() as operations:
        augment.augmented(random_images(1, 1, 8), None, draw_of(5.0, side=8, padding=1), *statistics(1))
    assert "gather" not in operations.names
