"""The noise scale in the training loop: it measures what it should, and changes nothing of the training."""

from __future__ import annotations

import copy
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
ON = "instruments.noise_scale=true"
DIVISIONS = [(), ("micro_batch=4",), ("micro_batch=auto",)]
NETWORKS = [("model.norm=batch", "optimizer=lars"), ("optimizer=clars",), ("mode=bt", "mode.exact=false")]


def begun(folder: Path, *overrides: str) -> MainPhase:
    folder.mkdir()
    with Console(folder / "log.txt", speaking=False) as console:
        return set_up(configuration(*TINY, "steps=40", *overrides), RunFolder(folder), 0, 1, CPU, console, None)


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
    phase = trained(tmp_path / "run", LEAST_STEPS, "micro_batch=2", ON)
    (row,), _ = phase.train_rows()
    layers = {name for name, p in phase.training.model.named_parameters() if p.ndim > 1}
    assert row["noise/scale_low"] >= 0
    named = {key.removeprefix("noise_layers/").removesuffix("_low") for key in row if key.startswith("noise_layers/")}
    assert layers <= named


def test_a_checkpoint_gives_the_same_rows(tmp_path: Path) -> None:
    """It keeps steps that no row has yet. A run may also be resumed with another choice of instruments."""
    phase = trained(tmp_path / "run", LEAST_STEPS, "micro_batch=2", ON)
    saved = {"step": LEAST_STEPS, **phase.training.state(0.0)}
    resumed, off = (begun(tmp_path / name, "micro_batch=2", *on) for name, on in (("on", (ON,)), ("off", ())))
    resumed.training.load(copy.deepcopy(saved), rank=0)
    off.training.load(copy.deepcopy(saved), rank=0)
    rows = phase.train_rows()
    assert "noise/scale_low" in rows[0][0]
    assert resumed.train_rows() == rows
    del saved["noise"]
    later = begun(tmp_path / "later", "micro_batch=2", ON)
    later.training.load(saved, rank=0)
    assert later.train_rows() == off.train_rows()


def test_the_loss_scale_cancels() -> None:
    taken = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        layer = nn.Linear(5, 3)
        noise = GradientNoise(layer)
        for _ in range(LEAST_STEPS):
            noise.begin(active=True)
            for _ in range(4):
                (scale * layer(torch.randn(8, 5)).square().sum() / 32).backward()  # type: ignore[no-untyped-call]
                noise.add(*noise.of_pass())
            noise.end(8, 32, 4.0, scale)
            layer.zero_grad()
        taken.append(noise.take())
    assert taken[0] == taken[1]
    assert taken[0]["noise/scale_low"] > 0


def test_the_instrument_is_no_part_of_a_run_s_identity() -> None:
    assert identity(configuration(*TINY, ON)) == identity(configuration(*TINY))


def test_a_loss_over_the_global_batch_is_refused() -> None:
    with pytest.raises(UserError, match=r"instruments\.noise_scale=true: not allowed with mode=bt mode\.exact=true"):
        validate(configuration(*TINY, "mode=bt", "mode.exact=true", ON))


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
