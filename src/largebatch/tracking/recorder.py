"""Everything that a run's rank 0 records while it trains, and the files that it leaves at the end."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import Tensor

from largebatch.config.schema import Config
from largebatch.runs.folder import RunFolder, write_atomic
from largebatch.runs.metrics import MetricsLog, Row, read_rows, write_table
from largebatch.tracking import wandb_run
from largebatch.tracking.console import Console
from largebatch.tracking.layers import LayerLog, LayerRow
from largebatch.tracking.wandb_feed import WandbFeed

_STATUS_EVERY_SECONDS = 1.0
_LAST = ("train/", "val/", "test/", "optim/", "embedding/", "probe/")  # families whose last figures are in the summary
_LAYER_ROWS_IN_WANDB = 1000  # of a run, at most: some 30 MB with 100 layers, and charts sample from more anyway


class Recorder:
    """Metric rows to ``metrics.jsonl``, W&B and the console; layer statistics; status and summary.

    Args:
        step: the optimizer step that the run continues from; rows after it are dropped, for they will come again.
        facts: what the run resolved to; part of the summary.
    """

    def __init__(self, config: Config, folder: RunFolder, step: int, facts: dict[str, Any], console: Console) -> None:
        self._folder, self._facts, self._console, self._tracker = folder, facts, console, config.tracker
        self._metrics = MetricsLog(folder.metrics, step)
        self._layers = LayerLog(folder.layers, step)
        self._status_at = 0.0
        self._wandb_layers_every = wandb_layers_every(config.tracker.layers_every, facts["steps"])
        repetition = folder.read_status().get("repetition", 0)
        run_id = folder.name.rsplit("-", 1)[-1] + (f"-{repetition}" if repetition else "")
        self._wandb = wandb_run.start(config, folder.path, run_id, folder.name, facts, console.say)
        self._feed = WandbFeed(self._wandb, facts["steps_per_epoch"]) if self._wandb else None
        folder.update_status(step=step, steps=facts["steps"], wandb_id=self._wandb.id if self._wandb else None)
        if self._feed and folder.images.exists():
            self._feed.images(folder.images)
        if self._feed and step > 0:
            self._feed_again(self._feed)

    def _feed_again(self, feed: WandbFeed) -> None:
        """All rows that are kept from before, of which W&B may lack some."""
        layers = self._layers.rows_from_before(self._wandb_layers_every)
        for layer_row in layers:
            feed.expect_layers(layer_row.step)
        for row in read_rows(self._folder.metrics):
            feed.row(row)
        for layer_row in layers:
            feed.layers(layer_row)

    def row(self, row: Row) -> None:
        self._metrics.write(row)
        if self._feed:
            self._feed.row(row)
        figures = {k: v for k, v in row.items() if k.endswith(("/loss", "accuracy"))}
        self._console.progress(row["step"], "  ".join(f"{name} {value:.4f}" for name, value in figures.items()))
        if time.monotonic() - self._status_at >= _STATUS_EVERY_SECONDS:
            self._status_at = time.monotonic()
            self._folder.update_status(step=row["step"])

    def layers(self, step: int, names: list[str], statistics: dict[str, Tensor]) -> None:
        """Statistics after optimizer step ``step``: a tensor of shape [layers] for each of ``layers.COLUMNS``."""
        if self._feed and names and step % self._wandb_layers_every == 0:
            self._feed.expect_layers(step)
        self._layers_to_wandb(self._layers.add(step, names, statistics))

    def layers_to_write(self) -> Callable[[], None]:
        """What brings the layers' file up to date with what was recorded so far, in any thread."""
        rows, write = self._layers.to_write()
        self._layers_to_wandb(rows)
        return write

    def _layers_to_wandb(self, rows: list[LayerRow]) -> None:
        for row in rows:
            if self._feed and row.step % self._wandb_layers_every == 0:
                self._feed.layers(row)

    def finish(self, state: str, step: int, message: str, seconds: float) -> None:
        """Close the run in ``state``; a run that has an outcome leaves its table and its summary."""
        self._layers_to_wandb(self._layers.write())
        self._metrics.close()
        if state in ("finished", "diverged"):
            rows = read_rows(self._folder.metrics)
            write_table(rows, self._folder.metrics_table)
            figures = summarise(rows) | {"state": state, "step": step, "wall_seconds": seconds}
            write_atomic(self._folder.summary, json.dumps(figures | self._facts, indent=1) + "\n")
            if self._wandb:
                self._wandb.summarize(figures)
                if self._tracker.checkpoints:
                    self._upload_checkpoints(self._wandb, rows)
        if self._wandb and self._tracker.alerts and state == "diverged":
            self._wandb.alert(f"{self._folder.name} diverged", message)
        self._end(wandb_run.exit_code(state))
        self._folder.update_status(state=state, step=step, message=message, ended=time.time())

    def _upload_checkpoints(self, wandb: wandb_run.WandbRun, rows: list[Row]) -> None:
        """The last one, and the best one if there is one: of a run with validation images."""
        best = self._folder.best_checkpoint
        for last in sorted(self._folder.checkpoints.glob("step-*.pt"))[-1:]:
            step = int(last.stem.removeprefix("step-"))
            is_both = best.exists() and last.samefile(best)
            if best.exists() and not is_both:
                chosen = max(rows, key=lambda row: (row.get("val/accuracy") or 0.0, -row["step"]))
                wandb.checkpoint(best, ["best"], figures_at(rows, chosen["step"]))
            wandb.checkpoint(last, ["last", "best"] if is_both else ["last"], figures_at(rows, step))

    def _end(self, exit_code: int) -> None:
        if self._wandb:
            self._wandb.finish(exit_code)
            self._wandb = self._feed = None

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._wandb and self._tracker.alerts and error is not None:
            self._wandb.alert(f"{self._folder.name} failed", f"{type(error).__name__}: {error}"[:1000])
        self._end(1)  # nothing to end unless the run came here by an exception


def wandb_layers_every(layers_every: int, steps: int) -> int:
    """Steps between the layer rows that W&B gets: ``tracker.layers_every``, or the multiple that a long run needs."""
    every = max(layers_every, 1)  # 0 is off: there are no rows
    return every * math.ceil(steps / every / _LAYER_ROWS_IN_WANDB)


def figures_at(rows: list[Row], step: int) -> dict[str, Any]:
    """Step, epoch and the newest validation and test figures after a step."""
    found = {k: v for row in rows if row["step"] <= step for k, v in row.items()}
    return {"step": step} | {k: v for k, v in found.items() if k == "epoch" or k.startswith(("val/", "test/"))}


def summarise(rows: list[Row]) -> dict[str, Any]:
    """The last and the best figures of a run.

    ``test/accuracy``, ``test/loss`` ... are those of the last evaluation. With a validation part, ``best/epoch`` is the
    epoch that validation accuracy chose and ``best/test/accuracy`` the test accuracy there: the test set chooses
    nothing. Without one, the best is the test set's own and only says what could have been.
    """
    last = {k: v for row in rows for k, v in row.items() if k.startswith(_LAST)}
    evaluations = [row for row in rows if row.get("test/accuracy") is not None]
    chosen_by = "val/accuracy" if any("val/accuracy" in row for row in evaluations) else "test/accuracy"
    best = max(evaluations, key=lambda row: (row[chosen_by] or 0.0, -row["step"]), default=None)
    speeds = sorted(row["perf/images_per_second"] for row in rows if "perf/images_per_second" in row)
    figures: dict[str, Any] = dict(last)
    if best is not None:
        figures |= {f"best/{k}": v for k, v in best.items() if k.startswith(("val/", "test/")) or k == "epoch"}
        figures["best/chosen_by"] = chosen_by
    figures["images_per_second"] = speeds[len(speeds) // 2] if speeds else None
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}
