"""The kernels of augmentation on CUDA compile to machine code (without a GPU) with exact arithmetic."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
import torch
import ttir
from test_views import draws_for, some_images

from largebatch.data import augment_cpu
from largebatch.data.augment_cuda import _VIEW_CHUNK, _VIEW_WARPS, _taps

triton = pytest.importorskip("triton")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="triton interprets, so it doesn't compile"),
]

TYPES = {
    "pixels": "*u8", "indices": "*i64", "table": "*i32", "whole": "*i32", "real": "*fp32", "taps": "*i32",
    "mean": "*fp32", "std": "*fp32", "scratch": "*u8", "out": "*fp32", "stride": "i32", "padding": "i32",
}  # fmt: skip


def compiled(kernel: Any, constants: dict[str, Any], warps: int, capability: int) -> Any:
    """Compile the kernel to machine code as triton's launcher would; return the stages of the program by name."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {p.name: "constexpr" if p.name in constants else TYPES[p.name] for p in kernel.params}
    places = {(p.num,): p.name for p in kernel.params}
    values = {place: constants[name] for place, name in places.items() if name in constants}
    aligned = {place: [["tt.divisibility", 16]] for place, name in places.items() if name in ("scratch", "out")}
    options = {"num_warps": warps, "enable_fp_fusion": False, "num_stages": 1}
    source, target = ASTSource(kernel, signature, values, aligned), GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options).asm


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("kernel", "side"), [("crops", 32), ("views", 32), ("views", 224)])
def test_compiles(
    kernel: str, side: int, channels: int, capability: int, tmp_path_factory: Any, monkeypatch: Any
) -> None:
    from largebatch.data import augment_cuda_kernels as kernels

    try:
        assert triton.knobs.nvidia.ptxas.path
    except RuntimeError as error:
        pytest.skip(f"triton has no assembler: {error}")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    warps, chunk = (4, 1024) if kernel == "crops" else (_VIEW_WARPS[side > 32], _VIEW_CHUNK[side > 32])
    constants = {"SIDE": side, "CHANNELS": channels, "LAST": True, "CHUNK": chunk, "LINES": 32 * warps}
    stages = compiled(getattr(kernels, kernel), constants, warps, capability)
    assert stages["cubin"]
    text = stages["ptx"]
    assert not re.search(r"\b(div\.(full|approx)|sqrt\.approx|rsqrt|rcp\.approx|fma\.rn\.f)", text)
    assert "ld.global.nc" not in text  # pixels in scratch change while the kernel runs
    assert (len(re.findall(r"bar\.sync", text)) >= 4) == (kernel == "views")
    assert ".local" not in text  # registers suffice
    assert re.search(r"st\.global\.v[24]", text)


@pytest.mark.parametrize(("side", "channels", "last"), [(9, 3, True), (8, 1, False), (33, 3, False)])
def test_compiled_views_equal_cpp(side: int, channels: int, last: bool, tmp_path: Any, monkeypatch: Any) -> None:
    """Run the compiled program on images of several chunks, and with more lines than are blurred at once.

    Triton drops a variable from a loop if the loop's body only gives it the value that another variable began with.
    """
    from largebatch.data import augment_cuda_kernels as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    n, stride = 6, channels * side**2
    images, indices = some_images(n, channels, side), torch.arange(n).flip(0)
    draws = draws_for(n, side, 1, blur=[1, 0.8], solarize=[0, 0.3])
    mean, std = torch.tensor([0.1, 0.5, 0.9])[:channels], torch.tensor([0.2, 0.25, 0.3])[:channels]
    expected = augment_cpu.augmented(images, indices, draws, mean, std, channels_last=last)
    result, scratch = torch.empty_like(expected), torch.empty(n * 2 * stride, dtype=torch.uint8)
    tensors = (
        images,
        indices,
        draws.whole,
        draws.real,
        _taps(side, draws.interpolation, torch.device("cpu")),
        mean,
        std,
        scratch,
    )
    constants = {"SIDE": side, "CHANNELS": channels, "LAST": last, "CHUNK": 64, "LINES": 32}
    program = compiled(kernels.views, constants, 1, 90)["ttir"]
    in_order_of_memory = result.permute(0, 2, 3, 1) if last else result
    ttir.run(program, n, [*(tensor.numpy() for tensor in tensors), in_order_of_memory.numpy(), stride])
    assert torch.equal(result, expected)
