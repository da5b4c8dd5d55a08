"""Errors that the user can fix, with suggestions for mistyped names."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable

# Modules that the program imports from the extras in pyproject.toml. argcomplete is missed by a shell alone.
EXTRAS = {
    "train": (
        *("hydra", "omegaconf", "yaml", "torchvision", "timm", "sklearn", "numpy", "scipy", "PIL", "pyarrow", "tqdm"),
        "rich",
    ),
    "wandb": ("wandb", "wandb_workspaces"),
    "report": ("plotly", "jinja2"),
    "slurm": ("submitit",),
}


class UserError(Exception):
    """Error that the user can fix: shown as one message without a traceback, with exit code 2.

    The message names the key and its value, the problem, the allowed values, and the fix.
    """


def missing_extra(error: BaseException) -> str:
    """Describe the extra to install if ``error`` is a missing module of an extra; else return an empty text."""
    module = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    extras = [extra for extra, modules in EXTRAS.items() if module in modules]
    return f"{module} isn't installed. Fix: pip install 'largebatch[{extras[0]}]'" if extras else ""


def require(extra: str) -> None:
    """Raise a ``UserError`` unless all modules of ``extra`` are installed."""
    for module in EXTRAS[extra]:
        if importlib.util.find_spec(module) is None:
            raise UserError(missing_extra(ModuleNotFoundError(name=module)))


def choices(given: object, allowed: Iterable[str]) -> str:
    """Return ``"allowed: a, b, c; did you mean b?"``, for an error about an unknown name ``given``."""
    names = list(allowed)
    near = difflib.get_close_matches(str(given), names, n=1)
    listed = ", ".join(names) if len(names) <= 40 else f"{len(names)} names"
    return f"allowed: {listed}" + (f"; did you mean {near[0]}?" if near else "")
