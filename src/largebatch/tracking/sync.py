"""``largebatch sync``: uploads to W&B what it lacks, from the files of run folders.

Each run is replayed in the order and numbering of the live run. wandb drops the rows that W&B has, so a sync that was
killed doubles nothing when it is repeated.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from largebatch.errors import UserError, missing_extra, one_line
from largebatch.runs.folder import DONE, RunBusyError, RunFolder
from largebatch.runs.metrics import Row, read_rows
from largebatch.tracking import wandb_run
from largebatch.tracking.rows import Media, RowOrder, replay
from largebatch.tracking.wandb_arguments import base_settings
from largebatch.tracking.wandb_session import choose_mode, close_session, session_environment


class Upload(NamedTuple):
    """A W&B run: its run folder, the folder of its files (the same, or ``previous-N``), its ``uploads.json`` entry."""

    run: RunFolder
    files: RunFolder
    entry: wandb_run.Entry


def sync(folders: Iterable[RunFolder], dry_run: bool, seconds: float) -> int:
    """Upload what W&B lacks of some runs, in the order of their first start; print a line for each.

    Args:
        folders: run folders.
        dry_run: only print what would be uploaded; needs no key and no network.
        seconds: time limit for one run.

    Returns:
        The number of runs that could not be uploaded.

    Raises:
        UserError: W&B can't be reached or there is no key; nothing was uploaded.
    """
    try:
        import wandb  # noqa: F401
    except Exception as error:  # missing, or broken by another package
        raise UserError(missing_extra(error) or f"wandb can't be imported ({one_line(error)})") from error
    uploads, failed = [], 0
    for run in folders:
        try:
            uploads += _uploads_of(run)
        except UserError as error:
            failed += 1
            print(f"{run.name}  FAILED: {error}", flush=True)
    uploads.sort(key=lambda upload: float(upload.entry["started"]))
    pending = [upload for upload in uploads if not upload.entry["uploaded"]]
    if pending and not dry_run:
        _check_access()
    for upload in pending:
        name = upload.run.name + ("" if upload.files.name == upload.run.name else f" ({upload.files.name})")
        try:
            print(f"{name}  {_sync_run(upload, dry_run, seconds)}", flush=True)
        except UserError as error:
            failed += 1
            print(f"{name}  FAILED: {error}", flush=True)
    if uploaded := len(uploads) - len(pending):
        print(f"{uploaded} run(s) were uploaded before")
    if not uploads and not failed:
        print("none of these runs was started with W&B")
    if failed:
        print(f"{failed} run(s) could not be uploaded; repeat the command to try again")
    return failed


def _uploads_of(run: RunFolder) -> list[Upload]:
    """Return the W&B runs of a run folder and of its earlier repetitions.

    Raises:
        UserError: an ``uploads.json`` can't be used.
    """
    found = []
    for path in [run.path, *sorted(run.path.glob("previous-*"))]:
        for entry in wandb_run.read_uploads(path).values():
            if not _is_entry(entry):
                raise UserError(
                    f"{path}/wandb/uploads.json: invalid entry. Fix: remove the file; rerun=true uploads anew"
                )
            found.append(Upload(run, RunFolder(path.absolute()), entry))
    return found


def _is_entry(entry: Any) -> bool:
    match entry:
        case {
            "started": int() | float(), "uploaded": bool(), "sweep": str() | None, "arguments": {"config": {
                "resolved": {"steps": int(), "steps_per_epoch": int() | float() as steps_per_epoch},
                "tracker": {"layers_every": int() as layers_every, "checkpoints": bool()},
            }},
        }:  # fmt: skip
            return steps_per_epoch > 0 and layers_every >= 0
    return False


def _check_access() -> None:
    """Raise UserError without an API key or a host that answers."""
    with tempfile.TemporaryDirectory(prefix="largebatch-") as scratch, session_environment(Path(scratch), "online"):
        mode, why = choose_mode("online")
        close_session()
    if mode != "online":
        raise UserError(f"nothing was uploaded: {why}. Fix: `wandb login` stores a key, WANDB_BASE_URL sets the host")


def _sync_run(upload: Upload, dry_run: bool, seconds: float) -> str:
    """Upload one run and return what was done. Raise a ``UserError`` if W&B did not take the run in ``seconds``."""
    if upload.run.is_held():
        return "skipped: the run is running"
    config = upload.entry["arguments"]["config"]
    if dry_run:
        return f"would upload what W&B lacks of {_replay(upload.files, config, lambda *_: None)} rows"
    wandb_folder = upload.files.path / "wandb"
    scratch = wandb_folder / ".sync"
    said: list[str] = []
    try:
        with RunFolder(wandb_folder).hold():  # two uploads of a run would double rows
            shutil.rmtree(scratch, ignore_errors=True)  # of a killed sync
            scratch.mkdir()
            try:
                copy = _open(upload, scratch, said.append, seconds)
                count = send(copy, upload.files, config)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except RunBusyError:
        return "skipped: another sync is running"
    if said:
        raise UserError(said[0])
    return f"uploaded {max(count - copy.first, 0)} of {count} rows"


def _open(upload: Upload, scratch: Path, say: Callable[[str], None], seconds: float) -> wandb_run.WandbRun:
    settings = base_settings(min(seconds, wandb_run.INIT_TIMEOUT), seconds) | {"sweep_id": upload.entry["sweep"]}
    # W&B must not show the syncing machine as the run's.
    settings |= dict.fromkeys(("x_disable_stats", "x_disable_meta", "x_disable_machine_info"), True)
    settings["x_save_requirements"] = False
    with session_environment(scratch, "online"):
        try:
            run = wandb_run.open_run("online", scratch, upload.entry["arguments"], settings)
            return wandb_run.WandbRun(run, upload.files.path, say, True, bool(upload.entry["sweep"]))
        except Exception as error:  # wandb raises many kinds
            close_session()
            advice = "W&B refuses the id of a deleted run; rerun=true makes a new run"
            raise UserError(f"{one_line(error)} ({advice})") from error


def send(copy: wandb_run.WandbRun, folder: RunFolder, config: dict[str, Any]) -> int:
    """Send everything that a run has recorded in ``folder`` to its W&B run, and finish the W&B run.

    ``config`` is the W&B config, with ``resolved``. Return the number of rows in the files.
    """
    count = _replay(folder, config, copy.log)
    state = str(folder.state())
    if state in DONE:
        copy.summarize({k: v for k, v in folder.read_summary().items() if k not in config["resolved"]})
        if config["tracker"]["checkpoints"]:
            copy.upload_checkpoints(folder, read_rows(folder.metrics))
    copy.finish(state)
    return count


def _replay(folder: RunFolder, config: dict[str, Any], log: Callable[[int, Row, Media], None]) -> int:
    """Replay a run's files to ``log``. Return the number of rows."""
    facts = config["resolved"]
    order = RowOrder(log, config["tracker"]["layers_every"], facts["steps"])
    is_over = folder.state() in DONE
    replay(folder, order, is_over=is_over)
    if is_over and config["tracker"].get("predictions") and folder.predictions.exists():
        order.end(folder.predictions)
    return order.count
