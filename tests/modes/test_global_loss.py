"""Barlow Twins' loss of a global batch and its gradient, compared with the formula and the model in float64."""

from __future__ import annotations

import copy
import itertools
import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import TINY, configuration
from torch import Tensor, nn

from largebatch.machine import distributed
from largebatch.modes.bt import BarlowTwins, Projector, Stage, options
from largebatch.modes.global_loss import GlobalLoss, global_loss
from largebatch.optim import SampleNorms
from largebatch.runs.folder import RunFolder
from largebatch.tracking.console import Console
from largebatch.training.phase import MainPhase
from largebatch.training.pretraining import Pretraining
from largebatch.training.set_up import set_up
from largebatch.training.state import Run, Training

CPU = torch.device("cpu")
FP32 = torch.autocast("cpu", torch.bfloat16, enabled=False)
LMBDA, SCALE = 0.01, 0.3
Parts = tuple[Tensor, Tensor, Tensor]

projectors = pytest.mark.parametrize("widths", [[8], [8, 6], [12, 8, 6]], ids=str)


def projector_and_first(widths: list[int], images: int) -> tuple[Projector, Tensor]:
    """Return a projector with random batch-norm weights, and its first layer's output for two views of features."""
    torch.manual_seed(0)
    projector = Projector(5, widths)
    for stage in projector.stages:
        assert isinstance(stage, Stage)
        nn.init.uniform_(stage.norm.weight, 0.5, 1.5)
        nn.init.normal_(stage.norm.bias, std=0.3)
    one = torch.randn(images, 5)
    features = torch.stack([one, one + 0.5 * torch.randn(images, 5)])
    return projector, (projector.first(features) + 0.2).detach()


def normalised(values: Tensor) -> Tensor:
    centred = values - values.mean(0)
    return centred / (centred.square().mean(0) + 1e-5).sqrt()


def formula(one: Tensor, two: Tensor, lmbda: float) -> Parts:
    """Return the loss of two views' embeddings [n, D], its on-diagonal and its off-diagonal part, written out."""
    correlation = normalised(one).T @ normalised(two) / len(one)
    places = range(len(correlation))
    on_diagonal = torch.stack([(1 - correlation[i, i]) ** 2 for i in places]).sum()
    squares = [correlation[i, j] ** 2 for i in places for j in places if i != j]
    off_diagonal = torch.stack(squares).sum() if squares else torch.zeros(())
    return on_diagonal + lmbda * off_diagonal, on_diagonal, off_diagonal


def reference(projector: Projector, first: Tensor) -> tuple[GlobalLoss, Projector]:
    """Compute the same in float64 by autograd; the returned projector has the gradients of the parameters."""
    twin = copy.deepcopy(projector).double()
    twin.zero_grad()
    leaf = first.double().requires_grad_()
    views = []
    for values in leaf:
        for stage in twin.stages:
            assert isinstance(stage, Stage)
            before = normalised(values) * stage.norm.weight + stage.norm.bias
            values = before.clamp(min=0) @ stage.linear.weight.T
        views.append(values)
    parts = formula(views[0], views[1], LMBDA)
    torch.autograd.backward(SCALE * parts[0])
    assert leaf.grad is not None
    return GlobalLoss(parts, leaf.grad), twin


def computed(
    projector: Projector, first: Tensor, rows: int, autocast: torch.autocast = FP32, images: int | None = None
) -> GlobalLoss:
    images = images or first.shape[1]
    return global_loss(projector, first, rows, autocast, images=images, lmbda=LMBDA, scale=SCALE)


def difference(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def farthest(got: nn.Module, expected: nn.Module) -> float:
    """Return the largest relative difference between the gradients of a parameter."""
    found = []
    for (name, one), other in zip(got.named_parameters(), expected.parameters(), strict=True):
        assert one.grad is not None, name
        assert other.grad is not None, name
        found.append(difference(one.grad, other.grad))
    return max(found, default=0.0)


def gradients(projector: Projector) -> list[Tensor]:
    return [parameter.grad for parameter in projector.stages.parameters() if parameter.grad is not None]


def same_buffers(got: nn.Module, expected: nn.Module) -> None:
    theirs = dict(expected.named_buffers())
    assert theirs
    for name, buffer in got.named_buffers():
        torch.testing.assert_close(buffer, theirs[name], rtol=1e-5, atol=1e-6, msg=name)


# -- the loss alone


@projectors
@pytest.mark.parametrize("rows", [15, 5, 3, 1])
def test_loss_and_gradients_equal_the_formula(widths: list[int], rows: int) -> None:
    projector, first = projector_and_first(widths, 15)
    untouched = first.clone()
    got = computed(projector, first, rows)
    expected, twin = reference(projector, first)
    assert [float(part) for part in got.parts] == pytest.approx(
        [float(part.detach()) for part in expected.parts], rel=1e-5
    )
    assert difference(got.gradient, expected.gradient) < 1e-5
    assert farthest(projector.stages, twin.stages) < 1e-5
    assert projector.first.weight.grad is None  # global_loss starts at its output
    assert torch.equal(first, untouched)


def test_values_far_from_0_lose_no_digits() -> None:
    """Variances of parts are combined from deviations; sums of squares would lose every digit here."""
    projector, first = projector_and_first([12, 8, 6], 16)
    first += 100 * torch.arange(1.0, 13)
    got = computed(projector, first, 4)
    expected, twin = reference(projector, first)
    # fp32 rounds the means, up to 1,200, to 6e-5.
    assert difference(got.gradient, expected.gradient) < 1e-3
    assert farthest(projector.stages, twin.stages) < 1e-3


@projectors
@pytest.mark.parametrize("rows", [15, 5])
def test_running_statistics_equal_batch_norm_s_of_one_view_after_the_other(widths: list[int], rows: int) -> None:
    projector, first = projector_and_first(widths, 15)
    twin = copy.deepcopy(projector).train()
    computed(projector, first, rows)
    for values in first:
        for stage in twin.stages:
            values = stage(values)
    if len(widths) > 1:
        same_buffers(projector, twin)
        assert {int(count) for name, count in projector.named_buffers() if "num_batches" in name} == {2}


@pytest.mark.parametrize("rows", [15, 5])
def test_gradients_are_added_to_existing_gradients(rows: int) -> None:
    projector, first = projector_and_first([12, 8, 6], 15)
    computed(projector, first, rows)
    once = [one.clone() for one in gradients(projector)]
    computed(projector, first, rows)
    assert len(once) == 6
    torch.testing.assert_close(gradients(projector), [2 * one for one in once])


@projectors
@pytest.mark.parametrize("rows", [15, 5])
def test_a_constant_column_has_a_finite_loss(widths: list[int], rows: int) -> None:
    projector, first = projector_and_first(widths, 15)
    first[:, :, 3] = 0.75
    got = computed(projector, first, rows)
    expected, twin = reference(projector, first)
    assert float(got.parts[0]) == pytest.approx(float(expected.parts[0].detach()), rel=1e-5)
    assert difference(got.gradient, expected.gradient) < 1e-5
    assert farthest(projector.stages, twin.stages) < 1e-5


def test_a_batch_of_equal_images_has_correlation_0() -> None:
    projector, first = projector_and_first([12, 8, 6], 1)
    got = computed(projector, first.repeat(1, 16, 1), 4)
    assert [float(part) for part in got.parts] == pytest.approx([6, 6, 0], abs=1e-6)
    assert bool(got.gradient.isfinite().all())
    assert all(bool(one.isfinite().all()) for one in gradients(projector))


@pytest.mark.parametrize("rows", [64, 16])
def test_linear_layers_in_bf16_are_as_exact_as_with_autograd(rows: int) -> None:
    bf16 = torch.autocast("cpu", torch.bfloat16)
    projector, values = projector_and_first([32, 24, 16], 64)
    first = values.bfloat16()
    plain, leaf = copy.deepcopy(projector).train(), first.clone().requires_grad_()
    expected, double = reference(projector, first)
    got = computed(projector, first, rows, bf16)
    views = list(leaf)
    for stage in plain.stages:
        with bf16:
            views = [stage(view) for view in views]
    torch.autograd.backward(SCALE * formula(views[0].float(), views[1].float(), LMBDA)[0])
    assert leaf.grad is not None
    for ours, theirs in (
        (difference(got.gradient, expected.gradient), difference(leaf.grad, expected.gradient)),
        (farthest(projector.stages, double.stages), farthest(plain.stages, double.stages)),
    ):
        assert 1e-3 < ours < 1.1 * theirs


def one_process(rank: int, processes: int, widths: list[int], ends: list[int], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=processes)
    projector, first = projector_and_first(widths, 18)
    got = computed(projector, first[:, ends[rank] : ends[rank + 1]].contiguous(), 3, images=18)
    distributed.average_gradients(projector.stages)
    torch.save((got.parts, got.gradient, gradients(projector), list(projector.buffers())), folder / f"rank{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("widths", "ends"), [([12, 8, 6], [0, 9, 18]), ([8, 6], [0, 6, 12, 18]), ([12, 8, 6], [0, 4, 18, 18])], ids=str
)
def test_several_processes_agree_with_one_process(tmp_path: Path, widths: list[int], ends: list[int]) -> None:
    """Shares may be unequal, and empty."""
    fork = multiprocessing.get_context("fork")
    processes = len(ends) - 1
    arguments = [(rank, processes, widths, ends, tmp_path) for rank in range(processes)]
    ranks = [fork.Process(target=one_process, args=its) for its in arguments]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(100)
    assert [process.exitcode for process in ranks] == [0] * processes
    projector, first = projector_and_first(widths, 18)
    whole = computed(projector, first, 18)
    found = [torch.load(tmp_path / f"rank{rank}") for rank in range(processes)]
    # Each gradient is multiplied by the number of processes, so that their mean is the gradient.
    given_back = torch.cat([of_rank for _, of_rank, _, _ in found], dim=1) / processes
    torch.testing.assert_close(given_back, whole.gradient, rtol=1e-4, atol=1e-6)
    for parts, _, averaged, buffers in found:
        torch.testing.assert_close(parts, whole.parts, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(averaged, gradients(projector), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(buffers, list(projector.buffers()), rtol=1e-5, atol=1e-6)


# -- the gradient of a whole step

SMALL = (*TINY, "mode=bt", "mode.projector=[24,20,16]", "steps=3", "batch_size=32")


def at_start(folder: Path, *overrides: str) -> MainPhase:
    with Console(folder / "log.txt", speaking=False) as console:
        return set_up(configuration(*SMALL, *overrides), RunFolder(folder), 0, 1, CPU, console, None)


def after_one_gradient(folder: Path, *overrides: str) -> tuple[Run, Training]:
    phase = at_start(folder, *overrides)
    batches = phase.batches()
    phase.training.step = 1
    finite = phase.gradient(batches)
    assert finite is not None
    assert bool(finite)
    return phase.run, phase.training


def in_float64(folder: Path, *overrides: str) -> tuple[BarlowTwins, Parts]:
    """Return the initial model after autograd's backward pass through the undivided batch, and the loss parts."""
    phase = at_start(folder, *overrides)
    assert isinstance(phase, Pretraining)
    model = phase.model.double().train()
    images, _ = next(phase.batches())
    one, two = model(images.double()).chunk(2)
    parts = formula(one, two, phase.options.lmbda)
    torch.autograd.backward(phase.options.loss_scale * parts[0])
    return model, parts


@pytest.mark.parametrize("division", [(), ("micro_batch=16",), ("micro_batch=8",), ("micro_batch=4",)], ids=str)
def test_a_divided_batch_has_the_gradient_of_the_whole_batch(tmp_path: Path, division: tuple[str, ...]) -> None:
    run, divided = after_one_gradient(tmp_path, *division)
    assert run.batch.accumulation == 32 // run.batch.micro_batch
    whole = after_one_gradient(tmp_path)[1]
    double, parts = in_float64(tmp_path)
    assert farthest(divided.model, whole.model) < 1e-5
    assert farthest(divided.model, double) < 1e-5
    same_buffers(divided.model, whole.model)
    scale = options(run.config).loss_scale
    totals = [float(32 * part.detach()) for part in (scale * parts[0], *parts[1:])]
    assert divided.unlogged.totals[0].tolist() == pytest.approx([*totals, 32], rel=1e-5)


def test_without_exact_the_gradient_is_the_mean_over_micro_batches(tmp_path: Path) -> None:
    whole = after_one_gradient(tmp_path)[1]
    run, each = after_one_gradient(tmp_path, "mode.exact=false", "micro_batch=8")
    assert run.batch.accumulation == 4
    assert farthest(each.model, whole.model) > 1e-2
    # No other error explains the difference: the gradient equals the mean over the micro-batches' own gradients.
    twin = at_start(tmp_path, "mode.exact=false", "micro_batch=8")
    model = twin.training.model.double().train()
    for images, _ in itertools.islice(twin.batches(), 4):
        one, two = model(images.double()).chunk(2)
        torch.autograd.backward(formula(one, two, 0.005)[0] * options(run.config).loss_scale / 4)
    assert farthest(each.model, model) < 1e-5


def test_with_batch_norm_an_undivided_batch_agrees_with_autograd(tmp_path: Path) -> None:
    exact = after_one_gradient(tmp_path, "model.norm=batch")[1]
    plain = after_one_gradient(tmp_path, "model.norm=batch", "mode.exact=false")[1]
    assert farthest(exact.model, plain.model) < 1e-5
    same_buffers(exact.model, plain.model)
    torch.testing.assert_close(exact.unlogged.totals, plain.unlogged.totals, rtol=1e-5, atol=0)


def test_running_statistics_move_by_the_mean_although_micro_batches_pass_twice(tmp_path: Path) -> None:
    training = after_one_gradient(tmp_path, "model.norm=batch", "micro_batch=8")[1]
    untrained = at_start(tmp_path, "model.norm=batch", "micro_batch=8")
    twin = untrained.training.model.train()
    assert isinstance(training.model, BarlowTwins)
    assert isinstance(twin, BarlowTwins)
    after = []
    with torch.no_grad():
        for images, _ in itertools.islice(untrained.batches(), 4):
            alone = copy.deepcopy(twin.backbone)
            for view in images.chunk(2):
                alone(view)
            after.append(dict(alone.named_buffers()))
    for name, buffer in training.model.backbone.named_buffers():
        torch.testing.assert_close(buffer.float(), torch.stack([each[name].float() for each in after]).mean(0))
    assert {int(count) for name, count in training.model.backbone.named_buffers() if "num_batches" in name} == {2}


def test_random_layers_draw_the_same_in_both_passes(tmp_path: Path) -> None:
    model = ("model=timm", "model.name=test_resnet", "+model.options.drop_path_rate=0.5")
    images = ("+model.options.zero_init_last=false", "dataset.image_size=32", "dataset.channels=3")
    phase = at_start(tmp_path, *model, *images, "batch_size=8", "micro_batch=4")
    training = phase.training
    assert isinstance(training.model, BarlowTwins)
    outputs: list[Tensor] = []
    training.model.projector.first.register_forward_hook(lambda *call: outputs.append(call[2].detach()))
    batches = list(itertools.islice(phase.batches(), 4))
    training.step = 1
    phase.gradient(iter(batches))
    assert len(outputs) == 8  # two micro-batches of two views, twice
    for collected, replayed in zip(outputs[:4], outputs[4:], strict=True):
        assert torch.equal(collected, replayed)
    view = batches[0][0][:4]
    for _ in range(2):
        training.model.projector.first(training.model.backbone(view))
    assert not torch.equal(outputs[8], outputs[9])  # the network is random


# -- CLARS's norms of samples

CONVOLUTIONS = ("conv1", "conv2", "conv3", "conv4")


def norms_of_contributions(folder: Path) -> dict[str, float]:
    """Return for each layer the sum, over samples and views, of the norm of the sample's part of the gradient.

    In float64: each sample's row of a layer's output goes back alone, with its gradient.
    """
    phase = at_start(folder)
    assert isinstance(phase, Pretraining)
    model = phase.model.double().train()
    convolutions = {f"backbone.{name}.weight": getattr(model.backbone, name).weight for name in CONVOLUTIONS}
    rows: list[tuple[str, nn.Linear, Tensor, Tensor]] = []
    for name, module in model.projector.named_modules(prefix="projector"):
        if isinstance(module, nn.Linear):

            def note(module: nn.Linear, args: tuple[Tensor], output: Tensor, name: str = name) -> None:
                output.retain_grad()
                rows.append((f"{name}.weight", module, args[0], output))

            module.register_forward_hook(note)  # type: ignore[arg-type]
    images, _ = next(phase.batches())
    one, two = model(images.double()).chunk(2)
    loss = phase.options.loss_scale * formula(one, two, phase.options.lmbda)[0]
    torch.autograd.backward(loss, retain_graph=True)
    found = dict.fromkeys([*convolutions, *(name for name, *_ in rows)], 0.0)
    for name, module, inputs, outputs in rows:
        assert outputs.grad is not None
        for sample in range(len(inputs)):
            found[name] += float((outputs.grad[sample, :, None] * inputs[sample]).detach().norm())
            if module is model.projector.first:  # group norm: samples are independent up to here
                own = torch.autograd.grad(
                    outputs[sample], list(convolutions.values()), outputs.grad[sample], retain_graph=True
                )
                for convolution, gradient_of_one in zip(convolutions, own, strict=True):
                    found[convolution] += float(gradient_of_one.norm())
    return found


@pytest.mark.parametrize("division", [(), ("micro_batch=8",), ("micro_batch=2",)], ids=str)
def test_clars_uses_the_norms_of_samples_in_the_global_batch(tmp_path: Path, division: tuple[str, ...]) -> None:
    expected = norms_of_contributions(tmp_path)
    _, training = after_one_gradient(tmp_path, "optimizer=clars", *division)
    assert isinstance(training.norms, SampleNorms)
    assert training.norms.method == "hooks"
    means = training.norms.means()
    names = {parameter: name for name, parameter in training.model.named_parameters()}
    got = {names[parameter]: float(mean) for parameter, mean in means.items()}
    assert got == pytest.approx(expected, rel=1e-4)
    assert len(got) == 7
    for parameter, mean in means.items():  # triangle inequality: the norm of a mean is at most the mean of norms
        assert parameter.grad is not None
        assert float(parameter.grad.norm()) < float(mean)


def test_clars_s_hooks_do_not_change_the_gradient(tmp_path: Path) -> None:
    watched = after_one_gradient(tmp_path, "optimizer=clars", "micro_batch=8")[1]
    assert farthest(watched.model, after_one_gradient(tmp_path, "micro_batch=8")[1].model) == 0
