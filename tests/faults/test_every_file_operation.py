"""A fault at any file operation of a run: it ends in order, and the next start gives the undisturbed run, bit for bit.

``FAULTS`` is the number of operations that are tried for each kind of fault, ``FAULTS_SEED`` chooses them. Without
``FAULTS``, a fixed few; ``make soak`` tries all.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY, configuration, environment
from same_run import assert_same_run

from largebatch.config.schema import to_yaml
from largebatch.runs.folder import RunFolder

TOOLS = ROOT / "tests" / "tools"
COUNT = int(os.environ.get("FAULTS", "2"))
SEED = os.environ.get("FAULTS_SEED", "0")
RUNS = {
    "clf": (
        *TINY, "steps=6", "checkpoint.every_steps=2", "eval_every=1", "dataset.val_fraction=0.2",
        "tracker.layers_every=2", "optimizer=tvlars", "cluster.threads=1", "cluster.device=cpu",
    ),
    "bt": (
        *TINY, "mode=bt", "steps=4", "checkpoint.every_steps=2", "mode.projector=[16,16]", "mode.eval_epochs=2",
        "tracker.layers_every=2", "cluster.threads=1", "cluster.device=cpu",
    ),
}  # fmt: skip


class Machine:
    """The process that works on runs, one after the other."""

    def __init__(self, library: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(TOOLS / "faulty_run.py")],
            env=environment() | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def work(self, run: Path, kind: str = "count", at: int = 0, trace: Path | None = None) -> dict[str, Any]:
        """Work on a run that the launcher has queued. Return its exit code and its number of file operations."""
        RunFolder(run).update_status(state="queued", message="", exit_code=0)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        asked = {"run": str(run), "kind": kind, "at": at, "trace": str(trace) if trace else None}
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
    trace = folder / "operations.txt"
    answer = machine.work(run, trace=trace)
    assert answer["code"] == 0, (folder / "run.out").read_text()
    operations = trace.read_text().splitlines()
    assert len(operations) == answer["operations"] > 50
    return request.param, run, operations


@pytest.mark.parametrize("kind", ["kill", "fail", "full"])
def test_a_fault_at_any_file_operation_loses_nothing(
    machine: Machine, whole: tuple[str, Path, list[str]], kind: str, tmp_path: Path
) -> None:
    name, undisturbed, operations = whole
    numbers = range(1, len(operations) + 1)
    chosen = random.Random(f"{SEED} {name} {kind}").sample(numbers, min(COUNT, len(numbers)))
    wrong = []
    for at in sorted(chosen):
        run = new_run(tmp_path / str(at), name)
        first = machine.work(run, kind, at)
        again = machine.work(run)
        try:
            if kind == "kill":
                assert first["code"] == -9
            assert again["code"] == 0
            assert_same_run(run, undisturbed)
        except AssertionError as error:
            out = (tmp_path / f"{at}.out").read_text()[-1500:]
            wrong.append(f"{operations[at - 1]}: {first} {again}\n{str(error)[:1500]}\n{out}")
        else:
            shutil.rmtree(run)
    assert not wrong, f"{len(wrong)} of {len(chosen)}\n" + "\n".join(wrong)
