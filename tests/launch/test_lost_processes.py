"""Runs whose processes are killed, stopped or lose their folder: outcomes, messages, and nothing left running."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY, start
from datafiles import make_imagefolder
from runs import finish, is_alive, the_run, worker_pid

from largebatch.machine.pulse import Watch
from largebatch.runs.folder import RunFolder
from largebatch.runs.metrics import newest

pytestmark = pytest.mark.slow

LONG = (*TINY, "steps=4000", "eval_every=100", "checkpoint.every_steps=1000000", "cluster.threads=1")


def until(condition: Callable[[], bool], seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timeout"
        time.sleep(0.02)


def training(folder: Path, *overrides: str, runs: int = 1) -> subprocess.Popen[str]:
    """Start a launcher, and return it when so many of its runs train."""
    launcher = start(*overrides, cwd=folder)

    def train() -> bool:
        assert launcher.poll() is None, launcher.communicate()
        return sum((newest(path, "step") or 0) >= 3 for path in folder.glob("runs/*/metrics.jsonl")) >= runs

    until(train)
    return launcher


def ranks(run: Path) -> dict[int, int]:
    """Return the process of each rank of a run, by the variables of all processes."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
            variables = (process / "environ").read_bytes().decode().split("\0")
            leads = os.getsid(int(process.name)) == int(process.name)  # unlike a decoding process
        except OSError:  # it has ended, or is another user's
            continue
        if leads and str(run) in words and "torch.distributed.run" not in words:
            rank = [int(line.partition("=")[2]) for line in variables if line.startswith("RANK=")]
            found[rank[0] if rank else 0] = int(process.name)
    return found


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_grid_with_a_killed_torchrun_fails_and_goes_on(tmp_path: Path) -> None:
    launcher = training(tmp_path, "-m", *LONG, "steps=60", "eval_every=1", "seed=0,1", "cluster.processes=2")
    (first,) = (path.parent for path in tmp_path.glob("runs/*-s0-*/metrics.jsonl"))
    processes = ranks(first)
    os.kill(parent(processes[0]), signal.SIGKILL)
    out, errors = launcher.communicate(timeout=100)
    assert launcher.returncode == 1, out + errors
    assert "the worker was ended by SIGKILL (Linux kills processes when memory runs out)" in errors
    assert RunFolder(first).state() == "failed"
    (second,) = tmp_path.glob("runs/*-s1-*")
    assert RunFolder(second).state() == "finished"
    until(lambda: not any(is_alive(pid) for pid in processes.values()), 5)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named_with_its_signal(tmp_path: Path, rank: int) -> None:
    launcher = training(tmp_path, *LONG, "cluster.processes=2")
    os.kill(ranks(the_run(tmp_path))[rank], signal.SIGKILL)
    _, errors = launcher.communicate(timeout=100)
    assert launcher.returncode == 1
    assert f"error: rank {rank} was ended by SIGKILL" in errors
    assert f"rank {rank} was ended by SIGKILL" in RunFolder(the_run(tmp_path)).read_status()["message"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stopped_rank_is_named_and_ended(tmp_path: Path, processes: int) -> None:
    launcher = training(tmp_path, *LONG, f"cluster.processes={processes}", "cluster.hang_seconds=5")
    pids = ranks(the_run(tmp_path))
    os.kill(pids[processes - 1], signal.SIGSTOP)
    _, errors = launcher.communicate(timeout=100)
    assert launcher.returncode == 1
    assert f"error: rank {processes - 1} gave no sign of life for 5 s" in errors
    assert "same command resumes" in errors
    assert not any(is_alive(pid) for pid in pids.values())


def test_ctrl_c_ends_a_run_with_a_stopped_rank(tmp_path: Path) -> None:
    launcher = training(tmp_path, *LONG, "cluster.processes=2")
    pids = ranks(the_run(tmp_path))
    os.kill(pids[1], signal.SIGSTOP)
    launcher.send_signal(signal.SIGINT)
    assert launcher.stdout is not None
    while "Ctrl-C again stops at once" not in launcher.stdout.readline():
        assert launcher.poll() is None
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=20)
    assert launcher.returncode == 130
    assert RunFolder(the_run(tmp_path)).state() == "preempted"
    assert not any(is_alive(pid) for pid in pids.values())


def test_a_watch_names_ranks_without_progress() -> None:
    """Ranks send signs of life, but no pass ends; before the first pass, no time limits a download."""
    watch = Watch(range(3), 0.2)
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def beat(*passes: int) -> bool:
        for rank, number in enumerate(passes):
            sender.sendto(f"{rank} {2**30 + rank} {number} 0 ".encode(), ("127.0.0.1", int(watch.port)))
        sender.sendto(b"not a pulse", ("127.0.0.1", int(watch.port)))
        time.sleep(0.05)
        return watch.look()

    assert not any(beat(0, 0, 0) for _ in range(8))
    assert not any(beat(number, number, number) for number in range(1, 9))
    for _ in range(100):
        if beat(9, 8, 9):
            break
    assert watch.verdict == "no pass over a batch ended for 0.2 s; rank 1 behind the others hung"
    watch.close()


def test_a_watch_names_what_a_rank_waits_for() -> None:
    """A wait has the limit of a pass, also before the first pass; the next wait is progress."""
    watch = Watch(range(2), 0.2)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:

        def beat(wait: int) -> bool:
            for pulse in (f"0 {os.getpid()} 0 0 ", f"1 {os.getpid()} 0 {wait} a disk"):
                sender.sendto(pulse.encode(), ("127.0.0.1", int(watch.port)))
            time.sleep(0.05)
            return watch.look()

        assert not any(beat(number) for number in range(1, 9))
        assert any(beat(9) for _ in range(100))
    assert watch.verdict == "rank 1 waited 0.2 s for a disk"
    watch.close()


def test_a_rank_that_has_ended_does_not_hang_while_another_writes_the_last_files() -> None:
    watch, ended = Watch(range(2), 0.2), subprocess.Popen(["true"])
    ended.wait()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(f"1 {ended.pid} 8 3 a disk".encode(), ("127.0.0.1", int(watch.port)))
        for _ in range(10):
            sender.sendto(f"0 {os.getpid()} 0 0 ".encode(), ("127.0.0.1", int(watch.port)))
            time.sleep(0.05)
            assert not watch.look(), watch.verdict
    watch.close()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, -signal.SIGHUP), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_hangup_saves_and_stops_as_a_termination_does(tmp_path: Path, number: signal.Signals, code: int) -> None:
    launcher = training(tmp_path, "-m", *LONG, "seed=0,1", "cluster.parallel=2", runs=2)
    launcher.send_signal(number)
    launcher.communicate(timeout=60)
    assert launcher.returncode == code
    for path in (tmp_path / "runs").iterdir():
        run = RunFolder(path)
        assert run.state() == "preempted"
        assert list(run.checkpoints.glob("step-*.pt"))


def test_a_hangup_is_ignored_under_nohup(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a child inherits it
    try:
        launcher = training(tmp_path, *LONG, "steps=100")
    finally:
        signal.signal(signal.SIGHUP, before)
    launcher.send_signal(signal.SIGHUP)
    finish(launcher)


def test_a_killed_launcher_leaves_no_process(tmp_path: Path) -> None:
    launcher = training(tmp_path, *LONG, "cluster.processes=2")
    pids = ranks(the_run(tmp_path))
    launcher.kill()
    launcher.communicate()
    until(lambda: not any(is_alive(pid) for pid in pids.values()), 10)
    assert not RunFolder(the_run(tmp_path)).is_held()


def test_a_removed_folder_ends_its_run_and_not_the_grid(tmp_path: Path) -> None:
    launcher = training(tmp_path, "-m", *LONG, "steps=400", "seed=0,1")
    (first,) = (path.parent for path in tmp_path.glob("runs/*-s0-*/metrics.jsonl"))
    worker = worker_pid(first)
    shutil.rmtree(first)
    out, errors = launcher.communicate(timeout=100)
    assert launcher.returncode == 1, out + errors
    assert f"error: {first}: the folder was removed while the run trained" in errors
    assert "Traceback" not in errors
    assert not is_alive(worker)
    (second,) = tmp_path.glob("runs/*-s1-*")
    assert RunFolder(second).state() == "finished"


@pytest.mark.parametrize("what", ["rank", "torchrun", "launcher"])
def test_a_run_goes_on_after_a_process_was_stopped_for_a_while(tmp_path: Path, what: str) -> None:
    launcher = training(tmp_path, *LONG, "steps=300", "cluster.processes=2")
    rank = ranks(the_run(tmp_path))[1]
    pid = {"rank": rank, "torchrun": parent(rank), "launcher": launcher.pid}[what]
    os.kill(pid, signal.SIGSTOP)
    time.sleep(3)
    os.kill(pid, signal.SIGCONT)
    finish(launcher)
    assert RunFolder(the_run(tmp_path)).state() == "finished"


def test_a_launcher_that_was_stopped_for_longer_than_a_hang_sees_no_hang(tmp_path: Path) -> None:
    launcher = training(tmp_path, *LONG, "cluster.processes=2", "cluster.hang_seconds=4")
    os.kill(launcher.pid, signal.SIGSTOP)
    time.sleep(8)
    os.kill(launcher.pid, signal.SIGCONT)
    time.sleep(1)
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=60)
    assert launcher.returncode == 130
    assert RunFolder(the_run(tmp_path)).state() == "preempted"


def test_a_run_whose_torchrun_stays_stopped_ends(tmp_path: Path) -> None:
    """The ranks finish. Their silence ends the launcher's wait for torchrun, and the run has finished."""
    launcher = training(tmp_path, *LONG, "steps=60", "cluster.processes=2", "cluster.hang_seconds=5")
    pids = ranks(the_run(tmp_path))
    torchrun = parent(pids[0])
    os.kill(torchrun, signal.SIGSTOP)
    finish(launcher)
    assert RunFolder(the_run(tmp_path)).state() == "finished"
    assert not any(is_alive(pid) for pid in (torchrun, *pids.values()))


def test_ctrl_c_ends_a_stopped_only_rank_after_the_time_of_a_hang(tmp_path: Path) -> None:
    launcher = training(tmp_path, *LONG, "cluster.hang_seconds=5")
    (pid,) = ranks(the_run(tmp_path)).values()
    os.kill(pid, signal.SIGSTOP)
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=60)
    assert launcher.returncode == 130
    assert RunFolder(the_run(tmp_path)).state() == "preempted"
    assert not is_alive(pid)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# Prepares the workers: little memory, so that images are decoded while training. ``STALL``: decoding processes wait for
# a pipe without a writer, as for a disk without an answer. ``STALL_DISK``: so do flushes of files of
# this name.
PREPARED = """
import multiprocessing, os, sys
if "largebatch.training.worker" in sys.orig_argv and "torch.distributed.run" not in sys.orig_argv:
    import PIL.Image
    import largebatch.machine.memory
    largebatch.machine.memory.host_memory = lambda: 1000
    def stall(*given, before=PIL.Image.open):
        if multiprocessing.parent_process() is None or "STALL_DISK" in os.environ or "STALL" not in os.environ:
            return before(*given)
        return open(os.environ["STALL"])
    PIL.Image.open = stall
    def flush(number, before=os.fsync):
        if os.environ.get("STALL_DISK", "//") in os.readlink(f"/proc/self/fd/{number}"):
            open(os.environ["STALL"])
        before(number)
    os.fsync = flush
"""
DECODERS = "waited 5 s for its decoding processes (dataset.workers=1), which may be stopped or wait for a disk"


@pytest.fixture
def of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Make an image folder. Return the options that decode it while training, in one process for each rank."""
    (tmp_path / "sitecustomize.py").write_text(PREPARED)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
    make_imagefolder(tmp_path / "data", 8)
    return (
        "dataset=imagefolder", f"dataset.root={tmp_path / 'data'}", "dataset.image_size=8", "dataset.workers=1",
        "batch_size=18", "tracker=none", "tracker.log_every=2", "cluster.threads=1", "cluster.hang_seconds=5",
    )  # fmt: skip


def test_a_stopped_decoding_process_is_named_with_its_rank(tmp_path: Path, of_files: tuple[str, ...]) -> None:
    launcher = training(tmp_path, *of_files, "steps=100000", "cluster.processes=2")
    pids = ranks(the_run(tmp_path))
    decoders = children(pids[1])
    for decoder in decoders:
        os.kill(decoder, signal.SIGSTOP)
    _, errors = launcher.communicate(timeout=100)
    assert launcher.returncode == 1
    assert f"error: rank 1 {DECODERS}; see " in errors
    assert "same command resumes" in errors
    assert not any(is_alive(pid) for pid in (*pids.values(), *decoders))


def test_decoding_that_stalls_before_the_first_batch_is_a_hang(
    tmp_path: Path, of_files: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setenv("STALL", str(tmp_path / "pipe"))
    launcher = start(*of_files, "steps=8", cwd=tmp_path)
    _, errors = launcher.communicate(timeout=100)
    assert launcher.returncode == 1
    assert f"error: rank 0 {DECODERS}; see " in errors
    assert " in stall" in (the_run(tmp_path) / "log.txt").read_text()


@pytest.mark.parametrize(("file", "what"), [("/.correct.npz.", "correct.npz"), ("/step-", "the checkpoint before")])
def test_a_disk_that_stalls_is_named(
    tmp_path: Path, of_files: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, file: str, what: str
) -> None:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setenv("STALL", str(tmp_path / "pipe"))
    monkeypatch.setenv("STALL_DISK", file)
    launcher = start(*of_files, "steps=8", "checkpoint.every_steps=2", cwd=tmp_path)
    _, errors = launcher.communicate(timeout=100)
    assert launcher.returncode == 1
    assert f"error: rank 0 waited 5 s for the disk to write {what}; see " in errors
    assert "same command resumes" in errors
