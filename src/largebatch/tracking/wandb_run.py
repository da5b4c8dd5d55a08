"""A run's copy in Weights & Biases. The truth is ``metrics.jsonl``; nothing that happens here may stop training.

So: it never asks for anything, every wait has a limit, and every failure is said once and ends the copy, not the run.
Online needs a key and a host that answers; everything else is written to the run folder, to be looked at or uploaded
later (``docs/tracking.md``). Only rank 0 calls ``start``, and wandb is imported there and nowhere else.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from largebatch.config.identity import without_none
from largebatch.config.schema import Config
from largebatch.runs.folder import DONE
from largebatch.tracking.agent import agent_run_id
from largebatch.tracking.wandb_arguments import run_arguments
from largebatch.tracking.wandb_parts import Part, parts_of, rows_after
from largebatch.tracking.wandb_server import UploadError, this_server
from largebatch.tracking.wandb_session import (
    choose_mode,
    close_session,
    one_line,
    session_environment,
    without_password,
)

if TYPE_CHECKING:
    import wandb

INIT_TIMEOUT = 20.0  # seconds that an online start may take before the run goes on offline
FINISH_TIMEOUT = 60.0  # seconds for the last uploads; what is left stays in the run folder (wandb's default: for ever)
CHECKPOINT_TIMEOUT = 600.0  # the same, where checkpoints are uploaded

_BINS = 32  # of a histogram: enough for a hundred layers

# Every logged row holds both axes; a metric's chart is drawn over the one that its family is listed under.
AXES = {"step": ("train", "optim", "perf", "layers"), "epoch": ("test", "val", "embedding", "probe")}


class WandbRun:
    """A started W&B run. Its methods never raise: the first failure is said, and nothing is sent after it.

    Attributes:
        id: what W&B knows the run by.
        mode: ``"online"`` or ``"offline"``.
        how: why that mode, in one line.
        rows_before: the number of rows that W&B has, or that are on the disk for it, from earlier parts of the run.
    """

    def __init__(self, run: wandb.Run, mode: str, how: str, rows_before: int, say: Callable[[str], None]) -> None:
        self.id = str(run.id)
        self.mode = mode
        self.how = how
        self.rows_before = rows_before
        self._rows = rows_before  # with those that were logged
        self._run = run
        self._say = say
        self._failed = False

    def log(
        self, row: dict[str, Any], histograms: dict[str, list[float]] | None = None, images: Path | None = None
    ) -> None:
        """One row of metrics, with its ``step`` and ``epoch``, and maybe histograms of lists of values, or a picture.

        Values that are None are left out.

        wandb's own step counter is never given: it counts rows, and goes on counting in a resumed run.
        """
        if not self._failed:
            self._rows += 1
            self._attempt("log", lambda: self._run.log(without_none(row) | _media(histograms or {}, images)))

    def summarize(self, summary: dict[str, Any]) -> None:
        """The run's final and best values, in place of each metric's last one."""
        if not self._failed:
            self._attempt("write the summary", lambda: self._run.summary.update(without_none(summary)))

    def alert(self, title: str, text: str) -> None:
        """Have W&B tell the user, by the ways that are set there (e-mail, Slack)."""
        if not self._failed:
            self._attempt("send an alert", lambda: self._run.alert(title=title, text=text, level="ERROR"))

    def checkpoint(self, path: Path, aliases: list[str], facts: dict[str, Any]) -> None:
        """Upload a file as a version of the artifact ``checkpoint-ID``; offline it is only noted, and must stay."""
        if not self._failed:
            self._attempt("upload a checkpoint", lambda: self._log_artifact(path, aliases, facts))

    def _log_artifact(self, path: Path, aliases: list[str], facts: dict[str, Any]) -> None:
        import wandb

        artifact = wandb.Artifact(f"checkpoint-{self._run.id}", "model", metadata=without_none(facts))
        with session_environment(path.parent.parent, "auto"):  # else there would be folders in the home
            artifact.add_file(str(path), name="checkpoint.pt", policy="immutable", skip_cache=True)  # without a copy
            self._run.log_artifact(artifact, aliases=aliases)

    def mark_preempting(self) -> None:
        """Have W&B put the run, once it ends as failed, in the queue of its sweep."""
        self._attempt("mark the run as preempting", self._run.mark_preempting)

    def finish(self, exit_code: int) -> None:
        """End the run, and wandb's session with it. 0 is shown as finished, anything else as failed."""
        self._attempt("finish", lambda: self._run.finish(exit_code=exit_code))
        if self.mode == "online" and not self._failed:
            self._attempt("see what W&B got", self._check_rows)
        close_session()

    def _check_rows(self) -> None:
        """Mark the part as uploaded if W&B has all of its rows: of one that it refused to take wandb says nothing."""
        run = self._run
        there = this_server().rows(run.project, run.entity, run.id, seconds=5.0)
        if there < self._rows:
            raise UploadError(f"it has {there} of {self._rows} rows; `largebatch sync` uploads the rest")
        part_of(run).mark_done()

    def _attempt(self, what: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # wandb's or our own: said, so that neither goes unnoticed
            if not self._failed:
                self._say(f"W&B is off from here, it could not {what}: {one_line(error)}")
            self._failed = True


def start(
    config: Config,
    directory: Path,
    run_id: str,
    name: str,
    facts: dict[str, Any],
    say: Callable[[str], None],
    *,
    init_timeout: float = INIT_TIMEOUT,
    finish_timeout: float | None = None,
) -> WandbRun | None:
    """Start, or resume, the W&B run of one run folder. Call it on rank 0 only.

    Args:
        config: the run's configuration, stored whole as the W&B config.
        directory: the run folder; wandb writes to its ``wandb/``.
        run_id: the W&B run's id. The same id again continues the same W&B run. A sweep's agent brings its own.
        name: what W&B calls the run.
        facts: what the configuration came to (rate, batch per process, commit, versions), stored under ``resolved``
            with ``name``; none leaves what is there.
        say: takes one line at a time: the mode and its reason, and every failure once.
        init_timeout: seconds an online start may take.
        finish_timeout: seconds for the last uploads; None for what is usual.

    Returns:
        None when W&B isn't wanted (``tracker=none``, ``tracker.mode=disabled``, ``WANDB_MODE=disabled``), can't be
        imported or can't be started. Never raises.
    """
    if config.tracker.name == "none" or config.tracker.mode == "disabled":
        return None
    if config.tracker.mode == "auto" and os.environ.get("WANDB_MODE", "").lower() == "disabled":
        say("W&B is off: WANDB_MODE=disabled")
        return None
    try:
        import wandb  # noqa: F401
    except Exception as error:  # not there, or broken by another package
        say(f"W&B is off: wandb can't be imported ({one_line(error)})")
        return None
    directory = directory.absolute()
    if finish_timeout is None:
        finish_timeout = CHECKPOINT_TIMEOUT if config.tracker.checkpoints else FINISH_TIMEOUT
    with session_environment(directory, config.tracker.mode):
        try:
            (directory / "wandb").mkdir(parents=True, exist_ok=True)
            earlier = parts_of(directory)
            arguments = run_arguments(
                config, directory, agent_run_id() or run_id, name, facts, init_timeout, finish_timeout
            )
            run, mode, how = begin(config.tracker.mode, arguments)
            rows_before = continue_from(earlier, run, mode) if run else 0
        except Exception as error:  # whatever it is, training matters more
            run, mode, how, rows_before = None, "is off", one_line(error), 0
    say(f"W&B {mode}: {how}")
    if run is None:
        close_session()
        return None
    if not Path(run.dir).resolve().is_relative_to(directory.resolve()):
        say(f"W&B could not write to {directory}, its files are in {run.dir}")
    return WandbRun(run, mode, how, rows_before, say)


def continue_from(earlier: list[Part], run: wandb.Run, mode: str) -> int:
    """The number of rows that need not be sent again.

    Online W&B says what it has. What else earlier parts hold will come again in this one, so they are done with.
    """
    of_this_run = [part for part in earlier if part.run_id == run.id]  # a sweep's agent gives runs its own ids
    if mode == "offline":
        return rows_after(of_this_run)
    for part in of_this_run:
        part.mark_done()
    first = part_of(run).first_row()  # run.step may not know it yet
    return int(run.step) if first is None else first


def part_of(run: wandb.Run) -> Part:
    return Part(Path(run.dir).parent / f"run-{run.id}.wandb")


def begin(asked: str, arguments: dict[str, Any]) -> tuple[wandb.Run | None, str, str]:
    """The run, its mode and why; where the server fails to start it, offline with the attempt's traces removed."""
    import wandb

    mode, how = choose_mode(asked)
    if mode == "disabled":
        return None, "is off", how
    run = None
    if mode == "online":
        folder = Path(arguments["dir"], "wandb")
        before = set(folder.glob("run-*"))
        try:
            run = wandb.init(mode="online", **arguments)
            how = without_password(str(run.url))
        except Exception as error:
            mode, how = "offline", f"the server did not start the run ({one_line(error)})"
            close_session()  # otherwise the half-open run keeps its id, and going offline fails
            for left in set(folder.glob("run-*")) - before:
                shutil.rmtree(left)  # holds no row, and would be shown and synced as a run of its own
    if run is None:
        run = wandb.init(mode="offline", **arguments)
    for axis, families in AXES.items():
        run.define_metric(axis)
        for family in families:
            run.define_metric(f"{family}/*", step_metric=axis)
    return run, mode, how


def exit_code(state: str) -> int:
    """What W&B is told of a run in ``state``: 0 is shown as finished, 1 as failed.

    A divergence is an outcome. But the search of a sweep would take the best figure before it for the run's value,
    where a failed run counts as the worst one.
    """
    return 0 if state == "finished" or (state in DONE and agent_run_id() is None) else 1


def _media(histograms: dict[str, list[float]], images: Path | None) -> dict[str, Any]:
    """Histograms of the finite values, none where there is no such; and the picture as ``images``."""
    import wandb

    finite = {name: list(filter(math.isfinite, values)) for name, values in histograms.items()}
    media: dict[str, Any] = {name: wandb.Histogram(values, num_bins=_BINS) for name, values in finite.items() if values}
    return media | ({"images": wandb.Image(str(images))} if images else {})
