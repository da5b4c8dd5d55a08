"""Errors that the user can fix, with suggestions for mistyped names."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable


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


def exit_code_of(program: Callable[[], int]) -> int:
    """Run ``program`` and return its exit code: 2 after a ``UserError``, 130 after Ctrl-C, 141 after a closed pipe."""
    try:
        return program()
    except UserError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader closed the pipe, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
