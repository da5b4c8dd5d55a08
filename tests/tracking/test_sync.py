"""``largebatch sync``: uploads, skipped runs and errors; and wandb's own tools on the folders of offline runs."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY, environment
from copies import local_rows, timeless
from programs import Ended, Programs
from recorder import Recorded, recorder

from largebatch.runs.folder import RunFolder
from largebatch.runs.predictions import read_predictions
from largebatch.tracking.wandb_run import read_uploads, update_upload

KEY = "c0ffee" * 6 + "beef"
Sync = Callable[..., Ended]


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory, process: Programs) -> Path:
    """Return the folder of an offline run with images and checkpoints."""
    folder = tmp_path_factory.mktemp("offline")
    extras = ["tracker=wandb", "tracker.mode=offline", "tracker.images=true", "tracker.checkpoints=true"]
    extras += ["tracker.predictions=true"]
    return process.train(folder, *TINY, *extras, "tracker.layers_every=2", "dataset.val_fraction=0.25", "steps=60")


@pytest.fixture
def runs(offline: Path, tmp_path: Path) -> Path:
    """Return ``runs`` with a copy of the offline run."""
    shutil.copytree(offline, tmp_path / "runs" / offline.name, symlinks=True)
    return tmp_path / "runs"


@pytest.fixture
def sync(process: Programs, tmp_path: Path) -> Sync:
    """Return a function that calls ``largebatch sync`` in ``tmp_path``."""

    def call(*arguments: str, server: Recorded | None = None, **more: str) -> Ended:
        around = {"HOME": str(tmp_path), **(server.environment(KEY) if server else {}), **more}
        return process.call("largebatch", "sync", *arguments, cwd=tmp_path, **around)

    return call


def test_an_upload_has_rows_images_and_checkpoints_and_is_not_repeated(runs: Path, sync: Sync, tmp_path: Path) -> None:
    (run,) = runs.iterdir()
    with recorder() as server:
        done = sync(server=server)
        assert done.code == 0, done.output
        taken = server.run
        first, *rows, last = taken.rows()
        assert done.stdout == f"{run.name}  uploaded {2 + len(rows)} of {2 + len(rows)} rows\n"
        table = json.loads(taken.files[last["predictions"]["path"]])
        found = read_predictions(run / "predictions.parquet")
        assert [row[2] for row in table["data"]] == [found.classes[label] for label in found.prediction]
        matrix = json.loads(taken.files[last["confusion_matrix_table"]["path"]])
        assert [row[2] for row in matrix["data"]] == found.confusion().flatten().tolist()
        assert taken.files[first["images"]["path"]] == (run / "images.png").read_bytes()
        assert [timeless(row) for row in rows] == local_rows(run, 3)
        sent = [artifact["files"].get("checkpoint.pt") for artifact in server.artifacts.values()]
        assert (run / "checkpoints" / "best.pt").read_bytes() in sent
        assert not taken.events, "the syncing machine's metrics are not the run's"
        assert "wandb-metadata.json" not in taken.files
        assert sync(server=server).stdout == "1 run(s) were uploaded before\n"
        assert len(taken.history) == 2 + len(rows)
        assert server.unknown == []
    assert [path.name for path in tmp_path.iterdir()] == ["runs"], "nothing is left in the home or the current folder"
    assert not (run / "wandb" / ".sync").exists()


@pytest.mark.parametrize("posts", [1, 2])
def test_a_killed_upload_is_completed_by_the_next(runs: Path, sync: Sync, tmp_path: Path, posts: int) -> None:
    """W&B may have taken rows without an answer; at the latest the second post has rows."""
    (run,) = runs.iterdir()
    with recorder() as server:
        server.freeze_after = posts
        command = [sys.executable, "-m", "largebatch.cli", "sync"]
        around = {**environment(), "HOME": str(tmp_path), **server.environment(KEY)}
        process = subprocess.Popen(command, cwd=tmp_path, env=around, stdout=subprocess.DEVNULL)
        assert server.frozen.wait(30)
        assert posts == 1 or server.run.history
        process.kill()
        process.wait()
        server.freeze_after = None
        server.frozen.clear()
        done = sync(server=server)
        assert done.code == 0, done.output
        assert [timeless(row) for row in server.run.rows()[1:-1]] == local_rows(run, 3)
        assert [row["_step"] for row in server.run.history] == list(range(len(server.run.history)))
        summary = json.loads((run / "summary.json").read_text())
        assert server.run.summary["best/test/accuracy"] == summary["best/test/accuracy"]
        assert server.run.exit_code == 0
        assert server.unknown == []
    assert not (run / "wandb" / ".sync").exists(), "nothing is left of the killed upload"


def test_runs_are_uploaded_in_the_order_of_their_first_start(runs: Path, sync: Sync) -> None:
    """A run that fails doesn't stop the others, and the next sync uploads only that run."""
    (run,) = runs.iterdir()
    earlier = run.with_name("z-0000abcd")
    shutil.copytree(run, earlier, symlinks=True)
    (entry,) = read_uploads(earlier).values()
    (earlier / "wandb" / "uploads.json").unlink()
    arguments = {**entry["arguments"], "id": "0000abcd"}
    update_upload(earlier, "0000abcd", **{**entry, "started": 0.0, "arguments": arguments})
    with recorder() as server:
        server.refused.append("0000abcd")
        done = sync("runs", "--timeout", "30", server=server)
        assert done.code == 1
        first, second, *_, last = done.stdout.splitlines()
        assert first.startswith("z-0000abcd  FAILED: ")
        assert second.startswith(f"{run.name}  uploaded")
        assert last == "1 run(s) could not be uploaded; repeat the command to try again"
        server.refused.clear()
        again = sync(server=server)
        assert again.code == 0
        assert again.stdout.splitlines()[0].startswith("z-0000abcd  uploaded")
        assert len(server.runs["0000abcd"].history) == len(server.runs[entry["arguments"]["id"]].history)


@pytest.mark.parametrize("content", ["[]", '{"a": 1}', '{"a": {"started": "x"}}', "{"])
def test_a_damaged_list_of_uploads_fails_its_run_alone(runs: Path, sync: Sync, content: str) -> None:
    (run,) = runs.iterdir()
    damaged = shutil.copytree(run, runs / "damaged-0000abcd", symlinks=True)
    (damaged / "wandb" / "uploads.json").write_text(content)
    done = sync("--dry-run")
    assert done.code == 1, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("damaged-0000abcd  FAILED: ")
    assert "uploads.json" in lines[0]
    assert lines[1].startswith(f"{run.name}  would upload")


@pytest.mark.parametrize("name", ["metrics.jsonl", "layers.parquet"])
def test_damaged_rows_are_named(runs: Path, sync: Sync, name: str) -> None:
    (run,) = runs.iterdir()
    (run / name).write_bytes(b"[1]\n\n")
    done = sync("--dry-run")
    assert done.code == 1, done.stderr
    assert f"{run.name}  FAILED: {run.absolute()}/{name}: can't be read (" in done.stdout


def test_without_a_key_or_a_host_nothing_is_uploaded(runs: Path, sync: Sync) -> None:
    refused = sync()
    assert (refused.code, refused.stdout) == (2, "")
    assert "error: nothing was uploaded: no API key. Fix: `wandb login`" in refused.stderr
    refused = sync(WANDB_API_KEY=KEY, WANDB_BASE_URL="http://127.0.0.1:9")
    assert refused.code == 2
    assert "127.0.0.1:9 can't be reached" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_arguments_select_runs(runs: Path, sync: Sync) -> None:
    (run,) = runs.iterdir()
    for wanted in ("synth", run.name[-8:], "runs", f"runs/{run.name}"):
        assert sync(wanted, "--dry-run").stdout.startswith(f"{run.name}  would upload ")
    wrong = sync("synth", "cifar", "--dry-run")
    assert (wrong.code, wrong.stdout) == (2, "")
    assert "cifar: no run in runs has a name or last eight digits with this beginning" in wrong.stderr


def test_earlier_repetitions_are_uploaded_too(runs: Path, sync: Sync) -> None:
    (run,) = runs.iterdir()
    repeated = shutil.copytree(run, runs / "repeated-0000abcd", symlinks=True)
    shutil.move(run, repeated / "previous-1")
    update_upload(repeated, run.name[-8:], uploaded=True)
    with recorder() as server:
        first, second = sync(server=server).stdout.splitlines()
        assert first.startswith("repeated-0000abcd (previous-1)  uploaded ")
        assert second == "1 run(s) were uploaded before"
        assert [timeless(row) for row in server.run.rows()[1:-1]] == local_rows(repeated, 3)


def test_a_running_run_is_skipped(runs: Path, sync: Sync) -> None:
    (run,) = runs.iterdir()
    with RunFolder(run).hold(), recorder() as server:
        done = sync(server=server)
        assert (done.code, done.stdout) == (0, f"{run.name}  skipped: the run is running\n")
        assert server.runs == {}


def test_a_run_that_was_deleted_in_wandb_fails_with_advice(runs: Path, sync: Sync) -> None:
    (run,) = runs.iterdir()
    with recorder() as server:
        server.refused.append(run.name[-8:])
        done = sync(server=server)
    assert done.code == 1
    assert "W&B refuses the id of a deleted run; rerun=true makes a new run" in done.stdout


# ---- wandb's own tools ----


def test_wandb_lists_and_summarises_an_offline_run(offline: Path) -> None:
    around = {**environment(), "HOME": str(offline)}
    command = [sys.executable, "-m", "wandb"]
    listed = subprocess.run(
        [*command, "sync", "--dry-run", "wandb"], cwd=offline, env=around, capture_output=True, text=True, timeout=60
    )
    assert listed.returncode == 0
    assert "Would sync 1 run(s)" in listed.stderr
    assert f"run-{offline.name[-8:]}.wandb" in listed.stderr
    told = subprocess.run(
        [*command, "leet", "inspect", "--summary", "wandb"],
        cwd=offline, env=around, capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    accuracy = json.loads((offline / "summary.json").read_text())["test/accuracy"]
    shown = dict(line.split(maxsplit=1) for line in told.splitlines() if len(line.split()) > 1)
    assert float(shown["test/accuracy"]) == accuracy
    assert shown["optimizer.name"] == "lars"
    assert shown["optimizer_label"] == "lars + constant"


def test_wandbs_terminal_viewer_starts(offline: Path) -> None:
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (50, 160))
    process = subprocess.Popen(
        [sys.executable, "-m", "wandb", "leet", "wandb"], cwd=offline, stdin=child, stdout=child, stderr=child,
        env={**environment(), "HOME": str(offline), "TERM": "xterm-256color"}, start_new_session=True,
    )  # fmt: skip
    os.close(child)
    shown, until, wanted = b"", time.monotonic() + 30, (b"Finished", b"best/epoch")
    while not all(part in shown for part in wanted) and process.poll() is None and time.monotonic() < until:
        if select.select([parent], [], [], 0.2)[0]:
            shown += os.read(parent, 65536)
    os.killpg(process.pid, signal.SIGKILL)  # with the viewer itself, which wandb starts
    process.wait()
    os.close(parent)
    assert [part for part in wanted if part not in shown] == [], "state and summary"
