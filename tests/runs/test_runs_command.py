"""``largebatch status``, ``logs`` and ``cancel``, and the estimates of a dry run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY, environment, start
from in_terminal import in_terminal
from programs import Ended, Programs

from largebatch.runs.folder import RunFolder, read_json
from largebatch.runs.metrics import newest

Command = Callable[..., Ended]
LARGEBATCH = [sys.executable, "-m", "largebatch.cli"]
# A run of more than ten seconds.
LONG = (*TINY, "steps=4000", "eval_every=100", "checkpoint.every_steps=1000000")


@pytest.fixture
def largebatch(process: Programs, tmp_path: Path) -> Command:
    """Return a function that calls ``largebatch`` in the folder of ``runs/``."""
    return lambda *arguments: process.call("largebatch", *arguments, cwd=tmp_path)


def a_run(folder: Path, name: str, log: str = "", **status: object) -> RunFolder:
    """Make a run's folder with this log and status."""
    run = RunFolder(folder / "runs" / name)
    run.path.mkdir(parents=True)
    run.update_status(**{"state": "finished", "message": "", "cluster": "local", **status})
    run.log.write_text(log)
    return run


def test_status_lists_states_and_last_log_lines(tmp_path: Path, largebatch: Command) -> None:
    a_run(tmp_path, "digits-a-11111111", state="finished", step=8, steps=8)
    preempted = a_run(
        tmp_path, "digits-b-12222222", "begins\nstep 3/8  train/loss 0.5\n", state="preempted", step=3, steps=8
    )
    preempted.metrics.write_text('{"step": 2, "test/accuracy": 0.25}\n{"step": 3, "train/loss": 0.5}\n{"st')
    a_run(tmp_path, "digits-c-33333333", state="running", pid=1, host="gone", step=5, steps=8)
    a_run(tmp_path, "digits-d-44444444", state="failed", message="out of disk", step=1, steps=8)
    (tmp_path / "runs" / "not-a-run").mkdir()
    listed = largebatch("status")
    lines = [re.split(r"\s{2,}", line) for line in listed.stdout.splitlines()]
    assert lines[0] == ["run", "state", "step", "of", "test"]
    assert lines[1:5] == [
        ["digits-a-11111111", "finished", "8", "8", "-"],
        ["digits-b-12222222", "preempted", "3", "8", "25.00 %", "step 3/8", "train/loss 0.5"],
        ["digits-c-33333333", "interrupted", "5", "8", "-"],
        ["digits-d-44444444", "failed", "1", "8", "-", "out of disk"],
    ]
    assert lines[-1] == ["4 run(s): 1 finished, 1 preempted, 1 interrupted, 1 failed"]
    rows = json.loads(largebatch("status", "runs", "--json").stdout)
    assert [row["log"] for row in rows] == ["", "step 3/8  train/loss 0.5", "", ""]


def test_piped_tables_have_one_whole_line_a_run(tmp_path: Path, largebatch: Command) -> None:
    message = "a long message " * 40
    a_run(tmp_path, "digits-a-11111111", state="failed", message=f"{message}\nsecond line")
    lines = largebatch("status").stdout.splitlines()
    assert len(lines) == 4
    assert f"{message} second line" in lines[1]


@pytest.mark.parametrize(
    ("file", "content"),
    [("status.json", '{"state": "fin'), ("status.json", "[1]"), ("summary.json", "\xff"), ("metrics.jsonl", "half\n")],
)
def test_status_lists_a_folder_with_a_damaged_file_as_unreadable(
    tmp_path: Path, largebatch: Command, file: str, content: str
) -> None:
    a_run(tmp_path, "good-11111111")
    bad = a_run(tmp_path, "bad-22222222", state="running" if file == "metrics.jsonl" else "finished")
    (bad.path / file).write_bytes(content.encode("latin-1"))
    listed = largebatch("status")
    assert listed.code == 0, listed.stderr
    assert "1 unreadable, 1 finished" in listed.stdout
    assert re.search(rf"bad-22222222 +unreadable.*{file}", listed.stdout)


def test_a_run_is_found_by_the_beginning_of_its_name_or_digits(tmp_path: Path, largebatch: Command) -> None:
    for name in ("digits-lars-s0-1a111111", "digits-lars-s1-1b222222", "cifar10-lamb-s0-3c333333"):
        a_run(tmp_path, name, f"this is {name}\nits end\n")
    for wanted in ("cifar", "3c3", "runs/cifar10", "runs/3c", "runs/cifar10-lamb-s0-3c333333"):
        assert largebatch("logs", wanted).stdout == "this is cifar10-lamb-s0-3c333333\nits end\n", wanted
    assert largebatch("logs", "1b", "--lines", "1").stdout == "its end\n"
    assert len(json.loads(largebatch("status", "digits", "3c3", "--json").stdout)) == 3
    assert len(json.loads(largebatch("status", "digits", "1a", "--json").stdout)) == 2
    several, none = largebatch("logs", "digits"), largebatch("status", "imagenet")
    assert several.code == none.code == 2
    assert "digits: matches 2 runs. Fix: give more of the name or digits" in several.stderr
    assert "error:   digits-lars-s1-1b222222" in several.stderr
    assert none.stderr == (
        "error: imagenet: no run in runs has a name or last eight digits with this beginning. "
        "Fix: `largebatch status runs` lists the runs\n"
    )
    nowhere = largebatch("cancel", "elsewhere/1a")
    assert nowhere.code == 2
    assert "elsewhere is not a folder" in nowhere.stderr


def test_logs_prints_slurm_s_log_if_the_run_has_none(tmp_path: Path, largebatch: Command) -> None:
    a_run(tmp_path, "digits-11111111", state="failed", cluster="slurm", job_id="12_3")
    assert largebatch("logs", "digits").code == 2
    (tmp_path / "runs" / ".slurm").mkdir()
    (tmp_path / "runs" / ".slurm" / "12_3_0_log.err").write_text("srun: error: no such module\n")
    (tmp_path / "runs" / ".slurm" / "12_4_0_log.err").write_text("another's\n")
    assert largebatch("logs", "digits").stdout.splitlines() == [
        "==> runs/.slurm/12_3_0_log.err", "srun: error: no such module",
    ]  # fmt: skip


def wait_for_step(folder: Path, step: int) -> RunFolder:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        for path in folder.glob("runs/*/metrics.jsonl"):
            if (newest(path, "step") or 0) >= step:
                return RunFolder(path.parent)
        time.sleep(0.05)
    raise AssertionError("the run didn't reach that step")


def test_a_cancelled_run_saves_and_can_be_resumed(tmp_path: Path, largebatch: Command) -> None:
    launcher = start(*LONG, "cluster.processes=2", cwd=tmp_path)
    run = wait_for_step(tmp_path, 20)
    followed = subprocess.Popen(
        [*LARGEBATCH, "logs", "synthetic", "--follow"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    watched = subprocess.Popen(
        [*LARGEBATCH, "status", "--watch"], cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert watched.stdout is not None
    assert re.search(r"\d\d:\d\d:\d\d synthetic.* running", watched.stdout.readline())
    cancelled = largebatch("cancel", run.name[:12])
    assert cancelled.code == 0, cancelled.stdout + cancelled.stderr
    step = run.read_status()["step"]
    assert cancelled.stdout == f"{run.name}: cancelled after step {step} of 4000\n"
    assert run.state() == "preempted"
    assert (run.checkpoints / f"step-{step:08}.pt").exists()
    assert launcher.wait(30) == 0, launcher.communicate()
    assert f"preempted after step {step} of 4000" in followed.communicate(timeout=30)[0]
    last = watched.communicate(timeout=30)[0].splitlines()
    assert re.search(rf"{run.name} preempted +(cancelled; )?the same command resumes", last[-2])
    assert last[-1] == "1 run(s): 1 preempted"
    again = largebatch("cancel", "runs")
    assert again.stdout == f"{run.name}: not running; preempted\n"


def test_watching_in_a_terminal_ends_when_no_run_is_open(tmp_path: Path) -> None:
    done, queued = a_run(tmp_path, "digits-a-11111111"), a_run(tmp_path, "digits-b-22222222", state="queued")

    def end(sent: bytes) -> None:
        if b"queued" in sent and queued.state() == "queued":  # the table has shown it
            queued.update_status(state="finished")

    shown = in_terminal([*LARGEBATCH, "status", "--watch"], tmp_path, 120, heard=end)
    assert shown.code == 0
    text = "\n".join(shown.lines)
    first = text.partition("1 finished, 1 queued")[2]
    assert first.index(queued.name[-8:]) < first.index(done.name[-8:])  # open runs come first
    assert text.rstrip().endswith("2 run(s): 2 finished")


def test_watching_outlasts_the_time_between_two_runs_of_a_grid(tmp_path: Path) -> None:
    first = a_run(tmp_path, "digits-a-11111111", state="queued")
    watched = subprocess.Popen(
        [*LARGEBATCH, "status", "--watch"], cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert watched.stdout is not None
    assert "11111111 queued" in watched.stdout.readline()
    first.update_status(state="finished")
    assert "11111111 finished" in watched.stdout.readline()
    second = a_run(tmp_path, "digits-b-22222222", state="queued")
    assert "22222222 queued" in watched.stdout.readline()
    second.update_status(state="finished")
    assert watched.communicate(timeout=30)[0].splitlines()[-1] == "2 run(s): 2 finished"


def test_a_dry_run_prints_states_and_an_estimate_of_the_time(tmp_path: Path, process: Programs) -> None:
    def planned(*overrides: str) -> list[str]:
        grid = ("-m", *TINY, "seed=0,1", *overrides, "dry_run=true")
        return process.call("launch", *grid, cwd=tmp_path).stdout.splitlines()

    before = planned("steps=8")
    assert before[:3] == [
        "2 run(s): 2 new; nothing is started (dry_run=true)",
        "1 process on cpu",
        "no finished run of these data sets, models and modes to estimate the time from",
    ]
    finished = process.train(tmp_path, *TINY, "seed=0", "steps=8") / "summary.json"
    summary = read_json(finished)
    finished.write_text(json.dumps(summary | {"wall_seconds": 7200.0, "processes": 2}))  # of 8 steps
    after = planned("steps=8")
    assert after[:3] == [
        "2 run(s): 1 finished, 1 new; nothing is started (dry_run=true)",
        "1 process on cpu",
        "about 4.0 device-hours to go, estimated from the nearest finished runs",
    ]
    assert before[3:4] == after[3:4] == [""]
    measured = {
        "images_per_second": 30.0,
        "data_share": 0.25,
        "decoded_images_per_second": 11.0,
        "decoding_processes": 3,
    }
    finished.write_text(json.dumps(read_json(finished) | measured))
    decoded = planned("steps=8")[3:5]
    assert " ".join(decoded) == (
        f"training needs 40 images/s, and 3 decoding process(es) decode 33, measured in {finished.parent.name} "
    )
    longer = planned("steps=16", "batch_size=8,16")
    assert longer[2].startswith("about 24.0 device-hours to go")  # 2 * (8 + 4): images count
    other = planned("mode=bt")
    assert other[2].startswith("no finished run of these")
