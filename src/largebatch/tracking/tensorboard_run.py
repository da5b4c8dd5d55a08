"""A run's copy for TensorBoard: one event file in ``tensorboard/`` of the run folder. No account and no network.

The event file is a copy of the run's own files. So a start removes the event file of an earlier start, and the caller
replays the rows so far: TensorBoard never sees a step twice.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from largebatch.config.identity import without_none
from largebatch.config.schema import Config
from largebatch.runs.metrics import Row, newest
from largebatch.tracking.rows import Media
from largebatch.tracking.tracker import Say, Tracker, draw_confusion, histogram, shown_config

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary


class TensorboardRun(Tracker):
    """An event file. Its steps are optimizer steps, and its times are the run's seconds of training.

    This thread writes, so that a full disk is an error here. TensorBoard's own writer has a thread, which prints it.

    Args:
        file: the event file.
        began: unix time at which the run would have started without interruptions.
        say: takes one line at a time.
    """

    label = "TensorBoard"

    def __init__(self, file: BinaryIO, began: float, say: Say) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        super().__init__(say)
        self._records = RecordWriter(file)
        self._began, self._time, self._step = began, began, 0

    def begin(self, config: dict[str, Any]) -> None:
        """Write the file's version, and the configuration as text and for TensorBoard's table of hyperparameters."""
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from torch.utils.tensorboard.summary import hparams, text

        self._write(file_version="brain.Event:2")
        # A TensorBoard that shows an earlier event file discards what it has read.
        self._write(session_log=SessionLog(status=SessionLog.START))
        # Without the first of three summaries, TensorBoard derives the columns from all runs.
        _, values, _ = hparams(_flat({k: v for k, v in config.items() if k != "resolved"}), {})
        self._add(text("config", _as_code(config)), values)

    def _log(self, number: int, row: Row, media: Media) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard.summary import histogram_raw, image

        self._step = row["step"]
        self._time = self._began + row.get("wall_seconds", self._time - self._began)  # layer rows have no time
        names = row.keys() - {"step", "wall_seconds"} - ({"epoch"} if media.images or media.predictions else set())
        shown = [Summary(value=[Summary.Value(tag=name, simple_value=row[name]) for name in names])]
        for name, given in media.histograms.items():
            if drawn := histogram(given):
                counts, edges = drawn
                finite = list(filter(math.isfinite, given))
                ends = min(finite), max(finite)
                sums = len(finite), sum(finite), sum(value**2 for value in finite)
                shown.append(histogram_raw(name, *ends, *sums, edges[1:].tolist(), counts.tolist()))
        if media.images:
            shown.append(image("images", _pixels(media.images), dataformats="HWC"))
        if media.predictions and (matrix := draw_confusion(media.predictions)) is not None:
            shown.append(image("confusion_matrix", matrix, dataformats="HWC"))
        self._add(*shown)

    def _summarize(self, summary: dict[str, Any]) -> None:
        from torch.utils.tensorboard.summary import hparams, text

        _, _, end = hparams({}, {})
        self._add(text("summary", _as_code(dict(without_none(summary)))), end)

    def _finish(self, state: str) -> None:
        self._records.close()

    def _add(self, *summaries: Summary) -> None:
        """Write one event with all values: a layer row has hundreds."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._write(summary=Summary(value=[value for summary in summaries for value in summary.value]))

    def _write(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(wall_time=self._time, step=self._step, **content).SerializeToString())
        self._records.flush()


def start(config: Config, directory: Path, run_id: str, name: str, facts: dict[str, Any], say: Say) -> TensorboardRun:
    """Start the event file of one run folder; see ``start_tracker``. Raise errors of the import and of the disk."""
    folder = directory / "tensorboard"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    # TensorBoard reads the files of a folder in the order of their names, each to its end.
    file = (folder / f"events.out.tfevents.{time.time():.6f}").open("wb")
    seconds = newest(directory / "metrics.jsonl", "wall_seconds") or 0.0
    run = TensorboardRun(file, time.time() - seconds, say)
    run.begin(shown_config(config, {"run": name, **facts}))
    say(f"TensorBoard: tensorboard --logdir {directory.parent}")
    return run


def _pixels(path: Path) -> Any:
    """Return the pixels of an image file, uint8 [H, W, 3]."""
    import numpy
    from PIL import Image

    return numpy.asarray(Image.open(path).convert("RGB"))


def _as_code(content: dict[str, Any]) -> str:
    """Return Markdown that shows ``content`` as JSON."""
    return "\n".join(f"    {line}" for line in json.dumps(content, indent=1).splitlines())


def _flat(tree: dict[str, Any], above: str = "") -> dict[str, bool | float | str]:
    """Return ``{"optimizer.lr": 2.0, ...}``; lists as text."""
    found: dict[str, bool | float | str] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{above}{key}.")
        else:
            found[above + key] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return found
