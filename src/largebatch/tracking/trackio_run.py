"""A run's copy for trackio: a SQLite file for all runs of a project, in ``.trackio/`` of the folder of runs.

No account and no network. The SQLite file is a copy of the run's own files. So a start removes the run's rows of an
earlier start, and the caller replays the rows so far: trackio never has a row twice.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from largebatch.config.identity import without_none
from largebatch.config.schema import Config
from largebatch.runs.metrics import Row
from largebatch.runs.predictions import read_predictions
from largebatch.tracking.tracker import MOST_CLASSES, Media, Say, Tracker, draw_confusion, histogram
from largebatch.tracking.wandb_arguments import wandb_config

if TYPE_CHECKING:
    from trackio.run import Run

# With these, trackio would send rows to a server.
_REMOTE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_BUCKET_ID", "TRACKIO_DATASET_ID")


class TrackioRun(Tracker):
    """A run in trackio's SQLite file. Its steps are optimizer steps."""

    label = "trackio"

    def __init__(self, run: Run, say: Say) -> None:
        super().__init__(say)
        self._run = run

    def _log(self, number: int, row: Row, media: Media) -> None:
        import trackio

        shown: dict[str, Any] = {name: value for name, value in without_none(row).items() if name != "step"}
        for name, values in media.histograms.items():
            if counts := histogram(values):
                shown[name] = trackio.Histogram(np_histogram=counts)
        if media.images:
            shown["images"] = trackio.Image(str(media.images))
        if media.predictions and len((found := read_predictions(media.predictions)).classes) <= MOST_CLASSES:
            shown["confusion_matrix"] = trackio.Image(draw_confusion(found.confusion()).repeat(3, 2))
        self._run.log(shown, step=row["step"])

    def _summarize(self, summary: dict[str, Any]) -> None:
        """Do nothing: trackio has no values of a run beside its rows."""

    def _finish(self, exit_code: int) -> None:
        with _quiet():
            self._run.finish()


def start(config: Config, directory: Path, run_id: str, name: str, facts: dict[str, Any], say: Say) -> TrackioRun:
    """Start the copy of one run folder; see ``start_tracker``. Raises errors of the import and of the disk."""
    os.environ.setdefault("TRACKIO_DIR", str(directory.parent.absolute() / ".trackio"))
    for variable in _REMOTE:
        os.environ.pop(variable, None)
    with _quiet():
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        project = re.sub(r"[^\w.-]", "_", config.tracker.project or "largebatch")
        shown = config.tracker.run_name or name
        SQLiteStorage.delete_run(project, shown)
        run = trackio.init(
            project, name=shown, group=config.tracker.group, embed=False, auto_log_gpu=False, auto_log_cpu=False,
            config=wandb_config(config, {"run": name, **facts}),
        )  # fmt: skip
    folder = os.environ["TRACKIO_DIR"]
    say(f"trackio: TRACKIO_DIR={folder} trackio show --project {project}")
    return TrackioRun(run, say)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop what trackio prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
