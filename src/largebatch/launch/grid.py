"""Run a plan, or show it."""

from __future__ import annotations

from collections.abc import Sequence

from largebatch.errors import UserError
from largebatch.launch import sweep_agent
from largebatch.launch.estimate import estimated
from largebatch.launch.local import exit_code
from largebatch.launch.packing import StoppedByUser, carry_out, noted_signals, runs_at_a_time
from largebatch.launch.plan import PlannedRun
from largebatch.launch.slurm import sbatch_texts, submit_plan
from largebatch.launch.view import PlanView, plan_rows, print_plan
from largebatch.runs.folder import DONE
from largebatch.runs.table import counted
from largebatch.tracking.wandb_arguments import agent_run_id


def carry_out_plan(plan: Sequence[PlannedRun]) -> int:
    """Run every run of the plan and return the program's exit code.

    0: every run has an outcome (a divergence is one); 1: a run failed; 2: a failure that the user can fix;
    128 plus the number of the signal that stopped the runs, 130 for Ctrl-C.
    """
    if agent_run_id():
        sweep_agent.check(plan)
    if _on_slurm(plan):
        return submit_plan(plan)
    view = PlanView(plan, runs_at_a_time(plan))
    try:
        with noted_signals() as received:
            outcomes = carry_out(plan, view, received)
    except StoppedByUser as stopped:
        view.close()
        print(f"stopped; the same command resumes {stopped}", flush=True)
        return 128 + stopped.number
    finally:
        view.close()
        if len(plan) > 1:
            print_plan(plan_rows(plan))
    if agent_run_id() and outcomes[0].skipped:
        sweep_agent.show_finished(plan[0])
    # A run of a grid that another launcher works on is no failure.
    return exit_code(outcome.exit_code for outcome in outcomes if len(plan) == 1 or outcome.state != "busy")


def show_plan(plan: Sequence[PlannedRun]) -> int:
    """Print the runs, their states, the settings that differ, and an estimate of the time to go."""
    rows = plan_rows(plan)
    print(f"{len(plan)} run(s): {counted(rows)}; nothing is started (dry_run=true)", flush=True)
    to_go = [run for run, row in zip(plan, rows, strict=True) if row["state"] not in DONE or run.config.rerun]
    if estimate := estimated(to_go):
        print(estimate)
    print_plan(rows)
    if _on_slurm(plan):
        for text in sbatch_texts(plan):
            print(f"\nscript for sbatch:\n\n{text}")
    return 0


def _on_slurm(plan: Sequence[PlannedRun]) -> bool:
    names = {run.config.cluster.name for run in plan}
    if len(names) > 1:
        raise UserError("cluster.name: differs within the grid. Fix: start one grid for each cluster")
    return names == {"slurm"}
