"""The two Barlow Twins views, compared with the per-image chain of torchvision's functions on PIL images."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps

from largebatch.config.datasets import DatasetConfig, ViewsConfig
from largebatch.data import augment, augment_cpu
from largebatch.data.draws import draw_view

PATHS = [
    pytest.param(augment_cpu.augmented, id="kernel"),
    pytest.param(augment.augmented_torch, id="torch"),
]
FIRST, SECOND = range(2)  # views
OFF = {"flip": 0, "jitter": 0, "gray": 0, "solarize": 0, "sigma": 0}
both_paths = pytest.mark.parametrize("path", PATHS)


def some_images(n, channels, side, seed=0):
    """Return images, half white noise, half smooth with flat dark and light parts."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (n - n // 2, channels, side, side), dtype=torch.uint8, generator=generator)
    smooth = torch.rand(n // 2, channels, 4, 4, generator=generator).mul(400).sub(70)
    smooth = torch.nn.functional.interpolate(smooth, size=side, mode="bilinear").clamp(0, 255).byte()
    return torch.cat([noise, smooth])


def draws_for(n, side, view=FIRST, seed=1, **options):
    """Return a view's draws for a configuration with these ``dataset.views``."""
    config = DatasetConfig(name="x", flip=options.pop("flip", True), views=ViewsConfig(**options))
    return draw_view(torch.Generator().manual_seed(seed), n, side, config, view)


def with_columns(draws, **values):
    """Return the draws with some columns replaced."""
    changed = replace(draws, whole=draws.whole.clone(), real=draws.real.clone())
    for name, column in changed.columns().items():
        if name in values:
            column.copy_(torch.as_tensor(values[name]))
    return changed


def whole_image(draws, side):
    return with_columns(draws, top=0, left=0, height=side, width=side, **OFF)


def steps(*order):
    return {"jitter": 1, **{f"step{i}": step for i, step in enumerate(order)}}


def levels(path, images, draws, **options):
    """Return the view's pixels in 0..255, by a mean of 0 and a std of one level."""
    channels = images.shape[1]
    got = path(images, None, draws, torch.zeros(channels), torch.full((channels,), 1 / 255), **options)
    assert got.dtype == torch.float32
    whole = got.round()
    torch.testing.assert_close(got, whole, rtol=1e-6, atol=0)
    return whole


def pil_levels(images, draws):
    columns = {name: column.tolist() for name, column in draws.columns().items()}
    rows = [{name: column[i] for name, column in columns.items()} for i in range(len(images))]
    return torch.stack([pil_chain(image, row) for image, row in zip(images, rows, strict=True)]).float()


def pil_chain(image, row):
    from torchvision.transforms import InterpolationMode, functional

    side = image.shape[-1]
    array = image.permute(1, 2, 0).numpy()
    pil = Image.fromarray(array[..., 0] if len(image) == 1 else array)
    corner_and_size = [row[name] for name in ("top", "left", "height", "width")]
    pil = functional.resized_crop(pil, *corner_and_size, [side, side], InterpolationMode.BICUBIC)
    if row["flip"]:
        pil = functional.hflip(pil)
    for i in range(4 if row["jitter"] else 0):
        pil = [
            lambda pil: functional.adjust_brightness(pil, row["brightness"]),
            lambda pil: functional.adjust_contrast(pil, row["contrast"]),
            lambda pil: functional.adjust_saturation(pil, row["saturation"]),
            # torchvision truncates this factor to the shift.
            lambda pil: functional.adjust_hue(pil, (row["hue"] + 0.5 * np.sign(row["hue"])) / 255),
            lambda pil: pil,
        ][row[f"step{i}"]](pil)
    if row["gray"]:
        pil = functional.rgb_to_grayscale(pil, num_output_channels=len(image))
    if row["sigma"] > 0:
        pil = pil.filter(ImageFilter.GaussianBlur(radius=row["sigma"]))
    if row["solarize"]:
        pil = ImageOps.solarize(pil, threshold=128)
    return torch.from_numpy(np.array(pil)).view(side, side, -1).permute(2, 0, 1)


@both_paths
@pytest.mark.parametrize("view", [FIRST, SECOND], ids=["first", "second"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [8, 32, 33, 64])
def test_the_chain_equals_pil_bit_for_bit(path, view, side, channels):
    images, draws = some_images(60, channels, side), draws_for(60, side, view)
    assert torch.equal(levels(path, images, draws), pil_levels(images, draws))


@both_paths
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "values",
    [
        {"flip": 1},
        {**steps(3, 0, 1, 2), "contrast": 1, "saturation": 1, "hue": 0},
        {**steps(3, 0, 1, 2), "brightness": 1, "saturation": 1, "hue": 0},
        {**steps(3, 0, 1, 2), "brightness": 1, "contrast": 1, "hue": 0},
        {**steps(3, 0, 1, 2), "brightness": 1, "contrast": 1, "saturation": 1},
        {"gray": 1},
        {"sigma": torch.linspace(0.1, 2, 40)},
        {"solarize": 1},
    ],
    ids=["flip", "brightness", "contrast", "saturation", "hue", "grayscale", "blur", "solarize"],
)
def test_each_operation_alone_equals_pil(path, values, channels):
    """The jitter has a hue shift of 0, because the conversion to HSV rounds."""
    images = some_images(40, channels, 33)
    draws = with_columns(whole_image(draws_for(40, 33), 33), **values)
    assert torch.equal(levels(path, images, draws), pil_levels(images, draws))


@both_paths
@pytest.mark.parametrize("side", [8, 33, 50])
def test_resized_crops_of_every_size_equal_pil(path, side):
    sizes = torch.cartesian_prod(torch.arange(1, side + 1), torch.tensor([1, 2, 3, side // 2, side]))
    draws = with_columns(whole_image(draws_for(len(sizes), side), side), height=sizes[:, 0], width=sizes[:, 1])
    draws = with_columns(draws, top=(side - sizes[:, 0]) // 2, left=side - sizes[:, 1])
    images = some_images(len(sizes), 3, side)
    assert torch.equal(levels(path, images, draws), pil_levels(images, draws))


@both_paths
@pytest.mark.parametrize("shift", [-25, 0, 7])
def test_the_hue_of_every_second_green_and_blue_at_some_reds_equals_pil(path, shift):
    plane = torch.arange(256, dtype=torch.uint8).view(1, 256).expand(256, 256)[::2, ::2]
    images = torch.stack([torch.stack([torch.full_like(plane, red), plane, plane.T]) for red in range(1, 256, 42)])
    values = {**steps(3, 0, 1, 2), "brightness": 1, "contrast": 1, "saturation": 1, "hue": shift}
    draws = with_columns(whole_image(draws_for(len(images), 128), 128), **values)
    assert torch.equal(levels(path, images, draws), pil_levels(images, draws))


@both_paths
def test_values_are_normalised_by_channel(path):
    images, draws = some_images(4, 3, 8), draws_for(4, 8, SECOND)
    mean, std = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.25, 0.3])
    got = path(images, None, draws, mean, std)
    pixels = levels(path, images, draws)
    for c in range(3):
        assert torch.equal(got[:, c], (pixels[:, c] - mean[c] * 255) / (std[c] * 255))


@both_paths
def test_indices_choose_images_of_the_data_set(path):
    images, draws = some_images(20, 3, 16), draws_for(50, 16)
    indices = torch.randint(0, 20, (50,), generator=torch.Generator().manual_seed(2))
    mean, std = torch.zeros(3), torch.ones(3)
    assert torch.equal(path(images, indices, draws, mean, std), path(images[indices], None, draws, mean, std))


@both_paths
@pytest.mark.parametrize("channels", [1, 3])
def test_channels_last_changes_only_the_memory_format(path, channels):
    images, draws = some_images(40, channels, 9), draws_for(40, 9, SECOND)
    plain, last = (levels(path, images, draws, channels_last=flag) for flag in (False, True))
    assert torch.equal(plain, last)
    assert path(images, None, draws, torch.zeros(channels), torch.ones(channels), channels_last=True).is_contiguous(
        memory_format=torch.channels_last
    )


@both_paths
def test_a_part_of_the_batch_gets_its_part_of_the_draws(path):
    images, draws = some_images(70, 3, 8), draws_for(70, 8)
    parts = [levels(path, images[part], draws[part]) for part in (slice(0, 41), slice(41, 70))]
    assert torch.equal(levels(path, images, draws), torch.cat(parts))


@both_paths
def test_the_result_does_not_depend_on_the_number_of_threads(path):
    images, draws = some_images(30, 3, 32), draws_for(30, 32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(levels(path, images, draws))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@both_paths
def test_autocast_does_not_change_the_result(path):
    images, draws = some_images(10, 3, 16), draws_for(10, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = levels(path, images, draws)
    assert torch.equal(got, levels(path, images, draws))


@both_paths
def test_equal_images_get_different_views(path):
    image = some_images(1, 3, 32).expand(64, -1, -1, -1)
    got = levels(path, image, draws_for(64, 32))
    assert len({picture.numpy().tobytes() for picture in got}) == 64


def test_a_view_is_by_the_kernel_on_cpu_and_by_torch_without_a_compiler(monkeypatch):
    images, draws = some_images(5, 3, 8), draws_for(5, 8)
    arguments = (images, None, draws, torch.zeros(3), torch.ones(3))
    taken = []
    for module, name in (augment_cpu, "augmented"), (augment, "augmented_torch"):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name, **k: taken.append(name) or real(*a, **k))
    with_compiler = augment.augmented(*arguments)
    monkeypatch.setattr(augment_cpu, "why_not", lambda *_: "there is no C++ compiler")
    assert torch.equal(augment.augmented(*arguments), with_compiler)
    assert taken == ["augmented", "augmented_torch"]


def test_the_kernel_raises_for_tensors_that_do_not_fit():
    images, draws = some_images(4, 3, 8), draws_for(2, 8)
    numbers = (torch.zeros(3), torch.ones(3))
    for indices in ([0, 4], [-1, 0]):
        with pytest.raises(IndexError, match=r"0\.\.3"):
            augment_cpu.augmented(images, torch.tensor(indices), draws, *numbers)
    with pytest.raises(ValueError, match=r"\(4, 13\).*\(2, 13\)"):
        augment_cpu.augmented(images, None, draws, *numbers)
    with pytest.raises(ValueError, match="float32"):
        augment_cpu.augmented(images[:2].float(), None, draws, *numbers)
    with pytest.raises(ValueError, match=r"\(1, 2, 8, 8\)"):
        augment_cpu.augmented(images[:2, :2], None, draws, *numbers)


def test_draws_have_the_ranges_and_probabilities_of_the_recipe():
    n, side = 20_000, 32
    for view, blurred, solarized in (FIRST, 1.0, 0.0), (SECOND, 0.1, 0.2):
        drawn = {name: column.double() for name, column in draws_for(n, side, view).columns().items()}
        for name, probability in (("flip", 0.5), ("jitter", 0.8), ("gray", 0.2), ("solarize", solarized)):
            assert set(drawn[name].tolist()) <= {0, 1}
            assert drawn[name].mean() == pytest.approx(probability, abs=0.015)
        for name, spread in (("brightness", 0.4), ("contrast", 0.4), ("saturation", 0.2)):
            assert drawn[name].min() == pytest.approx(1 - spread, abs=0.001)
            assert drawn[name].max() == pytest.approx(1 + spread, abs=0.001)
            assert drawn[name].mean() == pytest.approx(1, abs=0.01)
        sigma = drawn["sigma"][drawn["sigma"] > 0]
        assert len(sigma) / n == pytest.approx(blurred, abs=0.015)
        assert (sigma.min(), sigma.max()) == pytest.approx((0.1, 2.0), abs=0.01)
        assert sigma.mean() == pytest.approx(1.05, abs=0.04)
        hues = torch.bincount(drawn["hue"].long() + 25, minlength=51) / n
        assert hues[25] == pytest.approx(2 / 51, rel=0.15)  # -1 < 255 * factor < 1
        assert hues[1:25].mean() == pytest.approx(1 / 51, rel=0.05)
        orders = {tuple(order) for order in torch.stack([drawn[f"step{i}"] for i in range(4)], 1).int().tolist()}
        assert len(orders) == 24
        assert all(sorted(order) == [0, 1, 2, 3] for order in orders)


@pytest.mark.parametrize("side", [8, 32])
def test_crops_are_distributed_as_torchvisions(side):
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    image = torch.empty(3, side, side)
    theirs = [RandomResizedCrop.get_params(image, [0.08, 1], [3 / 4, 4 / 3]) for _ in range(3000)]
    theirs = torch.tensor(theirs).double()
    drawn = draws_for(20_000, side).columns()
    ours = torch.stack([drawn[name] for name in ("top", "left", "height", "width")], 1).double()
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= side).all()
    assert (ours[:, 2:] >= 1).all()
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), rtol=0, atol=0.02 * side)
    torch.testing.assert_close(ours.std(0), theirs.std(0), rtol=0.06, atol=0)
    torch.testing.assert_close(torch.corrcoef(ours.T), torch.corrcoef(theirs.T), rtol=0, atol=0.06)
    assert not torch.equal(ours[:, 0], ours[:, 1])


def test_equal_seeds_give_equal_draws_and_different_seeds_different_draws():
    first, again, other = draws_for(10, 32, seed=3), draws_for(10, 32, seed=3), draws_for(10, 32, seed=4)
    assert torch.equal(first.whole, again.whole)
    assert torch.equal(first.real, again.real)
    assert not torch.equal(first.real, other.real)


def test_each_view_has_its_own_probabilities():
    never, always = (draws_for(50, 8, blur=[p, p], solarize=[p, p]).columns() for p in (0.0, 1.0))
    assert (never["sigma"] == 0).all()
    assert (never["solarize"] == 0).all()
    assert (always["sigma"] >= 0.1).all()
    assert (always["solarize"] == 1).all()


def drawn_by_config(n, side, **options):
    """Return the columns of both views' draws for a configuration with these ``dataset.views``."""
    return [draws_for(n, side, view, **options).columns() for view in (FIRST, SECOND)]


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_configured_probabilities_of_0_and_1_mean_never_and_always(probability):
    both = [probability, probability]
    for drawn in drawn_by_config(200, 16, jitter=probability, gray=probability, blur=both, solarize=both):
        for name in ("jitter", "gray", "solarize"):
            assert (drawn[name] == probability).all()
        assert ((drawn["sigma"] > 0) == bool(probability)).all()
        assert set(drawn["flip"].tolist()) == {0, 1}


def test_each_configured_view_has_its_own_blur_and_solarize():
    first, second = drawn_by_config(4000, 16, blur=[0.25, 0.75], solarize=[0.6, 0.0], jitter=0.4, gray=0.9)
    for drawn, blur, solarize in ((first, 0.25, 0.6), (second, 0.75, 0.0)):
        assert (drawn["sigma"] > 0).double().mean() == pytest.approx(blur, abs=0.03)
        for name, expected in (("solarize", solarize), ("jitter", 0.4), ("gray", 0.9), ("flip", 0.5)):
            assert drawn[name].double().mean() == pytest.approx(expected, abs=0.03)


def test_views_are_flipped_only_if_the_data_set_allows_it():
    for drawn in drawn_by_config(200, 16, flip=False):
        assert (drawn["flip"] == 0).all()


@pytest.mark.parametrize("min_area", [0.08, 0.25, 0.5, 0.9])
def test_crops_contain_at_least_the_configured_fraction_of_the_image(min_area):
    """The sides are rounded by at most half a pixel; ratios are at most 4:3."""
    for drawn in drawn_by_config(5000, 32, min_area=min_area):
        area = (drawn["height"] * drawn["width"]).double()
        least = min_area * 32**2
        rounding = 0.5 * (math.sqrt(4 / 3) + math.sqrt(3 / 4)) * math.sqrt(least)
        assert area.min() >= least - rounding
        assert area.min() <= least + rounding  # the minimum isn't larger than configured
        assert area.max() > 0.97 * 32**2


def test_min_area_1_crops_nothing():
    for drawn in drawn_by_config(500, 32, min_area=1.0):
        assert all((drawn[name] == 0).all() for name in ("top", "left"))
        assert all((drawn[name] == 32).all() for name in ("height", "width"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("path", [augment.augmented, augment.augmented_torch], ids=["kernel", "torch"])
def test_cuda_equals_pil_without_a_host_synchronisation(path, channels):
    images, draws = some_images(60, channels, 32), draws_for(60, 32, SECOND)
    mean, std = torch.zeros(channels, device="cuda"), torch.full((channels,), 1 / 255, device="cuda")
    on_device, indices = images.cuda(), torch.arange(60, device="cuda")
    path(on_device[:1], indices[:1], draws[:1].to("cuda"), mean, std)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = path(on_device, indices, draws.to("cuda"), mean, std)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got.cpu().round(), pil_levels(images, draws))
