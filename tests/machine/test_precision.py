"""``precision=auto``: measuring the fastest arithmetic, caching it, and computing in it."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Launch, configuration, environment
from torch import nn

from largebatch.machine.precision import Arithmetic, _fastest, choose_arithmetic, measure
from largebatch.runs.folder import RunFolder
from largebatch.tracking.console import Console
from largebatch.training.set_up import set_up

CPU = torch.device("cpu")
FP32, FP32_CL = Arithmetic("fp32", False), Arithmetic("fp32", True)
BF16, BF16_CL = Arithmetic("bf16", False), Arithmetic("bf16", True)
IMAGE = (3, 8, 8)
# A model with more than a million parameters whose passes take milliseconds.
RESNET = (
    "dataset=synthetic", "dataset.train_size=32", "dataset.test_size=8", "dataset.image_size=32", "model=resnet18",
    "batch_size=8", "tracker=none",
)  # fmt: skip


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 2500)
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LARGEBATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_measuring_leaves_the_model_unchanged() -> None:
    model = small_network().eval()
    before = copy.deepcopy(model.state_dict())
    seconds = measure(model, [FP32, BF16_CL], IMAGE, 16, CPU)
    assert set(seconds) == {FP32, BF16_CL}
    assert all(min(times) > 0 for times in seconds.values())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.is_contiguous() for p in model.parameters())
    assert not model.training


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({FP32: 1.0, FP32_CL: 0.99, BF16: 0.95, BF16_CL: 0.95}, FP32),  # equally fast apart from noise
        ({FP32: 1.0, FP32_CL: 0.9, BF16: 1.0, BF16_CL: 0.85}, FP32_CL),
        ({FP32: 1.0, FP32_CL: 0.9, BF16: 0.6, BF16_CL: 0.4}, BF16_CL),
        ({FP32: 1.0, FP32_CL: 1.1, BF16: 0.6, BF16_CL: 0.6}, BF16),
        ({BF16: 1.0, BF16_CL: 0.5}, BF16_CL),
    ],
)
def test_the_fastest_arithmetic_is_chosen_beyond_noise(seconds: dict[Arithmetic, float], chosen: Arithmetic) -> None:
    assert _fastest({way: [1.5 * best, best] for way, best in seconds.items()}) == chosen


def test_a_small_network_is_not_measured(cache: Path) -> None:
    model = nn.Conv2d(3, 8, 3)
    for precision, expected in (("auto", FP32), ("fp32", FP32), ("bf16", BF16)):
        config = configuration("precision=" + precision)
        assert choose_arithmetic(config, model, IMAGE, 8, CPU) == (expected, "")
    assert not cache.exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_given_precision_is_used(cache: Path, precision: str) -> None:
    chosen, how = choose_arithmetic(configuration("precision=" + precision), small_network(), IMAGE, 8, CPU)
    assert (chosen.precision, how) == (precision, "measured now")


def test_a_measurement_is_reused_for_the_same_model_and_batch(cache: Path) -> None:
    def choose(seed: int) -> tuple[Arithmetic, str]:
        return choose_arithmetic(configuration(f"seed={seed}"), small_network(), IMAGE, 8, CPU)

    first = choose(0)
    assert first[1] == "measured now"
    assert choose(1) == (first[0], "measured before, on a machine of this kind")
    other_batch, how = choose_arithmetic(configuration(), small_network(), IMAGE, 16, CPU)
    assert how == "measured now"
    assert len(list(cache.glob("arithmetic-*.json"))) == 2
    assert other_batch.precision in ("fp32", "bf16")


def test_a_disturbed_measurement_is_reused_for_an_hour(cache: Path) -> None:
    choose_arithmetic(configuration(), small_network(), IMAGE, 8, CPU)
    (path,) = cache.glob("arithmetic-*.json")
    kept = json.loads(path.read_text())
    for calm, age, how in ((False, 60, "before"), (False, 4000, "now"), (True, 4000, "before")):
        path.write_text(json.dumps(kept | {"calm": calm}))
        os.utime(path, (time.time() - age,) * 2)
        assert how in choose_arithmetic(configuration(), small_network(), IMAGE, 8, CPU)[1]


@pytest.mark.parametrize(
    "content", ['{"arit', "[]", "{}", '{"calm": true, "arithmetic": {"precision": 3}}', '{"arithmetic": null}']
)
def test_a_damaged_measurement_is_replaced(cache: Path, content: str) -> None:
    chosen, _ = choose_arithmetic(configuration("precision=fp32"), small_network(), IMAGE, 8, CPU)
    (path,) = cache.glob("arithmetic-*.json")
    path.write_text(content)
    again, how = choose_arithmetic(configuration("precision=fp32"), small_network(), IMAGE, 8, CPU)
    assert (again.precision, how) == (chosen.precision, "measured now")
    assert json.loads(path.read_text())["arithmetic"]["precision"] == "fp32"


def test_arithmetic_is_measured_without_a_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LARGEBATCH_CACHE", str(tmp_path / "file" / "cache"))
    _, how = choose_arithmetic(configuration(), small_network(), IMAGE, 8, CPU)
    assert how.startswith("measured now; not cached: ")


@pytest.mark.parametrize("way", [FP32, FP32_CL, BF16_CL])
def test_a_run_keeps_the_arithmetic_of_its_first_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Arithmetic
) -> None:
    """Another choice, such as that of another machine, changes nothing before the first checkpoint either."""
    folder = RunFolder(tmp_path)
    with Console(folder.log, speaking=False) as console:
        monkeypatch.setattr("largebatch.training.set_up.choose_arithmetic", lambda *_: (way, ""))
        set_up(configuration(*RESNET), folder, 0, 1, CPU, console, None)
        monkeypatch.setattr("largebatch.training.set_up.choose_arithmetic", lambda *_: (BF16, ""))
        phase = set_up(configuration(*RESNET), folder, 0, 1, CPU, console, None)
    assert phase.run.arithmetic == way
    layer = next(p for p in phase.training.model.parameters() if p.ndim == 4 and p.shape[1] > 1)
    assert layer.is_contiguous(memory_format=way.memory_format)


def test_all_arithmetics_agree_up_to_rounding(tmp_path: Path) -> None:
    """Compare a loss and its gradient in bf16 and channels last with plain fp32."""
    losses, gradients = {}, {}
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for way in (FP32, FP32_CL, BF16_CL):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 900, 4))
        model = model.to(memory_format=way.memory_format)
        with way.autocast(CPU):
            loss = model(images.contiguous(memory_format=way.memory_format)).float().square().mean()
        loss.backward()
        losses[way], gradients[way] = loss.detach(), model[0].weight.grad
    torch.testing.assert_close(losses[FP32_CL], losses[FP32], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients[FP32_CL], gradients[FP32], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses[BF16_CL], losses[FP32], rtol=0.02, atol=0)
    assert losses[BF16_CL] != losses[FP32]


def test_a_run_logs_and_stores_the_chosen_arithmetic(launch: Launch, tmp_path: Path) -> None:
    result = launch(*RESNET, "steps=2", "model.stem=cifar")
    assert result.returncode == 0, result.stderr
    (run,) = (tmp_path / "runs").iterdir()
    summary = json.loads((run / "summary.json").read_text())
    chosen = Arithmetic(summary["precision"], summary["channels_last"])
    assert f"{chosen}: the fastest for resnet18 here" in (run / "log.txt").read_text()
    assert Arithmetic(**json.loads((run / "status.json").read_text())["arithmetic"]) == chosen
    saved = torch.load(run / "checkpoints" / "step-00000002.pt", weights_only=True)
    assert saved["micro_batch"] == 8


CHOOSE = """
import os, sys
from conftest import configuration
os.environ["LARGEBATCH_CACHE"] = sys.argv[1]  # conftest sets another folder
from largebatch.machine.precision import choose_arithmetic
from test_precision import CPU, IMAGE, small_network
print(*choose_arithmetic(configuration(), small_network(), IMAGE, 8, CPU), sep=": ")
"""


def test_processes_that_start_together_measure_once(cache: Path) -> None:
    folders = (ROOT / "src", ROOT / "tests", ROOT / "tests" / "machine")
    variables = environment() | {"PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHOOSE, str(cache)]
    processes = [subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = sorted(process.communicate(timeout=100)[0].strip().split(": ") for process in processes)
    assert sorted(how for _, how in printed) == ["measured before, on a machine of this kind", "measured now"]
    assert len({way for way, _ in printed}) == 1
