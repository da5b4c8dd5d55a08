"""The real program on a GPU; skipped without a GPU."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import ROOT, configuration
from torch import Tensor

from largebatch.machine.precision import Arithmetic
from largebatch.runs.folder import RunFolder
from largebatch.tracking.console import Console
from largebatch.training.graphs import Graphs
from largebatch.training.phase import Batches, MainPhase
from largebatch.training.set_up import set_up

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic products, before the first product

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

RUN = (
    "dataset=synthetic", "dataset.train_size=512", "dataset.test_size=64", "model=resnet18", "batch_size=128",
    "tracker=none", "steps=6", "optimizer.lr=0.1", "cluster.processes=1",
)  # fmt: skip


def train(folder: Path, *overrides: str) -> tuple[dict[str, torch.Tensor], str]:
    """Return the final parameters of a run, and its log."""
    folder.mkdir()
    command = [sys.executable, str(ROOT / "launch.py"), *RUN, *overrides]
    result = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (run,) = (folder / "runs").iterdir()
    newest = sorted((run / "checkpoints").iterdir())[-1]
    state = torch.load(newest, map_location="cpu", weights_only=True)
    return state["model"], (run / "log.txt").read_text()


def test_the_location_of_the_pixels_does_not_change_the_result(tmp_path: Path) -> None:
    common = ("deterministic=true", "precision=fp32")
    on_device, log = train(tmp_path / "device", *common, "dataset.location=device")
    in_host_memory, other_log = train(tmp_path / "host", *common, "dataset.location=host")
    assert "on the device" in log
    assert "in host memory" in other_log
    assert all(torch.equal(tensor, in_host_memory[name]) for name, tensor in on_device.items())


@pytest.mark.parametrize("division", ["micro_batch=null", "micro_batch=32"])
def test_compiled_passes_train_the_same_up_to_rounding(tmp_path: Path, division: str) -> None:
    eager, _ = train(tmp_path / "eager", "precision=fp32", "compile=false", division)
    compiled, log = train(tmp_path / "compiled", "precision=fp32", "compile=true", division)
    assert " compiled\n" in log
    assert "CUDA graph of the pass: recorded" in log
    for name, tensor in eager.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-2, atol=1e-3)


def test_the_exact_loss_of_barlow_twins_is_the_same_in_micro_batches(tmp_path: Path) -> None:
    common = ("mode=bt", "mode.knn_every=1", "mode.eval_epochs=2", "model=smallcnn", "precision=fp32", "optimizer=sgd")
    whole, _ = train(tmp_path / "whole", *common)
    parted, _ = train(tmp_path / "parted", *common, "micro_batch=32")
    for name, tensor in whole.items():
        torch.testing.assert_close(parted[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["auto", "fp16"])
def test_a_given_precision_trains_with_micro_batch_auto(tmp_path: Path, precision: str) -> None:
    _, log = train(tmp_path / "run", "micro_batch=auto", f"precision={precision}", "profile=true")
    has_bf16 = torch.cuda.get_device_capability() >= (8, 0)
    chosen = "bf16" if precision == "auto" and has_bf16 else "fp16"
    assert f"{chosen}, channels last, on {torch.cuda.get_device_name()}" in log
    assert "finished after step 6 of 6" in log


# -- CUDA graphs, in this process

SMALL = ("batch_size=64", "dataset.train_size=160", "optimizer=lars", "optimizer.lr=0.1")
CLF = ("model=smallcnn", "model.norm=batch", *SMALL)
BT = (*CLF, "mode=bt", "mode.projector=[64,48,32]")
PARTS = "micro_batch=16"


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def begun(folder: Path, *overrides: str) -> MainPhase:
    """Return a run at step 0 on the GPU, with its arithmetic fixed."""
    folder.mkdir()
    config = configuration("dataset=synthetic", "tracker=none", "steps=9", "compile=false", *overrides)
    run = RunFolder(folder)
    run.update_status(arithmetic=asdict(Arithmetic("bf16", channels_last=True)))
    return set_up(config, run, 0, 1, torch.device("cuda", 0), Console(run.log, speaking=False), None)


def step(phase: MainPhase, batches: Batches) -> None:
    phase.training.step += 1
    assert phase.gradient(batches) is not None
    phase.update(None)


def results(phase: MainPhase, steps: int) -> dict[str, Tensor]:
    """Return the totals of these steps, and the model after them."""
    batches = phase.batches()
    for _ in range(steps):
        step(phase, batches)
    return {**phase.training.model.state_dict(), "totals": phase.training.unlogged.totals}


def add_dropout(model: torch.nn.Module) -> None:
    network = next(module for module in model.modules() if hasattr(module, "gelu2"))
    network.gelu2 = torch.nn.Sequential(torch.nn.GELU(), torch.nn.Dropout(0.3))


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize(
    ("overrides", "dropout"),
    [
        (CLF, True),
        ((*CLF, PARTS), True),
        ((*CLF, "dataset.last_batch=keep"), False),
        (("model=resnet18", "model.stem=cifar", *SMALL, PARTS), False),
        (BT, True),
        ((*BT, PARTS), True),
        ((*BT, "mode.exact=false"), False),
    ],
    ids=str,
)
def test_a_replayed_pass_has_the_bits_of_an_eager_pass(
    tmp_path: Path, overrides: tuple[str, ...], dropout: bool
) -> None:
    """The same kernels run, with the same random numbers and the same running statistics."""
    eager = begun(tmp_path / "eager", *overrides, "cuda_graphs=false")
    graphs = begun(tmp_path / "graphs", *overrides)
    if dropout:
        add_dropout(eager.training.model)
        add_dropout(graphs.training.model)
    expected, got = results(eager, 4), results(graphs, 4)
    assert graphs.training.graphs.off == ""
    assert eager.training.graphs.off == "cuda_graphs=false"
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


@pytest.mark.usefixtures("deterministic")
def test_a_resumed_run_replays_the_bits_of_an_unbroken_run(tmp_path: Path) -> None:
    whole = begun(tmp_path / "whole", *CLF)
    expected = results(whole, 5)
    first = begun(tmp_path / "first", *CLF)
    results(first, 2)
    second = begun(tmp_path / "second", *CLF)
    second.training.load(copy.deepcopy(first.training.state(0.0)) | {"step": 2}, rank=0)
    got = results(second, 3)
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


@pytest.mark.parametrize("overrides", [CLF, (*CLF, PARTS), BT, (*BT, PARTS)])
def test_a_step_does_not_wait_for_the_gpu(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    phase = begun(tmp_path / "run", *overrides)
    batches = phase.batches()
    for _ in range(2):
        step(phase, batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            step(phase, batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Layer(torch.nn.Linear):
    """A layer that does in each pass what a graph can't repeat."""

    def __init__(self, kind: str) -> None:
        super().__init__(8, 8, device="cuda")
        self.kind, self.calls = kind, 0

    def add_gradient(self, values: Tensor) -> tuple[Tensor]:
        self.calls += 1
        loss = self(values).sum()
        if self.kind == "reads":
            loss = loss / float(loss)
        elif self.kind == "draws on the host":
            loss = loss * torch.rand(())
        elif self.kind == "counts its passes":
            loss = loss * self.calls
        elif self.kind == "waits":
            torch.cuda.synchronize()
        loss.backward()
        return (loss.detach(),)


@pytest.mark.parametrize("kind", ["reads", "draws on the host", "counts its passes", "waits"])
def test_a_pass_that_a_graph_cannot_repeat_stays_eager(kind: str) -> None:
    lines: list[str] = []
    layer, stream = Layer(kind), torch.cuda.current_stream()
    values = torch.ones(4, 8, device="cuda")
    graphs = Graphs(layer, values.device, repeated=False, off="", say=lines.append)
    for _ in range(2):
        layer.zero_grad()
        graphs(layer.add_gradient, values)
        assert layer.weight.grad is not None
    assert lines == [f"no CUDA graphs: {graphs.off}"]
    assert torch.cuda.current_stream() == stream
    layer.kind = "is fine again"
    other = Graphs(layer, values.device, repeated=False, off="", say=lines.append)
    layer.zero_grad()
    other(layer.add_gradient, values)
    assert not other.off
