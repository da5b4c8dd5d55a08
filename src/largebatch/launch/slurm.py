"""The runs of a plan as jobs of SLURM: a run is a job, a grid is an array. What happens in them: slurm_task.py."""

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
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from largebatch.config.schema import ClusterConfig
from largebatch.errors import UserError
from largebatch.launch.local import claim
from largebatch.launch.plan import PlannedRun
from largebatch.launch.plan_table import print_table
from largebatch.launch.slurm_task import carry_out_run
from largebatch.runs.folder import DONE, RunBusyError
from largebatch.runs.provenance import copy_code, copy_of_code
from largebatch.runs.slurm_queue import Jobs, ask, has_it, jobs_of
from largebatch.runs.table import run_rows

_ARRAY_SIZE = 1001  # SLURM's own default of MaxArraySize
_LOOK_SECONDS = 5.0
_NOT_ASKED_FOR = ("processes", "processes_per_node", "threads", "device", "wait", "max_requeues")  # of SLURM


@dataclass(frozen=True)
class Array:
    """Runs that ask SLURM for the same; a single one is a plain job."""

    runs: list[PlannedRun]
    cluster: ClusterConfig
    runs_dir: Path
    code: Path

    @property
    def folder(self) -> Path:
        """Of SLURM's logs and submitit's files: one for all, because SLURM before 23.02 makes none."""
        return self.runs_dir / ".slurm"


def submit_plan(plan: Sequence[PlannedRun]) -> int:
    """Submit what isn't done or in the queue; with ``cluster.wait`` watch it. Returns the program's exit code.

    Raises:
        UserError: in SLURM's words, when it refuses any of it; nothing of the plan is in the queue then.
    """
    if shutil.which("sbatch") is None:
        raise UserError("cluster.name=slurm: no sbatch here; run this on a login node of the cluster, or cluster=local")
    jobs: dict[str, Array] = {}
    claimed: list[tuple[PlannedRun, bool]] = []  # with whether a run's folder is new
    try:
        _claim_all(plan, claimed)
        for array in arrays_of([run for run, _ in claimed], _largest_array()):
            copy_code(array.runs_dir / ".code")
            jobs[_submit(array)] = array
    except (Exception, KeyboardInterrupt) as error:
        _withdraw(list(jobs), claimed, str(error) or type(error).__name__)
        if isinstance(error, UserError):
            raise UserError(f"{error}\nno run of this plan is in the queue") from None
        raise
    _announce(jobs)
    return _watch(plan) if plan[0].config.cluster.wait else 0


def sbatch_texts(plan: Sequence[PlannedRun]) -> Iterator[str]:
    """What sbatch would be given for each array of what is missing of the plan; needs no SLURM."""
    jobs = jobs_of(run.folder.read_status() for run in plan)
    for array in arrays_of([run for run in plan if _is_missing(run, jobs)], _largest_array()):
        from submitit.slurm.slurm import _make_sbatch_string

        command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(array.folder))}"
        count = len(array.runs) if len(array.runs) > 1 else None
        yield _make_sbatch_string(command=command, folder=array.folder, map_count=count, **parameters(array))


def arrays_of(plan: Sequence[PlannedRun], largest: int) -> list[Array]:
    """The runs by what they ask for, in arrays of at most ``largest``."""
    groups: dict[str, list[PlannedRun]] = {}
    for run in plan:
        cluster = run.config.cluster
        request = {key: value for key, value in vars(cluster).items() if key not in _NOT_ASKED_FOR}
        groups.setdefault(json.dumps([run.config.runs_dir, request], sort_keys=True), []).append(run)
    return [
        Array(runs[at : at + largest], runs[0].config.cluster, runs_dir, copy_of_code(runs_dir / ".code"))
        for runs in groups.values()
        for runs_dir in [Path(runs[0].config.runs_dir)]
        for at in range(0, len(runs), largest)
    ]


def parameters(array: Array) -> dict[str, Any]:
    """What submitit makes ``#SBATCH`` lines and the commands before the run of."""
    cluster = array.cluster
    options = {key: value for key, value in cluster.options.items() if value not in (None, False)}
    requeue = {} if cluster.options.get("requeue") is False else {"requeue": True}
    memory = None if cluster.memory_gb is None else f"{round(1024 * cluster.memory_gb)}M"
    cpus = [] if cluster.cpus_per_node is None else [f"--cpus-per-task={cluster.cpus_per_node}"]  # 22.05 drops sbatch's
    return {
        "job_name": array.runs[0].folder.name if len(array.runs) == 1 else "largebatch",
        "nodes": cluster.nodes,
        "ntasks_per_node": 1,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "gpus_per_node": cluster.gpus_per_node or None,
        "cpus_per_task": cluster.cpus_per_node,
        "mem": memory,
        "time": cluster.time_limit,
        "signal_delay_s": cluster.signal_seconds,
        "array_parallelism": cluster.array_parallelism or len(array.runs),
        "wckey": None,
        "additional_parameters": requeue | options,
        "setup": [
            *cluster.setup,
            f"export PYTHONPATH={shlex.quote(str(array.code))}${{PYTHONPATH:+:$PYTHONPATH}}",
            "export PYTHONSAFEPATH=1",  # no package of the folder that this was submitted in comes first
        ],
        "srun_args": ["--kill-on-bad-exit=1", *cpus],
    }


def _claim_all(plan: Sequence[PlannedRun], claimed: list[tuple[PlannedRun, bool]]) -> None:
    """Claim what is neither done nor in the queue, and say what is."""
    jobs = jobs_of(run.folder.read_status() for run in plan)
    for run in plan:
        new = not run.folder.path.exists()
        outcome = claim(run, jobs, code=copy_of_code(Path(run.config.runs_dir) / ".code").name)
        if outcome is None:
            claimed.append((run, new))
        elif outcome.state == "failed":
            raise UserError(outcome.message)
        else:
            done = f"{run.folder.name} {outcome.state} before; not repeated (rerun=true repeats it)"
            _say(f"      {done if outcome.skipped else outcome.message}")


def _is_missing(run: PlannedRun, jobs: Jobs) -> bool:
    status = run.folder.read_status()
    return not has_it(status, jobs) and (status.get("state") not in DONE or run.config.rerun)


def _submit(array: Array) -> str:
    """Have SLURM take the array, and write down its number, which is returned."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError
    from submitit.helpers import clean_env
    from submitit.slurm.slurm import SlurmExecutor

    array.folder.mkdir(exist_ok=True)
    # Of the class: an array is submitted by an executor that submitit makes.
    SlurmExecutor._make_submission_command = _sbatch  # type: ignore[assignment,method-assign]
    executor = SlurmExecutor(array.folder)
    executor.update_parameters(**parameters(array))
    before = set(array.folder.iterdir())
    where = {key: value for key, value in os.environ.items() if key in ("SLURM_CONF", "SLURM_CLUSTERS")}
    in_a_job = "SLURM_JOB_ID" in os.environ  # its variables aren't the new one's
    try:
        with clean_env() if in_a_job else contextlib.nullcontext(), contextlib.redirect_stderr(io.StringIO()):
            os.environ.update(where)  # the error that submitit prints is the one that it raises
            jobs = executor.map_array(carry_out_run, [str(run.folder.path) for run in array.runs])
    except (FailedJobError, FailedSubmissionError) as error:
        for file in set(array.folder.iterdir()) - before:
            file.unlink()
        raise UserError(f"SLURM refused {len(array.runs)} run(s): {' '.join(str(error).split())}") from None
    for run, job in zip(array.runs, jobs, strict=True):
        with contextlib.suppress(RunBusyError), run.folder.hold():  # else it has begun, and wrote the same
            if run.folder.read_status().get("job_id") is None:
                run.folder.update_status(job_id=job.job_id)
    return str(jobs[0].job_id).partition("_")[0]


def _sbatch(_: Any, file: Path) -> list[str]:
    return [sys.executable, "-m", "largebatch.launch.sbatch", str(file)]


def _withdraw(jobs: list[str], claimed: list[tuple[PlannedRun, bool]], why: str) -> None:
    """Take back what was submitted, and say so in the runs' folders; those that are new and empty go."""
    if jobs:
        subprocess.run(["scancel", *jobs], capture_output=True, check=False)
    for run, new in claimed:
        if new and run.folder.read_status().get("job_id") is None:
            shutil.rmtree(run.folder.path)
        else:
            run.folder.update_status(state="failed", message=f"wasn't submitted: {why}", exit_code=2)


def _largest_array() -> int:
    if shutil.which("scontrol"):
        found = re.search(r"^MaxArraySize\s*=\s*(\d+)", ask("scontrol", "show", "config").stdout, re.MULTILINE)
        if found:
            return max(1, int(found[1]))
    return _ARRAY_SIZE


def _announce(jobs: dict[str, Array]) -> None:
    for job, array in jobs.items():
        count, cluster = len(array.runs), array.cluster
        at_a_time = f", at most {cluster.array_parallelism} at a time" if cluster.array_parallelism else ""
        what = f"{count} runs as array {job}{at_a_time}" if count > 1 else f"{array.runs[0].folder.name} as job {job}"
        _say(f"submitted {what}")
    if not jobs:
        _say("nothing to submit")
        return
    if len(jobs) > 1 and next(iter(jobs.values())).cluster.array_parallelism:
        _say("each of these arrays keeps cluster.array_parallelism for itself")
    array, numbers = next(iter(jobs.values())), list(jobs)
    hint = array.runs[0].folder.name.rpartition("-")[2]
    _say(f"  largebatch status {array.runs_dir}   # how the runs stand; --watch keeps looking")
    _say(f"  largebatch logs {array.runs_dir}/{hint}   # what a run says; SLURM's own logs are in {array.folder}")
    _say(f"  squeue --jobs={','.join(numbers)}   # what SLURM says")
    _say(f"  scancel {' '.join(numbers)}   # end them; the same command again continues from the last checkpoint")


def _watch(plan: Sequence[PlannedRun]) -> int:
    """Say what ends until all have ended. The exit code is as after runs on this machine."""
    numbers = {run.folder.name: number for number, run in enumerate(plan, start=1)}
    told: set[str] = set()
    try:
        while True:
            rows = {row["run"]: row for row in run_rows([run.folder for run in plan])}
            for name, row in rows.items():
                if name not in told and row["state"] not in ("queued", "running"):
                    told.add(name)
                    message = f": {row['message']}" if row["message"] else ""
                    _say(f"[{numbers[name]}/{len(plan)}] {name} {row['state']}{message}")
            if len(told) == len(plan):
                break
            time.sleep(_LOOK_SECONDS)
    except KeyboardInterrupt:
        _say("\nno longer watching; the jobs go on. The same command watches again, scancel ends them")
        return 130
    print_table(plan)
    codes = {_exit_code(run, rows[run.folder.name]["state"]) for run in plan} - {0}
    return min(codes) if codes else 0


def _exit_code(run: PlannedRun, state: str) -> int:
    if state in ("finished", "diverged"):
        return 0
    return int(run.folder.read_status().get("exit_code") or 1)


def _say(text: str) -> None:
    print(text, flush=True)
