"""Runs of a W&B agent (``wandb agent``), with the W&B sweep's values, in the W&B run that the agent has opened.

The agent starts ``largebatch run`` by the W&B sweep's ``command`` and waits for it. See docs/dashboards.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from largebatch.config.schema import Config
from largebatch.errors import UserError
from largebatch.launch.plan import PlannedRun

if TYPE_CHECKING:
    from largebatch.tracking.wandb_run import WandbRun

# Keys of a summary; other keys without / are facts.
_OUTCOME = ("state", "step", "wall_seconds", "images_per_second", "checksum", "stopped_early")
_NOT_OURS = ("_wandb=", "resolved=")  # keys of W&B's configuration of a run, which users never give


def overrides(arguments: Sequence[str]) -> list[str]:
    """Return an agent's arguments as overrides; ``None`` becomes ``null``.

    For a preempted run the agent gives W&B's whole configuration of the run. The command's own arguments, plain values
    and the W&B sweep's values (``optimizer.lr=1``) stay, and W&B's mappings (``optimizer={'lr': 1}``) go.
    """
    given = [f"{argument[:-5]}=null" if argument.endswith("=None") else argument for argument in arguments]
    if not any(argument.startswith(_NOT_OURS) for argument in given):
        return given
    known = {field.name for field in dataclasses.fields(Config)}
    kept = []
    for argument in given:
        key, _, value = argument.partition("=")
        if key.startswith("-") or (key.lstrip("+~").partition(".")[0] in known and not value.startswith(("{'", "{}"))):
            kept.append(argument)
    return kept


def check(plan: Sequence[PlannedRun]) -> None:
    """Check that an agent can run the plan.

    Raises:
        UserError: the plan is a grid, goes to SLURM, or isn't tracked online.
    """
    config = plan[0].config
    if len(plan) > 1:
        raise UserError("-m: a W&B agent takes one run at a time. Fix: make the parameter part of the W&B sweep")
    if config.cluster.name == "slurm":
        raise UserError(
            "cluster=slurm: a W&B agent would count a submitted run as finished. "
            "Fix: start the agent in a job (docs/dashboards.md)"
        )
    if config.tracker.name != "wandb" or config.tracker.mode in ("offline", "disabled"):
        raise UserError("tracker: a W&B sweep needs its runs' metrics. Fix: tracker=wandb, and leave out tracker.mode")


def show_finished(run: PlannedRun) -> None:
    """Log everything that a finished run recorded to the agent's W&B run, so that the W&B sweep gets its value."""
    from largebatch.tracking.sync import send
    from largebatch.tracking.tracker import shown_config

    facts = {k: v for k, v in run.folder.read_summary().items() if "/" not in k and k not in _OUTCOME}
    if copy := _join(run, facts):
        send(copy, run.folder, shown_config(run.config, facts))
        print(f"logged the metrics of {run.folder.path} to the W&B sweep", flush=True)


def give_back(run: PlannedRun) -> None:
    """Mark a preempted run in W&B, which then gives the run to this or another agent."""
    if run.folder.state() == "preempted" and (interrupted := _join(run, {})):
        interrupted.mark_preempting()
        interrupted.finish("preempted")
        print("marked the run as preempted for the W&B sweep", flush=True)


def _join(run: PlannedRun, facts: dict[str, Any]) -> WandbRun | None:
    """Open the agent's W&B run in this process, while no worker runs."""
    from largebatch.tracking.tracker import start_tracker
    from largebatch.tracking.wandb_run import WandbRun

    joined = start_tracker(run.config, run.folder.path, run.folder.name, run.folder.name, facts, print)
    return joined if isinstance(joined, WandbRun) else None
