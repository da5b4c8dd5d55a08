"""Errors that the user can fix, with suggestions for mistyped names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Error that the user can fix: shown as one message without a traceback, with exit code 2.

    The message names the key and its value, the problem, the allowed values, and the fix.
    """


def choices(given: object, allowed: Iterable[str]) -> str:
    """Return ``"allowed: a, b, c; did you mean b?"``, for an error about an unknown name ``given``."""
    names = list(allowed)
    near = difflib.get_close_matches(str(given), names, n=1)
    listed = ", ".join(names) if len(names) <= 40 else f"{len(names)} names"
    return f"allowed: {listed}" + (f"; did you mean {near[0]}?" if near else "")
