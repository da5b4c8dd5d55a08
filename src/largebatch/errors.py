"""Errors that the user can fix, with suggestions for mistyped names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_FEWEST_LETTERS = 3  # of a beginning that names a longer key


class UserError(Exception):
    """Error that the user can fix: shown as one message without a traceback, with exit code 2.

    The message names the key and its value, the problem, the allowed values, and the fix.
    """


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
