"""Run a plan, or show it. On this machine, as many runs at a time as fit on its devices."""

from __future__ import annotations

import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from largebatch.errors import UserError
from largebatch.launch import sweep_agent
from largebatch.launch.devices import chosen_gpus, in_words, worker_environment
from largebatch.launch.local import Outcome, Started, conclude, exit_code, has_ended, start, stop
from largebatch.launch.plan import PlannedRun, estimated
from largebatch.launch.slurm import sbatch_texts, submit_plan
from largebatch.launch.view import PlanView, plan_rows, print_notes, print_plan, print_report_command
from largebatch.runs.folder import DONE
from largebatch.runs.screen import wrapped
from largebatch.runs.table import counted
from largebatch.tracking.wandb_arguments import agent_run_id

_POLL_SECONDS = 0.05
# Ctrl-C; SIGTERM from an agent or supervisor; SIGUSR2 from SLURM before a time limit; SIGHUP when a connection ends.
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)


def carry_out_plan(plan: Sequence[PlannedRun], report_options: str = "") -> int:
    """Run every run of the plan and return the program's exit code. A grid ends with a table and the next command.

    0: every run has an outcome (a divergence is one); 1: a run failed; 2: a failure that the user can fix;
    128 plus the number of the signal that stopped the runs, 130 for Ctrl-C.

    Args:
        report_options: options of the next command, ``largebatch report``.
    """
    if agent_run_id():
        sweep_agent.check(plan)
    print_notes(plan)
    is_compared = len(plan) > 1 or plan[0].config.confirms
    if _on_slurm(plan):
        code = submit_plan(plan)
        if is_compared:
            print_report_command(plan[0].folder.path.parent, report_options, "when all runs have ended")
        return code
    view = PlanView(plan, runs_at_a_time(plan))
    try:
        with noted_signals() as received:
            outcomes = carry_out(plan, view, received)
    finally:
        view.close()
        if len(plan) > 1:
            print_plan(plan_rows(plan, view.outcomes))
    if is_compared and outcomes and any(outcome.state in DONE for outcome in outcomes):
        print_report_command(plan[0].folder.path.parent, report_options)
    if outcomes is None:
        return 128 + received[0]
    if agent_run_id() and outcomes[0].skipped:
        sweep_agent.show_finished(plan[0])
    # A run of a grid that another launcher works on is no failure.
    return exit_code(outcome.exit_code for outcome in outcomes if len(plan) == 1 or outcome.state != "busy")


def show_plan(plan: Sequence[PlannedRun]) -> int:
    """Print the runs, their states, the settings that differ, and an estimate of the time to go."""
    rows = plan_rows(plan)
    print(wrapped(f"{len(plan)} run(s): {counted(rows)}; nothing is started (dry_run=true)", sys.stdout), flush=True)
    to_go = [run for run, row in zip(plan, rows, strict=True) if row["state"] not in DONE or run.config.rerun]
    for words in dict.fromkeys(in_words(run.config.cluster) for run in plan):
        print(wrapped(words, sys.stdout))
    if to_go:
        print(wrapped(estimated(to_go), sys.stdout))
    print_notes(plan)
    print_plan(rows)
    if _on_slurm(plan):
        for text in sbatch_texts(to_go):
            print(f"\nscript for sbatch:\n\n{text}")
    return 0


def _on_slurm(plan: Sequence[PlannedRun]) -> bool:
    names = {run.config.cluster.name for run in plan}
    if len(names) > 1:
        raise UserError("cluster.name: differs within the grid. Fix: start one grid for each cluster")
    return names == {"slurm"}


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Collect the numbers of signals that ask to stop, instead of raising KeyboardInterrupt.

    An exception at any point could lose a worker that has just started, or leave a lock of ``subprocess`` taken.
    """
    received: list[int] = []
    under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    heard = [number for number in _STOP_SIGNALS if not (under_nohup and number == signal.SIGHUP)]
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in heard}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def runs_at_a_time(plan: Sequence[PlannedRun]) -> int:
    """Return ``cluster.parallel``, by default as many runs as fit on the GPUs, or one on CPU; at most all runs."""
    needed = [_gpus(run) for run in plan if _gpus(run)]
    most = len(_gpus_of(plan)) // min(needed) if needed else 1
    return max(1, min(plan[0].config.cluster.parallel or most, len(plan)))


def carry_out(plan: Sequence[PlannedRun], view: PlanView, received: list[int]) -> list[Outcome] | None:
    """Run the plan in order. Each run starts as soon as its devices are free; a failed run doesn't stop the others.

    Args:
        received: signals from ``noted_signals``. The first stops all runs after their step, another Ctrl-C at once.

    Returns:
        The outcomes, or None after such a signal, when no process of any run is left.
    """
    parallel = runs_at_a_time(plan)
    waiting, outcomes = deque(plan), []
    free = _gpus_of(plan)
    running: list[tuple[Started, list[str]]] = []  # with their GPUs
    while (waiting or running) and not received:
        while waiting and len(running) < parallel:
            needed = _gpus(waiting[0])
            gpus = [gpu for gpu in chosen_gpus(waiting[0].config.cluster) if gpu in free][:needed]
            if len(gpus) < needed:
                break
            run = waiting.popleft()
            view.begins(run)
            started = start(run, worker_environment(run.config.cluster, gpus, parallel), speaking=parallel == 1)
            if isinstance(started, Started):
                free = [gpu for gpu in free if gpu not in gpus]
                running.append((started, gpus))
            else:
                outcomes.append(started)
                view.ended(started)
        view.look([started for started, _ in running])
        time.sleep(_POLL_SECONDS)
        for one in [one for one in running if has_ended(one[0])]:
            running.remove(one)
            free += one[1]
            outcomes.append(conclude(one[0]))
            view.ended(outcomes[-1])
    if not waiting and not running:
        return outcomes
    stopped = [started for started, _ in running]
    if stopped:
        view.stopping(len(stopped))
        by = "Ctrl-C" if received[0] == signal.SIGINT else signal.Signals(received[0]).name
        stop(stopped, at_once=lambda: signal.SIGINT in received[1:], by=by)
    view.stopped(" and ".join(one.run.folder.name for one in stopped) or "the rest of the grid")
    return None


def _gpus_of(plan: Sequence[PlannedRun]) -> list[str]:
    """Return the GPUs that any run of the plan may use."""
    return list(dict.fromkeys(gpu for run in plan for gpu in chosen_gpus(run.config.cluster)))


def _gpus(run: PlannedRun) -> int:
    cluster = run.config.cluster
    return (cluster.processes or 1) if cluster.device == "cuda" else 0
