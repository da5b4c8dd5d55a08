"""Checkpoints of a run: written atomically, the newest two kept, a damaged one passed over."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

KEPT = 2


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors and plain values only) as the checkpoint after optimizer step ``step``."""
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as handle:
        torch.save({"step": step, **state}, handle)
        handle.flush()
        os.fsync(handle.fileno())  # so that the rename can't reach the disk before the content
    os.replace(temporary, path)
    for old in _newest_first(folder)[KEPT:]:
        old.unlink()


def load_newest(folder: Path, device: torch.device, say: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, or None. A damaged one is named through ``say`` and passed over."""
    for path in _newest_first(folder):
        try:
            state = torch.load(path, map_location=device, weights_only=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            say(f"{path} can't be read ({error}); trying the one before")
            continue
        assert isinstance(state, dict)
        return state
    return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"), reverse=True)
