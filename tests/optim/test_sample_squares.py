"""Means of the groups' squared gradients, compared with one backward pass a group in float64."""

import pytest
import torch
from test_sample_norms import LAYERS, N, cnn_images, loss_of, small_cnn
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from two_processes import in_two_processes

from largebatch.optim import SampleNorms, SampleSquares, group_norms


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def reference(model, inputs, sample_size, layers):
    """Return the mean over groups of the square of the group's own gradient."""
    groups = [torch.autograd.grad(loss_of(model, group), layers) for group in inputs.split(sample_size)]
    return [torch.stack(own).square().mean(0) for own in zip(*groups, strict=True)]


def collected(model, inputs, sample_size, **options):
    sample_squares = SampleSquares(model, sample_size, **options)
    loss_of(model, inputs).backward()
    sample_squares.remove()
    return list(sample_squares.means().values())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", LAYERS)
def test_layers_by_hooks(name, monkeypatch):
    """Weights and biases, all groups at once and one at a time."""
    build, shape = LAYERS[name]
    model = build().double()
    layers = list(model.parameters())
    inputs = torch.randn(N, *shape, dtype=torch.float64)
    for sample_size in (1, 4):
        expected = reference(model, inputs, sample_size, layers)
        for slice_size in (2**20, 1):
            monkeypatch.setattr(group_norms, "_CPU_SLICE", slice_size)
            found = collected(model, inputs, sample_size, method="hooks", parameters=layers)
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scale", [1.0, 4096.0])
@pytest.mark.parametrize("method", ["hooks", "passes"])
def test_accumulation_and_a_scaled_loss_equal_one_batch(method, scale):
    model, inputs = small_cnn(), cnn_images()
    expected = reference(model, inputs, 2, [p for p in model.parameters() if p.ndim > 1])
    sample_squares = SampleSquares(model, 2, method=method)
    for _ in range(2):  # the second step starts from nothing
        for part in inputs.split(2):
            (scale * loss_of(model, part) / 4).backward()
        torch.testing.assert_close(list(sample_squares.means(scale).values()), expected)


def test_a_step_that_is_run_again_counts_once():
    model, inputs = small_cnn(), cnn_images()
    expected = collected(model, inputs, 2)
    sample_squares = SampleSquares(model, 2)
    loss_of(model, inputs).backward()
    sample_squares.forget()
    loss_of(model, inputs).backward()
    torch.testing.assert_close(list(sample_squares.means().values()), expected)


def test_means_without_a_backward_pass_raises():
    with pytest.raises(RuntimeError, match="no backward pass since"):
        SampleSquares(nn.Linear(2, 2)).means()


@pytest.mark.parametrize("kind", [SampleNorms, SampleSquares])
def test_an_empty_batch_adds_nothing(kind):
    """One process may have no samples of a step."""
    model, images = small_cnn(), cnn_images()
    measured = kind(model, 2)
    loss_of(model, images).backward()
    model(images[:0]).sum().backward()
    found = list(measured.means().values())
    loss_of(model, images).backward()
    torch.testing.assert_close(found, list(measured.means().values()))


def one_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    model, inputs = small_cnn(), cnn_images()
    mine = inputs.split(N // 4)[2 * rank : 2 * rank + 2]
    found = []
    for method in ("hooks", "passes"):
        sample_squares = SampleSquares(model, 2, method=method)
        replica = DistributedDataParallel(model)
        with replica.no_sync():
            (loss_of(replica, mine[0]) / 2).backward()
        (loss_of(replica, mine[1]) / 2).backward()
        found.append(list(sample_squares.means().values()))
        sample_squares.remove()
    torch.save(found, f"{folder}/found{rank}")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    in_two_processes(one_rank, tmp_path)
    torch.manual_seed(0)
    model, inputs = small_cnn(), cnn_images()
    expected = reference(model, inputs, 2, [p for p in model.parameters() if p.ndim > 1])
    for rank in (0, 1):
        for means in torch.load(tmp_path / f"found{rank}"):
            torch.testing.assert_close(means, expected)
