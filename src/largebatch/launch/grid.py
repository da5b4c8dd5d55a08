"""Carrying a plan out, or showing it."""

from __future__ import annotations

from collections.abc import Sequence

from largebatch.errors import UserError
from largebatch.launch import sweep_agent
from largebatch.launch.estimate import estimated
from largebatch.launch.interrupts import noted_signals
from largebatch.launch.packing import StoppedByUser, carry_out, runs_at_a_time
from largebatch.launch.plan import PlannedRun
from largebatch.launch.plan_table import plan_rows, plan_table, print_table
from largebatch.launch.slurm import sbatch_texts, submit_plan
from largebatch.launch.view import PlanView
from largebatch.runs.folder import DONE
from largebatch.runs.table import counted
from largebatch.tracking.agent import agent_run_id


def carry_out_plan(plan: Sequence[PlannedRun]) -> int:
    """Carry out every run. Returns the exit code of the program.

    0: every run has an outcome (a divergence is one); 1: a run failed; 2: what failed is the user's to mend;
    128 and the number of the signal that stopped it: 130 for Ctrl-C.
    """
    if agent_run_id():
        sweep_agent.check(plan)
    if _on_slurm(plan):
        return submit_plan(plan)
    view = PlanView(plan, runs_at_a_time(plan))
    try:
        with noted_signals() as asked:
            outcomes = carry_out(plan, view, asked)
    except StoppedByUser as stopped:
        view.close()
        _say(f"stopped; the same command resumes {stopped}")
        return 128 + stopped.number
    finally:
        view.close()
        if len(plan) > 1:
            print_table(plan)
    if agent_run_id() and outcomes[0].skipped:
        sweep_agent.show_finished(plan[0])
    if len(plan) > 1:  # another launcher that shares the grid is no failure of this one
        outcomes = [outcome for outcome in outcomes if outcome.state != "busy"]
    codes = {outcome.exit_code for outcome in outcomes} - {0}
    return min(codes) if codes else 0


def show_plan(plan: Sequence[PlannedRun]) -> int:
    """What would be done: the runs, how each stands, what tells them apart, and how long they may take."""
    rows = plan_rows(plan)
    _say(f"{len(plan)} run(s): {counted(rows)}; nothing is started (dry_run=true)")
    to_go = [run for run, row in zip(plan, rows, strict=True) if row["state"] not in DONE or run.config.rerun]
    if estimate := estimated(to_go):
        _say(estimate)
    _say("\n" + plan_table(rows))
    if _on_slurm(plan):
        for text in sbatch_texts(plan):
            _say(f"\nsbatch would be given:\n\n{text}")
    return 0


def _on_slurm(plan: Sequence[PlannedRun]) -> bool:
    names = {run.config.cluster.name for run in plan}
    if len(names) > 1:
        raise UserError("cluster.name: differs within the grid; start one grid for each cluster")
    return names == {"slurm"}


def _say(text: str) -> None:
    print(text, flush=True)
