"""A run's copy for TensorBoard: one event file in ``tensorboard/`` of the run folder. No account and no network.

The event file is a copy of the run's own files. So a start removes the event file of an earlier start, and the caller
replays the rows so far: TensorBoard never sees a step twice.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from largebatch.config.identity import without_none
from largebatch.config.schema import Config
from largebatch.runs.metrics import Row, newest
from largebatch.runs.predictions import read_predictions
from largebatch.tracking.tracker import MOST_CLASSES, Media, Say, Tracker, draw_confusion, histogram
from largebatch.tracking.wandb_arguments import wandb_config

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_FLUSH_SECONDS = 10  # that a killed process loses, until it is resumed


class TensorboardRun(Tracker):
    """An event file. Its steps are optimizer steps, and its times are the run's seconds of training.

    Args:
        writer: of the event file.
        began: unix time at which the run would have started without interruptions.
        say: takes one line at a time.
    """

    label = "TensorBoard"

    def __init__(self, writer: SummaryWriter, began: float, say: Say) -> None:
        super().__init__(say)
        self._writer, self._began, self._time, self._step = writer, began, began, 0

    def describe(self, config: dict[str, Any]) -> None:
        """Write the configuration as text, and its values for TensorBoard's table of hyperparameters."""
        from torch.utils.tensorboard.summary import hparams

        self._writer.add_text("config", _as_code(config), 0, self._began)
        # Without the first of three summaries, TensorBoard derives the columns from all runs.
        _, values, _ = hparams(_flat({k: v for k, v in config.items() if k != "resolved"}), {})
        self._writer._get_file_writer().add_summary(values, 0, self._began)

    def _log(self, number: int, row: Row, media: Media) -> None:
        import numpy
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._step = row["step"]
        self._time = self._began + row.get("wall_seconds", self._time - self._began)  # layer rows have no time
        values = {name: value for name, value in without_none(row).items() if name not in ("step", "wall_seconds")}
        if media.images:
            self._image("images", numpy.asarray(Image.open(media.images).convert("RGB")))
        if media.predictions and len((found := read_predictions(media.predictions)).classes) <= MOST_CLASSES:
            self._image("confusion_matrix", draw_confusion(found.confusion()))
        if not values.keys() - {"epoch"}:
            return
        # All values in one event: a layer row has hundreds.
        one = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._writer._get_file_writer().add_summary(one, self._step, self._time)
        for name, given in media.histograms.items():
            if drawn := histogram(given):
                counts, edges = drawn
                finite = [value for value in given if abs(value) < float("inf")]
                self._writer.add_histogram_raw(
                    name, min(finite), max(finite), len(finite), sum(finite), sum(value**2 for value in finite),
                    edges[1:].tolist(), counts.tolist(), self._step, walltime=self._time,
                )  # fmt: skip

    def _image(self, name: str, pixels: Any) -> None:
        self._writer.add_image(name, pixels, self._step, self._time, dataformats="HWC")

    def _summarize(self, summary: dict[str, Any]) -> None:
        from torch.utils.tensorboard.summary import hparams

        self._writer.add_text("summary", _as_code(dict(without_none(summary))), self._step, self._time)
        _, _, end = hparams({}, {})
        self._writer._get_file_writer().add_summary(end, self._step, self._time)

    def _finish(self, exit_code: int) -> None:
        self._writer.close()


def start(config: Config, directory: Path, run_id: str, name: str, facts: dict[str, Any], say: Say) -> TensorboardRun:
    """Start the event file of one run folder; see ``start_tracker``. Raises errors of the import and of the disk."""
    from torch.utils.tensorboard import SummaryWriter

    folder = directory / "tensorboard"
    shutil.rmtree(folder, ignore_errors=True)
    # A TensorBoard that shows an earlier event file discards what it has read.
    writer = SummaryWriter(str(folder), purge_step=0, flush_secs=_FLUSH_SECONDS)
    seconds = newest(directory / "metrics.jsonl", "wall_seconds") or 0.0
    run = TensorboardRun(writer, time.time() - seconds, say)
    run.describe(wandb_config(config, {"run": name, **facts}))
    say(f"TensorBoard: tensorboard --logdir {directory.parent}")
    return run


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
