"""What W&B is told of a run when it starts: its name and place, its configuration, and how wandb is to behave."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from largebatch.config.identity import setting_hash, setting_name, without_none
from largebatch.config.schema import Config


def run_arguments(
    config: Config,
    directory: Path,
    run_id: str,
    name: str,
    facts: dict[str, Any],
    init_timeout: float,
    finish_timeout: float,
) -> dict[str, Any]:
    """Arguments of ``wandb.init``: what W&B is told, cut to what it accepts, and how it is to behave."""
    tracker = config.tracker
    return {
        "dir": str(directory),
        "id": run_id,
        "resume": "allow",
        "name": name[:128],
        "project": re.sub(r"[/\\#?%:]", "_", tracker.project)[:128] or "largebatch",
        "entity": tracker.entity,
        "group": tracker.group,
        "job_type": tracker.job_type or config.mode.name,
        "tags": run_tags(config),
        "notes": tracker.notes,
        "config": wandb_config(config, {"run": name, **facts} if facts else {}),
        "settings": {
            "init_timeout": init_timeout,
            "finish_timeout": finish_timeout,
            "finish_timeout_raises": True,  # so that it is said
            "x_transaction_log_flush_interval": 1.0,  # seconds that a killed process loses; wandb's default is 15
            "console": "off",
            "silent": True,
            "disable_git": True,  # remote addresses hold passwords; the commit is among our facts
            "disable_code": True,
            "save_code": False,
            "disable_job_creation": True,
            "use_dot_wandb": False,
        },
    }


def wandb_config(config: Config, facts: dict[str, Any]) -> dict[str, Any]:
    """The configuration under its own names, without the options that the choices don't have, and what to group by."""
    shown: dict[str, Any] = without_none(
        {
            **dataclasses.asdict(config),
            "setting": setting_name(config),
            "setting_hash": setting_hash(config),
            "optimizer_label": f"{config.optimizer.name} + {config.schedule.name}",
            "resolved": facts or None,
        }
    )
    return shown


def run_tags(config: Config) -> list[str]:
    """Data set, model, optimizer, schedule and ``tracker.tags``: each once, stripped, 1 to 64 characters long."""
    parts = [config.dataset.name, config.model.name, config.optimizer.name, config.schedule.name, *config.tracker.tags]
    return list(dict.fromkeys(tag for part in parts if (tag := part.strip()[:64].strip())))
