"""Stopping a run and resuming it exactly, with the real program."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from conftest import TINY, start
from programs import Programs
from runs import finish, is_alive, parameters, the_run, timeless, worker_pid

from largebatch.runs.metrics import read_rows

# Long enough for a stop in the middle: 60 steps, with a checkpoint every 5.
LONG = (
    *TINY,
    "batch_size=18",  # divisible by three processes, for which the order of a sum matters
    "steps=60",
    "checkpoint.every_steps=5",
    "tracker.layers_every=3",
    "optimizer=tvlars",
    "cluster.threads=1",
)


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Wait until the metrics of the run in ``folder`` have reached ``step``."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be stopped"
        if any(row["step"] >= step for path in folder.glob("runs/*/metrics.jsonl") for row in read_rows(path)):
            return
        time.sleep(0.01)
    raise AssertionError(f"the run didn't reach step {step}")


def stop_run(run: Path, process: subprocess.Popen[str], how: str) -> tuple[str, str]:
    """Kill the worker, kill its launcher ("everything"), or press Ctrl-C; return the launcher's output and errors.

    The worker has ended when this returns.
    """
    worker = worker_pid(run)
    if how == "worker":
        os.kill(worker, signal.SIGKILL)
    elif how == "everything":
        process.kill()
    else:
        process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=100)
    deadline = time.monotonic() + 20
    while is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(worker)
    return out, errors


@pytest.fixture(
    scope="module", params=[1, pytest.param(3, marks=pytest.mark.slow)], ids=["one process", "three processes"]
)
def undisturbed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, process: Programs
) -> tuple[Path, list[str]]:
    """Uninterrupted run, and its command line."""
    command = [*LONG, f"cluster.processes={request.param}", "model.norm=batch"]
    return process.train(tmp_path_factory.mktemp("runs"), *command), command


@pytest.mark.parametrize("how", ["worker", "everything", "interrupt"])
def test_a_stopped_run_resumes_exactly(
    tmp_path: Path, how: str, process: Programs, undisturbed: tuple[Path, list[str]]
) -> None:
    """The program itself resumes after Ctrl-C; otherwise its workers alone."""
    whole, command = undisturbed
    first = start(*command, cwd=tmp_path)
    wait_for_step(tmp_path, 20, first)
    stopped = the_run(tmp_path)
    out, errors = stop_run(stopped, first, how)
    if how == "worker":
        assert first.returncode == 1
        assert "same command resumes" in errors
    if how == "interrupt":
        assert first.returncode == 130
        assert json.loads((stopped / "status.json").read_text())["state"] == "preempted", out
    assert not (stopped / "summary.json").exists()

    if how == "interrupt":
        assert "resumed after step" in finish(start(*command, cwd=tmp_path))
    else:
        assert process.train(tmp_path, *command) == stopped
        assert "resumed after step" in (stopped / "log.txt").read_text()
    assert_same_bits(stopped, whole)


def assert_same_bits(run: Path, whole: Path) -> None:
    resumed, expected = parameters(run), parameters(whole)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert timeless(run) == timeless(whole)
    assert (
        pyarrow.parquet.read_table(run / "layers.parquet").to_pylist()
        == pyarrow.parquet.read_table(whole / "layers.parquet").to_pylist()
    )


@pytest.mark.parametrize("moved", ["runs folder", "run folder"])
def test_a_moved_run_resumes_exactly(
    tmp_path: Path, process: Programs, undisturbed: tuple[Path, list[str]], moved: str
) -> None:
    """The plan finds a run by its name in ``runs_dir``; a worker trains in a folder of any name."""
    whole, command = undisturbed
    process.kill(tmp_path, 20, *command)
    place = tmp_path / "another disk" / "old runs"
    place.parent.mkdir()
    (tmp_path / "runs").rename(place)
    run = place / whole.name
    if moved == "runs folder":
        assert process.train(tmp_path, *command, f"runs_dir='{place}'") == run
    else:
        if "cluster.processes=1" not in command:
            pytest.skip("a worker alone is one process")
        run = run.rename(place / "renamed")
        ended = process.call("worker", str(run), cwd=tmp_path)
        assert ended.code == 0, ended.output
    assert "resumed after step" in (run / "log.txt").read_text()
    assert_same_bits(run, whole)
