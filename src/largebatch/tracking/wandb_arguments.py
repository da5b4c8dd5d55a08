"""Arguments of ``wandb.init``: a run's name, place and configuration, and settings of wandb."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

from largebatch.config.identity import setting_hash, setting_name, without_none
from largebatch.config.schema import Config


def agent_run_id() -> str | None:
    """Return the id of the W&B run that a W&B sweep's agent opened for this process, or None without an agent."""
    return os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None


def run_arguments(config: Config, run_id: str, name: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``wandb.init`` that describe a run, cut to what W&B accepts. JSON types only."""
    tracker = config.tracker
    return {
        "id": run_id,
        "name": name[:128],
        "project": re.sub(r"[/\\#?%:]", "_", tracker.project)[:128] or "largebatch",
        "entity": tracker.entity,
        "group": tracker.group,
        "job_type": tracker.job_type or config.mode.name,
        "tags": run_tags(config),
        "notes": tracker.notes,
        "config": wandb_config(config, {"run": name, **facts} if facts else {}),
    }


def run_settings(init_timeout: float, finish_timeout: float) -> dict[str, Any]:
    """Return wandb's settings; timeouts in seconds."""
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


def wandb_config(config: Config, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration under its own names, without unused options, and the keys to group runs by."""
    shown = {
        **dataclasses.asdict(config),
        "setting": setting_name(config),
        "setting_hash": setting_hash(config),
        "optimizer_label": f"{config.optimizer.name} + {config.schedule.name}",
        "resolved": facts or None,
    }
    return dict(without_none(shown))


def run_tags(config: Config) -> list[str]:
    """Return data set, model, optimizer, schedule and ``tracker.tags``: each once, stripped, 1 to 64 characters."""
    parts = [config.dataset.name, config.model.name, config.optimizer.name, config.schedule.name, *config.tracker.tags]
    return list(dict.fromkeys(tag for part in parts if (tag := part.strip()[:64].strip())))
