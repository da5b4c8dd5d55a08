"""One planned run on this machine: worker processes that live no longer than the launcher."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from largebatch.config.schema import to_yaml
from largebatch.errors import UserError
from largebatch.launch.plan import PlannedRun
from largebatch.machine.process import LAUNCHER_PID, die_with_parent
from largebatch.runs.folder import DONE, RESUMES, RunBusyError, RunFolder, write_atomic
from largebatch.runs.slurm_queue import Jobs, has_it

_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Outcome:
    """How a run stands after the launcher dealt with it."""

    run: PlannedRun
    state: str  # of run_folder.STATES, or "busy": another process works on it
    message: str = ""
    exit_code: int = 0
    skipped: bool = False  # it was done before


@dataclass(frozen=True)
class Started:
    """A run whose worker is at work."""

    run: PlannedRun
    child: subprocess.Popen[bytes]
    new: bool  # there was no folder of it before,
    runs_dir_new: bool  # and none of any run


def claim(run: PlannedRun, jobs: Jobs | None = None, **status: Any) -> Outcome | None:
    """Freeze the run's configuration and say that it is about to start, for nobody else to start it.

    Args:
        jobs: SLURM's, where they were asked for already.
        status: what else the status shall say.

    Returns:
        Its outcome instead, where it is done or another process, or a job of SLURM's, has it.
    """
    folder, config = run.folder, run.config
    try:
        with folder.hold():
            before = folder.read_status()
            state = before.get("state")
            if state in DONE and not config.rerun:
                return Outcome(run, state, str(before.get("message", "")), skipped=True)
            if job := has_it(before, jobs):
                return Outcome(run, "busy", f"{folder.path} {job}", exit_code=2)
            if state in DONE:
                _set_aside(folder)
            write_atomic(folder.config, to_yaml(config))
            folder.update_status(
                state="queued", message="", exit_code=0, queued=time.time(), cluster=config.cluster.name,
                **(dict.fromkeys(("job_id", "code", "restarts")) | status),
            )  # fmt: skip
    except RunBusyError as error:
        return Outcome(run, "busy", str(error), exit_code=2)
    except UserError as error:  # SLURM can't be asked, or the status can't be read
        return Outcome(run, "failed", str(error), exit_code=2)
    return None


def start(run: PlannedRun, environment: dict[str, str], *, speaking: bool) -> Started | Outcome:
    """Start a run from where it stands. Its outcome instead, where it is done or another process works on it.

    Args:
        environment: the run's devices and threads, beside this process's own variables.
        speaking: what its first process says goes to the terminal as well as to the run's log.
    """
    new, runs_dir_new = not run.folder.path.exists(), not run.folder.path.parent.exists()
    if outcome := claim(run):
        return outcome
    return Started(run, _start_worker(run, environment, speaking), new, runs_dir_new)


def conclude(started: Started) -> Outcome:
    """What became of a run whose worker has ended."""
    run, folder, code = started.run, started.run.folder, started.child.wait()
    _kill_group(started.child)
    status = folder.read_status()
    if status["state"] in ("queued", "running"):
        if folder.is_held():  # taken by another launcher in the moment between
            return Outcome(run, "busy", folder.held_by(), exit_code=2)
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        message = f"the worker {how}; see {folder.log}; {RESUMES}"
        folder.update_status(state="failed", message=message, exit_code=1)
        status = folder.read_status()
    outcome = Outcome(run, status["state"], status["message"], status["exit_code"])
    if outcome.state == "failed" and outcome.exit_code == 2 and started.new:
        shutil.rmtree(folder.path)  # nothing was begun: what the user mends may make another run of it
        if started.runs_dir_new:
            with contextlib.suppress(OSError):  # another run came to it meanwhile
                folder.path.parent.rmdir()
    return outcome


def stop(started: list[Started], at_once: Callable[[], bool]) -> None:
    """Have runs save after their step and end. None is left afterwards.

    Args:
        at_once: whether to wait no longer; what they have saved before is what they resume from then.
    """
    for one in started:
        one.child.send_signal(signal.SIGINT)
    while any(one.child.poll() is None for one in started) and not at_once():
        time.sleep(_POLL_SECONDS)
    for one in started:
        _kill_group(one.child)
        one.child.wait()
        if one.run.folder.state() in ("queued", "running"):
            one.run.folder.update_status(state="preempted", message="stopped by Ctrl-C")


def _start_worker(run: PlannedRun, environment: dict[str, str], speaking: bool) -> subprocess.Popen[bytes]:
    worker = ["-m", "largebatch.training.worker", str(run.folder.path)]
    processes = run.config.cluster.processes or 1
    if processes > 1:
        # --standalone lets the system pick a free port.
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        worker = [*torchrun, "--max-restarts", "0", *worker]
    with run.folder.log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, *worker],
            env={**os.environ, **environment, LAUNCHER_PID: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=None if speaking else subprocess.DEVNULL,
            stderr=log,  # warnings, torchrun's own lines and tracebacks; what the user must know is in the status
            start_new_session=True,  # Ctrl-C reaches the launcher alone, which passes it on once
            preexec_fn=die_with_parent,
        )


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # all of it has ended
        os.killpg(child.pid, signal.SIGKILL)


def _set_aside(folder: RunFolder) -> None:
    """Move a finished run's files to a numbered folder inside, so that a repetition loses nothing."""
    number = 1
    while (folder.path / f"previous-{number}").exists():
        number += 1
    previous = folder.path / f"previous-{number}"
    previous.mkdir()
    for item in folder.path.iterdir():
        if item.name != "lock" and not item.name.startswith("previous-"):
            item.rename(previous / item.name)
    folder.update_status(repetition=number)
