"""Detection of a W&B sweep's agent. Imports nothing heavy, because the launcher calls it at each start."""

from __future__ import annotations

import os


def agent_run_id() -> str | None:
    """Return the id of the W&B run that a W&B sweep's agent opened for this process, or None without an agent."""
    return os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
