"""Under a W&B agent (``wandb agent``): one run, with what the sweep chose, in the W&B run that the agent opened for it.

The agent starts ``launch.py`` with the sweep's ``command`` and waits for it. See docs/dashboards.md.
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

_OUTCOME = ("state", "step", "wall_seconds", "images_per_second")  # of a summary; what else has no / are facts
_NOT_OURS = ("_wandb=", "resolved=")  # of W&B's configuration of a run: nobody gives these by hand


def overrides(arguments: Sequence[str]) -> list[str]:
    """An agent's arguments as overrides: its ``None`` is ``null``.

    For a run that goes on after a preemption the agent gives the whole configuration that W&B has of it. Of that the
    plain values stay, and the sweep's own (``optimizer.lr=1``), beside what the command has chosen.
    """
    given = [f"{argument[:-5]}=null" if argument.endswith("=None") else argument for argument in arguments]
    if not any(argument.startswith(_NOT_OURS) for argument in given):
        return given
    known = {field.name for field in dataclasses.fields(Config)}
    kept = []
    for argument in given:
        key, _, value = argument.partition("=")
        if key.startswith("-") or (key.lstrip("+~").partition(".")[0] in known and not value.startswith("{")):
            kept.append(argument)
    return kept


def check(plan: Sequence[PlannedRun]) -> None:
    """
    Raises:
        UserError: for what an agent can't do with its run.
    """
    config = plan[0].config
    if len(plan) > 1:
        raise UserError("-m: a W&B agent takes one run at a time; let the sweep have the parameter instead")
    if config.cluster.name == "slurm":
        raise UserError(
            "cluster=slurm: a W&B agent would take the run as over once it is submitted; "
            "start the agent in a job instead (docs/dashboards.md)"
        )
    if config.tracker.name == "none" or config.tracker.mode in ("offline", "disabled"):
        raise UserError("tracker: a W&B sweep needs its runs' figures; leave out tracker=none and tracker.mode")


def show_finished(run: PlannedRun) -> None:
    """Give the agent's W&B run all that a finished run has recorded, so that the sweep sees its value."""
    from largebatch.tracking.sync import send
    from largebatch.tracking.wandb_arguments import wandb_config

    facts = {k: v for k, v in run.folder.read_summary().items() if "/" not in k and k not in _OUTCOME}
    if copy := _join(run, facts):
        send(copy, run.folder, wandb_config(run.config, facts), in_sweep=True)
        print(f"the W&B sweep got the metrics of {run.folder.path}", flush=True)


def give_back(run: PlannedRun) -> None:
    """Tell W&B that a run which had to make way is to go on: an agent, this or another one, is given it again."""
    from largebatch.tracking import wandb_run

    if run.folder.state() == "preempted" and (interrupted := _join(run, {})):
        interrupted.mark_preempting()
        interrupted.finish(wandb_run.exit_code("preempted", in_sweep=True))
        print("the sweep was told that the run is to go on", flush=True)


def _join(run: PlannedRun, facts: dict[str, Any]) -> WandbRun | None:
    """Open the agent's W&B run from here, where the run isn't at work."""
    from largebatch.tracking import wandb_run

    return wandb_run.start(run.config, run.folder.path, run.folder.name, run.folder.name, facts, print)
