"""Carrying out one planned run on this machine: worker processes that live no longer than the launcher."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

from largebatch.config import to_yaml
from largebatch.launch.devices import worker_environment
from largebatch.launch.plan import PlannedRun
from largebatch.process import LAUNCHER_PID, die_with_parent
from largebatch.run_folder import DONE, RESUMES, RunBusyError, RunFolder, write_atomic


@dataclass(frozen=True)
class Outcome:
    """How a run stands after the launcher dealt with it."""

    run: PlannedRun
    state: str  # of run_folder.STATES, or "busy": another process works on it
    message: str = ""
    exit_code: int = 0
    skipped: bool = False  # it was done before


class StoppedByUser(Exception):
    """The user pressed Ctrl-C; the run in hand is stopped and can be resumed."""


def carry_out(run: PlannedRun) -> Outcome:
    """Run it from where it stands: skip it when done, resume it when interrupted, leave it alone when held elsewhere.

    Raises:
        StoppedByUser: after Ctrl-C, once no process of the run is left.
    """
    folder, config = run.folder, run.config
    existed, runs_existed = folder.path.exists(), folder.path.parent.exists()
    try:
        with folder.hold():
            state = folder.state()
            if state in DONE and not config.rerun:
                return Outcome(run, state, str(folder.read_status().get("message", "")), skipped=True)
            if state in DONE:
                _set_aside(folder)
            write_atomic(folder.config, to_yaml(config))
            folder.update_status(state="queued", message="", exit_code=0, queued=time.time())
    except RunBusyError as error:
        return Outcome(run, "busy", str(error), exit_code=2)

    code = _run_worker(run)
    status = folder.read_status()
    if status["state"] in ("queued", "running"):
        if folder.is_held():  # taken by another launcher in the moment between
            return Outcome(run, "busy", folder.held_by(), exit_code=2)
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        message = f"the worker {how}; see {folder.log}; {RESUMES}"
        folder.update_status(state="failed", message=message, exit_code=1)
        status = folder.read_status()
    outcome = Outcome(run, status["state"], status["message"], status["exit_code"])
    if outcome.state == "failed" and outcome.exit_code == 2 and not existed:
        shutil.rmtree(folder.path)  # nothing was begun: what the user mends may make another run of it
        if not runs_existed:
            with contextlib.suppress(OSError):  # another run came to it meanwhile
                folder.path.parent.rmdir()
    return outcome


def _run_worker(run: PlannedRun) -> int:
    """Start the run's processes and wait for them. Negative: the signal that ended the first one."""
    worker = ["-m", "largebatch.train", str(run.folder.path)]
    processes = run.config.cluster.processes or 1
    if processes > 1:
        # --standalone lets the system pick a free port.
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        worker = [*torchrun, "--max-restarts", "0", *worker]
    environment = {**os.environ, **worker_environment(run.config.cluster), LAUNCHER_PID: str(os.getpid())}
    with run.folder.log.open("ab") as log:
        child = subprocess.Popen(
            [sys.executable, *worker],
            env=environment,
            stdin=subprocess.DEVNULL,
            stderr=log,  # warnings, torchrun's own lines and tracebacks; what the user must know is in the status
            start_new_session=True,  # Ctrl-C reaches the launcher alone, which passes it on once
            preexec_fn=die_with_parent,
        )
    try:
        return child.wait()
    except KeyboardInterrupt:
        _stop(child, run.folder)
        raise StoppedByUser(run.folder.name) from None
    finally:
        _kill_group(child)


def _stop(child: subprocess.Popen[bytes], folder: RunFolder) -> None:
    print("\nstopping after this step; Ctrl-C again stops at once", flush=True)
    child.send_signal(signal.SIGINT)
    try:
        child.wait()
    except KeyboardInterrupt:
        _kill_group(child)
        child.wait()
    if folder.state() in ("queued", "running"):
        folder.update_status(state="preempted", message="stopped by Ctrl-C")


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
