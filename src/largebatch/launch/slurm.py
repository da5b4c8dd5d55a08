"""The runs of a plan as SLURM jobs: a run is a job, a grid is an array. slurm_task.py runs inside the jobs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from largebatch.config.custom import custom_choices
from largebatch.config.slurm import sbatch_options, seconds_of
from largebatch.errors import UserError, require
from largebatch.launch.devices import in_words
from largebatch.launch.local import claim, exit_code
from largebatch.launch.plan import PlannedRun
from largebatch.launch.slurm_task import carry_out_run
from largebatch.launch.view import plan_rows, print_plan
from largebatch.runs.folder import DONE, RunBusyError
from largebatch.runs.provenance import code_hash, copy_code, copy_files
from largebatch.runs.slurm_queue import ask, claim_by_slurm, jobs_of
from largebatch.runs.watch import watch_status

Array = list[PlannedRun]  # runs with the same request to SLURM; a single run is a plain job


def submit_plan(plan: Sequence[PlannedRun]) -> int:
    """Submit the runs that are neither done nor in the queue; with ``cluster.wait`` watch all. Return the exit code.

    Raises:
        UserError: SLURM refuses a part, with SLURM's words; then no run of the plan is in the queue.
    """
    if shutil.which("sbatch") is None:
        raise UserError("cluster.name=slurm: no sbatch here. Fix: run this on a login node, or set cluster=local")
    require("slurm")
    jobs: dict[str, Array] = {}
    claimed: list[tuple[PlannedRun, bool]] = []  # True if the run's folder is new
    try:
        known = jobs_of(run.folder.read_status() for run in plan)
        for run in plan:
            new = not run.folder.path.exists()
            outcome = claim(run, known, code=code_hash())
            if outcome is None:
                claimed.append((run, new))
            elif outcome.state == "failed":
                raise UserError(outcome.message)
            elif outcome.skipped:
                print(f"      {run.folder.name} {outcome.state} before; not repeated (rerun=true repeats it)")
            else:
                print(f"      {outcome.message}")
        for array in arrays_of([run for run, _ in claimed], _largest_array()):
            copy_code(array[0].folder.code)
            for run in array:
                copy_own_code(run)
            jobs[_submit(array)] = array
    except (Exception, KeyboardInterrupt) as error:
        _withdraw(list(jobs), claimed, str(error) or type(error).__name__)
        if isinstance(error, UserError):
            raise UserError(f"{error}\nno run of this plan is in the queue") from None
        raise
    _announce(jobs)
    return _watch(plan) if plan[0].config.cluster.wait else 0


def sbatch_texts(plan: Sequence[PlannedRun]) -> Iterator[str]:
    """Yield sbatch's script for each array of the runs that aren't in the queue; needs no SLURM."""
    from submitit.slurm.slurm import _make_sbatch_string

    jobs = jobs_of(run.folder.read_status() for run in plan)
    missing = [run for run in plan if not claim_by_slurm(run.folder.read_status(), jobs)]
    for array in arrays_of(missing, _largest_array()):
        folder = array[0].folder.slurm
        command = f"{_python(array[0])} -u -m submitit.core._submit {shlex.quote(str(folder))}"
        count = len(array) if len(array) > 1 else None
        yield _make_sbatch_string(command=command, folder=folder, map_count=count, **parameters(array[0], len(array)))


def arrays_of(plan: Sequence[PlannedRun], largest: int) -> list[Array]:
    """Group the runs by their requests, in arrays of at most ``largest`` runs."""
    groups: dict[str, Array] = {}
    for run in plan:
        groups.setdefault(json.dumps([_python(run), parameters(run, 0)], sort_keys=True), []).append(run)
    return [runs[at : at + largest] for runs in groups.values() for at in range(0, len(runs), largest)]


def _python(run: PlannedRun) -> str:
    """Return the shell command that starts Python on a node; the workers inherit its interpreter and container."""
    return run.config.cluster.python or shlex.quote(sys.executable)


def parameters(run: PlannedRun, count: int) -> dict[str, Any]:
    """Return submitit's parameters for ``count`` runs like ``run``: ``#SBATCH`` lines, and shell commands before."""
    cluster = run.config.cluster
    # SLURM 22.05 drops sbatch's cpus-per-task.
    srun = {"kill-on-bad-exit": 1, "cpus-per-task": cluster.cpus_per_node, "cpu-bind": cluster.cpu_bind}
    seconds = None if cluster.time_limit is None else seconds_of(cluster.time_limit)
    code = shlex.quote(str(run.folder.code / code_hash()))
    return {
        "job_name": cluster.job_name or (run.folder.name if count == 1 else _array_name(run)),
        # Options that submitit knows; others go into additional_parameters.
        **{key: getattr(cluster, key) for key in ("nodes", "partition", "account", "qos", "constraint")},
        "ntasks_per_node": 1,
        "cpus_per_task": cluster.cpus_per_node,
        "mem": None if cluster.memory_gb is None else f"{round(1024 * cluster.memory_gb)}M",
        "time": None if seconds is None else -(-seconds // 60),  # submitit counts minutes, and SLURM rounds up too
        "signal_delay_s": cluster.signal_seconds,
        "array_parallelism": cluster.array_parallelism or count,
        "wckey": None,
        "additional_parameters": sbatch_options(cluster),
        "setup": [
            *cluster.setup,
            f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}",
            "export PYTHONSAFEPATH=1",  # packages in the folder of the submission don't come first
        ],
        "srun_args": [
            *(f"--{option}={value}" for option, value in srun.items() if value is not None),
            *cluster.srun_args,
        ],
    }


def _array_name(run: PlannedRun) -> str:
    return re.sub(r"[^A-Za-z0-9_.+-]", "_", run.sweep) or "largebatch"


def _submit(array: Array) -> str:
    """Submit the array, write its jobs' numbers into the runs' statuses, and return the array's number."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError
    from submitit.helpers import clean_env
    from submitit.slurm.slurm import SlurmExecutor

    # Set on the class, because submitit makes another executor for an array.
    sbatch = [sys.executable, "-P", "-m", "largebatch.launch.sbatch"]
    SlurmExecutor._make_submission_command = lambda _, file: [*sbatch, str(file)]  # type: ignore[assignment,method-assign]
    executor = SlurmExecutor(array[0].folder.slurm, python=_python(array[0]))
    executor.update_parameters(**parameters(array[0], len(array)))
    where = {key: value for key, value in os.environ.items() if key in ("SLURM_CONF", "SLURM_CLUSTERS")}
    in_a_job = "SLURM_JOB_ID" in os.environ  # the new job must not inherit this job's variables
    try:
        with clean_env() if in_a_job else contextlib.nullcontext(), contextlib.redirect_stderr(io.StringIO()):
            os.environ.update(where)  # submitit prints the same error that it raises
            jobs = executor.map_array(carry_out_run, [str(run.folder.path) for run in array])
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"SLURM refused {len(array)} run(s): {' '.join(str(error).split())}") from None
    for run, job in zip(array, jobs, strict=True):
        with contextlib.suppress(RunBusyError), run.folder.hold():  # a running job has written its number itself
            if run.folder.read_status().get("job_id") is None:
                run.folder.update_status(job_id=job.job_id)
    return str(jobs[0].job_id).partition("_")[0]


def copy_own_code(run: PlannedRun) -> None:
    """Copy the user's own modules of a run beside the package's copy. The worker imports them from there."""
    for choice in custom_choices(run.config):
        if choice.files:
            copy_files(run.folder.code / choice.version, choice.files)


def _withdraw(jobs: list[str], claimed: list[tuple[PlannedRun, bool]], why: str) -> None:
    """Cancel the submitted jobs; remove the new folders of runs without a job, and mark the other runs as failed."""
    if jobs:
        subprocess.run(["scancel", *jobs], capture_output=True, check=False)
    for run, new in claimed:
        if new and run.folder.read_status().get("job_id") is None:
            shutil.rmtree(run.folder.path)
        else:
            run.folder.update_status(state="failed", message=f"not submitted: {why}", exit_code=2)


def _largest_array() -> int:
    if shutil.which("scontrol"):
        found = re.search(r"^MaxArraySize\s*=\s*(\d+)", ask("scontrol", "show", "config").stdout, re.MULTILINE)
        if found:
            return max(1, int(found[1]))
    return 1001  # SLURM's own default of MaxArraySize


def _announce(jobs: dict[str, Array]) -> None:
    if not jobs:
        print("nothing to submit")
        return
    for job, array in jobs.items():
        folder, most = array[0].folder, array[0].config.cluster.array_parallelism
        at_a_time = f", at most {most} at a time" if most else ""
        what = f"{len(array)} runs as array {job}{at_a_time}" if len(array) > 1 else f"{folder.name} as job {job}"
        print(f"submitted {what}: {in_words(array[0].config.cluster)}")
    print(f"  largebatch status {folder.path.parent}   # states of the runs; --watch updates them")
    print(f"  largebatch logs {folder.path}   # a run's log; SLURM's own logs are in {folder.slurm}")
    print(f"  squeue --jobs={','.join(jobs)}   # SLURM's view")
    print(f"  scancel {' '.join(jobs)}   # stop them; the same command resumes from the last checkpoint")


def _watch(plan: Sequence[PlannedRun]) -> int:
    """Show the runs until all have ended. Return the exit code, as for runs on this machine."""
    try:
        watch_status(lambda: [run.folder for run in plan])
    except KeyboardInterrupt:
        print("\nstopped watching; the jobs continue. The same command watches again, scancel stops them")
        return 130
    rows = plan_rows(plan)
    print_plan(rows)
    failed = [run for run, row in zip(plan, rows, strict=True) if row["state"] not in DONE]
    return exit_code(int(run.folder.read_status().get("exit_code") or 1) for run in failed)
