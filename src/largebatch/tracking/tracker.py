"""A run's copy in another program. The truth is in the run folder, and no failure of a tracker may stop training.

A tracker is a module ``NAME_run.py`` with a function ``start`` and a subclass of ``Tracker``, a preset
``conf/tracker/NAME.yaml``, and its name in ``TrackerConfig``. Only rank 0 starts a tracker.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from largebatch.config.identity import setting_hash, setting_name, without_none
from largebatch.config.schema import Config
from largebatch.errors import missing_extra, one_line
from largebatch.runs.folder import RunFolder
from largebatch.runs.metrics import Row
from largebatch.tracking.rows import NO_MEDIA, Media

Say = Callable[[str], None]

MOST_CLASSES = 100  # of a confusion matrix: more would be too small to read
_MATRIX_SIDE = 256  # least side of a drawn confusion matrix, in pixels
_BINS = 32  # of a histogram: enough for a hundred layers


class Tracker:
    """A started copy of a run. Its public methods never raise: the first failure is logged and ends the copy.

    Subclasses implement the methods that start with an underscore, which may raise.

    Args:
        say: takes one line at a time.

    Attributes:
        label: the tracker's name in messages.
        id: the run's id in W&B; None for other trackers.
        first: number of rows that the tracker has already.
    """

    label = ""
    id: str | None = None
    first = 0

    def __init__(self, say: Say) -> None:
        self._say = say
        self._is_sending = True

    def log(self, number: int, row: Row, media: Media = NO_MEDIA) -> None:
        """Log a row with ``step`` and ``epoch`` if the tracker lacks it.

        ``number`` counts the run's rows from 0 (see ``RowOrder``).
        """
        if number >= self.first:
            self._attempt("log", lambda: self._log(number, dict(without_none(row)), media))

    def summarize(self, summary: dict[str, Any]) -> None:
        """Set the run's final and best values."""
        self._attempt("write the summary", lambda: self._summarize(summary))

    def alert(self, title: str, text: str) -> None:
        """Let the tracker notify the user, if it can."""
        self._attempt("send an alert", lambda: self._alert(title, text))

    def upload_checkpoints(self, folder: RunFolder, rows: list[Row]) -> None:
        """Upload the last and the best checkpoint, if the tracker keeps files. ``rows`` are the run's metrics rows."""
        self._attempt("upload a checkpoint", lambda: self._upload_checkpoints(folder, rows))

    def finish(self, state: str) -> None:
        """End the copy of a run in ``state``."""
        self._attempt("finish", lambda: self._finish(state), always=True)

    def _log(self, number: int, row: Row, media: Media) -> None:
        """Log a row without values that are None."""
        raise NotImplementedError

    def _finish(self, state: str) -> None:
        raise NotImplementedError

    def _summarize(self, summary: dict[str, Any]) -> None:
        """Do nothing: a tracker may have no place for final values."""

    def _alert(self, title: str, text: str) -> None:
        """Do nothing: a tracker without an account notifies nobody."""

    def _upload_checkpoints(self, folder: RunFolder, rows: list[Row]) -> None:
        """Do nothing: the run folder has the checkpoints."""

    def _attempt(self, what: str, action: Callable[[], object], always: bool = False) -> None:
        if self._is_sending or always:
            try:
                action()
            except Exception as error:  # the tracker's or our own; the first is logged
                if self._is_sending:
                    self._say(f"{self.label} logging ends: could not {what}: {one_line(error)}")
                self._is_sending = False


def start_tracker(
    config: Config, directory: Path, run_id: str, name: str, facts: dict[str, Any], say: Say
) -> Tracker | None:
    """Start or resume the copy of one run that ``config.tracker`` names. Never raises.

    Args:
        config: the run's configuration, which the copy shows whole.
        directory: the run folder.
        run_id: the same id continues the same copy.
        name: the run's name.
        facts: resolved values (learning rate, batch per process, commit, versions).
        say: takes one line at a time: the place or the reason for having no copy, and the first failure.

    Returns:
        None when no copy is wanted (``tracker=none``, ``tracker.mode=disabled``) or the tracker can't be started.
    """
    tracker = config.tracker.name
    if tracker == "none" or config.tracker.mode == "disabled":
        return None
    try:
        module = importlib.import_module(f"largebatch.tracking.{tracker}_run")
        started: Tracker | None = module.start(config, directory, run_id, name, facts, say)
    except Exception as error:  # a missing or broken package, a full disk: training matters more
        say(f"tracker={tracker} is off: {missing_extra(error) or one_line(error)}")
        return None
    return started


def shown_config(config: Config, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration under its own names, without unused options, and the keys to group runs by."""
    shown = {
        **dataclasses.asdict(config),
        "setting": setting_name(config),
        "setting_hash": setting_hash(config),
        "optimizer_label": f"{config.optimizer.name} + {config.schedule.name}",
        "resolved": facts or None,
    }
    return dict(without_none(shown))


def histogram(values: Sequence[float]) -> tuple[Any, Any] | None:
    """Return counts [bins] and edges [bins + 1] of the finite values; None if there is no finite value."""
    import numpy

    finite = list(filter(math.isfinite, values))
    if not finite:
        return None
    low, high = min(finite), max(finite)
    # numpy widens a single value by 0.5, which is no range beside the 1e19 of a run that diverges.
    pad = max(0.5, abs(high) / 2) if low == high else 0.0
    return numpy.histogram(finite, bins=_BINS, range=(low - pad, high + pad))


def draw_confusion(predictions: Path) -> Any:
    """Return pixels uint8 [S, S, 3] of counts by label (rows) and prediction, or None with more than 100 classes.

    White is all images of the label.
    """
    import numpy

    from largebatch.runs.predictions import read_predictions

    found = read_predictions(predictions)
    if len(found.classes) > MOST_CLASSES:
        return None
    counts = found.confusion()
    part = counts / numpy.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = -(-_MATRIX_SIDE // len(counts))
    return (255 * part).round().astype(numpy.uint8).repeat(side, 0).repeat(side, 1)[:, :, None].repeat(3, 2)
