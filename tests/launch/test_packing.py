"""Several runs at a time, with the real program: outcomes, stopping, shares of GPUs and cores, and output."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, Launch, environment, start
from in_terminal import Shown, in_terminal
from programs import Programs
from runs import finish, is_alive, parameters, timeless, worker_pid

from largebatch.launch.composition import compose_grid, store_defaults
from largebatch.launch.devices import worker_environment
from largebatch.launch.grid import noted_signals, runs_at_a_time
from largebatch.launch.plan import PlannedRun, make_plan
from largebatch.runs.folder import RESUMES, read_json
from largebatch.runs.metrics import read_rows

# Two runs at a time, some seconds each.
LONG = (
    "-m", *TINY, "steps=400", "eval_every=20", "checkpoint.every_steps=40", "optimizer=tvlars,lars",
    "cluster.parallel=2", "cluster.threads=1",
)  # fmt: skip


def until(condition: Callable[[], bool], launcher: subprocess.Popen[str], seconds: float = 100) -> None:
    """Wait for ``condition``; fail if ``launcher`` ends first."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert launcher.poll() is None, "the launcher ended first"
        assert time.monotonic() < deadline, "timeout"
        time.sleep(0.01)


def runs_in(folder: Path) -> dict[str, Path]:
    """Return the run folders by their optimizer and seed."""
    found = (folder / "runs").iterdir()
    return {re.sub(r".*-clf-(\w+)-.*-(s\d+)-.*", r"\1 \2", run.name): run for run in found}


def reached(folder: Path, step: int, runs: int) -> bool:
    """Return True if this number of runs have a metrics row at or after ``step``."""
    logs = [read_rows(path) for path in folder.glob("runs/*/metrics.jsonl")]
    return sum(any(row["step"] >= step for row in rows) for rows in logs) == runs


# Three runs, two at a time.


def test_one_of_three_runs_fails_and_the_others_finish(launch: Launch, tmp_path: Path) -> None:
    # Only the worker knows the classes of the images: one held-out image can't be of each class.
    cases = "cases=[{seed:0,steps:6},{seed:2,steps:9,dataset.val_fraction:0.01},{seed:1,steps:7}]"
    result = launch("-m", *TINY, cases, "cluster.parallel=2")
    assert result.returncode == 2
    assert re.search(r"error: \[2/3\] dataset.val_fraction=0.01: holding out 1 of 64", result.stderr)
    *_, one, two, three, _, following = result.stdout.splitlines()
    table = [one, two, three]
    assert [re.split(r"\s{2,}", line)[1] for line in table] == ["finished", "failed", "finished"]
    assert "  dataset.val_fraction=0.01: holding out 1 of 64" in two
    assert following == "next: largebatch report runs"
    assert [line.split()[:2] for line in table] == [
        ["seed=0", "steps=6"], ["seed=2", "steps=9"], ["seed=1", "steps=7"],
    ]  # fmt: skip
    assert "after step" not in result.stdout  # only the log has it

    runs = runs_in(tmp_path)
    assert sorted(runs) == ["lars s0", "lars s1"]
    cores = len(os.sched_getaffinity(0))
    for run, steps in (("lars s0", 6), ("lars s1", 7)):
        log = (runs[run] / "log.txt").read_text()
        assert re.findall(r"(\w+) after step (\d+)", log) == [("finished", str(steps))]
        assert log.count("64 training images") == 1
        summary = read_json(runs[run] / "summary.json")
        assert summary["threads"] == max(1, cores // 2)
        assert f"{100 * summary['test/accuracy']:.2f} %" in next(line for line in table if f"steps={steps}" in line)


# In a terminal; stopped; killed; beside another launcher.


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], Shown]:
    """Run ``LONG`` to its end. Return both runs and the output to a terminal of 200 columns."""
    folder = tmp_path_factory.mktemp("undisturbed")
    shown = in_terminal([sys.executable, str(ROOT / "launch.py"), *LONG], folder, columns=200)
    assert shown.code == 0, shown.sent
    return runs_in(folder), shown


def test_a_terminal_shows_the_progress_of_each_run(undisturbed: tuple[dict[str, Path], Shown]) -> None:
    runs, shown = undisturbed
    lines = [line.strip() for line in shown.lines]
    for number, optimizer in ((1, "tvlars"), (2, "lars")):
        run = runs[f"{optimizer} s0"]
        assert f"[{number}/2] runs/{run.name}  (optimizer={optimizer})" in lines
        moving = rf"{run.name[-8:]}\s+\[{number}/2\] optimizer={optimizer}\s+running\s+\d+\s+400\s+\S+ %\s+0:0\d:\d\d"
        assert any(re.match(moving, line) for line in lines), shown.sent
        accuracy = f"{100 * read_json(run / 'summary.json')['test/accuracy']:.2f} %"
        assert f"[{number}/2] finished, test accuracy {accuracy}" in lines
    assert any(re.fullmatch(r"0 of 2 done, 2 running, about 0:0\d:\d\d left", line) for line in lines)
    assert lines.index(f"[1/2] runs/{runs['tvlars s0'].name}  (optimizer=tvlars)") < next(
        i for i, line in enumerate(lines) if line.startswith("0 of 2 done, 2 running")
    )


def test_the_same_command_completes_runs_that_ctrl_c_stopped(
    tmp_path: Path, undisturbed: tuple[dict[str, Path], Shown]
) -> None:
    launcher = start(*LONG, cwd=tmp_path)
    until(lambda: reached(tmp_path, 20, runs=2), launcher)
    stopped = runs_in(tmp_path)
    workers = [worker_pid(run) for run in stopped.values()]
    launcher.send_signal(signal.SIGINT)
    out, errors = launcher.communicate(timeout=100)
    assert launcher.returncode == 130, out + errors
    assert not any(is_alive(worker) for worker in workers)
    assert all(f"{run.name}" in out.partition("the same command resumes")[2] for run in stopped.values())
    for run in stopped.values():
        status = read_json(run / "status.json")
        # The worker itself saved and wrote the state.
        assert (status["state"], status["message"]) == ("preempted", RESUMES)
        assert status["step"] < 400
        assert list(run.glob("checkpoints/*.pt"))

    finish(start(*LONG, cwd=tmp_path))
    whole, _ = undisturbed
    for name, run in stopped.items():
        assert "resumed after step" in (run / "log.txt").read_text()
        resumed, expected = parameters(run), parameters(whole[name])
        assert all(torch.equal(resumed[key], expected[key]) for key in expected)
        assert timeless(run) == timeless(whole[name])


def test_a_second_ctrl_c_stops_all_runs_within_their_step(tmp_path: Path) -> None:
    # A step takes a minute.
    slow = ("dataset.image_size=64", "dataset.train_size=4096", "batch_size=4096", "micro_batch=32", "seed=0,1")
    launcher = start("-m", *TINY, *slow, "cluster.parallel=2", "cluster.threads=1", cwd=tmp_path)
    until(lambda: len(workers_that_train(tmp_path)) == 2, launcher)
    workers = workers_that_train(tmp_path)
    launcher.send_signal(signal.SIGINT)
    assert launcher.stdout is not None
    while "Ctrl-C again stops at once" not in launcher.stdout.readline():
        assert launcher.poll() is None
    launcher.send_signal(signal.SIGINT)
    out, errors = launcher.communicate(timeout=100)
    assert launcher.returncode == 130, out + errors
    assert not any(is_alive(worker) for worker in workers)
    for run in runs_in(tmp_path).values():
        status = read_json(run / "status.json")
        assert (status["state"], status["message"]) == ("preempted", "stopped by Ctrl-C")
        assert not list(run.glob("checkpoints/*.pt"))  # stopping after the step would leave one


def test_signals_are_collected_instead_of_raised() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for background commands
    with noted_signals() as came:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGUSR2)
        assert came == [signal.SIGINT, signal.SIGUSR2]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def workers_that_train(folder: Path) -> list[int]:
    """Return the workers that handle SIGTERM, which they do from their first step."""
    workers = [read_json(path).get("pid") for path in folder.glob("runs/*/status.json")]
    caught = {pid: re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text()) for pid in workers if pid}
    return [pid for pid, mask in caught.items() if mask and int(mask[1], 16) >> (signal.SIGTERM - 1) & 1]


def test_a_run_of_another_launcher_is_left_alone(tmp_path: Path, process: Programs) -> None:
    other = start(*TINY, "steps=4000", "eval_every=1000", cwd=tmp_path)
    try:
        until(lambda: reached(tmp_path, 2, runs=1), other)
        (theirs,) = runs_in(tmp_path).values()
        before = read_json(theirs / "status.json")
        cases = ("cases=[{steps:4000},{seed:1,steps:4}]", "cluster.parallel=2")
        result = process.call("launch", "-m", *TINY, "eval_every=1000", *cases, cwd=tmp_path)
        assert result.code == 0, result.stderr
        assert f"error: [1/2] {theirs}: pid {before['pid']} on " in result.stderr
        assert "[2/2] finished" in result.stdout
        single = process.call("launch", *TINY, "steps=4000", "eval_every=1000", cwd=tmp_path)
        assert single.code == 2
        assert f"pid {before['pid']} on " in single.stderr
        assert other.poll() is None
        after = read_json(theirs / "status.json")
        assert all(after[key] == before[key] for key in ("state", "pid", "started", "queued"))
    finally:
        other.send_signal(signal.SIGINT)
        other.communicate(timeout=60)


# GPUs named by the environment; the tests end before a worker looks for them.


def planned(*overrides: str) -> list[PlannedRun]:
    store_defaults()
    return make_plan(compose_grid([*TINY, *overrides], ROOT / "conf"))


@pytest.mark.parametrize(
    ("overrides", "at_a_time"),
    [
        (["seed=range(0,9)"], 1),  # all four GPUs each
        (["seed=range(0,9)", "cluster.processes=2"], 2),
        (["seed=range(0,9)", "cluster.processes=3", "batch_size=18"], 1),
        (["seed=range(0,9)", "cluster.processes=1"], 4),
        (["seed=range(0,9)", "cluster.processes=1", "cluster.parallel=3"], 3),
        (["seed=range(0,3)", "cluster.processes=1"], 3),
        (["seed=range(0,9)", "cluster.processes=1", "cluster.devices=[1,3]"], 2),
        (["cases=[{seed:0,cluster.devices:[[1]]},{seed:1,cluster.devices:[[2]]}]"], 2),
        (["seed=range(0,9)", "cluster.device=cpu"], 1),
        (["seed=range(0,9)", "cluster.device=cpu", "cluster.parallel=5"], 5),
        (["cases=[{seed:[1,2],cluster.device:cpu},{seed:[3,4],cluster.processes:2}]"], 2),
    ],
)
@pytest.mark.usefixtures("four_gpus")
def test_runs_at_a_time(overrides: list[str], at_a_time: int) -> None:
    assert runs_at_a_time(planned(*overrides)) == at_a_time


def test_cores_are_divided_by_runs_and_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    (run,) = planned("cluster.device=cpu", "cluster.processes=2")
    cores = len(os.sched_getaffinity(0))
    for parallel in (1, 2, 1000):
        assert worker_environment(run.config.cluster, ["4", "7"], parallel) == {
            "CUDA_VISIBLE_DEVICES": "4,7", "OMP_NUM_THREADS": str(max(1, cores // (2 * parallel))),
            "OMP_WAIT_POLICY": "PASSIVE", "MALLOC_MMAP_THRESHOLD_": str(2**28), "MALLOC_TRIM_THRESHOLD_": str(2**30),
        }  # fmt: skip
    run.config.cluster.threads = 3
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    found = worker_environment(run.config.cluster, [], 1000)
    assert (found["OMP_NUM_THREADS"], found["MALLOC_TRIM_THRESHOLD_"]) == ("3", "131072")


@pytest.mark.parametrize(
    ("overrides", "at_once"),
    [
        (["seed=range(0,5)", "cluster.processes=2"], ["0,1", "2,3"]),
        (["seed=range(0,5)", "cluster.processes=1", "cluster.devices=[3,0]"], ["0", "3"]),
        (["cases=[{seed:0,cluster.devices:[[2]]},{seed:1,cluster.devices:[[1]]}]"], ["1", "2"]),
        (["cases=[{seed:0,cluster.device:cpu},{seed:1,cluster.device:cuda}]", "cluster.parallel=2"], ["", "0,1,2,3"]),
    ],
)
@pytest.mark.usefixtures("four_gpus")
def test_parallel_runs_share_no_gpu(tmp_path: Path, overrides: list[str], at_once: list[str]) -> None:
    launcher = subprocess.Popen(
        [sys.executable, str(ROOT / "launch.py"), "-m", *TINY, *overrides],
        cwd=tmp_path, env={**environment(), "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        until(lambda: len(gpus_of_children(launcher.pid)) == 2, launcher)
        assert sorted(gpus_of_children(launcher.pid)) == at_once
    finally:
        launcher.kill()  # its workers end with it
        launcher.wait()


def gpus_of_children(parent: int) -> list[str]:
    """Return CUDA_VISIBLE_DEVICES of a launcher's workers."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the process has ended
            of = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if of == parent and b"largebatch.training.worker" in (process / "cmdline").read_bytes():
                variables = (process / "environ").read_text().split("\0")
                found += [line.partition("=")[2] for line in variables if line.startswith("CUDA_VISIBLE_DEVICES=")]
    return found
