"""The kernels of the fused step on CUDA compile to machine code (without a GPU) with the expected instructions."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from largebatch.optim import fused_cuda
from largebatch.optim.param_groups import LambNumbers, LarsNumbers, Part

triton = pytest.importorskip("triton")

pytestmark = pytest.mark.slow


class Recorder:
    """A stand-in for a kernel that records its launches."""

    def __init__(self, kernel: Any, launches: list[Any]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, enable_fp_fusion: bool, **kwargs: Any) -> None:
            options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
            self.launches.append((self.kernel, self.kernel.signature.bind(*args, **kwargs).arguments, options))

        return launch


@pytest.fixture(scope="module")
def triton_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An empty cache, so that the tests compile, but equal programs only once."""
    try:
        assert triton.knobs.nvidia.ptxas.path
    except RuntimeError as error:
        pytest.skip(f"triton has no assembler: {error}")
    return str(tmp_path_factory.mktemp("triton"))


def launches_of(dtype: torch.dtype, offset: int, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a step's launches for tensors ``offset`` elements after a 16-byte address; all variants for fp32 at 0."""
    from largebatch.optim import fused_cuda_kernels as kernels

    launches: list[Any] = []
    names = ("trust_ratios", "lars_norms", "lars_update", "lamb_moments", "lamb_update", "tvlars_coefficient")
    for name in names:
        monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name), launches))
    weights, gradients = ([torch.zeros(72, dtype=dtype)[offset : offset + 64]] for _ in range(2))
    state = [torch.zeros(64)]
    limit = float("inf")
    variants = [(0.9, False, "direction"), (0.0, False, "sum"), (0.9, True, "given")]
    for momentum, nesterov, form in variants if dtype == torch.float32 and offset == 0 else variants[:1]:
        numbers = LarsNumbers(
            0.1, 1e-3, momentum, 1e-4, 0.0, limit, limit, False, form == "sum", False, nesterov, False
        )
        given = torch.ones(1) if form == "given" else None
        buffers = state if momentum else []
        fused_cuda.lars(Part(weights, weights, gradients, (buffers,), [True], [True], given_norms=given), numbers)
    lamb_numbers = LambNumbers(0.1, 0.9, 0.999, 1e-6, 0.01, 0.1, 0.001, limit, limit, False)
    fused_cuda.lamb(Part(weights, weights, gradients, (state, state, []), [True], [True]), lamb_numbers)
    if dtype == torch.float32 and offset == 0:  # as captured by a CUDA graph
        on_device = torch.ones(())
        numbers = numbers._replace(lr=on_device, coefficient=on_device, larc=True)
        fused_cuda.lars(Part(weights, weights, gradients, (buffers,), [True], [True]), numbers)
        part = Part(weights, weights, gradients, (state, state, [on_device]), [True], [True])
        fused_cuda.lamb(part, lamb_numbers._replace(lr=on_device))
        fused_cuda.tvlars_coefficient(on_device, 1e-3, 0.1, 1.0, 0.0, 0.0)
    return launches


def compiled(kernel: Any, arguments: dict[str, Any], options: dict[str, Any], capability: int) -> dict[str, Any]:
    """Compile one launch as triton's launcher would; return the stages of the program by name."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = {torch.int64: "*i64", torch.float32: "*fp32"}[value.dtype]
            if not parameter.do_not_specialize_on_alignment:
                attributes[(index,)] = [["tt.divisibility", 16]]  # the alignment of torch's allocator
        else:
            signature[parameter.name] = {int: "i32", float: "fp32"}[type(value)]
    source = ASTSource(kernel, signature, constants, attributes)
    stages: dict[str, Any] = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm
    return stages


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="triton interprets, so it doesn't compile")
@pytest.mark.parametrize(
    ("dtype", "offset", "capability"),
    [
        (torch.float32, 0, 80), (torch.bfloat16, 0, 80), (torch.float32, 0, 90), (torch.bfloat16, 0, 90),
        (torch.float16, 0, 90), (torch.float32, 1, 90), (torch.bfloat16, 1, 90),
    ],
    ids=str,
)  # fmt: skip
def test_compiles(
    dtype: torch.dtype, offset: int, capability: int, triton_cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels compile to 16-byte accesses if addresses allow them, exact arithmetic and no atomics."""
    monkeypatch.setenv("TRITON_CACHE_DIR", triton_cache)
    wide = "v4.b32" if offset == 0 else None
    for kernel, arguments, options in launches_of(dtype, offset, monkeypatch):
        stages = compiled(kernel, arguments, options, capability)
        assert stages["cubin"]
        program = stages["ptx"]
        assert not re.search(r"\b(div\.(full|approx)|sqrt\.approx|rsqrt|rcp\.approx|atom|red)\.", program)
        assert ".local" not in program  # registers suffice
        if wide and "DTYPE" in arguments:
            assert len(re.findall(rf"ld\.global\.{wide}", program)) >= 2
            if kernel.__name__ != "lars_norms":
                assert re.search(rf"st\.global\.{wide}", program)
