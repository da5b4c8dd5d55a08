"""The error that a user can mend, and the nearest name for a mistyped one."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend: shown as one message without a traceback, exit code 2.

    The message says what was wrong and where, what is allowed, and what to do.
    """


def choices(given: object, allowed: Iterable[str]) -> str:
    """``"allowed: a, b, c; did you mean b?"`` for an error about a name that isn't one of ``allowed``."""
    names = list(allowed)
    near = difflib.get_close_matches(str(given), names, n=1)
    listed = ", ".join(names) if len(names) <= 40 else f"{len(names)} names"
    return f"allowed: {listed}" + (f"; did you mean {near[0]}?" if near else "")
