"""Whether a sweep's agent of W&B started this program. Imports nothing: the launcher asks at each start."""

from __future__ import annotations

import os


def agent_run_id() -> str | None:
    """The id of the W&B run that a sweep's agent has opened for this run; None where no agent started it."""
    return os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
