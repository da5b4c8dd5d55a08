"""``largebatch`` on folders of other users, on file systems without locks, and on damaged or hostile files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import TINY, Launch
from programs import Programs

from largebatch import cli
from largebatch.errors import UserError
from largebatch.runs.folder import RunFolder

ESCAPE = "\x1b[31mred\x1b]0;title\x07"


def a_run(folder: Path, name: str, **status: object) -> RunFolder:
    run = RunFolder(folder / name)
    run.path.mkdir(parents=True)
    run.update_status(**{"state": "finished", "message": "", "cluster": "local", "step": 3, "steps": 8, **status})
    run.log.write_text("the log\n")
    return run


@pytest.fixture
def shared() -> Iterator[Path]:
    """Return a folder that other users can read."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def as_another_user(program: Callable[[], int], output: Path) -> tuple[int | None, str]:
    """Run ``program`` without the rights of root. Return its exit code and output."""
    output.touch()
    output.chmod(0o666)

    def run() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
        with output.open("w") as text, contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            code = program()
        os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    return process.exitcode, output.read_text()


@pytest.mark.parametrize("lock", ["readable", "private"])
def test_another_user_s_runs_are_listed_and_not_cancelled(shared: Path, lock: str) -> None:
    run = a_run(shared / "runs", "digits-11111111", state="running", pid=os.getpid(), host="elsewhere")
    run.path.chmod(0o555)
    with run.hold():
        (run.path / "lock").chmod(0o444 if lock == "readable" else 0)
        code, listed = as_another_user(lambda: cli.main(["status", str(shared / "runs"), "--json"]), shared / "out")
        assert (code, json.loads(listed)[0]["state"]) == (0, "running")
        code, said = as_another_user(lambda: cli.main(["cancel", str(shared / "runs")]), shared / "out")
    run.path.chmod(0o755)
    assert code == 1
    assert said.count("\n") == 1
    assert said.startswith("digits-11111111: not cancelled:")
    assert "another user's, or read-only" in said


def test_a_process_that_reads_the_lock_sees_that_it_is_free(shared: Path) -> None:
    run = a_run(shared / "runs", "digits-11111111", state="running", pid=1, host="elsewhere")
    with run.hold():
        pass
    (run.path / "lock").chmod(0o444)
    code, listed = as_another_user(lambda: cli.main(["status", str(shared / "runs"), "--json"]), shared / "out")
    assert (code, json.loads(listed)[0]["state"]) == (0, "interrupted")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    run = a_run(tmp_path, "digits-11111111")
    (run.path / "lock").touch()
    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(UserError, match=r"has no locks .*Fix: runs_dir=FOLDER on another file system"), run.hold():
        pass
    assert run.is_held()  # unknown: the status decides


FILES = ("status.json", "summary.json", "metrics.jsonl", "layers.parquet", "correct.npz", "config.yaml", "log.txt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, process: Programs) -> dict[str, bytes]:
    """Return the files of a finished run by name."""
    run = process.train(tmp_path_factory.mktemp("trained"), *TINY, "steps=8")
    return {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}


@pytest.mark.parametrize("state", ["finished", "running"])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_gives_one_line_and_the_other_runs_are_shown(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], trained: dict[str, bytes], file: str, state: str
) -> None:
    """Truncated, empty, random and flipped bytes, and a folder in place of the file; with a fixed seed."""
    chance = random.Random(f"{file} {state}")
    good, bad = tmp_path / "runs" / "good-11111111", tmp_path / "runs" / "bad-22222222"
    for run, seed in ((good, b"seed: 0\n"), (bad, b"seed: 1\n")):
        run.mkdir(parents=True)
        for name, content in trained.items():
            (run / name).write_bytes(content.replace(b"seed: 0\n", seed) if name == "config.yaml" else content)
    RunFolder(bad).update_status(state=state)
    content = (bad / file).read_bytes()
    flipped = bytearray(content)
    for _ in range(3):
        flipped[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    damages = [content[: len(content) // 2], b"", b"\0" * 40, chance.randbytes(200), bytes(flipped), b"[]\n", None]
    for damage in damages:
        if damage is None:
            (bad / file).unlink()
            (bad / file).mkdir()
        else:
            (bad / file).write_bytes(damage)
        for command in (["status"], ["report", "--format", "md", "--out", "-"], ["cancel"]):
            code = cli.main([command[0], str(tmp_path / "runs"), *command[1:]])
            out, errors = capfd.readouterr()
            assert code == 0 or command == ["cancel"], errors
            assert command != ["status"] or "good-11111111  finished" in out
            assert errors.count("\n") <= 1
    assert cli.main(["logs", str(bad)]) in (0, 2)


def test_control_characters_are_escaped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path / "runs", "digits-11111111", state="failed", message=ESCAPE)
    running = a_run(tmp_path / "runs", "digits-22222222", state="preempted")
    for each in (run, running):
        each.log.write_text(f"first\n{ESCAPE}\n")
    run.config.write_text("dataset: {name: \x1b}\n")
    for command in (["status"], ["status", "--json"], ["status", "--watch"]):
        cli.main([*command, str(tmp_path / "runs")])
    cli.main(["logs", str(run.path)])
    cli.main(["logs", "--follow", str(run.path)])
    cli.main(["report", str(tmp_path / "runs"), "--format", "md"])
    out, errors = capfd.readouterr()
    assert "\x1b" not in out + errors
    assert r"\x1b[31mred\x1b]0;title\x07" in out


def test_a_folder_that_cannot_be_written_fails_with_one_line(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    refused = launch("dataset=synthetic", "tracker=none")
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: runs_dir={tmp_path}/runs: can't be written (")
    assert refused.stderr.count("\n") == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_s_running_run_is_not_waited_for(shared: Path) -> None:
    """The process is found by the run's name in its command line, and can't be signalled."""
    run = a_run(shared / "runs", "digits-11111111", state="running", host=socket.gethostname())
    command = [sys.executable, "-c", "import time; time.sleep(100)", run.name]
    with run.hold(), subprocess.Popen(command) as process:
        run.update_status(pid=process.pid)
        started = time.monotonic()
        code, said = as_another_user(lambda: cli.main(["cancel", str(shared / "runs")]), shared / "out")
        process.kill()
    assert (code, time.monotonic() - started < 20) == (1, True)
    assert said.startswith(f"digits-11111111: not cancelled: {run.path}: pid {process.pid}")
    assert process.returncode == -signal.SIGKILL


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_s_private_run_is_named_in_one_line_beside_the_other_runs(
    shared: Path, trained: dict[str, bytes]
) -> None:
    for name in ("good-11111111", "private-22222222"):
        (shared / "runs" / name).mkdir(parents=True)
        for file, content in trained.items():
            (shared / "runs" / name / file).write_bytes(content)
    private = shared / "runs" / "private-22222222"
    private.chmod(0o700)

    def said(*arguments: str) -> tuple[int | None, str]:
        cli.main(list(arguments))  # imports what another user may not read
        code, output = as_another_user(lambda: cli.main(list(arguments)), shared / "out")
        assert "Traceback" not in output
        return code, output

    runs = str(shared / "runs")
    code, listed = said("status", runs)
    assert code == 0
    assert "good-11111111     finished" in listed
    assert f"{private}/summary.json: can't be read (Permission denied)" in listed
    code, report = said("report", runs, "--format", "md")
    assert code == 0
    assert "private-22222222" in report
    assert f"private-22222222: {private}/status.json: can't be read (Permission denied)" in said("cancel", runs)[1]
    assert (
        f"private-22222222  FAILED: {private}/wandb/uploads.json: can't be read" in said("sync", "--dry-run", runs)[1]
    )
    for command in (["logs"], ["status"], ["cancel"], ["sync", "--dry-run"]):
        _, output = said(*command, str(private))
        assert f"{private}/status.json: " in output, output
    (shared / "runs").chmod(0o700)
    for command in ("status", "report", "cancel", "sync", "logs"):
        code, output = said(command, runs)
        assert (code, output.count("\n")) == (2, 1), output
        assert output.startswith(f"error: {runs}"), output
        assert output.endswith(": Permission denied\n"), output


@pytest.mark.parametrize(
    "value", ["optimizer.name=\x1b[31m", "batch_size=\x1b[31m", "\x1b[31m=1", "dataset.root=/\x1b[31m"]
)
def test_messages_of_the_launcher_escape_control_characters(tmp_path: Path, process: Programs, value: str) -> None:
    command = ("dataset=cifar10", "dataset.download=false", "tracker=none", value)
    refused = process.call("launch", *command, cwd=tmp_path)
    assert refused.code == 2
    assert r"\x1b[31m" in refused.stderr
    assert "\x1b" not in refused.output
