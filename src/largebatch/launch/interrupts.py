"""Signals that ask the launcher to stop, noted until it looks.

As an exception in the middle of anything, a KeyboardInterrupt could come between a worker's start and its being known,
or leave a lock of ``subprocess`` taken for ever.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

# Ctrl-C; SIGTERM, an agent's or a supervisor's; SIGUSR2, SLURM's before a time limit.
_ASK_TO_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """The signals that have come meanwhile, in their order. What they did before, they do again afterwards."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in _ASK_TO_STOP}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
