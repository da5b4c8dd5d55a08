"""W&B never prompts, hangs, raises or leaks secrets, and an offline run is complete.

Each run has its own process (``one_run.py``), because wandb keeps state per process. W&B's own reader reads the files
of a run; the server is on the loopback interface (``recorder.py``).
"""

from __future__ import annotations

import functools
import json
import os
import pty
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from one_run import configuration
from recorder import recorder

from largebatch.errors import one_line
from largebatch.runs.folder import read_json
from largebatch.tracking.wandb_arguments import run_tags
from largebatch.tracking.wandb_session import next_hop, unreachable

TOOLS = ROOT / "tests" / "tools"
KEY = "c0ffee" * 6 + "beef"
DRIVER = str(TOOLS / "one_run.py")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def environment(home: Path) -> dict[str, str]:
    """Return the environment without a user's settings of W&B, SLURM and proxies."""
    unwanted = ("WANDB_", "SLURM_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "NETRC")
    kept = {key: value for key, value in os.environ.items() if not key.upper().startswith(unwanted)}
    return {**kept, "HOME": str(home), "XDG_CACHE_HOME": f"{home}/.cache", "XDG_CONFIG_HOME": f"{home}/.config"}


Go = Callable[..., dict[str, Any]]


@pytest.fixture
def go(environment: dict[str, str], tmp_path: Path) -> Go:
    """Return a function that runs one run with more environment and returns its report, its only output."""

    def carry_out(more: dict[str, str] | None = None, **asked: Any) -> dict[str, Any]:
        command = [sys.executable, DRIVER, json.dumps({"directory": str(tmp_path / "run"), **asked})]
        done = subprocess.run(
            command, env={**environment, **(more or {})}, cwd=tmp_path, capture_output=True, text=True, timeout=60,
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return json.loads(done.stdout)  # type: ignore[no-any-return]

    (tmp_path / "run").mkdir()
    return carry_out


def segments(run: Path) -> list[Path]:
    return sorted((run / "wandb").glob("*run-*-0123abcd"))


@functools.cache
def records(segment: Path) -> list[dict[str, Any]]:
    """Return every record of a finished segment, as W&B's own reader prints them."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(segment)]
    printed = subprocess.run(command, cwd=segment, capture_output=True, text=True, timeout=30, check=True).stdout
    return [json.loads(line) for line in printed.splitlines()]


def all_of(kind: str, segment: Path) -> list[dict[str, Any]]:
    return [record[kind] for record in records(segment) if record["type"] == kind]


def exit_codes(segment: Path) -> list[int]:
    return [record.get("exit_code", 0) for record in all_of("exit", segment)]  # W&B's reader leaves out 0


def history(segment: Path) -> list[dict[str, Any]]:
    return [row["item"] for row in all_of("history", segment)]


# ---- contents of a run ----


SECRETS = {
    "WANDB_API_KEY": KEY,
    "AWS_SECRET_ACCESS_KEY": "canary-aws",
    "MY_TOKEN": "canary-token",
    "SLURM_JWT": "canary-jwt",
    "HTTPS_PROXY": "http://someone:canary-proxy@127.0.0.1:9",
    "WANDB_BASE_URL": "http://someone:canary-url@127.0.0.1:9",
}


@pytest.fixture(scope="module")
def full(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Run offline with every kind of secret in the environment and wandb's debugging on. Return folder and report."""
    where = tmp_path_factory.mktemp("full")
    project = where / "checkout"
    project.mkdir()
    git = ["git", "-C", str(project), "-c", "user.name=x", "-c", "user.email=x@example.invalid"]
    (project / "source.py").touch()
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    subprocess.run(
        [*git, "remote", "add", "origin", "https://canary-name:canary-git@example.invalid/x.git"], check=True
    )
    (project / "source.py").write_text("canary = 'canary-diff'")
    tracker = {
        "mode": "offline", "project": "large/batch", "group": "sweep-1", "job_type": "train", "notes": "a note",
        "tags": ["  mine ", "", "x" * 80, "digits"],
    }  # fmt: skip
    asked = {"directory": str(project / "run"), "tracker": tracker}
    noisy = {"WANDB_DEBUG": "true", "WANDB_CORE_DEBUG": "true", "SLURM_JOB_ID": "4711"}
    done = subprocess.run(
        [sys.executable, DRIVER, json.dumps(asked), "--token=canary-argument"], cwd=project, timeout=60, check=True,
        env={**environment, **SECRETS, **noisy}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr == ""
    return project / "run", json.loads(done.stdout)


def test_offline_run_has_the_config_and_resolved_values(full: tuple[Path, dict[str, Any]]) -> None:
    (segment,) = segments(full[0])
    (run,) = all_of("run", segment)
    config = run["config"]["update"]
    assert config["optimizer"]["lmbda_relative"] == 10
    assert config["batch_size"] == 512
    assert config["dataset"]["name"] == "digits"
    assert config["resolved"] == {"run": "digits-tvlars-0123abcd", "lr": 4.0, "commit": "0" * 40, "steps": 20}


def test_offline_run_is_named_grouped_and_tagged(full: tuple[Path, dict[str, Any]]) -> None:
    (segment,) = segments(full[0])
    (run,) = all_of("run", segment)
    assert (run["run_id"], run["display_name"]) == ("0123abcd", "digits-tvlars-0123abcd")
    assert (run["project"], run["run_group"], run["job_type"]) == ("large_batch", "sweep-1", "train")
    assert run["notes"] == "a note"
    assert run["tags"] == ["digits", "smallcnn", "tvlars", "constant", "mine", "x" * 64]
    assert run["resume"] is True


def test_offline_run_has_every_row_and_its_axes(full: tuple[Path, dict[str, Any]]) -> None:
    (segment,) = segments(full[0])
    rows = history(segment)
    assert [row["step"] for row in rows] == [1, 2, 3, 3]
    assert [row.get("train/loss") for row in rows] == [1.0, 1 / 2, 1 / 3, None]
    assert rows[3]["test/accuracy"] == 0.5
    assert all({"epoch", "examples", "wall_seconds"} <= set(row) for row in rows)
    assert not any("optim/phi" in row for row in rows), "None is left out"
    axes = {metric["glob_name"]: metric["step_metric"] for metric in all_of("metric", segment) if "glob_name" in metric}
    by_step = ["train/*", "optim/*", "perf/*", "layers/*", "noise/*", "noise_layers/*"]
    by_epoch = ["test/*", "val/*", "embedding/*", "probe/*", "sharpness/*"]
    assert axes == dict.fromkeys(by_step, "step") | dict.fromkeys(by_epoch, "epoch")


def test_offline_run_ends_with_the_given_summary(full: tuple[Path, dict[str, Any]]) -> None:
    (segment,) = segments(full[0])
    final: dict[str, Any] = {}
    for summary in all_of("summary", segment):
        final.update(summary["update"])
    assert (final["test/accuracy"], final["best/test/accuracy"]) == (0.875, 0.9)
    assert "test/top5" not in final
    assert exit_codes(segment) == [0]


def test_no_secret_is_on_disk_or_terminal(full: tuple[Path, dict[str, Any]], home: Path) -> None:
    run, report = full
    files = [path for folder in (run, home) for path in folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        content = path.read_bytes()
        assert b"canary" not in content, path
        assert KEY.encode() not in content, path
    assert "canary" not in json.dumps(report)


def test_only_the_slurm_job_is_recorded_of_slurm_variables(full: tuple[Path, dict[str, Any]]) -> None:
    (segment,) = segments(full[0])
    recorded = [found["slurm"] for found in all_of("environment", segment) if "slurm" in found]
    assert recorded == [{"job_id": "4711"}]


def test_everything_stays_in_the_run_folder(full: tuple[Path, dict[str, Any]], home: Path) -> None:
    run, _ = full
    links = [path for path in run.rglob("*") if path.is_symlink()]
    assert links
    assert all(link.resolve(strict=True).is_relative_to(run.resolve()) for link in links)
    assert [path.name for path in run.iterdir()] == ["wandb"]
    assert sorted(path.name for path in run.parent.iterdir()) == [".git", "run", "source.py"]
    assert list(home.iterdir()) == []


def test_the_environment_is_restored(full: tuple[Path, dict[str, Any]]) -> None:
    assert full[1]["changed"] == []


def test_without_a_tracker_wandb_is_not_imported(go: Go, tmp_path: Path) -> None:
    report = go(tracker={"name": "none"})
    assert (report["mode"], report["wandb"], report["said"]) == (None, False, [])
    assert not (tmp_path / "run" / "wandb").exists()


SURROUNDINGS = {
    "WANDB_PROJECT": "theirs", "WANDB_NAME": "their name", "WANDB_NOTES": "their notes",
    "WANDB_TAGS": "one,two", "WANDB_JOB_TYPE": "their type", "WANDB_RUN_GROUP": "their group",
}  # fmt: skip


def test_keys_come_before_the_environment_and_the_environment_before_defaults(go: Go, tmp_path: Path) -> None:
    go(SURROUNDINGS)
    (segment,) = segments(tmp_path / "run")
    (run,) = all_of("run", segment)
    assert (run["project"], run["display_name"], run["notes"]) == ("theirs", "their name", "their notes")
    assert (run["job_type"], run["run_group"]) == ("their type", "their group")
    assert run["tags"] == ["digits", "smallcnn", "tvlars", "constant", "one", "two"]
    (entry,) = read_json(tmp_path / "run" / "wandb" / "uploads.json").values()
    assert entry["arguments"]["project"] == "theirs", "largebatch sync uploads to the same project"

    ours = {"project": "p", "run_name": "n", "notes": "o", "job_type": "j", "group": "g", "tags": ["t"]}
    go(SURROUNDINGS, directory=str(tmp_path / "ours"), tracker=ours)
    (segment,) = segments(tmp_path / "ours")
    (run,) = all_of("run", segment)
    assert (run["project"], run["display_name"], run["notes"]) == ("p", "n", "o")
    assert (run["job_type"], run["run_group"]) == ("j", "g")
    assert run["tags"][4:] == ["t", "one", "two"]


def test_git_state_is_recorded_on_request_without_the_password(go: Go, tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.invalid"]
    remote = "https://someone:canary@example.invalid/x.git"
    for command in (["init", "-q"], ["commit", "-q", "-m", "x", "--allow-empty"], ["remote", "add", "origin", remote]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    go(tracker={"git": True})
    (segment,) = segments(tmp_path / "run")
    (run,) = all_of("run", segment)
    assert len(run["git"]["commit"]) == 40
    assert "example.invalid/x.git" in run["git"]["remote_url"]
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [path for path in files if b"canary" in path.read_bytes()]


# ---- online or offline ----


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.mark.parametrize(
    ("more", "tracker", "mode", "why"),
    [
        ({}, {}, "offline", "no API key"),
        ({}, {"mode": "online"}, "offline", "no API key"),
        ({"WANDB_API_KEY": "tooshort"}, {}, "offline", "API key must have"),
        ({"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:{closed}"}, {}, "offline", "refused"),
        (
            {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://w.invalid", "HTTP_PROXY": "127.0.0.1:{closed}"},
            {"mode": "online"}, "offline", "127.0.0.1:{closed} can't be reached",
        ),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, {}, "offline", "WANDB_MODE=offline"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}, {}, None, "WANDB_MODE=disabled"),
    ],
    ids=["no key", "online without key", "malformed key", "refused", "dead proxy", "env offline", "env disabled"],
)  # fmt: skip
def test_mode_follows_key_host_and_environment(
    go: Go, more: dict[str, str], tracker: dict[str, Any], mode: str | None, why: str
) -> None:
    """The run is offline at once without a usable key and an answering host; one line has the reason."""
    closed = str(closed_port())
    report = go({key: value.replace("{closed}", closed) for key, value in more.items()}, tracker=tracker)
    assert report["mode"] == mode
    assert len(report["said"]) == 1
    assert why.replace("{closed}", closed) in report["said"][0]
    assert report["start_seconds"] < 10


def test_without_a_key_there_is_no_prompt_at_a_terminal(environment: dict[str, str], tmp_path: Path) -> None:
    """wandb by default prompts and waits without limit."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, DRIVER, json.dumps({"directory": str(tmp_path)})],
        env=environment, cwd=tmp_path, stdin=child, stdout=child, stderr=child, start_new_session=True,
    )  # fmt: skip
    os.close(child)
    shown = b""
    deadline = time.monotonic() + 40
    while process.poll() is None and time.monotonic() < deadline:
        if select.select([parent], [], [], 0.2)[0]:
            shown += read(parent)
    process.kill()
    while chunk := read(parent):
        shown += chunk
    os.close(parent)
    assert process.wait() == 0, shown
    report = json.loads(shown)  # fails if anything else was shown
    assert report["said"] == ["W&B offline: no API key"]


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # on Linux: the other side is closed
        return b""


def test_a_host_that_never_answers_delays_the_start_by_its_limit(go: Go, tmp_path: Path) -> None:
    with recorder() as server:
        server.frozen.set()
        report = go({"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url}, init_timeout=1.5)
    assert report["mode"] == "offline"
    assert report["start_seconds"] < 1.5 + 8
    assert len(report["said"]) == 1
    assert "the server did not start the run" in report["said"][0]
    (segment,) = segments(tmp_path / "run")
    assert segment.name.startswith("offline-run-"), "the online attempt left nothing"
    assert len(history(segment)) == 4


def test_an_unknown_key_is_logged(go: Go) -> None:
    with recorder() as server:
        server.status = 401
        report = go(server.environment(KEY))
    assert report["mode"] == "offline"
    assert len(report["said"]) == 1
    assert "the server did not start the run" in report["said"][0]


def test_online_the_server_gets_what_was_logged(go: Go, tmp_path: Path) -> None:
    with recorder() as server:
        address = server.url.replace("//", "//someone:canary@")
        report = go({"WANDB_API_KEY": KEY, "WANDB_BASE_URL": address, "WANDB_RUN_GROUP": "g"})
        assert report["said"] == [f"W&B online: {server.url}/someone/largebatch/runs/0123abcd"]
        (entry,) = read_json(tmp_path / "run" / "wandb" / "uploads.json").values()
        assert entry["url"] == f"{server.url}/someone/largebatch/runs/0123abcd"
        assert [row["step"] for row in server.run.rows()] == [1, 2, 3, 3]
        assert server.run.summary["test/accuracy"] == 0.875
        assert server.run.exit_code == 0
        assert server.unknown == []
        announced = server.run.announced[0]
        assert (announced["groupName"], announced["jobType"]) == ("g", "clf")
        assert server.run.config["optimizer"]["name"] == "tvlars"


def test_a_server_that_stops_answering_delays_the_end_by_its_limit(environment: dict[str, str], tmp_path: Path) -> None:
    asked = {"directory": str(tmp_path), "finish_timeout": 1.5, "break": "wait"}
    with recorder() as server:
        process = subprocess.Popen(
            [sys.executable, DRIVER, json.dumps(asked)], cwd=tmp_path, text=True,
            env={**environment, "WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        server.frozen.set()
        shown, errors = process.communicate("\n", timeout=30)
    assert (process.returncode, errors) == (0, "")
    report = json.loads(shown)
    assert report["finish_seconds"] < 1.5 + 5
    assert len(report["said"]) == 2
    assert "could not finish: TimeoutError" in report["said"][1]
    (segment,) = segments(tmp_path)
    assert len(history(segment)) == 4, "every row is on disk"


# ---- failures during a run ----


def test_wandb_sync_joins_the_parts_of_a_resumed_run(go: Go, environment: dict[str, str], tmp_path: Path) -> None:
    go()
    go(first_step=4, first_number=4)
    parts = segments(tmp_path / "run")
    assert len(parts) == 2
    with recorder() as server:
        online = {**environment, **server.environment(KEY)}
        command = [sys.executable, "-m", "wandb", "sync", "--yes", *map(str, parts)]
        subprocess.run(command, env=online, cwd=tmp_path, check=True, capture_output=True, timeout=60)
        assert [row["step"] for row in server.run.rows()] == [1, 2, 3, 3, 4, 5, 6, 6]
        assert list(server.runs) == ["0123abcd"]
        assert server.unknown == []


def test_two_runs_one_after_the_other_in_one_process(go: Go, tmp_path: Path) -> None:
    report = go(times=2)
    assert report["said"] == ["W&B offline: no API key"] * 2
    first, second = segments(tmp_path / "run")
    assert first != second
    assert len(history(second)) == 4


def test_losing_wandbs_process_is_logged_once(go: Go) -> None:
    report = go(**{"break": "core"})
    assert len(report["said"]) == 2
    assert report["said"][1].startswith("W&B logging ends: could not log: ConnectionResetError")


def test_our_own_error_is_logged_and_the_run_is_still_ended(go: Go, tmp_path: Path) -> None:
    report = go(**{"break": "type", "state": "failed"})
    assert len(report["said"]) == 2
    assert "could not log: ValueError" in report["said"][1]
    (segment,) = segments(tmp_path / "run")
    assert len(history(segment)) == 1
    assert exit_codes(segment) == [1]


def test_a_killed_run_keeps_what_is_older_than_two_seconds(environment: dict[str, str], tmp_path: Path) -> None:
    asked = {"directory": str(tmp_path), "break": "self"}
    command = [sys.executable, DRIVER, json.dumps(asked)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, timeout=60, check=False)
    assert done.returncode == -9
    (segment,) = segments(tmp_path)
    assert [row["step"] for row in history(segment)] == [1]


def test_a_folder_that_cannot_be_made_is_logged(go: Go, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    report = go(directory=str(tmp_path / "file" / "run"))
    assert report["mode"] is None
    assert len(report["said"]) == 1
    assert "tracker=wandb is off: NotADirectoryError" in report["said"][0]


READ_ONLY = """
import os
access = os.access
os.access = lambda path, mode: str(path) != {run!r} and access(path, mode)
"""


def test_a_folder_that_cannot_be_written_is_logged(go: Go, tmp_path: Path) -> None:
    """wandb silently uses the system's temporary folder. Root may write anywhere, so ``os.access`` is replaced."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "sitecustomize.py").write_text(READ_ONLY.format(run=str(tmp_path / "run")))
    report = go({"TMPDIR": str(tmp_path / "elsewhere"), "PYTHONPATH": f"{tmp_path}:{ROOT}/src"})
    assert len(report["said"]) == 2
    assert "could not write to" in report["said"][1]
    assert str(tmp_path / "elsewhere") in report["said"][1]


def test_a_broken_wandb_is_logged(go: Go, tmp_path: Path) -> None:
    (tmp_path / "broken" / "wandb").mkdir(parents=True)
    (tmp_path / "broken" / "wandb" / "__init__.py").write_text("raise TypeError('Descriptors cannot be created')")
    report = go({"PYTHONPATH": f"{tmp_path}/broken:{ROOT}/src"})
    assert report["mode"] is None
    assert report["said"] == ["tracker=wandb is off: TypeError: Descriptors cannot be created"]


# ---- functions ----


@contextmanager
def deaf_port() -> Iterator[int]:
    """Yield a port whose queue of connections is full, so that another connection waits."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        port = int(server.getsockname()[1])
        waiting = []
        for _ in range(4):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
            waiting.append(client)
        yield port
        for client in waiting:
            client.close()


def test_the_connection_to_a_host_has_a_time_limit() -> None:
    with deaf_port() as port:
        began = time.monotonic()
        assert "can't be reached" in str(unreachable(f"http://127.0.0.1:{port}", 0.3))
        assert time.monotonic() - began < 2
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert unreachable(f"http://127.0.0.1:{server.getsockname()[1]}", 3.0) is None


@pytest.mark.parametrize(
    ("url", "proxies", "hop"),
    [
        ("https://api.example.org", {}, ("api.example.org", 443)),
        ("http://api.example.org:8080/x", {}, ("api.example.org", 8080)),
        ("https://api.example.org", {"https_proxy": "http://u:p@proxy:3128"}, ("proxy", 3128)),
        ("https://api.example.org", {"https_proxy": "proxy:3128"}, ("proxy", 3128)),
        ("https://api.example.org", {"http_proxy": "http://proxy:3128"}, ("api.example.org", 443)),
        (
            "https://api.example.org",
            {"https_proxy": "http://proxy:3128", "no_proxy": ".example.org"},
            ("api.example.org", 443),
        ),
        ("http://127.0.0.1:99", {"http_proxy": "http://proxy:3128"}, ("127.0.0.1", 99)),
    ],
)
def test_next_hop_is_the_host_or_its_proxy(
    monkeypatch: pytest.MonkeyPatch, url: str, proxies: dict[str, str], hop: tuple[str, int]
) -> None:
    for key in ("http_proxy", "https_proxy", "no_proxy"):
        monkeypatch.delenv(key, raising=False)
        monkeypatch.delenv(key.upper(), raising=False)
    for key, value in proxies.items():
        monkeypatch.setenv(key, value)
    assert next_hop(url) == hop


@pytest.mark.parametrize("tag", ["", "   ", "x" * 200, " y" * 64, "tvlars", "a,b"])
def test_tags_have_a_form_that_wandb_accepts(tag: str) -> None:
    tags = run_tags(configuration(tags=[tag, tag]))
    assert tags[:4] == ["digits", "smallcnn", "tvlars", "constant"]
    assert all(1 <= len(each) <= 64 and each == each.strip() for each in tags)
    assert len(tags) == len(set(tags))


def test_an_error_is_one_line_without_passwords() -> None:
    error = ValueError("POST https://someone:secret@host/graphql\n failed" + "!" * 1000)
    line = one_line(error)
    assert line.startswith("ValueError: POST https://host/graphql failed!")
    assert "\n" not in line
    assert len(line) == 300
