"""``largebatch sync``: uploads to W&B what isn't there yet, with ``wandb sync``.

wandb joins the parts of a run in order, but after an upload that was cut off it sends everything again, and a part that
was killed while it was written it never takes for done. So W&B is asked how many rows it has, and what is uploaded is
a copy of the part's whole records without those rows.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from largebatch.errors import UserError
from largebatch.machine.process import die_with_parent
from largebatch.runs.folder import RunBusyError, RunFolder
from largebatch.tracking.wandb_parts import Part, parts_of, rows_after, write_without_rows
from largebatch.tracking.wandb_server import Server, UploadError, this_server
from largebatch.tracking.wandb_session import (
    choose_mode,
    close_session,
    one_line,
    session_environment,
    without_password,
)

UPLOAD_SECONDS = 600.0  # for one part


@dataclass(frozen=True)
class RunParts:
    """One W&B run of a run folder: all of its parts, oldest first."""

    name: str
    folder: Path
    parts: list[Part]

    @property
    def pending(self) -> list[Part]:
        return [part for part in self.parts if not part.is_done]


def sync(
    folders: Iterable[RunFolder], dry_run: bool, say: Callable[[str], None], seconds: float = UPLOAD_SECONDS
) -> int:
    """Upload what W&B lacks of some runs, in the order in which they were made; a line for each.

    Args:
        folders: the runs'.
        dry_run: only say what would be uploaded; needs no key and no network.
        say: takes one line at a time.
        seconds: that one part may take.

    Returns:
        The number of runs that could not be uploaded.

    Raises:
        UserError: when W&B can't be reached or there is no key, before anything is done.
    """
    try:
        import wandb  # noqa: F401
    except Exception as error:  # not there, or broken by another package
        raise UserError(f"wandb can't be imported ({one_line(error)})") from error
    runs = sorted(_runs_of(folders), key=lambda run: run.parts[0].started)
    pending = [run for run in runs if run.pending]
    server = None if dry_run or not pending else _reach()
    failed = 0
    for run in pending:
        try:
            say(f"{run.name}  {_upload_run(run, server, seconds)}")
        except UploadError as error:
            failed += 1
            say(f"{run.name}  FAILED: {error}")
    if there := len(runs) - len(pending):
        say(f"{there} run(s) were uploaded before")
    if not runs:
        say("none of these runs has files of W&B")
    if failed:
        say(f"{failed} run(s) could not be uploaded; the same command goes on from here")
    return failed


def _runs_of(folders: Iterable[RunFolder]) -> Iterator[RunParts]:
    """The W&B runs of the folders; a run that was repeated has some in ``previous-1``, ..."""
    for folder in folders:
        for of_one_time in [folder.path, *sorted(folder.path.glob("previous-*"))]:
            parts = parts_of(of_one_time)
            name = folder.name if of_one_time == folder.path else f"{folder.name} ({of_one_time.name})"
            for run_id in dict.fromkeys(part.run_id for part in parts):
                yield RunParts(name, folder.path, [part for part in parts if part.run_id == run_id])


def _reach() -> Server:
    """W&B, if there is a key and it answers.

    Raises:
        UserError: if not.
    """
    with (
        tempfile.TemporaryDirectory(prefix="largebatch-sync-") as scratch,
        session_environment(Path(scratch), "online"),
    ):
        mode, why = choose_mode("online")
        server = this_server()
        close_session()
    if mode != "online":
        raise UserError(f"nothing was uploaded: {why}; `wandb login` stores a key, WANDB_BASE_URL names another host")
    return server


def _upload_run(run: RunParts, server: Server | None, seconds: float) -> str:
    """Upload the parts that are left, or with no server none; what was done, in words.

    Raises:
        UploadError: when it couldn't be done.
    """
    parts = f"{len(run.pending)} part(s), {sum(part.rows() for part in run.pending)} rows"
    if RunFolder(run.folder).is_held():
        return "left out: it is still at work"
    if server is None:
        return f"would upload {parts}"
    try:
        with RunFolder(run.folder / "wandb").hold():  # two at a time would double rows
            for number, part in enumerate(run.parts):
                if not part.is_done:
                    _upload_part(part, rows_after(run.parts[:number]), server, seconds)
                    part.mark_done()
    except RunBusyError:
        return "left out: another sync is at it"
    return f"uploaded {parts}"


def _upload_part(part: Part, rows_before: int, server: Server, seconds: float) -> None:
    announced = part.announcement()
    if announced is None:
        return
    first = part.first_row()
    rows_before = rows_before if first is None else first
    rows = server.rows(announced.project, announced.entity, part.run_id)
    if rows < rows_before:
        raise UploadError(
            f"W&B has {rows} of the {rows_before} rows that it was sent before; was the run deleted there? "
            "W&B takes no run of the same id again"
        )
    scratch = part.log.parent.with_name(".sync").absolute()
    shutil.rmtree(scratch, ignore_errors=True)  # of one that was killed
    try:
        copy = scratch / part.name / part.log.name
        copy.parent.mkdir(parents=True)
        copy.parent.joinpath("files").symlink_to((part.log.parent / "files").absolute())  # images
        write_without_rows(part.log, rows - rows_before, copy)
        _wandb_sync(copy, scratch, seconds)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _wandb_sync(log: Path, scratch: Path, seconds: float) -> None:
    """Upload one log with ``wandb sync``, which says that it was done by a mark and not by its exit code."""
    command = [sys.executable, "-m", "wandb", "sync", "--yes", "--include-online", str(log)]
    ours = {"WANDB_ERROR_REPORTING": "false", "WANDB_CACHE_DIR": str(scratch), "WANDB_DIR": str(scratch)}
    unwanted = ("WANDB_MODE", "WANDB_SERVICE", "WANDB_SILENT", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_DEBUG")
    environment = {key: value for key, value in os.environ.items() if key not in unwanted} | ours
    process = subprocess.Popen(
        command, cwd=scratch, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True, preexec_fn=die_with_parent,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise UploadError(f"W&B did not take it in {seconds:g} s") from error
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if not Part(log).is_done:
        lines = [line.removeprefix("wandb: ") for line in said.splitlines()]
        why = [line for line in lines if line.startswith("ERROR")] or lines[-1:]
        raise UploadError(without_password("; ".join(why)) or "wandb sync did not say why")
