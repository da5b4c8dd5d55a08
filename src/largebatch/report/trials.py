"""Group settings into trials: settings that are far enough apart to be different attempts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

# Options that people tune in log scale, by the last part of their key.
LOG_SCALE = ("lr", "lr_1d", "lr_1d_ratio", "lmbda", "weight_decay")
_APART = math.log(1.05)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_log(key: str) -> bool:
    """Return True if people tune the option in log scale."""
    return key.rpartition(".")[2] in LOG_SCALE


def apart(key: str, one: Any, other: Any) -> bool:
    """Return True if two values of an option make different trials.

    Numbers do if they are at least 5 % apart in log scale. For options between 0 and 1 outside ``LOG_SCALE``, such as
    momentum, the distances to 1 count too. All other values do if they are different.
    """
    if one == other or not (is_number(one) and is_number(other)):
        return bool(one != other)
    pairs = [(one, other)]
    if not is_log(key) and 0 < one < 1 and 0 < other < 1:
        pairs.append((1 - one, 1 - other))
    return any(a * b <= 0 or abs(math.log(a / b)) >= _APART for a, b in pairs)


def distinct_trials(settings: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Group settings into trials. A setting joins the first trial whose first setting isn't apart from it.

    Args:
        settings: options of each setting, by dotted key.

    Returns:
        For each trial, the indices of its settings.
    """
    trials: list[list[int]] = []
    for i, options in enumerate(settings):
        for trial in trials:
            first = settings[trial[0]]
            if not any(apart(key, options.get(key), first.get(key)) for key in options.keys() | first.keys()):
                trial.append(i)
                break
        else:
            trials.append([i])
    return trials
