"""Arguments of ``wandb.init``: a run's name, place and configuration, and settings of wandb."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from largebatch.config.schema import Config, TrackerConfig
from largebatch.tracking.tracker import shown_config

if TYPE_CHECKING:
    import wandb


def agent_run_id() -> str | None:
    """Return the id of the W&B run that a W&B sweep's agent opened for this process, or None without an agent."""
    return os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None


def run_arguments(
    config: Config, run_id: str, name: str, facts: dict[str, Any], surroundings: wandb.Settings
) -> dict[str, Any]:
    """Return the arguments of ``wandb.init`` that describe a run, cut to what W&B accepts. JSON types only.

    A key of ``tracker`` comes before wandb's settings in ``surroundings`` (environment variables and files), and these
    before the project's defaults.
    """
    tracker = config.tracker
    project = tracker.project or surroundings.project or "largebatch"
    return {
        "id": run_id,
        "name": (tracker.run_name or surroundings.run_name or name)[:128],
        "project": re.sub(r"[/\\#?%:]", "_", project)[:128],
        "entity": tracker.entity,
        "group": tracker.group,
        "job_type": tracker.job_type or surroundings.run_job_type or config.mode.name,
        "tags": run_tags(config, *(surroundings.run_tags or ())),
        "notes": tracker.notes,
        "config": shown_config(config, {"run": name, **facts} if facts else {}),
    }


def run_settings(tracker: TrackerConfig, init_timeout: float, finish_timeout: float) -> dict[str, Any]:
    """Return wandb's settings of a live run; timeouts in seconds."""
    return (
        base_settings(init_timeout, finish_timeout)
        | {
            "console": "wrap" if tracker.console else "off",
            "disable_git": not tracker.git,
        }
        | ({"git_root": os.environ.get("WANDB_GIT_ROOT") or os.getcwd()} if tracker.git else {})
    )


def base_settings(init_timeout: float, finish_timeout: float) -> dict[str, Any]:
    """Return wandb's settings that are the same for live runs and uploads; timeouts in seconds."""
    return {
        "init_timeout": init_timeout,
        "finish_timeout": finish_timeout,
        "finish_timeout_raises": True,
        "x_transaction_log_flush_interval": 1.0,  # seconds that a killed process loses; wandb's default is 15
        "console": "off",
        "silent": True,
        "disable_git": True,  # remote addresses may hold passwords; the commit is among our facts
        "disable_code": True,
        "save_code": False,
        "disable_job_creation": True,
        "use_dot_wandb": False,
    }


def run_tags(config: Config, *more: str) -> list[str]:
    """Return data set, model, optimizer, schedule, ``tracker.tags`` and more: each once, of 1 to 64 characters."""
    choices = config.dataset.name, config.model.name, config.optimizer.name, config.schedule.name
    parts = [*choices, *config.tracker.tags, *more]
    return list(dict.fromkeys(tag for part in parts if (tag := part.strip()[:64].strip())))
