"""Sums of the groups' gradient norms, compared with one backward pass a group in float64."""

import math

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from two_processes import in_two_processes

from largebatch.optim import group_norms
from largebatch.optim.sample_norms import SampleNorms

N = 8
# name: the layer, and one sample's shape
LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (5,)),
    "linear_no_bias": (lambda: nn.Linear(5, 4, bias=False), (5,)),
    "linear_positions": (lambda: nn.Linear(5, 4), (3, 5)),
    "linear_two_positions": (lambda: nn.Linear(5, 4), (3, 2, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (3, 9)),
    "conv1d_same_even": (lambda: nn.Conv1d(3, 4, 4, padding="same", dilation=3), (3, 15)),
    "conv1d_valid": (lambda: nn.Conv1d(3, 4, 2, padding="valid"), (3, 6)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), (3, 6, 5)),
    "conv2d_everything": (lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (2, 1), (1, 2), groups=2), (4, 7, 6)),
    "conv2d_1x1": (lambda: nn.Conv2d(3, 4, 1, stride=2, bias=False), (3, 5, 5)),
    "conv2d_stem": (lambda: nn.Conv2d(3, 4, 7, 2, 3, bias=False), (3, 11, 10)),
    "conv2d_one_position": (lambda: nn.Conv2d(3, 4, 3), (3, 3, 3)),
    "conv2d_unused_border": (lambda: nn.Conv2d(3, 4, 3, stride=3), (3, 8, 7)),
    "conv2d_depthwise": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), (4, 5, 5)),
    "conv2d_one_channel": (lambda: nn.Conv2d(1, 2, (1, 3)), (1, 1, 6)),
    "conv2d_same": (lambda: nn.Conv2d(2, 3, (4, 3), padding="same"), (2, 5, 6)),
    "conv2d_reflect": (lambda: nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="reflect"), (2, 5, 6)),
    "conv2d_circular": (lambda: nn.Conv2d(2, 4, 3, padding=(1, 2), padding_mode="circular", groups=2), (2, 5, 6)),
    "conv2d_same_replicate": (lambda: nn.Conv2d(2, 3, (4, 2), padding="same", padding_mode="replicate"), (2, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (3, 2, 1), (1, 2, 1), (1, 0, 0), (1, 2, 1)), (2, 4, 5, 3)),
    "conv3d_groups": (lambda: nn.Conv3d(2, 4, 2, padding=1, groups=2), (2, 3, 3, 2)),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def loss_of(model, inputs):
    """Return a mean over samples whose gradients differ from sample to sample."""
    return (model(inputs).flatten(1).sin() ** 2).sum(1).mean()


def reference(model, inputs, sample_size, layers=None):
    """Return the mean over groups of the norm of the group's own gradient, in float64."""
    layers = [p for p in model.parameters() if p.requires_grad] if layers is None else layers
    groups = inputs.split(sample_size)
    sums = dict.fromkeys(layers, 0.0)
    for group in groups:
        gradients = torch.autograd.grad(loss_of(model, group), layers, allow_unused=True)
        for layer, gradient in zip(layers, gradients, strict=True):
            if gradient is not None:
                sums[layer] += math.sqrt((gradient.double() ** 2).sum().item()) / len(groups)
    return sums


def collected(model, inputs, sample_size=1, **options):
    """Return the means of SampleNorms for one step of one backward pass."""
    sample_norms = SampleNorms(model, sample_size, **options)
    loss_of(model, inputs).backward()
    sample_norms.remove()
    return sample_norms.means()


def assert_close(means, expected, rel=1e-5):
    for layer, mean in means.items():
        assert mean.dtype == torch.float32
        assert mean.ndim == 0
        assert mean.item() == pytest.approx(expected[layer], rel=rel, abs=1e-12)


def small_cnn():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 3, stride=2), nn.GELU(),
        nn.Flatten(), nn.Linear(16, 5), nn.ReLU(inplace=True), nn.Linear(5, 3),
    )  # fmt: skip


def cnn_images():
    return torch.randn(N, 3, 6, 6)


# -- compared with one backward pass a group


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("gram", [True, False], ids=["gram", "direct"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_by_hooks(name, gram, monkeypatch):
    """Both ways of computing, for weights and biases, all groups at once and one at a time."""
    monkeypatch.setattr(group_norms, "_gram_is_cheaper", lambda rows, k, o: gram)
    build, shape = LAYERS[name]
    model = build().double()
    inputs = torch.randn(N, *shape, dtype=torch.float64)
    for sample_size in (1, 2, 4, N):
        expected = reference(model, inputs, sample_size)
        for slice_size in (2**20, 1):
            monkeypatch.setattr(group_norms, "_CPU_SLICE", slice_size)
            means = collected(model, inputs, sample_size, method="hooks", parameters=model.parameters())
            assert len(means) == len(expected)
            assert_close(means, expected, rel=1e-6)


@pytest.mark.parametrize("sample_size", [1, 2, 4, N])
def test_per_sample_gradients_of_torch_func(sample_size):
    model, inputs = small_cnn().double(), cnn_images().double()

    def loss_of_one(parameters, one):
        return loss_of(lambda x: torch.func.functional_call(model, parameters, x), one[None])

    model[1], model[6] = nn.ReLU(), nn.ReLU()  # torch.func has no in-place ReLU here
    parameters = dict(model.named_parameters())
    gradients = torch.func.vmap(torch.func.grad(loss_of_one), (None, 0))(parameters, inputs)
    means = collected(model, inputs, sample_size)
    for name, parameter in parameters.items():
        if parameter.ndim > 1:
            groups = gradients[name].reshape(N // sample_size, sample_size, -1).mean(1)
            assert means[parameter].item() == pytest.approx(groups.norm(dim=1).mean().item(), rel=1e-6)


def test_memory_formats_and_in_place_activations():
    model, inputs = small_cnn(), cnn_images()
    expected = reference(model, inputs, 2)
    assert_close(collected(model, inputs, 2), expected)
    model.to(memory_format=torch.channels_last)
    assert_close(collected(model, inputs.to(memory_format=torch.channels_last), 2), expected)


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_a_sample_without_a_batch_dimension_and_a_keyword_argument(name):
    build, shape = LAYERS[name]
    model, inputs = build(), torch.randn(shape)
    sample_norms = SampleNorms(model)
    model(input=inputs).sin().sum().backward()
    assert sample_norms.means()[model.weight].item() == pytest.approx(model.weight.grad.norm().item(), rel=1e-5)


def test_resnet18():
    """In training mode, one group is the batch; in evaluation mode, samples are independent, as in the reference."""
    from torchvision import models

    model, inputs = models.resnet18(num_classes=10).double(), torch.randn(4, 3, 32, 32).double()
    model.train()
    sample_norms = SampleNorms(model, 4)
    assert sample_norms.method == "hooks"
    loss_of(model, inputs).backward()
    means = sample_norms.means()
    assert len(means) == 21  # 20 convolutions and the last layer
    for layer, mean in means.items():
        assert mean.item() == pytest.approx(layer.grad.norm().item(), rel=1e-5)
    sample_norms.remove()
    model.eval()
    for sample_size in (1, 2):
        means = collected(model, inputs, sample_size)
        assert_close(means, reference(model, inputs, sample_size, list(means)))


# -- properties


def test_mean_of_norms_is_at_least_the_norm_of_the_mean_and_falls_as_groups_grow():
    model, inputs = small_cnn(), cnn_images()
    found = [collected(model, inputs, sample_size) for sample_size in (1, 2, 4, N)]
    model.zero_grad()
    loss_of(model, inputs).backward()
    for layer in found[0]:
        means = [means[layer].item() for means in found]
        assert means == sorted(means, reverse=True)
        assert means[0] > 1.01 * means[-1]
        assert means[-1] == pytest.approx(layer.grad.norm().item(), rel=1e-5)


def test_parallel_gradients_give_the_norm_of_the_mean():
    model, inputs = small_cnn(), cnn_images()[:1].expand(N, -1, -1, -1)
    means = collected(model, inputs)
    for layer, mean in means.items():
        assert mean.item() == pytest.approx(layer.grad.norm().item(), rel=1e-5)


@pytest.mark.parametrize("method", ["hooks", "passes"])
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_one_batch(parts, method):
    model, inputs = small_cnn(), cnn_images()
    size = N // parts
    expected = collected(model, inputs, size)
    sample_norms = SampleNorms(model, size, method=method)
    for part in inputs.split(size):
        (loss_of(model, part) / parts).backward()
    assert_close(sample_norms.means(), {layer: mean.item() for layer, mean in expected.items()})


@pytest.mark.parametrize("method", ["hooks", "passes"])
def test_means_divide_by_the_loss_scale(method):
    model, inputs = small_cnn(), cnn_images()
    sample_norms = SampleNorms(model, N, method=method)
    loss_of(model, inputs).backward()
    expected = {layer: mean.item() for layer, mean in sample_norms.means().items()}
    (loss_of(model, inputs) * 4096).backward()
    assert_close(sample_norms.means(scale=4096), expected)


def test_bf16_autocast():
    """Means are close to fp32's, and computed in fp32 from the bf16 tensors, also if autocast is on in backward."""
    model, inputs = small_cnn(), cnn_images()
    expected = reference(model, inputs, 2)
    sample_norms = SampleNorms(model, 2)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, inputs)
    loss.backward()
    outside = sample_norms.means()
    assert_close(outside, expected, rel=0.03)
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model, inputs).backward()
    assert_close(sample_norms.means(), {layer: mean.item() for layer, mean in outside.items()}, rel=1e-6)


@pytest.mark.parametrize(("method", "sample_size"), [("hooks", 1), ("hooks", 4), ("passes", N)])
def test_gradients_and_buffers_stay_bit_for_bit(method, sample_size):
    def gradients(watched):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3))
        inputs = cnn_images()
        if watched:
            collected(model, inputs, sample_size, method=method)
        else:
            loss_of(model, inputs).backward()
        return [p.grad for p in model.parameters()] + list(model.buffers())

    for with_norms, without in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(with_norms, without)


def test_large_values_with_a_small_sum_are_accurate():
    """The Gram form subtracts; with fp32 inputs of one sign its error stays below 1e-3."""
    x, g = torch.rand(4, 16, 64) + 3, torch.randn(4, 16, 48)
    g -= g.mean(1, keepdim=True)  # as after batch norm: the constant part of the inputs cancels
    exact = (g.double().mT @ x.double()).flatten(1).norm(dim=1)
    found = group_norms.linear_group_norms(x, g, 1)
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=0)


# -- layers and methods


def test_default_layers_are_trainable_and_of_more_than_one_dimension():
    model = small_cnn()
    model[0].requires_grad_(False)
    assert list(collected(model, cnn_images())) == [model[2].weight, model[5].weight, model[7].weight]


def test_passes_support_any_parameter():
    """A tied weight counts once; norm layers and parameters of the model itself are supported."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
            self.second.weight = self.first.weight
            self.scale = nn.Parameter(torch.tensor(1.5))

        def forward(self, x):
            return self.second(self.norm(self.first(x)).relu()) * self.scale

    model, inputs = Tied(), torch.randn(N, 4)
    expected = reference(model, inputs, 2)
    sample_norms = SampleNorms(model, 2, parameters=model.parameters())
    assert sample_norms.method == "passes"
    for part in inputs.split(2):
        (loss_of(model, part) / 4).backward()
    means = sample_norms.means()
    assert means.keys() == expected.keys()
    assert_close(means, expected)


def test_auto_chooses_passes_for_layers_that_hooks_do_not_support():
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight

    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x) + self.weight.sum()

    decided = {
        "0.weight is shared": tied,
        "0.weight belongs to Embedding": nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4)),
        "1.weight belongs to Odd": nn.Sequential(nn.Linear(4, 4), Odd(4, 4)),
        "in_proj_weight belongs to MultiheadAttention": nn.MultiheadAttention(4, 2),
        "parametrizations.weight.original1 belongs to ParametrizationList": (
            nn.utils.parametrizations.weight_norm(nn.Linear(4, 4, bias=False))
        ),
    }
    for why, model in decided.items():
        sample_norms = SampleNorms(model)
        assert (sample_norms.method, why) == ("passes", why)
        assert why in sample_norms.why or "original0" in sample_norms.why
        with pytest.raises(ValueError, match='use method="passes"'):
            SampleNorms(model, method="hooks")
    norm = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    assert SampleNorms(norm).method == "hooks"
    with pytest.raises(ValueError, match=r"1\.weight belongs to LayerNorm"):
        SampleNorms(norm, method="hooks", parameters=norm.parameters())
    assert SampleNorms(small_cnn(), method="passes").method == "passes"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_size": 0}, "sample_size must be a whole number of at least 1, got 0"),
        ({"sample_size": 1.5}, "sample_size must be a whole number"),
        ({"method": "magic"}, 'method must be "auto", "hooks" or "passes"'),
        ({"parameters": []}, "no layers"),
        ({"parameters": [nn.Parameter(torch.ones(2, 3))]}, r"a tensor of shape \[2, 3\] isn't"),
    ],
)
def test_invalid_arguments_raise(options, message):
    with pytest.raises(ValueError, match=message):
        SampleNorms(small_cnn(), **options)


def test_a_frozen_layer_raises_with_its_name():
    model = small_cnn()
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"0\.weight is frozen"):
        SampleNorms(model, parameters=model.parameters())


# -- errors of hooks in the backward pass


def test_a_micro_batch_that_sample_size_does_not_divide_raises():
    with pytest.raises(RuntimeError, match=r"8 samples isn't a multiple of sample_size=3"):
        collected(small_cnn(), cnn_images(), 3)


def test_a_module_called_twice_raises():
    layer = nn.Linear(4, 4)
    with pytest.raises(RuntimeError, match=r"^0 was called twice .* method=\"passes\""):
        collected(nn.Sequential(layer, nn.ReLU(), layer), torch.randn(N, 4))


def test_two_forward_passes_and_one_backward_pass_raise():
    model = small_cnn()
    SampleNorms(model)
    with pytest.raises(RuntimeError, match="was called twice"):
        (loss_of(model, cnn_images()) + loss_of(model, cnn_images())).backward()


def test_two_forward_passes_and_two_backward_passes_add_up():
    """Both orders of accumulation are supported."""
    model, inputs = small_cnn(), cnn_images()
    sample_norms = SampleNorms(model)
    losses = [loss_of(model, part) / 2 for part in inputs.split(N // 2)]
    for loss in losses:
        loss.backward()
    assert_close(sample_norms.means(), reference(model, inputs, 1))


def test_a_first_dimension_that_is_not_samples_raises():
    model = nn.Sequential(nn.Linear(4, 4), nn.Flatten(0, 1), nn.Linear(4, 4), nn.Unflatten(0, (N, 3)))
    with pytest.raises(RuntimeError, match=rf"^0 got {N} rows along its first dimension, but 2 got {3 * N}"):
        collected(model, torch.randn(N, 3, 4))


def test_a_weight_used_outside_its_module_raises():
    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return nn.functional.linear(self.first(x), self.second.weight)

    with pytest.raises(RuntimeError, match=r"second\.weight got a gradient though its module wasn't called"):
        collected(Outside(), torch.randn(N, 4))


def test_a_second_backward_pass_through_one_graph_raises():
    model = small_cnn()
    sample_norms = SampleNorms(model)
    loss = loss_of(model, cnn_images())
    loss.backward(retain_graph=True)
    sample_norms.means()
    with pytest.raises(RuntimeError, match="second backward pass through the same graph, at 7"):
        loss.backward()


# -- state


def test_means_resets_the_sums():
    model, inputs = small_cnn(), cnn_images()
    sample_norms = SampleNorms(model)
    with pytest.raises(RuntimeError, match="no backward pass since"):
        sample_norms.means()
    loss_of(model, inputs).backward()
    means = sample_norms.means()
    first = {layer: mean.clone() for layer, mean in means.items()}
    with pytest.raises(RuntimeError, match="no backward pass since"):
        sample_norms.means()
    loss_of(model, inputs).backward()
    again = sample_norms.means()
    assert all(torch.equal(first[layer], again[layer]) for layer in first)
    assert all(torch.equal(first[layer], means[layer]) for layer in first)  # not overwritten


@pytest.mark.parametrize("method", ["hooks", "passes"])
def test_removed_hooks_add_nothing(method):
    model = small_cnn()
    sample_norms = SampleNorms(model, method=method)
    sample_norms.remove()
    loss_of(model, cnn_images()).backward()
    with pytest.raises(RuntimeError, match="no backward pass since"):
        sample_norms.means()


def inner_activations(model):
    """Return a list to which the forward pass appends weak references to the inputs of the model's layers."""
    storages = []
    for layer in model[1:]:
        layer.register_forward_pre_hook(lambda _, args: storages.append(StorageWeakRef(args[0].untyped_storage())))
    return storages


def test_nothing_is_kept_after_the_backward_pass():
    """Inputs are freed while the loss keeps the graph alive; a forward pass without gradients keeps nothing."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    storages = inner_activations(model)
    sample_norms = SampleNorms(model)
    loss = loss_of(model, torch.randn(N, 4))
    assert not any(storage.expired() for storage in storages)
    loss.backward()
    assert len(storages) == 2
    assert all(storage.expired() for storage in storages)
    sample_norms.means()
    storages.clear()
    with torch.no_grad():
        kept = model(torch.randn(N, 4))
    assert kept.shape == (N, 4)
    assert len(storages) == 2
    assert all(storage.expired() for storage in storages)


def test_checkpointing_gives_the_same_means_and_frees_activations():
    model, inputs = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(3))), torch.randn(N, 4)
    expected = {layer: mean.item() for layer, mean in collected(model, inputs, 2).items()}
    storages = []
    for block in model:
        block[1].register_forward_pre_hook(lambda _, args: storages.append(StorageWeakRef(args[0].untyped_storage())))
    sample_norms = SampleNorms(model, 2)
    loss = loss_of(lambda x: checkpoint(model, x, use_reentrant=False), inputs)
    assert len(storages) == 3
    assert all(storage.expired() for storage in storages)
    loss.backward()
    assert_close(sample_norms.means(), expected)


# -- processes


def one_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    model, inputs = small_cnn(), cnn_images()
    mine = inputs.split(N // 4)[2 * rank : 2 * rank + 2]
    found = []
    for method in ("hooks", "passes"):
        sample_norms = SampleNorms(model, 2, method=method)
        replica = DistributedDataParallel(model)
        with replica.no_sync():
            (loss_of(replica, mine[0]) / 2).backward()
        (loss_of(replica, mine[1]) / 2).backward()
        found.append([mean.item() for mean in sample_norms.means().values()])
        sample_norms.remove()
    torch.save((found, [p.grad for p in model.parameters()]), f"{folder}/found{rank}")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    in_two_processes(one_rank, tmp_path)
    torch.manual_seed(0)
    model, inputs = small_cnn(), cnn_images()
    expected = [mean.item() for mean in collected(model, inputs, 2).values()]
    for rank in (0, 1):
        found, gradients = torch.load(tmp_path / f"found{rank}")
        for means in found:
            assert means == pytest.approx(expected, rel=1e-5)
        for gradient, parameter in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(gradient, 2 * parameter.grad)  # two steps without zero_grad
