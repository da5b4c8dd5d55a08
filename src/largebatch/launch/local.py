"""One run on this machine: the claim of its folder, its worker, and its outcome."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from largebatch.config.typed import to_yaml
from largebatch.errors import UserError
from largebatch.launch.plan import PlannedRun
from largebatch.launch.worker_process import (
    ON_THIS_NODE,
    how_it_ended,
    killed_rank,
    start_worker,
    torchrun_arguments,
)
from largebatch.machine.process import die_with_parent
from largebatch.machine.pulse import ADDRESS, Watch
from largebatch.runs.folder import DONE, RESUMES, RunBusyError, RunFolder, write_atomic
from largebatch.runs.slurm_queue import Jobs, claim_by_slurm

_POLL_SECONDS = 0.05
_RELEASE_SECONDS = 10.0  # for the kernel to release the lock of a killed worker


@dataclass(frozen=True)
class Outcome:
    """State of a run after the launcher handled it."""

    run: PlannedRun
    state: str  # one of runs.folder.STATES, or "busy": another process works on the run
    message: str = ""
    exit_code: int = 0
    skipped: bool = False  # the run was done before


@dataclass(frozen=True)
class Started:
    """A run with a worker process."""

    run: PlannedRun
    child: subprocess.Popen[bytes]
    watch: Watch
    logged: int  # bytes of the log before this start


def exit_code(codes: Iterable[int]) -> int:
    """Return the lowest exit code other than 0, or 0 if there is none."""
    return min((code for code in codes if code), default=0)


def claim(run: PlannedRun, jobs: Jobs | None = None, **status: Any) -> Outcome | None:
    """Claim the run so that no other process starts it, and freeze its configuration.

    Args:
        jobs: SLURM's jobs, if known already.
        status: more entries for the run's status.

    Returns:
        None if claimed, else the outcome: the run is done, or another process or a job has it.
    """
    folder, config = run.folder, run.config
    try:
        with folder.hold():
            before = folder.read_status()
            state = before.get("state")
            if state in DONE and not config.rerun and not _moving(folder).exists():
                return Outcome(run, state, str(before.get("message", "")), skipped=True)
            if job := claim_by_slurm(before, jobs):
                return Outcome(run, "busy", f"{folder.path} {job}", exit_code=2)
            repetition = _set_aside(folder, state in DONE)
            write_atomic(folder.config, to_yaml(config))
            folder.update_status(
                state="queued", message="", exit_code=0, queued=time.time(), cluster=config.cluster.name,
                **(dict.fromkeys(("job_id", "code", "restarts")) | repetition | status),
            )  # fmt: skip
    except RunBusyError as error:
        return Outcome(run, "busy", str(error), exit_code=2)
    except UserError as error:  # SLURM doesn't answer, or the status can't be read
        return Outcome(run, "failed", str(error), exit_code=2)
    except OSError as error:
        return Outcome(run, "failed", f"{folder.path}: {error.strerror}", exit_code=1)
    return None


def start(run: PlannedRun, environment: dict[str, str], *, speaking: bool) -> Started | Outcome:
    """Start or resume a run. Return its outcome instead if it can't be claimed or started.

    Args:
        environment: variables for the run's devices and threads.
        speaking: the first process writes to the terminal too, not only to the run's log.
    """
    if outcome := claim(run):
        return outcome
    processes, binding = run.config.cluster.processes or 1, run.config.cluster.numa_binding
    torchrun = torchrun_arguments(processes, binding, *ON_THIS_NODE) if processes > 1 or binding else []
    stdout = None if speaking else subprocess.DEVNULL
    watch = Watch(range(processes), run.config.cluster.hang_seconds)
    logged = run.folder.log.stat().st_size if run.folder.log.exists() else 0
    try:
        child = start_worker(run.folder, torchrun, {**environment, ADDRESS: watch.port}, die_with_parent, stdout)
    except OSError as error:  # the log can't be opened, or no process can start
        watch.close()
        message = f"{run.folder.path}: {error.strerror}; {RESUMES}"
        with contextlib.suppress(OSError, UserError):
            run.folder.update_status(state="failed", message=message, exit_code=1)
        return Outcome(run, "failed", message, exit_code=1)
    return Started(run, child, watch, logged)


def has_ended(started: Started) -> bool:
    """Return True if a run's worker has ended, or hangs for longer than ``cluster.hang_seconds``."""
    return started.child.poll() is not None or started.watch.look()


def conclude(started: Started) -> Outcome:
    """Return the outcome of a run whose worker has ended or hangs. No process of the run is left."""
    run, folder = started.run, started.run.folder
    _end(started)
    try:
        status = folder.read_status()
        cause = _cause(started)
        if status.get("state") in ("queued", "running") or (cause and status.get("state") == "failed"):
            if not folder.path.exists():
                raise FileNotFoundError
            with folder.hold(patience=_RELEASE_SECONDS):  # the kernel may still be ending the worker
                how = cause or f"the worker {how_it_ended(started.child.returncode)}"
                message = f"{how}; see {folder.log}; {RESUMES}"
                folder.update_status(state="failed", message=message, exit_code=1)
            status = folder.read_status()
        outcome = Outcome(run, status["state"], status["message"], status["exit_code"])
    except RunBusyError as error:  # another launcher has started the run since
        return Outcome(run, "busy", str(error), exit_code=2)
    except (OSError, KeyError, UserError) as error:
        problem = str(error) if folder.status.exists() else "the folder was removed while the run trained"
        return Outcome(run, "failed", f"{folder.path}: {problem}", exit_code=1)
    has_result = folder.has_progress() or any(folder.path.glob("previous-*"))
    if outcome.state == "failed" and outcome.exit_code == 2 and not has_result:
        # No step was taken, and a corrected configuration may be another run.
        shutil.rmtree(folder.path, ignore_errors=True)
        with contextlib.suppress(OSError):  # it holds other runs
            folder.path.parent.rmdir()
    return outcome


def _cause(started: Started) -> str:
    """Name the rank that hung or that a signal killed, which other ranks only know as a lost connection."""
    if started.watch.verdict:
        return started.watch.verdict
    killed = killed_rank(started.run.folder.log, started.logged)
    return f"rank {killed[0]} {killed[2]}" if killed else ""


def stop(started: list[Started], at_once: Callable[[], bool], by: str) -> None:
    """Stop runs after they have finished their step and saved. No process of them is left.

    Args:
        at_once: returns True to kill the workers now; the runs resume from their last checkpoints.
        by: the signal, for the runs' messages.
    """
    for one in started:
        one.child.send_signal(signal.SIGINT)
    while not all(has_ended(one) for one in started) and not at_once():
        time.sleep(_POLL_SECONDS)
    for one in started:
        _end(one)
        with contextlib.suppress(OSError, UserError):  # the run's folder was removed or damaged
            if one.run.folder.state() in ("queued", "running"):
                one.run.folder.update_status(state="preempted", message=f"stopped by {by}")


def _end(started: Started) -> None:
    """Kill the processes of a run. Those of ranks end with torchrun, but their data workers end later."""
    started.watch.kill()
    with contextlib.suppress(ProcessLookupError):  # all processes have ended
        os.killpg(started.child.pid, signal.SIGKILL)
    started.child.wait()
    started.watch.close()


def _moving(folder: RunFolder) -> Path:
    """Return the folder that exists while a finished run's files are set aside."""
    return folder.path / "moving"


def _set_aside(folder: RunFolder, is_over: bool) -> dict[str, int]:
    """Move a finished run's files to ``previous-N`` inside its folder, so that repeating the run loses nothing.

    They first move to ``moving``, which gets its name last. A move that a kill cut short is completed.

    Returns:
        The entry of the status that numbers the repetition, if there is one.
    """
    moving = _moving(folder)
    previous = max((int(path.name.removeprefix("previous-")) for path in folder.path.glob("previous-*")), default=0)
    if is_over or moving.exists():
        moving.mkdir(exist_ok=True)
        others = [item for item in folder.path.iterdir() if item.name not in ("lock", moving.name)]
        for item in others:
            if not item.name.startswith("previous-"):
                item.rename(moving / item.name)
        previous += 1
        moving.rename(folder.path / f"previous-{previous}")
    return {"repetition": previous} if previous else {}
