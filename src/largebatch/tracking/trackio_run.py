"""A run's copy for trackio: a SQLite file for all runs of a project, in ``.trackio/`` of the folder of runs.

No account and no network. The SQLite file is a copy of the run's own files. So a start removes the run's rows of an
earlier start, and the caller replays the rows so far: trackio never has a row twice.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from largebatch.config.schema import Config
from largebatch.runs.metrics import Row
from largebatch.tracking.rows import Media
from largebatch.tracking.tracker import Say, Tracker, draw_confusion, histogram, shown_config

if TYPE_CHECKING:
    from trackio.run import Run


class TrackioRun(Tracker):
    """A run in trackio's SQLite file. Its steps are optimizer steps."""

    label = "trackio"

    def __init__(self, run: Run, say: Say) -> None:
        super().__init__(say)
        self._run = run
        self._problem = ""
        self._warn, warnings.showwarning = warnings.showwarning, self._hear  # trackio reports a failure by a warning

    def _hear(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if "trackio" in Path(filename).parts:
            self._problem = self._problem or str(message)
        else:
            self._warn(message, category, filename, lineno, file, line)

    def _log(self, number: int, row: Row, media: Media) -> None:
        import trackio

        shown: dict[str, Any] = {name: value for name, value in row.items() if name != "step"}
        for name, values in media.histograms.items():
            if counts := histogram(values):
                shown[name] = trackio.Histogram(np_histogram=counts)
        if media.images:
            shown["images"] = trackio.Image(str(media.images))
        if media.predictions and (matrix := draw_confusion(media.predictions)) is not None:
            shown["confusion_matrix"] = trackio.Image(matrix)
        self._run.log(shown, step=row["step"])
        self._check()

    def _finish(self, state: str) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()
        warnings.showwarning = self._warn
        self._check()

    def _check(self) -> None:
        if self._problem:
            raise RuntimeError(self._problem)


def start(config: Config, directory: Path, run_id: str, name: str, facts: dict[str, Any], say: Say) -> TrackioRun:
    """Start the copy of one run folder; see ``start_tracker``. Raise errors of the import and of the disk."""
    folder = os.environ.setdefault("TRACKIO_DIR", str(directory.parent.absolute() / ".trackio"))
    from trackio.run import Run  # reads TRACKIO_DIR
    from trackio.sqlite_storage import SQLiteStorage

    project = re.sub(r"[^\w.-]", "_", config.tracker.project or "largebatch")
    shown = config.tracker.run_name or name
    SQLiteStorage.init_db(project)
    SQLiteStorage.delete_run(project, shown, run_id)
    # Unlike trackio.init, which may choose a server and gives a random id, so that a name would have to be unique.
    run = Run(
        url=None, project=project, client=None, name=shown, run_id=run_id, group=config.tracker.group,
        config=shown_config(config, {"run": name, **facts}),
    )  # fmt: skip
    say(f"trackio: TRACKIO_DIR={folder} trackio show --project {project}")
    return TrackioRun(run, say)
