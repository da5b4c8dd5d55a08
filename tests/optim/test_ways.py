"""The fused, foreach and one-by-one step: number of operations, choice and fallback."""

import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from largebatch.optim import CLARS, LAMB, LARS, TVLARS, fused_cpu

OPTIMIZERS = {
    "lars": lambda params, **options: LARS(params, lr=0.5, weight_decay=1e-2, **options),
    "tvlars": lambda params, **options: TVLARS(params, lr=0.5, weight_decay=1e-2, lmbda=0.1, **options),
    "clars": lambda params, **options: CLARS(params, lr=0.5, weight_decay=1e-2, **options),
    "lamb": lambda params, **options: LAMB(params, lr=0.01, **options),
}
each = pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)


class Operations(TorchDispatchMode):
    """Records the names of torch's operations, except views."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def parameters(layers):
    """Return weights and biases with gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [shape for _ in range(layers) for shape in ((8, 4, 3, 3), (8,))]
    made = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return made


def step(optimizer):
    if isinstance(optimizer, CLARS):
        optimizer.set_sample_norms({layer: torch.tensor(3.0) for layer in optimizer.layers})
    optimizer.step()


@each
@pytest.mark.parametrize("way", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("options", [{}, {"adapt_1d": True, "decay_1d": True, "norm_clip": 1.0, "max_ratio": 0.5}])
def test_the_number_of_operations_is_small_and_independent_of_the_number_of_layers(build, way, options):
    """No operation reads a value, because the host would wait for the device. Includes ``layer_stats``."""
    counted = []
    for layers in (2, 30):
        optimizer = build(parameters(layers), **way, **options)
        step(optimizer)
        with Operations() as operations:
            step(optimizer)
            optimizer.layer_stats()
        assert "_local_scalar_dense" not in operations.names
        counted.append(operations.names)
    assert counted[0] == counted[1]
    assert len(counted[0]) <= 30


@each
def test_the_fused_step_is_the_default(build):
    def operations(**way):
        optimizer = build(parameters(2), **way)
        step(optimizer)
        with Operations() as counted:
            step(optimizer)
        return counted.names

    assert operations() == operations(fused=True)
    assert "_foreach_norm" not in operations()
    assert "_foreach_norm" in operations(fused=False)
    assert "_foreach_norm" in operations(foreach=True)
    assert operations(fused=False) == operations(foreach=True) != operations(foreach=False)


@each
@pytest.mark.parametrize(
    ("unfit", "reason"),
    [
        (lambda: torch.nn.Parameter(torch.ones(3, 2, dtype=torch.float64)), "requires fp32 parameters"),
        (lambda: torch.nn.Parameter(torch.ones(6, 4)[:, ::2]), "memory layouts"),
    ],
    ids=["fp64", "gaps"],
)
def test_fused_true_warns_once_if_the_fused_step_is_impossible(build, unfit, reason):
    weight = unfit()
    weight.grad = torch.ones_like(weight)
    optimizer = build([weight], fused=True)
    with pytest.warns(UserWarning, match=f"takes the unfused step instead: .*{reason}"):
        step(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(optimizer)  # no second warning
        step(build([weight]))  # no warning without fused=True
    assert not torch.equal(weight, torch.ones_like(weight))


@each
def test_gaps_in_memory_do_not_change_the_step(build):
    """Cases: a view with gaps, a transposed weight, and a gradient with another layout than its weight."""
    generator = torch.Generator().manual_seed(0)
    start, gradient = torch.randn(6, 4, generator=generator), torch.randn(6, 4, generator=generator)
    expected = torch.nn.Parameter(start.clone())
    room = torch.nn.Parameter(torch.zeros(6, 8)[:, ::2].copy_(start))
    transposed = torch.nn.Parameter(start.t().contiguous().t())
    mixed = torch.nn.Parameter(start.clone())
    for weight in (expected, room, transposed, mixed):
        optimizer = build([weight])
        for _ in range(3):
            weight.grad = gradient.t().contiguous().t() if weight is mixed else torch.empty_like(weight).copy_(gradient)
            step(optimizer)
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-7)


@each
def test_state_may_have_another_layout_than_the_weights(build):
    """A model is moved to channels_last after its first steps."""
    results = []
    for later in (torch.contiguous_format, torch.channels_last):
        module = torch.nn.Conv2d(4, 8, 3, bias=False)
        torch.nn.init.constant_(module.weight, 0.5)
        optimizer = build(module.parameters())
        for number in range(4):
            if number == 2:
                module.to(memory_format=later)
            gradient = torch.arange(288.0).view(8, 4, 3, 3).sin()
            module.weight.grad = torch.empty_like(module.weight).copy_(gradient)
            step(optimizer)
        results.append(module.weight.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)


@each
def test_the_result_does_not_depend_on_the_number_of_threads(build):
    """Results are equal bit for bit, because sums are added in one order."""
    results = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            weight = torch.nn.Parameter(torch.randn(300, 1025, generator=torch.Generator().manual_seed(0)))
            weight.grad = torch.randn(300, 1025, generator=torch.Generator().manual_seed(1))
            optimizer = build([weight], fused=True)
            step(optimizer)
            step(optimizer)
            results.append(weight.detach())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_fused_norms_are_right_if_fp32_squares_vanish_or_overflow(size):
    weight = torch.nn.Parameter(torch.full((4, 4), 2.0))
    weight.grad = torch.full((4, 4), size)
    optimizer = LARS([weight], lr=0.0, fused=True)
    optimizer.step()
    stats = optimizer.layer_stats()
    assert stats["gradient_norm"].item() == pytest.approx(4 * size, rel=1e-6)
    assert stats["trust_ratio"].item() == pytest.approx(1e-3 * 8 / (4 * size), rel=1e-6)


# -- compiling the step on CPU

TRY = """
import torch, warnings
from largebatch.optim import LARS, fused_cpu
weight = torch.nn.Parameter(torch.ones(4, 3))
weight.grad = torch.ones(4, 3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    LARS([weight], lr=0.1, fused=True).step()
print([str(warning.message) for warning in caught])
print(fused_cpu.why_not([weight]))
"""


def compile_in(folder, **environment):
    ours = {**os.environ, "LARGEBATCH_CACHE": str(folder), **environment}
    command = [sys.executable, "-c", TRY]
    return subprocess.Popen(command, env=ours, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_concurrent_processes_compile_one_library(tmp_path):
    for process in [compile_in(tmp_path / "cache") for _ in range(3)]:
        printed, errors = process.communicate(timeout=120)
        assert (process.returncode, printed) == (0, "[]\n\n"), errors
    (library,) = (path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock")
    made = library.stat().st_mtime_ns
    assert compile_in(tmp_path / "cache").wait(timeout=120) == 0
    assert library.stat().st_mtime_ns == made


def test_without_a_working_compiler_the_unfused_step_is_taken(compiler_fault):
    weight = torch.nn.Parameter(torch.ones(4, 3))
    weight.grad = torch.ones(4, 3)
    with pytest.warns(UserWarning, match=f"takes the unfused step instead: .*{re.escape(compiler_fault)}"):
        LARS([weight], lr=0.1, fused=True).step()
    assert not torch.equal(weight, torch.ones(4, 3))
    assert compiler_fault in fused_cpu.why_not([weight])


def test_this_machine_has_the_fused_step():
    """Otherwise the tests of the fused step would test its fallback."""
    assert fused_cpu.why_not([torch.ones(2, 2)]) == ""
