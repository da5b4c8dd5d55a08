"""A fault at any file operation of a worker or a launcher: the next start gives the undisturbed runs, bit for bit.

``FAULTS`` is the number of operations that are tried for each kind of fault, ``FAULTS_SEED`` chooses them. Without
``FAULTS``, a fixed few and no compiled run, which takes a minute; ``make soak`` tries all.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY, configuration, environment
from runs import processes_of
from same_run import assert_same_run, top_of

from largebatch.config.typed import to_yaml
from largebatch.runs.folder import RunFolder

TOOLS = ROOT / "tests" / "tools"
COUNT = int(os.environ.get("FAULTS", "0"))
SEED = os.environ.get("FAULTS_SEED", "0")
CAUSES = "Input/output error|No space left on device|can't be written"  # torch doesn't tell why
RUNS = {
    "clf": (
        *TINY, "steps=6", "checkpoint.every_steps=2", "eval_every=1", "dataset.val_fraction=0.2",
        "tracker.layers_every=2", "optimizer=tvlars", "cluster.threads=1", "cluster.device=cpu",
    ),
    "bt": (
        *TINY, "mode=bt", "steps=4", "checkpoint.every_steps=2", "mode.projector=[16,16]", "mode.eval_epochs=2",
        "tracker.layers_every=2", "cluster.threads=1", "cluster.device=cpu",
    ),
    "wandb": (
        *TINY, "steps=4", "checkpoint.every_steps=2", "tracker=wandb", "tracker.mode=offline", "tracker.images=true",
        "cluster.threads=1", "cluster.device=cpu",
    ),
    "tensorboard": (
        *TINY, "steps=4", "checkpoint.every_steps=2", "tracker=tensorboard", "tracker.images=true",
        "tracker.predictions=true", "cluster.threads=1", "cluster.device=cpu",
    ),
}  # fmt: skip
if COUNT:
    RUNS["compiled"] = (*RUNS["clf"], "compile=true")
GRID = ("-m", *TINY, "steps=2", "cluster.threads=1", "cluster.device=cpu", "seed=0,1")
LAUNCHES = {  # the command with a fault, and the same command or the command that must then give the same
    "packed grid": ((*GRID, "cluster.parallel=2"), (*GRID, "cluster.parallel=2")),
    "repeated grid": ((*GRID, "rerun=true"), GRID),
    "failing run": ((*TINY, "dataset.val_fraction=0.01"),) * 2,  # the worker finds too few images
}


class Machine:
    """The process that runs workers and launchers, one after the other."""

    def __init__(self, library: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(TOOLS / "faulty_run.py")],
            env=environment() | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(
        self, folder: Path, kind: str = "count", at: int = 0, launch: Sequence[str] | None = None, below: str = ""
    ) -> dict[str, Any]:
        """Run the worker of a run's folder, or a launcher in a folder. Return exit code and file operations.

        Only operations in the subfolder ``below`` count.
        """
        if launch is None:  # the launcher has queued the run
            RunFolder(folder).update_status(state="queued", message="", exit_code=0)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        trace = folder.with_suffix(".operations") if kind == "count" else None
        asked = {
            "folder": str(folder), "below": below, "launch": launch, "kind": kind, "at": at,
            "trace": trace and str(trace),
        }  # fmt: skip
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    library = tmp_path_factory.mktemp("library") / "faulty_files.so"
    source = TOOLS / "faulty_files.cpp"
    subprocess.run(["g++", "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    machine = Machine(library)
    with contextlib.closing(machine.process.stdin or contextlib.nullcontext()):  # type: ignore[type-var]
        yield machine
    machine.process.wait(timeout=30)


def new_run(folder: Path, name: str) -> Path:
    """Return a new run's folder, as the launcher leaves it for the worker."""
    run = RunFolder(folder)
    run.path.mkdir(parents=True)
    run.config.write_text(to_yaml(configuration(*RUNS[name])))
    return run.path


@pytest.fixture(scope="module", params=RUNS)
def whole(request: pytest.FixtureRequest, machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An undisturbed run: its kind, its folder, and its file operations."""
    folder = tmp_path_factory.mktemp(request.param)
    run = new_run(folder / "run", request.param)
    answer = machine.run(run)
    assert answer["code"] == 0, (folder / "run.out").read_text()
    operations = (folder / "run.operations").read_text().splitlines()
    assert len(operations) == answer["operations"] > 50
    return request.param, run, operations


def chosen(name: str, kind: str, operations: list[str]) -> list[int]:
    """Return the numbers of the operations to try. The first is among those with a kill."""
    count = COUNT or (2 if name in ("clf", "bt") else 1)
    first = [1] if kind == "kill" else []
    others = range(1 + len(first), len(operations) + 1)
    draw = random.Random(f"{SEED} {name} {kind}")
    return sorted([*first, *draw.sample(others, min(count - len(first), len(others)))])


def check_end(name: str, answer: dict[str, Any], kind: str, at: int, out: str) -> None:
    """Check that a kill killed, and that another fault is ignored or ends the process with a message."""
    if kind == "kill":
        assert answer["code"] == -9 or answer["operations"] < at  # the length of wandb's log varies
        return
    assert answer["code"] in (0, 1, 2)
    assert name == "wandb" or "Traceback" not in out  # wandb's log prints errors of its own file


def try_worker(machine: Machine, name: str, kind: str, at: int, run: Path, undisturbed: Path) -> None:
    """Check a run whose worker has a fault at one operation, and then no fault."""
    new_run(run, name)
    first = machine.run(run, kind, at)
    out, status = run.with_suffix(".out").read_text(), RunFolder(run).read_status()
    again = machine.run(run)
    check_end(name, first, kind, at, out)
    if first["code"] > 0:
        assert re.search(CAUSES, status["message"] + out), status
        assert "/wandb/" not in status["message"]  # W&B's record may be lost, not the run
    assert again["code"] == 0, again
    assert_same_run(run, undisturbed)


@pytest.mark.parametrize("kind", ["kill", "fail", "full"])
def test_a_fault_at_any_file_operation_loses_nothing(
    machine: Machine, whole: tuple[str, Path, list[str]], kind: str, tmp_path: Path
) -> None:
    name, undisturbed, operations = whole
    try_all(
        name, kind, operations, tmp_path,
        lambda at, run: try_worker(machine, name, kind, at, run, undisturbed),
    )  # fmt: skip


def test_a_fault_in_a_tracker_s_files_ends_the_copy_and_not_the_run(machine: Machine, tmp_path: Path) -> None:
    undisturbed = new_run(tmp_path / "undisturbed", "tensorboard")
    count = machine.run(undisturbed, below="tensorboard")["operations"]
    assert count > 5
    for kind, at in (("fail", 1), ("full", count // 2), ("fail", count)):
        run = new_run(tmp_path / f"{kind}{at}", "tensorboard")
        answer, out = machine.run(run, kind, at, below="tensorboard"), run.with_suffix(".out").read_text()
        assert answer["code"] == 0, out
        (line,) = re.findall("TensorBoard logging ends: .*|tracker=tensorboard is off: .*", out)
        assert re.search(CAUSES, line), line
        assert_same_run(run, undisturbed)


def try_all(name: str, kind: str, operations: list[str], folder: Path, attempt: Callable[[int, Path], None]) -> None:
    """Make an attempt at each chosen operation, in a folder of its own, and then name all that went wrong."""
    wrong, numbers = [], chosen(name, kind, operations)
    for at in numbers:
        try:
            attempt(at, folder / str(at))
        except AssertionError as error:
            out = (folder / f"{at}.out").read_text()[-3000:]
            wrong.append(f"{operations[at - 1]}\n{str(error)[:1500]}\n{out}")
        else:
            shutil.rmtree(folder / str(at))
    assert not wrong, f"{len(wrong)} of {len(numbers)}\n" + "\n".join(wrong)


@pytest.fixture(scope="module", params=LAUNCHES)
def launched(request: pytest.FixtureRequest, machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An undisturbed launch: its kind, the folders before and after it, and its file operations."""
    base = tmp_path_factory.mktemp("launched")
    before, after = base / "before", base / "after"
    before.mkdir()
    if request.param == "repeated grid":
        assert machine.run(before, launch=GRID)["code"] == 0
    copy_folder(before, after)
    answer = machine.run(after, launch=LAUNCHES[request.param][0])
    assert answer["code"] == (2 if request.param == "failing run" else 0), (base / "after.out").read_text()
    operations = (base / "after.operations").read_text().splitlines()
    assert len(operations) == answer["operations"] > 10
    return request.param, before, after, operations


def copy_folder(folder: Path, to: Path) -> None:
    """Copy a working directory with runs, and change its path in their configurations."""
    shutil.copytree(folder, to)
    for config in to.glob("runs/*/config.yaml"):
        config.write_text(config.read_text().replace(str(folder), str(to)))


def try_launcher(machine: Machine, name: str, kind: str, at: int, folder: Path, before: Path, after: Path) -> None:
    """Check the runs of a launcher with a fault at one operation, and then without a fault."""
    copy_folder(before, folder)
    command, same = LAUNCHES[name]
    first = machine.run(folder, kind, at, command)
    out = folder.with_suffix(".out").read_text()
    again = machine.run(folder, launch=same)
    check_end(name, first, kind, at, out)
    if first["code"] > 0 and name != "failing run":
        assert re.search(f"^error: .*({CAUSES})", out, re.MULTILINE), first
    assert again["code"] == (2 if name == "failing run" else 0), again
    for run in folder.glob("runs/*"):
        is_repeated = name != "repeated grid" or (run / "previous-1").exists()
        assert_same_run(run, (after if is_repeated else before) / "runs" / run.name)
    assert top_of(folder) == top_of(after)
    assert not processes_of(folder)


@pytest.mark.parametrize("kind", ["kill", "fail", "full"])
def test_a_fault_at_any_file_operation_of_the_launcher_loses_nothing(
    machine: Machine, launched: tuple[str, Path, Path, list[str]], kind: str, tmp_path: Path
) -> None:
    name, before, after, operations = launched
    try_all(
        name, kind, operations, tmp_path,
        lambda at, folder: try_launcher(machine, name, kind, at, folder, before, after),
    )  # fmt: skip
