"""Records of rank 0 while it trains, and the files of a run that is over."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, Self

from torch import Tensor

from largebatch.config.schema import Config
from largebatch.runs import metrics
from largebatch.runs.correct import is_readable
from largebatch.runs.folder import DONE, RunFolder, write_atomic
from largebatch.runs.metrics import MetricsLog, Row, read_rows, write_table
from largebatch.tracking import layers
from largebatch.tracking.console import Console
from largebatch.tracking.layers import LayerLog
from largebatch.tracking.rows import Layer, LayerRow, RowOrder, replay
from largebatch.tracking.tracker import start_tracker

_STATUS_EVERY_SECONDS = 1.0
# Families whose last values are in the summary.
_LAST = ("train/", "val/", "test/", "optim/", "embedding/", "probe/", "noise/", "sharpness/")


class Recorder:
    """Write metrics rows to ``metrics.jsonl``, the tracker and the console; and layer statistics, status and summary.

    Args:
        config: the run's configuration.
        folder: the run folder.
        step: the optimizer step that the run continues from; later rows are dropped, because the run logs them again.
        facts: resolved values such as ``steps`` and ``steps_per_epoch``; part of the summary.
        console: receives progress and the tracker's messages.
    """

    def __init__(self, config: Config, folder: RunFolder, step: int, facts: dict[str, Any], console: Console) -> None:
        self._folder, self._facts, self._console, self._keys = folder, facts, console, config.tracker
        if step == 0:  # also after damaged checkpoints
            for path in (folder.correct, folder.predictions, folder.worst_images):
                path.unlink(missing_ok=True)
        self._metrics = MetricsLog(folder.metrics, step)
        self._layers = LayerLog(folder.layers, step, self._layer_row)
        self._status_at = 0.0
        repetition = folder.read_status().get("repetition", 0)
        run_id = folder.name.rsplit("-", 1)[-1] + (f"-{repetition}" if repetition else "")
        self._tracker = start_tracker(config, folder.path, run_id, folder.name, facts, console.say)
        self._order: RowOrder | None = None
        if self._tracker:
            every = config.tracker.layers_every
            self._order = RowOrder(self._tracker.log, every, facts["steps"])
            replay(folder, self._order, step)
        folder.update_status(step=step, steps=facts["steps"], wandb_id=self._tracker.id if self._tracker else None)

    def row(self, row: Row) -> None:
        """Record a row of metrics. It has ``step``, ``epoch``, ``examples`` and ``wall_seconds``."""
        self._metrics.write(row)
        if self._order:
            self._order.row(row)
        shown = {k: v for k, v in row.items() if k.endswith(("/loss", "accuracy"))}
        self._console.progress(row["step"], "  ".join(f"{name} {value:.4f}" for name, value in shown.items()))
        if time.monotonic() - self._status_at >= _STATUS_EVERY_SECONDS:
            self._status_at = time.monotonic()
            self._folder.update_status(step=row["step"])

    def set_length(self, steps: int, training_examples: int) -> None:
        """Change the run's length in status and summary. The tracker keeps the length at the start."""
        self._facts = self._facts | {"steps": steps, "training_examples": training_examples}
        self._folder.update_status(steps=steps)

    def layers(self, step: int, layers: list[Layer], statistics: dict[str, Tensor]) -> None:
        """Record what update ``step`` used: a tensor of shape [layers] for each of ``rows.COLUMNS``."""
        if self._order and layers:
            self._order.expect_layers(step)
        self._layers.add(step, layers, statistics)

    def rows_to_write(self) -> Callable[[], dict[str, Any]]:
        """Return a function that puts the rows so far on the disk, in any thread, and describes them for ``lacks``."""
        layers, metrics, correct = self._layers.to_write(), self._metrics.to_sync(), self._folder.correct.exists()
        return lambda: {"layers": layers(), "metrics": metrics(), "correct": correct}

    def _layer_row(self, row: LayerRow) -> None:
        if self._order:
            self._order.layers(row)

    def finish(self, state: str, step: int, message: str, seconds: float, checksum: str) -> None:
        """Close the run in ``state``. Write the table and the summary of a run that is over.

        Args:
            checksum: CRC-32 of the final parameters and buffers.
        """
        self.rows_to_write()()
        self._metrics.close()
        if state in DONE:
            rows = read_rows(self._folder.metrics)
            write_table(rows, self._folder.metrics_table)
            metrics = summarise(rows) | {"state": state, "step": step, "wall_seconds": seconds, "checksum": checksum}
            metrics["stopped_early"] = state == "finished" and step < self._facts["steps"]
            write_atomic(self._folder.summary, json.dumps(metrics | self._facts, indent=1) + "\n")
            if self._tracker:
                if self._order and self._keys.predictions and self._folder.predictions.exists():
                    self._order.end(self._folder.predictions)
                self._tracker.summarize(metrics)
                if self._keys.checkpoints:
                    self._tracker.upload_checkpoints(self._folder, rows)
        if self._tracker and self._keys.alerts and state == "diverged":
            self._tracker.alert(f"{self._folder.name} diverged", message)
        self._end(state)
        self._folder.update_status(state=state, step=step, message=message, ended=time.time())

    def _end(self, state: str) -> None:
        if self._tracker:
            self._tracker.finish(state)
            self._tracker = self._order = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._tracker and self._keys.alerts and error is not None:
            self._tracker.alert(f"{self._folder.name} failed", f"{type(error).__name__}: {error}"[:1000])
        self._end("failed")  # does nothing after finish()


def lacks(folder: RunFolder, step: int, records: dict[str, Any]) -> str:
    """Return the reason why the folder lacks the rows that a checkpoint after ``step`` relies on; empty if it doesn't.

    Args:
        folder: the run folder.
        step: optimizer steps done.
        records: description by ``Recorder.rows_to_write``.
    """
    complete = {
        folder.metrics: metrics.has_rows(folder.metrics, records["metrics"]),
        folder.layers: layers.has_rows(folder.layers, step, records["layers"]),
        folder.correct: not records["correct"] or is_readable(folder.correct),
    }
    return " and ".join(f"{path.name} is missing, damaged or cut short" for path, ok in complete.items() if not ok)


def summarise(rows: list[Row]) -> dict[str, Any]:
    """Return the last finite and the best metrics of a run; None for a metric that was never finite.

    ``test/accuracy``, ``test/loss`` ... are from the last evaluation. With a validation part, ``best/epoch`` is the
    epoch of the best validation accuracy and ``best/test/accuracy`` the test accuracy there: the test set chooses
    nothing. Without a validation part, the best is the test set's own and only an upper bound.
    """
    shown = [(k, v) for row in rows for k, v in row.items() if k.startswith(_LAST)]
    metrics: dict[str, Any] = dict.fromkeys((k for k, _ in shown)) | {k: v for k, v in shown if v is not None}
    evaluations = [row for row in rows if row.get("test/accuracy") is not None]
    chosen_by = "val/accuracy" if any("val/accuracy" in row for row in evaluations) else "test/accuracy"
    best = max(evaluations, key=lambda row: (row[chosen_by] or 0.0, -row["step"]), default=None)
    if best is not None:
        metrics |= {f"best/{k}": v for k, v in best.items() if k.startswith(("val/", "test/")) or k == "epoch"}
        metrics["best/chosen_by"] = chosen_by
    for name in ("images_per_second", "decoded_images_per_second", "data_share"):
        measured = sorted(row[f"perf/{name}"] for row in rows if f"perf/{name}" in row)
        if measured or name == "images_per_second":
            metrics[name] = measured[len(measured) // 2] if measured else None
    return metrics
