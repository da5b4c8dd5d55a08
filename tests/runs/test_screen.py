"""Tables in terminals of several widths: they fit, break no word, and show accuracy, time left and failures."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import environment
from in_terminal import in_terminal
from rich.text import Text

from largebatch.runs.folder import RunFolder
from largebatch.runs.metrics import MetricsLog, seconds_left
from largebatch.runs.screen import duration, screen_table, short_label, split_names
from largebatch.runs.table import run_rows, runs_on_screen, seconds_to_go

STATUS = [sys.executable, "-m", "largebatch.cli", "status"]
WHY = "RuntimeError: the disk of the data set is full; the same command resumes the run from its last checkpoint"
NAMES = [
    f"deformed_digits-tinycnn-clf-{optimizer}-warmup_cosine-b{batch}-lr{lr}-s0-{digits}"
    for optimizer, batch, lr, digits in (
        ("lars", 128, 27, "1a2b3c4d"), ("tvlars", 1024, 0.001, "22222222"), ("lamb", 8192, "1e-05", "33333333"),
    )
]  # fmt: skip


def write_rows(path: Path, *rows: dict[str, Any]) -> None:
    log = MetricsLog(path, 0)
    for row in rows:
        log.write(row)
    log.close()


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    """A run that trains, one that failed and one that finished."""
    running, failed, finished = (RunFolder(tmp_path / "runs" / name) for name in NAMES)
    statuses: list[tuple[RunFolder, dict[str, Any]]] = [
        (running, {"state": "running", "step": 1200, "steps": 6750}),
        (failed, {"state": "failed", "message": WHY, "step": 10, "steps": 843}),
        (finished, {"state": "finished", "message": "", "step": 105, "steps": 105}),
    ]
    for folder, status in statuses:
        folder.path.mkdir(parents=True)
        folder.update_status(**{"message": "", "cluster": "local"} | status)
    write_rows(
        running.metrics,
        {"step": 200, "wall_seconds": 20.0, "train/loss": 1.0},
        {"step": 1200, "wall_seconds": 120.0, "test/accuracy": 0.7625},
    )
    finished.summary.write_text('{"test/accuracy": 0.861, "wall_seconds": 60.0}')
    return tmp_path / "runs"


def held(runs_dir: Path) -> subprocess.Popen[str]:
    """Return a process that holds the lock of the running run, so that the run isn't interrupted."""
    code = (
        "import sys; from largebatch.runs.folder import RunFolder\n"
        "with RunFolder(sys.argv[1]).hold(): print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(runs_dir / NAMES[0])], env=environment(), text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def words_of(lines: list[str]) -> list[str]:
    return [word for line in lines for word in line.split()]


@pytest.mark.parametrize("columns", [80, 120])
def test_status_fits_on_a_terminal_with_accuracy_time_left_and_reasons(runs_dir: Path, columns: int) -> None:
    holder = held(runs_dir)
    shown = in_terminal(STATUS, runs_dir.parent, columns)
    holder.communicate()
    assert shown.code == 0
    assert max(map(len, shown.lines)) <= columns
    running, failed, finished = (
        next(line for line in shown.lines if line.startswith(name[-8:])) for name in NAMES
    )  # fmt: skip
    assert re.split(r"\s{2,}", running)[1:] == ["lars b128 lr27", "running", "1200", "6750", "76.25 %", "0:09:15"]
    assert re.split(r"\s{2,}", failed)[1:3] == ["tvlars b1024 lr0.001", "failed"]
    assert re.split(r"\s{2,}", finished)[1:3] == ["lamb b8192 lr1e-05", "finished"]
    assert "86.10 %" in finished
    assert " ".join(words_of(shown.lines[shown.lines.index(failed) + 1 :])).startswith(WHY)
    assert "all runs: deformed_digits tinycnn clf warmup_cosine s0" in shown.lines
    assert "3 run(s): 1 finished, 1 running, 1 failed; about 0:09:15 left" in " ".join(shown.lines)
    for state, colour in (("running", 36), ("failed", 31), ("finished", 32)):
        assert re.search(rf"\x1b\[(1;)?{colour}m{state}", shown.sent), state


def test_the_number_of_runs_in_each_state_fits_on_a_terminal(runs_dir: Path) -> None:
    for number, state in enumerate(("diverged", "preempted", "odd", "queued")):
        folder = RunFolder(runs_dir / f"digits-{number}{number:07}")
        folder.path.mkdir()
        folder.update_status(state=state, message="", cluster="local")
    shown = in_terminal(STATUS, runs_dir.parent, 80)
    assert "7 run(s): " in shown.sent
    assert max(map(len, shown.lines)) <= 80


def test_status_in_a_pipe_has_one_whole_line_a_run(runs_dir: Path) -> None:
    holder = held(runs_dir)
    listed = subprocess.run(STATUS, cwd=runs_dir.parent, env=environment(), capture_output=True, text=True, check=True)
    holder.communicate()
    lines = {re.split(r"\s{2,}", line)[0]: line for line in listed.stdout.splitlines()}
    assert "\x1b" not in listed.stdout
    assert re.split(r"\s{2,}", lines["run"]) == ["run", "state", "step", "of", "test", "left"]
    assert lines[NAMES[0]].split()[1:] == ["running", "1200", "6750", "76.25", "%", "0:09:15"]
    assert lines[NAMES[1]].endswith(WHY)


@pytest.mark.parametrize("columns", [80, 120])
def test_watching_shows_one_line_a_run_with_its_accuracy(runs_dir: Path, columns: int) -> None:
    holder = held(runs_dir)

    def end(sent: bytes) -> None:
        if b"0:09:15" in sent and holder.poll() is None:
            RunFolder(runs_dir / NAMES[0]).update_status(state="preempted")
            holder.communicate()

    shown = in_terminal([*STATUS, "--watch"], runs_dir.parent, columns, heard=end)
    assert shown.code == 0
    first = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", shown.sent)
    assert re.search(r"1a2b3c4d +lars b128 lr27 +\n*running *\n* +1200 +6750 +76.25 % +0:09:15", first), first
    assert max(map(len, shown.lines)) <= columns


@pytest.mark.parametrize("width", [60, 72, 80, 100, 120, 200])
@pytest.mark.parametrize("live", [False, True])
def test_a_table_breaks_no_word_and_is_never_too_wide(width: int, live: bool) -> None:
    labels = [f"optimizer={name} schedule=warmup_cosine lr=0.00{i} batch_size=8192" for i, name in enumerate("abc")]
    columns = {
        "run": ["11111111", "22222222", "33333333"], "settings": labels, "state": ["finished", "interrupted", "failed"],
        "step": ["6750"] * 3, "of": ["6750"] * 3, "test": ["76.10 %", "-", "-"], "job": ["1234567_12"] * 3,
        "node": ["node-with-a-long-name"] * 3,
    }  # fmt: skip
    news = ["", "the same command resumes the run", WHY]
    lines = screen_table(columns, news, width, live=live).plain.splitlines()
    assert max(map(len, lines)) <= width
    known = {word for cells in [*columns.values(), list(columns), news] for cell in cells for word in cell.split()}
    if live:
        assert len(lines) <= 1 + 3 + 2  # at most one line of news below a row
    else:
        assert set(words_of(lines)) <= known
        assert WHY in " ".join(words_of(lines))
        assert all(word in words_of(lines) for label in labels for word in label.split())
    assert all(text in "\n".join(lines) for text in ("11111111", "interrupted", "76.10 %"))
    assert ("node-with" in lines[1]) == (width >= 120)


def test_names_are_split_into_digits_and_what_differs() -> None:
    assert split_names([*NAMES, "copy"]) == (
        [
            ("1a2b3c4d", "lars b128 lr27"), ("22222222", "tvlars b1024 lr0.001"), ("33333333", "lamb b8192 lr1e-05"),
            ("copy", ""),
        ],
        "deformed_digits tinycnn clf warmup_cosine s0",
    )  # fmt: skip
    assert split_names([NAMES[0]]) == (
        [("1a2b3c4d", "deformed_digits tinycnn clf lars warmup_cosine b128 lr27 s0")], "",
    )  # fmt: skip


def test_labels_are_shortened_unless_two_keys_would_agree() -> None:
    assert short_label("optimizer=lars optimizer.lr=3 seed=1") == "optimizer=lars lr=3 seed=1"
    assert short_label("optimizer.eps=3 model.eps=1 a.b=2") == "optimizer.eps=3 model.eps=1 b=2"


def test_the_time_left_follows_the_last_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert seconds_left(path, 100) is None
    write_rows(path, {"step": 10, "wall_seconds": 50.0}, {"step": 10, "wall_seconds": 51.0, "test/accuracy": 0.5})
    assert seconds_left(path, 100) is None
    write_rows(path, {"step": 10, "wall_seconds": 50.0}, {"step": 30, "wall_seconds": 60.0})  # 0.5 s a step
    assert seconds_left(path, 100) == 35.0
    assert [duration(seconds) for seconds in (0.4, 61, 36000)] == ["0:00:00", "0:01:01", "10:00:00"]


def test_the_time_left_of_all_runs_counts_queued_runs() -> None:
    def row(state: str, seconds: float | None = None, left: float | None = None) -> dict[str, Any]:
        return {"state": state, "seconds": seconds, "seconds_left": left}

    two = [row("running", left=30.0), row("running", left=50.0)]
    assert seconds_to_go(two) == 50.0
    assert seconds_to_go([*two, row("finished", 100.0), row("finished", 60.0), *[row("queued")] * 3]) == 160.0
    assert seconds_to_go([*two, row("queued")]) is None  # no finished run to estimate it from
    assert seconds_to_go([row("running"), row("finished", 60.0)]) is None
    assert seconds_to_go([row("finished", 60.0)]) is None


def test_state_colours_stand_in_the_table(runs_dir: Path) -> None:
    table = runs_on_screen(run_rows([RunFolder(runs_dir / NAMES[1])]), {"state": "state"}, 80)
    assert isinstance(table, Text)
    styles = {table.plain[span.start : span.end].strip(): str(span.style) for span in table.spans}
    assert styles["failed"] == "bold red"
