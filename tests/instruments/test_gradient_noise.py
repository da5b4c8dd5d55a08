"""The noise scale in the training loop: it measures what it should, and changes nothing of the training."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path

import pytest
import torch
from conftest import TINY, configuration
from torch import Tensor, nn

from largebatch.config.checks import validate
from largebatch.config.identity import identity
from largebatch.errors import UserError
from largebatch.instruments.gradient_noise import GradientNoise
from largebatch.instruments.noise_scale import LEAST_STEPS
from largebatch.runs.folder import RunFolder
from largebatch.tracking.console import Console
from largebatch.training.phase import MainPhase
from largebatch.training.set_up import set_up

CPU = torch.device("cpu")
STEPS = 2 * LEAST_STEPS + 1  # a cosine takes two
ON = "instruments.noise_scale=true"
DIVISIONS = [(), ("micro_batch=4",), ("micro_batch=auto",)]
NETWORKS = [("model.norm=batch", "optimizer=lars"), ("optimizer=clars",), ("mode=bt", "mode.exact=false")]


def begun(folder: Path, *overrides: str, base: tuple[str, ...] = (*TINY, "steps=40")) -> MainPhase:
    folder.mkdir()
    with Console(folder / "log.txt", speaking=False) as console:
        return set_up(configuration(*base, *overrides), RunFolder(folder), 0, 1, CPU, console, None)


def trained(folder: Path, steps: int, *overrides: str) -> MainPhase:
    phase = begun(folder, *overrides)
    batches = phase.batches()
    for step in range(1, steps + 1):
        phase.training.step = step
        assert phase.gradient(batches) is not None
        phase.update(None)
    return phase


@pytest.mark.parametrize("network", NETWORKS, ids=" ".join)
@pytest.mark.parametrize("division", DIVISIONS, ids=" ".join)
def test_training_is_bit_equal_with_and_without(
    tmp_path: Path, network: tuple[str, ...], division: tuple[str, ...]
) -> None:
    off = trained(tmp_path / "off", 3, *network, *division).training
    on = trained(tmp_path / "on", 3, *network, *division, ON).training
    assert on.noise is not None
    assert len(on.noise.state()["sizes"]) == (3 if "micro_batch=4" in division else 1)
    assert on.checksum() == off.checksum()


def test_the_squared_norms_are_those_of_each_small_batch(tmp_path: Path) -> None:
    """Compare with gradients of each micro-batch and of the whole batch, computed apart."""
    phase = begun(tmp_path / "run", "micro_batch=4", ON)
    run, training = phase.run, phase.training
    parts = [part for part, _ in zip(phase.batches(), range(4), strict=False)]
    parameters = [p for p in training.model.parameters() if p.requires_grad]

    def gradients(images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        training.model.train()
        return torch.autograd.grad(phase.mode.loss(run.config, training.model, images, labels)[0], parameters)

    apart = [gradients(*part) for part in parts]
    small = torch.stack([torch.stack([g.square().sum() for g in one]) for one in apart]).mean(0)
    whole = gradients(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    training.step = 1
    assert phase.gradient(iter(parts)) is not None
    assert training.noise is not None
    state = training.noise.state()
    torch.testing.assert_close(state["small"][0].float(), small, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(
        state["large"][0].float(), torch.stack([g.square().sum() for g in whole]), rtol=1e-3, atol=1e-9
    )
    assert state["sizes"] == [(4, 16)]


def test_half_a_batch_is_the_small_batch_without_a_division(tmp_path: Path) -> None:
    phase = begun(tmp_path / "run", ON)
    images, labels = next(phase.batches())
    training = phase.training
    loss, _ = phase.mode.loss(phase.run.config, training.model.train(), images[:8], labels[:8])
    half = torch.autograd.grad(loss, [p for p in training.model.parameters() if p.requires_grad])
    training.step = 1
    assert phase.gradient(iter([(images, labels)])) is not None
    assert training.noise is not None
    state = training.noise.state()
    assert state["sizes"] == [(8, 16)]
    torch.testing.assert_close(state["small"][0].float(), torch.stack([g.square().sum() for g in half]))


def test_rows_have_the_noise_scale_of_network_and_layers(tmp_path: Path) -> None:
    phase = trained(tmp_path / "run", STEPS, "micro_batch=2", ON)
    (row,), _ = phase.train_rows()
    layers = {name for name, p in phase.training.model.named_parameters() if p.ndim > 1}
    assert row["noise/scale_low"] >= 0
    ends = ("_low", "_variance", "_cosine", "_cosine_low", "_cosine_high")
    assert {f"noise_layers/{layer}{end}" for layer in layers for end in ends} <= row.keys()


def test_a_checkpoint_gives_the_same_rows(tmp_path: Path) -> None:
    """It keeps steps that no row has yet. A run may also be resumed with another choice of instruments."""
    phase = trained(tmp_path / "run", STEPS, "micro_batch=2", ON)
    saved = {"step": STEPS, **phase.training.state(0.0)}
    assert saved["noise"]["before"]  # the last step is to be compared with the next
    resumed, off = (begun(tmp_path / name, "micro_batch=2", *on) for name, on in (("on", (ON,)), ("off", ())))
    resumed.training.load(copy.deepcopy(saved), rank=0)
    off.training.load(copy.deepcopy(saved), rank=0)
    rows = phase.train_rows()
    assert {"noise/scale_low", "noise/cosine"} <= rows[0][0].keys()
    assert resumed.train_rows() == rows
    for one in (phase, resumed):
        one.training.step += 1
        assert one.gradient(one.batches()) is not None
    assert resumed.train_rows() == phase.train_rows() != rows
    del saved["noise"]
    later = begun(tmp_path / "later", "micro_batch=2", ON)
    later.training.load(saved, rank=0)
    assert later.train_rows() == off.train_rows()


def test_the_loss_scale_cancels() -> None:
    taken = []
    for growth in (1.0, 2.0):
        torch.manual_seed(0)
        layer = nn.Linear(5, 3)
        noise = GradientNoise(layer)
        for step in range(2 * LEAST_STEPS):
            scale = growth**step
            noise.begin(active=True)
            for _ in range(4):
                (scale * layer(torch.randn(8, 5)).square().sum() / 32).backward()  # type: ignore[no-untyped-call]
                noise.add(*noise.of_pass())
            noise.end(8, 32, 4.0, scale)
            layer.zero_grad()
        taken.append(noise.take())
    assert taken[0] == pytest.approx(taken[1], rel=1e-6)
    assert taken[0]["noise/scale_low"] > 0
    assert 0.5 < taken[0]["noise/cosine"] < 1


@pytest.mark.parametrize("lr", [0.0, 0.3, 1.9])
def test_variance_and_cosine_are_those_of_linear_regression_in_float64(lr: float) -> None:
    """Compare with the covariance of images' gradients, and with dot products of the gradients of successive steps.

    The loss is quadratic with curvatures of 0.2 to 1, so a step beyond 1 over the curvature turns the gradient.
    """
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(6, 1, bias=False).double()
    inputs = 8 * torch.linalg.qr(torch.randn(64, 6, generator=generator, dtype=torch.float64)).Q
    inputs *= torch.linspace(0.2, 1, 6, dtype=torch.float64).sqrt()
    targets = torch.randn(64, 1, generator=generator, dtype=torch.float64)
    noise, gradients, variances = GradientNoise(layer), [], []
    for _ in range(100):
        order = torch.randperm(64, generator=generator)
        of_images = ((layer(inputs) - targets) * inputs).detach()
        variances.append(of_images.var(0).sum())  # unbiased, and so is the estimate from a random division
        noise.begin(active=True)
        for part in order.chunk(4):
            ((layer(inputs[part]) - targets[part]).square().sum() / 128).backward()  # type: ignore[no-untyped-call]
            noise.add(*noise.of_pass())
        noise.end(16, 64, 4.0, 1.0)
        assert layer.weight.grad is not None
        gradients.append(layer.weight.grad.clone().flatten())
        with torch.no_grad():
            layer.weight -= lr * layer.weight.grad
        layer.zero_grad()
    row = noise.take()
    pairs = list(zip(gradients[::2], gradients[1::2], strict=True))
    dots = torch.stack([first.dot(second) for first, second in pairs])
    norms = torch.stack([first.norm() * second.norm() for first, second in pairs])
    assert row["noise/cosine"] == row["noise_layers/weight_cosine"] == pytest.approx(float(dots.sum() / norms.sum()))
    assert (row["noise/cosine"] < 0) == (lr > 1)
    assert lr or row["noise/cosine"] == pytest.approx(1)
    assert row["noise/cosine_low"] <= row["noise/cosine"] <= row["noise/cosine_high"]
    assert row["noise/variance"] == row["noise_layers/weight_variance"]
    assert row["noise/variance"] == pytest.approx(float(torch.stack(variances).mean()), rel=0.05)


def test_the_instrument_is_no_part_of_a_run_s_identity() -> None:
    assert identity(configuration(*TINY, ON)) == identity(configuration(*TINY))


def test_a_loss_over_the_global_batch_is_refused() -> None:
    with pytest.raises(UserError, match=r"instruments\.noise_scale=true: not allowed with mode=bt mode\.exact=true"):
        validate(configuration(*TINY, "mode=bt", "mode.exact=true", ON))


def test_the_latest_step_of_a_linear_gaussian_case() -> None:
    """Gradients ``w - x`` with normal x: against sample variances in float64, and against the true tr(S) and |G|^2.

    As in the norm test of the paper, the squared norm has the variance of the batch's gradient in its mean.
    """
    dimensions, small, count, steps = 40, 8, 6, 200
    scales = torch.linspace(0.5, 2.0, dimensions)
    layer = nn.Linear(dimensions, 1, bias=False)
    noise = GradientNoise(layer)
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(steps):
        images = scales * torch.randn(count, small, dimensions, generator=generator)
        noise.begin(active=True)
        for batch in images:
            (0.5 * (layer.weight - batch).square().sum() / (small * count)).backward()  # type: ignore[no-untyped-call]
            noise.add(*noise.of_pass())
        noise.end(small, small * count, count, 1.0)
        layer.zero_grad()
        each = (layer.weight.detach() - images.double()).mean(1)  # [count, dimensions]
        expected = small * each.var(0).sum().item(), each.mean(0).square().sum().item()
        assert noise.latest() == pytest.approx(expected, rel=1e-5)
        found.append(noise.latest())
    trace, squared = torch.tensor(found, dtype=torch.float64).mean(0)
    true_trace, true_squared = scales.square().sum().item(), layer.weight.detach().square().sum().item()
    assert trace.item() == pytest.approx(true_trace, rel=0.03)
    assert squared.item() == pytest.approx(true_squared + true_trace / (small * count), rel=0.05)


def test_the_batch_grows_by_the_variance_of_its_micro_batches(tmp_path: Path) -> None:
    """Against gradients of each micro-batch by a copy of the network in float64, at every step."""
    phase = begun(
        tmp_path / "run", "dataset=digits", "epochs=1", "batch_size=96", "batch_schedule.shape=norm_test",
        "batch_schedule.start=8", "batch_schedule.small_batch=4", "batch_schedule.eta=0.9", base=(),
    )  # fmt: skip
    run, training = phase.run, phase.training
    sizes, wanted = [], 8
    for _ in range(8):
        size = run.epochs.size(training.step)
        assert size == wanted
        parts = list(itertools.islice(phase.batches(), size // 4))
        exact = copy.deepcopy(training.model).double()
        each = []
        for images, labels in parts:
            loss = nn.functional.cross_entropy(exact(images.double()), labels)
            each.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(exact.parameters()))]))
        gradients = torch.stack(each)
        variance = 4 * gradients.var(0).sum() / size
        squared = gradients.mean(0).square().sum()
        if variance > 0.9**2 * squared:
            wanted = min(8 * math.ceil(variance * size / (0.9**2 * squared) / 8), 96)
        training.step += 1
        assert phase.gradient(iter(parts)) is not None
        phase.update(None)
        assert phase.grew == (wanted > size)
        sizes.append(size)
    assert len({*sizes}) >= 3
    assert "noise" not in " ".join(phase.train_rows()[0][0])


def test_a_growing_batch_is_measured_at_each_size_of_two_or_more_small_batches(tmp_path: Path) -> None:
    phase = trained(
        tmp_path / "run", 16, "steps=null", "epochs=3", "batch_schedule.shape=doubling", "batch_schedule.start=8",
        "batch_size=32", "batch_schedule.until=0.6", ON,
    )  # fmt: skip
    assert phase.training.noise is not None
    measured = phase.training.noise.state()["sizes"]
    sizes = [phase.epochs.size(step) for step in range(16)]
    assert measured == [(8, size) for size in sizes if size > 8]
    assert {*sizes} == {8, 16, 32}
