"""Points drawn from intervals: a search whose runs are all known before the first one starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.override_parser.types import IntervalSweep, Override

from largebatch.errors import UserError


@dataclass(frozen=True)
class Interval:
    """An axis ``interval(low,high)``, perhaps inside ``tag(log,...)`` or ``int(...)``."""

    key: str
    low: float
    high: float
    log: bool
    whole: bool

    def at(self, part: float) -> str:
        """Return the override at ``part`` in 0..1 of the interval, rounded to four digits."""
        value = self.low * (self.high / self.low) ** part if self.log else self.low + (self.high - self.low) * part
        return f"{self.key}={round(value) if self.whole else format(value, '.4g')}"


def interval_of(override: Override) -> Interval:
    """Return the axis of an override like ``optimizer.lr=tag(log,interval(0.1,10))``.

    Raises:
        UserError: the interval is empty, or logarithmic with a start of zero or below.
    """
    sweep = override.value()
    assert isinstance(sweep, IntervalSweep)
    assert sweep.start is not None
    assert sweep.end is not None
    log = "log" in sweep.tags
    if not sweep.start < sweep.end:
        raise UserError(f"{override.input_line}: the interval's end must be above its start")
    if log and sweep.start <= 0:
        raise UserError(f"{override.input_line}: a logarithmic interval must start above 0")
    return Interval(override.get_key_element(), sweep.start, sweep.end, log, isinstance(sweep.start, int))


def drawn(intervals: Sequence[Interval], trials: int) -> list[list[str]]:
    """Return the overrides of ``trials`` points, a list of one override for each interval.

    The points are the Halton sequence: it fills the space evenly for any number of points and has no seed. The same
    command gives the same runs, and more trials extend them.
    """
    from scipy.stats import qmc

    points = qmc.Halton(len(intervals), scramble=False).random(trials + 1)[1:]  # the first is a corner
    return [[interval.at(float(part)) for interval, part in zip(intervals, point, strict=True)] for point in points]
