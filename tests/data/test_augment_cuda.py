"""The kernels of augmentation on CUDA, compared bit for bit with C++ on the CPU.

Without a GPU the kernels run in triton's interpreter. Triton reads TRITON_INTERPRET when it is imported, which another
test may already have done in this process. ``test_arithmetic`` therefore runs the tests that need the kernels
(``check_*``) in a process of their own, once interpreted and, if there is a GPU, once on it.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any

import pytest
import torch
from test_augment import draws_for, random_images
from test_views import draws_for as view_draws_for
from test_views import some_images
from triton_checks import needs_triton, run_checks

from largebatch import triton_kernels
from largebatch.config.augmentation import ColorJitterConfig, ResizedCropConfig
from largebatch.config.datasets import DatasetConfig
from largebatch.data import augment, augment_cpu, augment_cuda
from largebatch.data.draws import AnyDraws, draw_resized_crop

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
MEAN, STD = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.25, 0.3])
KERNELS = "largebatch.data.augment_cuda_kernels"


@needs_triton
@pytest.mark.parametrize("where", [pytest.param("interpreter", marks=pytest.mark.slow), "gpu"])
def test_arithmetic(where: str) -> None:
    run_checks(__file__, where)


@pytest.fixture(autouse=True)
def quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call a kernel's own helpers directly.

    The interpreter would prepare triton's language for each call, as the kernel's launch has done: half of its time.
    """
    if DEVICE == "cpu":
        from triton.runtime.interpreter import InterpretedFunction

        prepared = InterpretedFunction.__call__

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            own = self.fn.__module__ == KERNELS
            return self.rewrite()(*args, **kwargs) if own else prepared(self, *args, **kwargs)

        monkeypatch.setattr(InterpretedFunction, "__call__", call)


def compare(pixels: torch.Tensor, indices: torch.Tensor | None, draws: AnyDraws, channels_last: bool) -> None:
    channels = pixels.shape[1]
    given = (pixels, indices, draws, MEAN[:channels], STD[:channels])
    expected = augment_cpu.augmented(*given, channels_last=channels_last)
    got = augment_cuda.augmented(*[x if x is None else x.to(DEVICE) for x in given], channels_last=channels_last)
    assert torch.equal(got.cpu(), expected)
    assert got.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("side", "padding", "rotation"), [(8, 1, 10), (33, 4, 0), (33, 9, 180)])
def check_crops_equal_cpp(side: int, padding: int, rotation: int, channels: int) -> None:
    """33 x 33 pixels are more than a chunk."""
    images, indices = random_images(5, channels, side), torch.arange(7) * 3 % 5
    draws = draws_for(7, side, padding=padding, flip=True, rotation=rotation)
    for channels_last in (False, True):
        for which, drawn in ((indices, draws), (None, draws[1:6]), (indices, None)):
            compare(images, which, drawn, channels_last)


@pytest.mark.parametrize(
    ("side", "n", "channels", "chunk"), [(8, 6, 3, 64), (7, 3, 1, 16), (9, 2, 3, 32), (48, 1, 3, 512)]
)
def check_views_equal_cpp(side: int, n: int, channels: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of one chunk and of several; 3 x 48 lines are more than are blurred at once."""
    monkeypatch.setattr(augment_cuda, "_VIEW_CHUNK", (chunk, chunk))
    n = 60 if DEVICE == "cuda" else n
    draws = view_draws_for(n + 1, side, 1, blur=[1, 0.6], solarize=[0, 0.4])
    compare(some_images(n, channels, side), torch.arange(n).flip(0), draws[1:], channels_last=side % 2 == 0)


def check_a_bilinear_crop_and_a_jitter_without_hue_equal_cpp() -> None:
    crop, jitter = ResizedCropConfig([0.2, 1.0], interpolation="bilinear"), ColorJitterConfig(0.4, 0.4, 0.4)
    config = DatasetConfig(name="x", resized_crop=crop, color_jitter=jitter)
    draws = draw_resized_crop(torch.Generator().manual_seed(0), 6, 8, config)
    compare(some_images(6, 3, 8), None, draws, channels_last=False)


@pytest.mark.parametrize("side", [32, 64, 224])
def check_views_of_usual_sizes_equal_cpp(side: int) -> None:
    if DEVICE == "cpu":
        pytest.skip("takes minutes in the interpreter")
    draws = view_draws_for(20, side, 1, blur=[1, 0.6], solarize=[0, 0.4])
    compare(some_images(20, 3, side), None, draws, channels_last=True)


def check_images_that_share_memory_are_augmented_alike() -> None:
    """For example a data set of one repeated image, whose images have a stride of 0."""
    draws = draws_for(5, 8, padding=2, flip=True, rotation=10)
    compare(random_images(1, 3, 8).expand(5, -1, -1, -1), None, draws, channels_last=False)


def check_no_images_give_an_empty_batch() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    compare(random_images(3, 3, 8), nothing, draws_for(0, 8, padding=2, flip=True, rotation=10), False)
    compare(random_images(3, 3, 8)[:0], None, view_draws_for(0, 8), False)


def check_the_trial_succeeds() -> None:
    for draws in (None, draws_for(1, 4, padding=1, flip=True, rotation=0), view_draws_for(1, 4)):
        pixels = random_images(1, 3, 4).to(DEVICE)
        assert augment_cuda.why_not(pixels, draws, True, augment.augmented_torch) == ""


def check_a_cuda_graph_of_the_views() -> None:
    """A replay reads the draws and indices that are in the tensors then."""
    if DEVICE == "cpu":
        pytest.skip("no GPU")
    pixels, indices, draws = some_images(8, 3, 16).cuda(), torch.arange(8).cuda(), view_draws_for(8, 16).to("cuda")
    given = (pixels, indices, draws, MEAN.cuda(), STD.cuda())
    augment.augmented(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = augment.augmented(*given)
    others = view_draws_for(8, 16, seed=2)
    draws.whole.copy_(others.whole)
    draws.real.copy_(others.real)
    indices.copy_(indices.flip(0))
    graph.replay()
    assert torch.equal(result.cpu(), augment_cpu.augmented(pixels.cpu(), indices.cpu(), others, MEAN, STD))


@pytest.mark.parametrize(
    "change",
    [
        {"pixels": random_images(3, 1, 8).float()},
        {"pixels": random_images(3, 1, 8)[:, :, :, :4]},
        {"indices": torch.tensor([0, 1], dtype=torch.int32)},
        {"draws": draws_for(3, 8, padding=1, flip=True, rotation=0)},
        {"draws": view_draws_for(3, 8)},
        {"mean": torch.zeros(3)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_tensors_that_the_kernels_cannot_read_raise(change: dict[str, object]) -> None:
    fitting = {"pixels": random_images(3, 1, 8), "indices": torch.tensor([0, 1]), "draws": None}
    with pytest.raises(ValueError, match="expected"):
        augment_cuda.augmented(**{**fitting, "mean": MEAN[:1], "std": STD[:1], **change})


# -- conditions


def test_why_not_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, KERNELS, raising=False)
    triton_kernels.imported.cache_clear()
    assert "triton can't be imported" in triton_kernels.why_not.__wrapped__(KERNELS, torch.device("cuda"))
    triton_kernels.imported.cache_clear()


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="triton interprets")
def test_the_kernels_need_an_nvidia_device() -> None:
    given = random_images(1, 1, 8), None, True, augment.augmented_torch
    assert augment_cuda.why_not(*given) == "triton requires an NVIDIA device"


def test_kernels_that_fail_their_trial_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """They raise or compute another result: a warning names the reason."""

    def broken(*arguments: object, **options: object) -> None:
        raise ValueError("no such\ninstruction")

    def wrong(*arguments: object, **options: object) -> torch.Tensor:
        return augment.augmented_torch(*arguments, **options) + 1e-6

    for failing, reason in ((broken, "ValueError: no such instruction"), (wrong, "wrong results")):
        monkeypatch.setattr(augment_cuda, "augmented", failing)
        for kind in ("ViewDraws", "Draws", "NoneType"):
            trial = augment_cuda._failed_trial.__wrapped__
            with pytest.warns(UserWarning, match=f"isn't used: .*{re.escape(reason)}"):
                assert reason in trial(torch.device("cpu"), kind, 3, 8, True, augment.augmented_torch)
