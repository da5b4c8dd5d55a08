"""``precision``: the rule, its place in a run's folder, and computing by it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import configuration
from programs import Programs
from torch import nn

from largebatch.machine.precision import Arithmetic, allow_tf32, choose_arithmetic
from largebatch.runs.folder import RunFolder
from largebatch.tracking.console import Console
from largebatch.training.set_up import set_up

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FP32, FP32_CL = Arithmetic("fp32", False), Arithmetic("fp32", True)
BF16, BF16_CL = Arithmetic("bf16", False), Arithmetic("bf16", True)
FP16, FP16_CL = Arithmetic("fp16", False), Arithmetic("fp16", True)
# A model with more than a million parameters whose passes take milliseconds.
RESNET = (
    "dataset=synthetic", "dataset.train_size=32", "dataset.test_size=8", "dataset.image_size=32", "model=resnet18",
    "batch_size=8", "tracker=none",
)  # fmt: skip


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 2500))


def test_without_a_gpu_auto_is_fp32_and_convolutions_are_channels_last() -> None:
    assert choose_arithmetic("auto", convolutional(), CPU) == FP32_CL
    assert choose_arithmetic("auto", nn.Linear(1000, 1001), CPU) == FP32


@pytest.mark.parametrize(
    ("capability", "chosen"), [((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")]
)
def test_on_a_gpu_auto_follows_the_compute_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], chosen: str
) -> None:
    """V100, T4, A100, H100."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_arithmetic("auto", convolutional(), CUDA) == Arithmetic(chosen, True)
    assert choose_arithmetic("auto", nn.Linear(1000, 1001), CUDA) == Arithmetic(chosen, False)
    assert choose_arithmetic("auto", nn.Conv2d(3, 8, 3), CUDA) == FP32


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_given_precision_is_used(precision: str) -> None:
    assert choose_arithmetic(precision, convolutional(), CPU) == Arithmetic(precision, True)
    assert choose_arithmetic(precision, nn.Linear(1000, 1001), CPU) == Arithmetic(precision, False)
    assert choose_arithmetic(precision, nn.Conv2d(3, 8, 3), CPU) == Arithmetic(precision, False)  # a small network


@pytest.mark.parametrize("way", [FP32, FP32_CL, BF16_CL, FP16_CL])
def test_a_run_keeps_the_arithmetic_of_its_first_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Arithmetic
) -> None:
    """Another choice, such as that of another machine, changes nothing before the first checkpoint either."""
    folder = RunFolder(tmp_path)
    with Console(folder.log, speaking=False) as console:
        monkeypatch.setattr("largebatch.training.set_up.choose_arithmetic", lambda *_: way)
        set_up(configuration(*RESNET), folder, 0, 1, CPU, console, None)
        monkeypatch.setattr("largebatch.training.set_up.choose_arithmetic", lambda *_: BF16)
        phase = set_up(configuration(*RESNET), folder, 0, 1, CPU, console, None)
    assert phase.run.arithmetic == way
    assert phase.training.loss_scale.enabled == (way == FP16_CL)
    layer = next(p for p in phase.training.model.parameters() if p.ndim == 4 and p.shape[1] > 1)
    assert layer.is_contiguous(memory_format=way.memory_format)


def test_all_arithmetics_agree_up_to_rounding() -> None:
    """Compare a loss and its gradient in half precision and channels last with plain fp32."""
    losses, gradients = {}, {}
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for way in (FP32, FP32_CL, BF16_CL, FP16_CL):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 900, 4))
        model = model.to(memory_format=way.memory_format)
        with way.autocast(CPU):
            loss = model(images.contiguous(memory_format=way.memory_format)).float().square().mean()
        loss.backward()
        losses[way], gradients[way] = loss.detach(), model[0].weight.grad
    torch.testing.assert_close(losses[FP32_CL], losses[FP32], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients[FP32_CL], gradients[FP32], rtol=1e-4, atol=1e-5)
    for way, tolerance in ((BF16_CL, 0.02), (FP16_CL, 0.002)):
        torch.testing.assert_close(losses[way], losses[FP32], rtol=tolerance, atol=0)
        assert losses[way] != losses[FP32]


def test_a_run_logs_and_stores_its_arithmetic(tmp_path: Path, process: Programs) -> None:
    run = process.train(tmp_path, *RESNET, "steps=2", "model.stem=cifar")
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["precision"], summary["channels_last"], summary["tf32"]) == ("fp32", True, False)
    assert "fp32, channels last, on cpu" in (run / "log.txt").read_text()
    assert json.loads((run / "status.json").read_text())["arithmetic"] == {"precision": "fp32", "channels_last": True}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_set_without_a_warning_and_can_be_read(allowed: bool) -> None:
    """torch.compile reads the settings through both of torch's interfaces."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        allow_tf32(allowed)
        assert (torch.get_float32_matmul_precision() == "high") == allowed
        assert (torch.backends.cuda.matmul.fp32_precision == "tf32") == allowed
        assert torch.backends.cudnn.allow_tf32 == allowed
        assert (torch.backends.cudnn.conv.fp32_precision == "tf32") == allowed
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
