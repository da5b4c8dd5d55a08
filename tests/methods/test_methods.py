"""Own methods and those of libraries: exact resume, and the same in two processes and with accumulation.

``make methods`` runs these tests. ``METHODS=lion,soap`` limits them to some presets.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from conftest import ROOT, TINY, configuration, environment
from runs import parameters, timeless
from train_folders import create, train_folder

from largebatch.config.schema import Config
from largebatch.results.evaluate import evaluate
from largebatch.results.run import load_run
from largebatch.runs.folder import RunFolder
from largebatch.runs.metrics import read_rows

# With learning rates at which rounding differences don't grow over the steps.
METHODS = {
    "muon": 0.001, "adamuon": 0.001, "merit": 0.01, "rotational_lion": 0.01, "lion": 1e-4, "novograd": 0.001,
    "adan": 0.001, "radam": 0.001, "adafactor": 0.01, "soap": 0.003, "shampoo": 0.001, "kron": 0.001,
    "schedulefree_sgd": 0.1, "schedulefree_adamw": 0.0025,
}  # fmt: skip
CHOSEN = os.environ.get("METHODS", ",".join(METHODS)).split(",")
SCHEDULE_FREE = [method for method in CHOSEN if method.startswith("schedulefree")]
# Rounding chooses the basis of directions without a gradient (SOAP) and the signs of elements near 0 (AdaMuon).
DIVISIBLE = [method for method in CHOSEN if method not in ("soap", "adamuon")]
STEPS, SAVED = 12, 6
each = pytest.mark.parametrize("method", CHOSEN)
divisible = pytest.mark.parametrize("method", DIVISIBLE)


def config_of(method: str, *overrides: str) -> Config:
    return configuration(
        *TINY, f"optimizer={method}", f"optimizer.lr={METHODS[method]}", f"steps={STEPS}",
        f"checkpoint.every_steps={SAVED}", "tracker.layers_every=3", *overrides,
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    """Return an undisturbed run of each method."""
    parent = tmp_path_factory.mktemp("whole")
    folders = {method: create(parent / method, config_of(method)) for method in CHOSEN}
    for folder in folders.values():
        train_folder(folder)
    return folders


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run of each method in two processes, which train all methods one after the other."""
    parent = tmp_path_factory.mktemp("two")
    for method in DIVISIBLE:
        create(parent / method, config_of(method, "cluster.processes=2"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        str(ROOT / "tests" / "tools" / "train_folders.py"),
        *(str(parent / m) for m in DIVISIBLE),
    ]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen(command, env=environment() | group | {"RANK": str(rank)}) for rank in range(2)]
    assert [rank.wait(timeout=280) for rank in ranks] == [0, 0]
    return parent


def checkpoint(run: Path, step: int = STEPS) -> dict[str, Any]:
    saved: dict[str, Any] = torch.load(run / "checkpoints" / f"step-{step:08d}.pt", weights_only=True)
    return saved


def layers_of(run: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(run / "layers.parquet").to_pylist()
    return rows


def resumed(whole: RunFolder, folder: Path, step: int) -> RunFolder:
    """Resume a copy of a run after the checkpoint at ``step``."""
    shutil.copytree(whole.path, folder)
    for path in (folder / "checkpoints").glob("*.pt"):
        if path.name > f"step-{step:08d}.pt":
            path.unlink()
    again = RunFolder(folder)
    train_folder(again)
    assert f"resumed after step {step} of" in again.log.read_text()
    return again


def assert_same_bits(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same_bits(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            assert_same_bits(mine, theirs)
    else:
        assert one == other


@each
def test_a_method_has_meaningful_layer_rows(runs: dict[str, RunFolder], method: str) -> None:
    """SOAP's first step only measures; a step changes a weight by less than the weight itself."""
    assert runs[method].read_status()["state"] == "finished"
    rows = [row for row in layers_of(runs[method].path) if row["dimensions"] > 1]
    assert {row["step"] for row in rows} == {1, 2, 3, 5, 6, 9, 10, 12}
    for row in rows:
        assert row["weight_norm"] > 0
        assert row["gradient_norm"] > 0
        assert row["update_ratio"] == 0 if (method, row["step"]) == ("soap", 1) else 0 < row["update_ratio"] < 1


@each
def test_a_method_resumes_bit_for_bit(runs: dict[str, RunFolder], method: str, tmp_path: Path) -> None:
    again = resumed(runs[method], tmp_path / method, SAVED)
    expected, found = checkpoint(runs[method].path), checkpoint(again.path)
    for key in ("model", "optimizer", "averaged"):
        assert_same_bits(found.get(key), expected.get(key))
    assert timeless(again.path) == timeless(runs[method].path)
    assert layers_of(again.path) == layers_of(runs[method].path)


def difference(one: Path, other: Path) -> float:
    a, b = parameters(one), parameters(other)
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@divisible
def test_a_method_trains_the_same_with_accumulation(runs: dict[str, RunFolder], method: str, tmp_path: Path) -> None:
    divided = create(tmp_path / method, config_of(method, "micro_batch=4"))
    train_folder(divided)
    assert difference(runs[method].path, divided.path) < 1e-5


@divisible
def test_a_method_trains_the_same_in_two_processes(
    runs: dict[str, RunFolder], method: str, in_two_processes: Path
) -> None:
    assert difference(runs[method].path, in_two_processes / method) < 1e-5


# -- Schedule-Free


@pytest.mark.parametrize("method", SCHEDULE_FREE)
def test_schedule_free_saves_and_evaluates_the_average(runs: dict[str, RunFolder], method: str) -> None:
    """Training weights are ``beta * average + (1 - beta) * z`` (arXiv 2405.15682, equation 2)."""
    saved = checkpoint(runs[method].path)
    groups, beta = saved["optimizer"]["param_groups"], 0.9
    order = [number for group in groups for number in group["params"]]
    names = sorted(saved["model"], key=lambda name: saved["model"][name].ndim <= 1)  # as the parameter groups
    for name, number in zip(names, order, strict=True):
        training, average, z = saved["model"][name], saved["averaged"][name], saved["optimizer"]["state"][number]["z"]
        torch.testing.assert_close(training, beta * average + (1 - beta) * z, msg=name)
        assert not torch.equal(training, average)
    again = evaluate(load_run(runs[method].path), (), torch.device("cpu"), print)
    logged = [row for row in read_rows(runs[method].metrics) if "test/loss" in row][-1]
    assert again["test/loss"] == logged["test/loss"]


@pytest.mark.parametrize("method", SCHEDULE_FREE[:1])
def test_a_probe_of_schedule_free_resumes_bit_for_bit(method: str, tmp_path: Path) -> None:
    """The probe takes the average, also after a resume in its middle."""
    bt = ("mode=bt", "mode.projector=[8,8]", "mode.eval_epochs=2", "mode.eval_batch_size=16", "optimizer.lr=0.1")
    whole = create(tmp_path / "whole", config_of(method, *bt))
    train_folder(whole)
    steps = whole.read_status()["step"]
    assert steps > STEPS + SAVED
    again = resumed(whole, tmp_path / "again", STEPS + SAVED)
    for key in ("model", "optimizer", "probe"):
        assert_same_bits(checkpoint(again.path, steps)[key], checkpoint(whole.path, steps)[key])
    assert timeless(again.path) == timeless(whole.path)
