"""The fused step on CUDA, against formulas in float64 written number by number.

Without a GPU the kernels' arithmetic runs in triton's interpreter. Triton reads TRITON_INTERPRET when it is imported,
which another test may already have done in this process. ``test_arithmetic`` therefore runs the tests that need the
kernels (``check_*``) in a process of their own, once interpreted and, if there is a GPU, once on it.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from triton_checks import needs_triton, run_checks

from largebatch import triton_kernels
from largebatch.optim import fused_cuda
from largebatch.optim.param_groups import LambNumbers, LarsNumbers, Part
from largebatch.optim.tvlars import phi

INFINITY = float("inf")
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
LARS = LarsNumbers(
    lr=0.3, coefficient=0.02, momentum=0.9, weight_decay=0.05, eps=0.0, norm_clip=INFINITY, max_ratio=INFINITY,
    larc=False, sum_of_norms=False, lr_in_momentum=False, nesterov=False, maximize=False,
)  # fmt: skip
LAMB = LambNumbers(
    lr=0.02, beta1=0.9, beta2=0.99, eps=1e-6, weight_decay=0.05, correction1=1.0, correction2=1.0, norm_clip=INFINITY,
    max_ratio=INFINITY, maximize=False,
)  # fmt: skip
SHAPES = ((), (7,), (5, 3), (0,), (1, 1), (2, 2051))  # the last is a chunk and a piece
FLAGS = ((True, True), (False, False), (True, False), (True, True), (False, True), (True, True))  # adapted, decayed


@needs_triton
@pytest.mark.parametrize("where", [pytest.param("interpreter", marks=pytest.mark.slow), "gpu"])
def test_arithmetic(where: str) -> None:
    run_checks(__file__, where)


# -- the reference, in Python's numbers


def norm(values: list[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values))


def layer_ratio(
    coefficient: float, numerator: float, denominator: float, eps: float, clips: tuple[float, float]
) -> float:
    if numerator == 0 or denominator == 0:
        return 1.0
    return coefficient * min(numerator, clips[0]) / (min(denominator, clips[1]) + eps)


class Layer(NamedTuple):
    """A tensor's values; ``state`` has the buffer of LARS, or both moments of LAMB."""

    weight: list[float]
    gradient: list[float]
    state: list[list[float]]
    adapted: bool
    decayed: bool


def lars_reference(layer: Layer, n: LarsNumbers, given: float | None) -> list[float]:
    """Update ``layer`` in place and return norms and ratio."""
    w, decay = layer.weight, n.weight_decay if layer.decayed else 0.0
    d = [(-g if n.maximize else g) + decay * x for g, x in zip(layer.gradient, w, strict=True)]
    weight_norm, gradient_norm = norm(w), norm(layer.gradient)
    measured = norm(d) if given is None else given
    denominator = (gradient_norm if given is None else given) + decay * weight_norm if n.sum_of_norms else measured
    ratio = 1.0
    if layer.adapted:
        ratio = layer_ratio(n.coefficient, weight_norm, denominator, n.eps, (n.norm_clip, n.norm_clip))
        ratio = min(ratio / n.lr if n.larc else ratio, n.max_ratio)
    for i in range(len(w)):
        scaled = move = ratio * d[i] * (n.lr if n.lr_in_momentum else 1)
        if n.momentum:
            layer.state[0][i] = n.momentum * layer.state[0][i] + scaled
            move = scaled + n.momentum * layer.state[0][i] if n.nesterov else layer.state[0][i]
        w[i] -= (1 if n.lr_in_momentum else n.lr) * move
    return [weight_norm, gradient_norm, ratio]


def lamb_reference(layer: Layer, n: LambNumbers) -> list[float]:
    w, (m, v), u = layer.weight, layer.state, []
    weight_norm, gradient_norm = norm(w), norm(layer.gradient)
    for i, g in enumerate(layer.gradient):
        m[i] = n.beta1 * m[i] + (1 - n.beta1) * (-g if n.maximize else g)
        v[i] = n.beta2 * v[i] + (1 - n.beta2) * g * g
        u.append(m[i] / n.correction1 / (math.sqrt(v[i] / n.correction2) + n.eps))
        u[i] += n.weight_decay * w[i] if layer.decayed else 0.0
    ratio = 1.0
    if layer.adapted:
        ratio = min(layer_ratio(1.0, weight_norm, norm(u), 0.0, (n.norm_clip, INFINITY)), n.max_ratio)
    for i in range(len(w)):
        w[i] -= n.lr * ratio * u[i]
    return [weight_norm, gradient_norm, ratio]


# -- both side by side


class Setting:
    """Tensors on the device and their reference, updated together."""

    def __init__(
        self,
        weights: list[Tensor],
        gradients: list[Tensor],
        states: int,
        flags: tuple[tuple[bool, bool], ...] = FLAGS,
        initial: float = 0.0,
    ) -> None:
        self.weights, self.gradients = weights, gradients
        self.state = [
            [torch.full_like(weight, initial, dtype=torch.float32) for weight in weights] for _ in range(states)
        ]
        self.adapted, self.decayed = [one for one, _ in flags], [one for _, one in flags]
        self.tables: dict[Any, Any] = {}
        self.layers = [
            Layer(numbers(weight), [], [[initial] * weight.numel() for _ in range(states)], *flag)
            for weight, flag in zip(weights, flags, strict=True)
        ]

    def step(
        self, n: LarsNumbers | LambNumbers, given: Tensor | None = None, launched: Any = None, steps: Any = ()
    ) -> tuple[Tensor, list[list[float]]]:
        """Return the statistics [3, adapted tensors] of the kernels and of the reference.

        ``launched`` are the kernels' numbers if they differ from the reference's, ``steps`` the tensors' step counts.
        """
        launched = launched or n
        layers = [layer._replace(gradient=numbers(g)) for layer, g in zip(self.layers, self.gradients, strict=True)]
        if isinstance(n, LambNumbers):
            stats = fused_cuda.lamb(self.part((*self.state, list(steps))), launched)
            rows = [lamb_reference(layer, n) for layer in layers]
        else:
            stats = fused_cuda.lars(self.part((self.state[0] if n.momentum else [],), given), launched)
            norms = iter([] if given is None else given.tolist())
            takes = [given is not None and layer.adapted for layer in layers]
            rows = [
                lars_reference(layer, n, next(norms) if take else None)
                for layer, take in zip(layers, takes, strict=True)
            ]
        return stats, [row for row, layer in zip(rows, layers, strict=True) if layer.adapted]

    def part(self, state: tuple[list[Tensor], ...], given: Tensor | None = None) -> Part:
        lists = self.weights, self.gradients, state, self.adapted, self.decayed
        return Part(self.weights, *lists, given_norms=given, tables=self.tables)

    def compare(self, stats: Tensor, rows: list[list[float]], rtol: float = 1e-6, weight_rtol: float = 1e-6) -> None:
        """Compare up to ``rtol`` of each tensor's largest value."""
        assert stats.dtype == torch.float32
        assert stats.shape == (3, len(rows))
        torch.testing.assert_close(stats.cpu().double().T, torch.tensor(rows).double().view(-1, 3), rtol=rtol, atol=0)
        for index, layer in enumerate(self.layers):
            agree(self.weights[index], layer.weight, weight_rtol)
            for state, expected in zip(self.state, layer.state, strict=True):
                agree(state[index], expected, rtol)


def numbers(tensor: Tensor) -> list[float]:
    return tensor.detach().double().flatten().tolist()


def agree(tensor: Tensor, expected: list[float], rtol: float) -> None:
    largest = max(map(abs, expected), default=0.0)
    reference = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(tensor.cpu().double().flatten(), reference, rtol=0, atol=rtol * largest)


def random(
    shapes: tuple[tuple[int, ...], ...], seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(shape, generator=generator)).to(DEVICE, dtype) for shape in shapes]


# -- checks


@pytest.fixture(autouse=True)
def quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call a kernel's own helpers directly.

    The interpreter would prepare triton's language for each call, as the kernel's launch has done: two thirds of its
    time.
    """
    if DEVICE == "cpu":
        from triton.runtime.interpreter import InterpretedFunction

        prepared = InterpretedFunction.__call__

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            own = self.fn.__module__ == "largebatch.optim.fused_cuda_kernels"
            return self.rewrite()(*args, **kwargs) if own else prepared(self, *args, **kwargs)

        monkeypatch.setattr(InterpretedFunction, "__call__", call)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("denominator", ["direction", "sum", "given", "sum of given"])
@pytest.mark.parametrize("limited", [False, True])
def check_lars_with_every_combination_of_options(momentum: float, denominator: str, limited: bool) -> None:
    shapes, flags = ((7,), (5, 3)), ((False, True), (True, True))
    given = torch.tensor([2.0], device=DEVICE) if "given" in denominator else None
    limits = {"eps": 0.01, "norm_clip": 1.5, "max_ratio": 0.03} if limited else {}
    nesterovs = [False, True] if momentum else [False]
    switches = itertools.product([False, True], [False, True], nesterovs, [False, True])
    for larc, lr_in_momentum, nesterov, maximize in switches:
        options = {"larc": larc, "lr_in_momentum": lr_in_momentum, "nesterov": nesterov, "maximize": maximize}
        n = LARS._replace(momentum=momentum, sum_of_norms="sum" in denominator, **options, **limits)
        setting = Setting(random(shapes, 1), random(shapes, 2), 1, flags, initial=0.25)
        setting.compare(*setting.step(n, given))


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("corrected", [False, True])
def check_lamb_with_every_combination_of_options(limited: bool, maximize: bool, corrected: bool) -> None:
    limits = {"eps": 0.01, "norm_clip": 1.5, "max_ratio": 0.6} if limited else {}
    corrections = {"correction1": 1 - 0.9**3, "correction2": 1 - 0.99**3} if corrected else {}
    setting = Setting(random(SHAPES, 1), random(SHAPES, 2), 2, initial=0.25)
    setting.compare(*setting.step(LAMB._replace(maximize=maximize, **limits, **corrections)))


@pytest.mark.parametrize("options", [{}, {"larc": True, "max_ratio": 0.5}, {"lr_in_momentum": True}], ids=str)
def check_lars_reads_lr_and_coefficient_from_the_device(options: dict[str, Any]) -> None:
    """The tensors are elements of larger tensors, aligned to 4 bytes only."""
    setting, n = Setting(random(SHAPES, 1), random(SHAPES, 2), 1), LARS._replace(**options)
    values = torch.zeros(3, device=DEVICE)
    launched = n._replace(lr=values[1], coefficient=values[2])
    for lr, coefficient in ((0.3, 0.02), (0.1, 0.05)):
        values.copy_(torch.tensor([0.0, lr, coefficient]))
        setting.compare(*setting.step(n._replace(lr=lr, coefficient=coefficient), launched=launched))


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def check_lamb_reads_lr_and_step_counts_from_the_device(beta1: float) -> None:
    setting = Setting(random(SHAPES, 1), random(SHAPES, 2), 2)
    lr, counts = torch.zeros((), device=DEVICE), [torch.zeros((), device=DEVICE) for _ in SHAPES]
    n = LAMB._replace(beta1=beta1, beta2=0.999)
    for step in (1, 2, 60, 600, 10**6):  # of 1 - beta2^t, some by the series and some by the exponential
        lr.fill_(0.01 * step**-0.5)
        torch._foreach_add_(counts, step - counts[0].item())
        corrected = n._replace(lr=lr.item(), correction1=1 - beta1**step, correction2=1 - n.beta2**step)
        setting.compare(*setting.step(corrected, launched=n._replace(lr=lr), steps=counts))


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def check_tvlars_coefficient_advances_the_step(alpha: float) -> None:
    options = {"lmbda": 0.5, "alpha": alpha, "delay": 4, "gamma_min": 0.01}
    for before in (0, 7, 10**4):  # the last overflows fp64's exponential
        step = torch.tensor(float(before), device=DEVICE)
        found = fused_cuda.tvlars_coefficient(step, 0.02, **options)
        assert step.item() == before + 1
        assert found.item() == pytest.approx(0.02 * phi(before + 1, **options), rel=1e-6)
    step = torch.tensor(0.0, device=DEVICE)
    found = fused_cuda.tvlars_coefficient(step, 1.0, 1.0, 0.0, 1000, 0.0)  # the fraction is larger than any float
    assert found.item() == pytest.approx(1 / torch.finfo(torch.float32).tiny)


@pytest.mark.parametrize("n", [LARS, LAMB], ids=["lars", "lamb"])
def check_25_steps(n: LarsNumbers | LambNumbers) -> None:
    """Errors stay below 1e-6, and no stale table of addresses is used: each gradient is a new tensor."""
    shapes = ((13, 11), (7,))
    setting = Setting(random(shapes, 1), [], 2, FLAGS[:2])
    for step in range(1, 26):
        setting.gradients = random(shapes, 100 + step)
        if isinstance(n, LambNumbers):
            n = n._replace(correction1=1 - n.beta1**step, correction2=1 - n.beta2**step)
        result = setting.step(n)
    setting.compare(*result)


@pytest.mark.parametrize("n", [LARS, LAMB], ids=["lars", "lamb"])
def check_large_tensors(n: LarsNumbers | LambNumbers) -> None:
    shapes = ((300 if n is LARS else 60, 1025), (4096,), (3, 5))
    setting = Setting(random(shapes, 1), random(shapes, 2), 2, ((True, True), (False, True), (True, False)))
    setting.compare(*setting.step(n))


@pytest.mark.parametrize("constant", [False, True])
def check_norms_of_many_elements(constant: bool) -> None:
    """Norms are right to 2e-7, also if all roundings go the same way, and equal from run to run."""
    shape = (512, 512, 9) if DEVICE == "cuda" else (32, 512, 9)  # the interpreter takes 8 ms a chunk
    weights, gradients = random((shape,), 1), random((shape,), 2)
    if constant:
        weights, gradients = [torch.full(shape, 0.1, device=DEVICE)], [torch.full(shape, 1 / 3, device=DEVICE)]
    expected = [norm(numbers(weights[0])), norm(numbers(gradients[0]))]
    no_update = LARS._replace(lr=0.0, momentum=0.0)  # so that the second run finds the same weights
    stats = [fused_cuda.lars(Part(weights, weights, gradients, ([],), [True], [False]), no_update) for _ in range(2)]
    assert stats[0][:2, 0].tolist() == pytest.approx(expected, rel=2e-7)
    assert torch.equal(*stats)


@pytest.mark.parametrize("n", [LARS, LAMB], ids=["lars", "lamb"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def check_half_types(n: LarsNumbers | LambNumbers, dtype: torch.dtype) -> None:
    """Arithmetic and state are fp32; the weight is rounded once (by an ulp: the interpreter truncates bf16)."""
    setting = Setting(random(SHAPES, 1, dtype=dtype), random(SHAPES, 2, dtype=dtype), 2)
    setting.compare(*setting.step(n), weight_rtol=torch.finfo(dtype).eps)
    assert {weight.dtype for weight in setting.weights} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [LARS, LAMB], ids=["lars", "lamb"])
def check_views_at_any_address(n: LarsNumbers | LambNumbers, dtype: torch.dtype) -> None:
    """Views into a bucket are aligned to their elements only; the elements between the views don't change."""
    sizes = (1, 7, 4099, 4096)
    buckets = [torch.full((sum(sizes) + len(sizes) + 1,), 5.0, device=DEVICE, dtype=dtype) for _ in range(2)]
    views: list[list[Tensor]] = []
    between = torch.ones(len(buckets[0]), dtype=torch.bool, device=DEVICE)
    for seed, bucket in enumerate(buckets):
        starts = [1 + index + sum(sizes[:index]) for index in range(len(sizes))]
        views.append([bucket[start : start + size] for start, size in zip(starts, sizes, strict=True)])
        for view, start, values in zip(
            views[-1], starts, random(tuple((size,) for size in sizes), seed, dtype=dtype), strict=True
        ):
            view.copy_(values)
            between[start : start + len(view)] = False
    assert any(view.data_ptr() % 4 for view in views[0]) == (dtype != torch.float32)
    setting = Setting(*views, 2, FLAGS[:4])
    setting.compare(*setting.step(n), weight_rtol=max(1e-6, 0 if dtype == torch.float32 else torch.finfo(dtype).eps))
    for bucket in buckets:
        assert torch.all(bucket[between] == 5.0)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
@pytest.mark.parametrize("n", [LARS, LAMB], ids=["lars", "lamb"])
def check_tiny_and_huge_gradients(n: LarsNumbers | LambNumbers, scale: float) -> None:
    shapes, flags = ((5, 3), (2, 2051)), ((True, False), (True, True))
    setting = Setting(random(shapes, 1), random(shapes, 2, scale), 2, flags)
    setting.compare(*setting.step(n))


@pytest.mark.parametrize("n", [LARS, LAMB._replace(eps=1e-6)], ids=["lars", "lamb"])
@pytest.mark.parametrize("zero", ["weights", "gradients"])
def check_zero_tensors_have_ratio_1(n: LarsNumbers | LambNumbers, zero: str) -> None:
    setting = Setting(random(SHAPES, 1), random(SHAPES, 2), 2, ((True, False),) * len(SHAPES))
    for tensor, layer in zip(getattr(setting, zero), setting.layers, strict=True):
        tensor.zero_()
        layer.weight[:] = [0.0] * len(layer.weight) if zero == "weights" else layer.weight
    stats, rows = setting.step(n)
    setting.compare(stats, rows)
    assert stats[2].tolist() == [1.0] * len(SHAPES)


@pytest.mark.parametrize("options", [{}, {"max_ratio": 0.5}, {"larc": True}, {"larc": True, "max_ratio": 2.0}], ids=str)
def check_larc_and_max_ratio_act_on_the_ratio_1_of_a_zero_weight(options: dict[str, Any]) -> None:
    setting = Setting([torch.zeros(5, 3, device=DEVICE)], random(((5, 3),), 2), 1, ((True, True),))
    setting.compare(*setting.step(LARS._replace(**options)))


def check_given_norms_belong_to_adapted_tensors_in_order() -> None:
    setting = Setting(random(SHAPES, 1), random(SHAPES, 2), 1)
    setting.compare(*setting.step(LARS, torch.tensor([0.5, 2.0, 1.0, 30.0], device=DEVICE)))


def check_lamb_without_eps_sums_nothing_beyond_the_end() -> None:
    """The masked rest of a tensor's last chunk would be 0 / 0."""
    setting = Setting(random(SHAPES, 1), random(SHAPES, 2), 2)
    setting.compare(*setting.step(LAMB._replace(eps=0.0)))


@pytest.mark.parametrize("n", [LARS, LAMB], ids=["lars", "lamb"])
@pytest.mark.parametrize("limited", [False, True])
def check_a_nan_spreads_over_its_layer_and_no_other(n: LarsNumbers | LambNumbers, limited: bool) -> None:
    if limited:
        n = n._replace(norm_clip=1.0, max_ratio=0.5)
    setting = Setting(random(SHAPES, 1), random(SHAPES, 2), 2)
    others = [layer.weight for layer in setting.layers]
    setting.gradients[-1].view(-1)[17] = math.nan
    stats, _ = setting.step(n)
    assert setting.weights[-1].isnan().all()
    assert stats[1:, -1].isnan().all()
    assert stats[:, :-1].isfinite().all()
    for weight, expected in zip(setting.weights[:-1], others[:-1], strict=True):
        agree(weight, expected, 1e-6)


@pytest.mark.parametrize("limited", [False, True])
def check_infinity_is_not_hidden(limited: bool) -> None:
    n = LARS._replace(norm_clip=1.0, max_ratio=0.5) if limited else LARS
    weights, gradients = random(((5, 3), (2, 3)), 1), random(((5, 3), (2, 3)), 2)
    for gradient in gradients:
        gradient[0, 0] = INFINITY
    buffers = [torch.zeros_like(weight) for weight in weights]
    stats = fused_cuda.lars(Part(weights, weights, gradients, (buffers,), [True, False], [True, True]), n)
    assert stats[1, 0] == INFINITY
    for weight in weights:
        assert not weight[0, 0].isfinite()


def check_an_infinite_weight_without_decay_stays_infinite() -> None:
    weights, gradients = [torch.tensor([INFINITY, 1.0], device=DEVICE)], [torch.ones(2, device=DEVICE)]
    part = Part(weights, weights, gradients, ([],), [False], [False])
    fused_cuda.lars(part, LARS._replace(momentum=0.0, lr=0.5))
    assert weights[0].tolist() == [INFINITY, 0.5]


def check_tables_follow_what_changes() -> None:
    """A kept table is replaced if addresses, flags or sizes differ from the last step's."""
    setting = Setting(random(SHAPES, 1), random(SHAPES, 2), 1)
    setting.step(LARS)
    kept = setting.tables["table"]
    setting.step(LARS)
    assert setting.tables["table"] is kept
    setting.gradients = random(SHAPES, 3)
    setting.compare(*setting.step(LARS))
    assert setting.tables["table"].chunks is kept.chunks
    other = Setting(random(((8,), (3, 3)), 4), random(((8,), (3, 3)), 5), 1, ((False, True), (True, True)))
    other.tables = setting.tables
    other.compare(*other.step(LARS))
    flipped = Setting(other.weights, other.gradients, 1, ((True, True), (False, False)))
    flipped.tables, flipped.state = other.tables, [[state.zero_() for state in other.state[0]]]
    flipped.compare(*flipped.step(LARS))


@pytest.mark.parametrize("adapted", [False, True])
def check_lists_that_leave_a_kernel_nothing_to_do(adapted: bool) -> None:
    """Lists with no adapted tensor, or with empty tensors only."""
    shapes = ((0,), (0, 3)) if adapted else ((4,), (2, 2))
    for n in (LARS, LAMB):
        setting = Setting(random(shapes, 1), random(shapes, 2), 2, ((adapted, True),) * 2)
        setting.compare(*setting.step(n))


def check_other_layouts_than_contiguous() -> None:
    """The kernels visit dense tensors in the order of their memory, which gradients and state share."""
    weights, gradients = (
        [one.to(memory_format=torch.channels_last) for one in random(((2, 3, 4, 5),), s)] for s in (1, 2)
    )
    setting = Setting(weights, gradients, 1, ((True, True),))
    setting.compare(*setting.step(LARS))


def check_elements_beyond_two_to_the_31() -> None:
    """Offsets above 32 bits: the last chunk of a tensor, at an address as if the chunks before it existed."""
    from largebatch.optim import fused_cuda_kernels as kernels

    first, left = 2**31 + kernels.CHUNK.value, 100
    weights, gradients = random(((left,), (left,)), 1)
    expected = numbers(weights - 0.5 * gradients)
    chunks = torch.tensor([[0, first, left, -1, 0]], device=DEVICE)
    pointers = torch.tensor([one.data_ptr() - 4 * first for one in (weights, gradients)], device=DEVICE)
    partials, stats = torch.empty(3, 1, device=DEVICE), torch.empty(3, 1, device=DEVICE)
    types = {"DTYPE": kernels.DTYPES[torch.float32], "ALIGN": 4, "GRADIENT_ALIGN": 4, **kernels.OPTIONS}
    kernels.lars_norms[(1,)](chunks, pointers, partials, 1, 1, 0.0, 1.0, **types)
    assert partials[:2, 0].sqrt().tolist() == pytest.approx(
        [norm(numbers(weights)), norm(numbers(gradients))], rel=1e-6
    )
    kernels.lars_update[(1,)](
        chunks, pointers, stats, 1, 0, 0.0, 1.0, 0.0, 1.0, 0.5, MOMENTUM=False, NESTEROV=False, **types
    )  # fmt: skip
    agree(weights, expected, 1e-6)


# -- conditions


def test_no_import_before_a_kernel_s_first_use_imports_triton() -> None:
    code = "import sys, largebatch.data, largebatch.optim.fused_cuda; assert 'triton' not in sys.modules, 'triton'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_why_not_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "largebatch.optim.fused_cuda_kernels", raising=False)
    triton_kernels.imported.cache_clear()
    triton_kernels.why_not.cache_clear()
    assert "triton can't be imported" in fused_cuda.why_not([torch.ones(2)])
    triton_kernels.imported.cache_clear()
    triton_kernels.why_not.cache_clear()


@needs_triton
def test_why_not_names_the_reason() -> None:
    assert "fp32, bf16 or fp16" in fused_cuda.why_not([torch.ones(2, dtype=torch.float64)])
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    assert fused_cuda.why_not([torch.ones(2)]) == ("" if interpreting else "triton requires an NVIDIA device")


def test_kernels_that_fail_their_trial_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """They raise or don't change the weights: a warning names the reason, and the unfused step is taken."""

    def broken(*arguments: Any) -> Tensor:
        raise ValueError("no such\ninstruction")

    for failing, reason in ((broken, "ValueError: no such instruction"), (lambda *arguments: None, "wrong results")):
        monkeypatch.setattr(fused_cuda, "lars", failing)
        monkeypatch.setattr(fused_cuda, "lamb", failing)
        with pytest.warns(UserWarning, match=f"fused step isn't used: .*{reason}"):
            assert reason in fused_cuda._failed_trial.__wrapped__(torch.device("cpu"), torch.float32)


def check_why_not_finds_nothing_wrong() -> None:
    assert fused_cuda.why_not([torch.ones(2, device=DEVICE)]) == ""
