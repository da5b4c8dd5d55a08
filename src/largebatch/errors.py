"""Errors that the user can fix, with suggestions for mistyped names."""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Iterable

# Modules that the program imports from the extras in pyproject.toml. argcomplete is missed by a shell alone.
EXTRAS = {
    "train": (
        *("hydra", "omegaconf", "yaml", "torchvision", "timm", "safetensors", "sklearn", "numpy", "scipy", "PIL"),
        *("pyarrow", "tqdm", "rich"),
    ),
    "wandb": ("wandb", "wandb_workspaces"),
    "tensorboard": ("tensorboard",),
    "trackio": ("trackio",),
    "report": ("plotly", "jinja2"),
    "slurm": ("submitit",),
    "export": ("onnx", "onnxscript"),
    "optimizers": ("pytorch_optimizer", "opt_einsum"),
}
_FEWEST_LETTERS = 3  # of a beginning that names a longer key


class UserError(Exception):
    """Error that the user can fix: shown as one message without a traceback, with exit code 2.

    The message names the key and its value, the problem, the allowed values, and the fix.
    """


def missing_extra(error: BaseException) -> str:
    """Describe the extra to install if ``error`` is a missing module of an extra; else return an empty text."""
    module = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    extras = [extra for extra, modules in EXTRAS.items() if module in modules]
    return f"{module} isn't installed. Fix: pip install 'largebatch[{extras[0]}]'" if extras else ""


def one_line(error: Exception) -> str:
    """Return the error's type and text in one line of at most 300 characters, without passwords."""
    text = without_password(" ".join(f"{type(error).__name__}: {error}".split()))
    return text if len(text) <= 300 else text[:299] + "…"


def without_password(text: str) -> str:
    """Return ``text`` without the user and password in URLs."""
    return re.sub(r"//[^/\s@]*@", "//", text)


def require(extra: str) -> None:
    """Raise a ``UserError`` unless all modules of ``extra`` are installed."""
    for module in EXTRAS[extra]:
        if importlib.util.find_spec(module) is None:
            raise UserError(missing_extra(ModuleNotFoundError(name=module)))


def choices(given: object, allowed: Iterable[str]) -> str:
    """Return ``"allowed: a, b, c; did you mean b?"``, for an error about an unknown name ``given``."""
    names = list(allowed)
    near = nearest(str(given), names)
    listed = ", ".join(names) if len(names) <= 40 else f"{len(names)} names"
    return f"allowed: {listed}" + (f"; did you mean {near}?" if near else "")


def nearest(given: str, names: Iterable[str]) -> str | None:
    """Return the name that ``given`` probably means, or None.

    A name may be a dotted key, whose last part counts. In this order: the last part itself (``lr``: ``optimizer.lr``),
    initials (``bs``: ``batch_size``; ``learning_rate``: ``optimizer.lr``), a beginning, a near spelling. Of several
    keys, the least nested one counts, then the first.
    """
    keys: dict[str, str] = {}  # by last part
    for name in sorted(names, key=lambda name: name.count(".")):
        keys.setdefault(name.rpartition(".")[2], name)
    last = given.rpartition(".")[2]
    if not last or last in keys:
        return keys.get(last)
    short = [part for part in keys if last == _initials(part) or _initials(last) == part]
    near = difflib.get_close_matches(last, keys, n=1)
    longer = [part for part in keys if len(last) >= _FEWEST_LETTERS and part.startswith(last)]
    return next((keys[part] for part in (*short, *longer, *near)), None)


def _initials(name: str) -> str:
    """Return ``"bs"`` for ``"batch_size"``; empty for a single word."""
    words = [word for word in re.split("[_-]", name) if word]
    return "".join(word[0] for word in words) if len(words) > 1 else ""
