"""A run's copy in Weights & Biases. The truth is in the run folder, and no W&B failure may stop training.

wandb never prompts, every wait has a limit, and the first failure is logged and ends the copy, not the run. Without a
key or an answering host the copy is offline, in the run folder (``docs/tracking.md``).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from largebatch.config.identity import without_none
from largebatch.config.schema import Config
from largebatch.errors import one_line, without_password
from largebatch.runs.folder import DONE, RunFolder, read_json, write_atomic
from largebatch.runs.metrics import Row
from largebatch.runs.predictions import read_predictions
from largebatch.tracking import wandb_session
from largebatch.tracking.rows import Media
from largebatch.tracking.tracker import MOST_CLASSES, Say, Tracker, histogram
from largebatch.tracking.wandb_arguments import agent_run_id, run_arguments, run_settings

if TYPE_CHECKING:
    import wandb

INIT_TIMEOUT = 20.0  # seconds for an online start; then the run is offline
FINISH_TIMEOUT = 60.0  # seconds for the last uploads; `largebatch sync` sends the rest (wandb's default: no limit)
CHECKPOINT_TIMEOUT = 600.0  # the same with tracker.checkpoints

# Every logged row holds both axes. W&B draws a metric over the axis that lists its family.
AXES = {
    "step": ("train", "optim", "perf", "layers", "noise", "noise_layers"),
    "epoch": ("test", "val", "embedding", "probe", "sharpness"),
}

Entry = dict[str, Any]


def read_uploads(run: Path) -> dict[str, Entry]:
    """Return ``wandb/uploads.json`` of a run folder: an entry for each of its W&B runs, by id.

    ``started``: unix time of the first start. ``arguments``: of ``wandb.init``, JSON types only. ``sweep``: id of the
    W&B sweep or None. ``rows``: number of rows that W&B has for certain. ``uploaded``: True if W&B has everything.
    ``url``: the run's page, if the run was ever online.

    Raises:
        UserError: the file isn't JSON.
    """
    return read_json(run / "wandb" / "uploads.json")


def update_upload(run: Path, run_id: str, **changes: Any) -> None:
    """Change the entry of one W&B run, or add it."""
    entries = read_uploads(run)
    entry = entries.get(run_id, {"started": time.time(), "rows": 0})
    write_atomic(run / "wandb" / "uploads.json", json.dumps(entries | {run_id: entry | changes}, indent=1) + "\n")


class WandbRun(Tracker):
    """A started W&B run.

    Args:
        run: wandb's run.
        folder: the run folder, with ``wandb/uploads.json``.
        say: takes one line at a time.
        is_recorded: True if the caller logs all rows, so that ``finish`` marks the run as uploaded.
        in_sweep: True for a run of a W&B sweep.

    Attributes:
        id: W&B's id of the run.
        mode: ``"online"`` or ``"offline"``.
        first: number of rows that W&B has already.
    """

    label = "W&B"
    id: str

    def __init__(self, run: wandb.Run, folder: Path, say: Say, is_recorded: bool, in_sweep: bool) -> None:
        import wandb

        super().__init__(say)
        self._run, self._folder, self._is_recorded, self._in_sweep = run, folder, is_recorded, in_sweep
        self.id = str(run.id)
        self.mode = "offline" if run.offline else "online"
        sent_before = read_uploads(folder).get(self.id, {}).get("rows", 0)  # a server may not know its number of rows
        self.first = 0 if run.offline else max(run.starting_step, sent_before)
        if is_recorded and not run.offline:
            update_upload(folder, self.id, url=without_password(str(run.url)))
        self._count = self.first
        self._is_refused = False
        listener = SimpleNamespace(info=self._hear, warning=self._hear, error=self._hear)
        wandb.termsetup(wandb.setup().settings, listener)  # receives wandb's messages

    def _hear(self, message: str) -> None:
        """Notice refused data: wandb reports it only by a message."""
        self._is_refused |= "Fatal error while uploading data" in message

    def _log(self, number: int, row: Row, media: Media) -> None:
        import wandb

        self._count = number + 1
        shown: dict[str, Any] = {}
        for name, values in media.histograms.items():
            if counts := histogram(values):
                shown[name] = wandb.Histogram(np_histogram=counts)
        if media.images:
            shown["images"] = wandb.Image(str(media.images))
        around: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if media.predictions:
            shown |= _predictions(media.predictions)
            # A table is an artifact too, and wandb makes folders for artifacts in the home.
            around = wandb_session.session_environment(self._folder, "auto")
        with around:
            self._run.log(without_none(row) | shown, step=number, commit=True)

    def _summarize(self, summary: dict[str, Any]) -> None:
        """Set the values in place of each metric's last value."""
        self._run.summary.update(without_none(summary))
        if summary.get("state") == "diverged":  # W&B shows it as finished
            self._run.tags = list(dict.fromkeys((*(self._run.tags or ()), "diverged")))

    def _alert(self, title: str, text: str) -> None:
        """Let W&B notify the user by the means set in W&B (e-mail, Slack)."""
        self._run.alert(title=title, text=text, level="ERROR")

    def _upload_checkpoints(self, folder: RunFolder, rows: list[Row]) -> None:
        """Upload both checkpoints as versions of the artifact ``checkpoint-ID``, from the run folder without a copy."""
        best = folder.best_checkpoint
        for last in sorted(folder.checkpoints.glob("step-*.pt"))[-1:]:
            step = int(last.stem.removeprefix("step-"))
            is_both = best.exists() and last.samefile(best)
            if best.exists() and not is_both:
                chosen = max(rows, key=lambda row: (row.get("val/accuracy") or 0.0, -row["step"]))
                self._upload(best, ["best"], _metrics_at(rows, chosen["step"]))
            self._upload(last, ["last", "best"] if is_both else ["last"], _metrics_at(rows, step))

    def _upload(self, checkpoint: Path, aliases: list[str], metadata: dict[str, Any]) -> None:
        import wandb

        artifact = wandb.Artifact(f"checkpoint-{self.id}", "model", metadata=without_none(metadata))
        with wandb_session.session_environment(self._folder, "auto"):  # else wandb makes folders in the home
            artifact.add_file(str(checkpoint), name="checkpoint.pt", policy="immutable", skip_cache=True)
            self._run.log_artifact(artifact, aliases=aliases)

    def mark_preempting(self) -> None:
        """Let W&B requeue the run in its W&B sweep once it ends as failed."""
        self._attempt("mark the run as preempting", self._run.mark_preempting)

    def finish(self, state: str) -> None:
        """End the run and wandb's session."""
        super().finish(state)
        wandb_session.close_session()

    def _finish(self, state: str) -> None:
        """End the run. W&B shows exit code 0 as finished, 1 as failed.

        A divergence is an outcome. But a W&B sweep's search would take the best value before the divergence for the
        run's value, and it counts a failed run as the worst.
        """
        is_shown_as_finished = state == "finished" or (state in DONE and not self._in_sweep)
        self._run.finish(exit_code=0 if is_shown_as_finished else 1)
        if self._is_refused:
            raise RuntimeError("W&B refused data; `largebatch sync` uploads the rest")
        if self._is_sending and self.mode == "online" and self._is_recorded:
            update_upload(self._folder, self.id, rows=self._count, uploaded=True)


def start(config: Config, directory: Path, run_id: str, name: str, facts: dict[str, Any], say: Say) -> WandbRun | None:
    """Start or resume the W&B run of one run folder, and add it to ``uploads.json``; see ``start_tracker``.

    A W&B sweep's agent brings its own id. With empty ``facts``, W&B's config and ``uploads.json`` stay as they are,
    because the caller logs no rows. Return None with ``WANDB_MODE=disabled``. Raise errors of the import and of wandb.
    """
    import wandb

    directory = directory.absolute()
    finish_timeout = CHECKPOINT_TIMEOUT if config.tracker.checkpoints else FINISH_TIMEOUT
    settings = run_settings(config.tracker, INIT_TIMEOUT, finish_timeout)
    in_sweep = agent_run_id() is not None
    started, files = None, directory
    with wandb_session.session_environment(directory, config.tracker.mode):
        try:
            (directory / "wandb").mkdir(parents=True, exist_ok=True)
            arguments = run_arguments(config, agent_run_id() or run_id, name, facts, wandb.setup().settings)
            run, mode, why = _begin(config.tracker.mode, directory, arguments, settings)
            if run and facts:
                effective = {"project": run.project, "entity": run.entity or None, "group": run.group or None}
                sweep = os.environ.get("WANDB_SWEEP_ID") if in_sweep else None
                update_upload(directory, run.id, arguments=arguments | effective, sweep=sweep, uploaded=False)
            if run:
                started, files = WandbRun(run, directory, say, bool(facts), in_sweep), Path(run.dir)
        except Exception:
            wandb_session.close_session()
            raise
    say(f"W&B {mode}: {why}")
    if started is None:
        wandb_session.close_session()
    elif not files.resolve().is_relative_to(directory.resolve()):
        say(f"W&B could not write to {directory}, its files are in {files}")
    return started


def _begin(
    asked: str, directory: Path, arguments: dict[str, Any], settings: dict[str, Any]
) -> tuple[wandb.Run | None, str, str]:
    """Return the run, its mode and the reason. If the server fails to start it, the run is offline."""
    mode, why = wandb_session.choose_mode(asked)
    if mode == "disabled":
        return None, "is off", why
    if mode == "online":
        before = set(directory.glob("wandb/run-*"))
        try:
            run = open_run("online", directory, arguments, settings)
            return run, mode, without_password(str(run.url))
        except Exception as error:
            why = f"the server did not start the run ({one_line(error)})"
            wandb_session.close_session()  # otherwise the half-open run keeps its id, and going offline fails
            for left in set(directory.glob("wandb/run-*")) - before:
                shutil.rmtree(left)  # holds no row, and wandb would show it as a run of its own
    return open_run("offline", directory, arguments, settings), "offline", why


def open_run(mode: str, directory: Path, arguments: dict[str, Any], settings: dict[str, Any]) -> wandb.Run:
    """Start or resume a W&B run, ``online`` or ``offline``, and define its axes. Raises wandb's errors."""
    import wandb

    run = wandb.init(mode=mode, dir=str(directory), resume="allow", settings=settings, **arguments)  # type: ignore[arg-type]
    for axis, families in AXES.items():
        run.define_metric(axis)
        for family in families:
            run.define_metric(f"{family}/*", step_metric=axis)
    return run


def _predictions(path: Path) -> dict[str, Any]:
    """Return a table with a row for each test image, and the confusion matrix."""
    import wandb

    found = read_predictions(path)
    columns = found.label.tolist(), found.prediction.tolist(), found.loss.tolist()
    rows = [
        [image, found.classes[label], found.classes[prediction], loss]
        for image, (label, prediction, loss) in enumerate(zip(*columns, strict=True))
    ]
    shown: dict[str, Any] = {"predictions": wandb.Table(["image", "label", "prediction", "loss"], rows)}
    if len(found.classes) <= MOST_CLASSES:
        shown["confusion_matrix"] = wandb.plot.confusion_matrix(
            y_true=columns[0], preds=columns[1], class_names=list(found.classes)
        )
    return shown


def _metrics_at(rows: list[Row], step: int) -> dict[str, Any]:
    """Return step, epoch and the newest validation and test metrics at a step."""
    found = {k: v for row in rows if row["step"] <= step for k, v in row.items()}
    return {"step": step} | {k: v for k, v in found.items() if k == "epoch" or k.startswith(("val/", "test/"))}
