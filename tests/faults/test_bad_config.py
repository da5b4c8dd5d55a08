"""Any value of any key gives a plan or one message, and a worker of one step a result or one message.

The examples are the same in each run, unless ``FAULTS_SEED`` is set. ``FAULTS_EXAMPLES`` multiplies their number.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from bad_values import Configured, base, configurations, examples, with_changes
from conftest import TINY
from datafiles import make_imagefolder
from hypothesis import given
from programs import Programs, assert_ends_in_order

from largebatch.config.identity import run_name
from largebatch.config.typed import load_config, to_yaml
from largebatch.errors import UserError
from largebatch.launch.composition import Composed
from largebatch.launch.grid import show_plan
from largebatch.launch.plan import PlannedRun, make_plan
from largebatch.runs.folder import RunFolder


def planned(tree: dict[str, Any]) -> PlannedRun | str:
    """Return the run of a composed configuration, or the message of the error."""
    try:
        (run,) = make_plan([Composed((), tree, None, multirun=False)])
    except UserError as error:
        return str(error)
    return run


@examples(100)
@given(configured=configurations(worker=False))
def test_any_value_gives_a_plan_or_a_message(tmp_path: Path, configured: Configured) -> None:
    overrides, changes = configured
    run = planned(with_changes(base(*overrides), changes, tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()
    if isinstance(run, str):
        assert run
        assert not run.startswith("?:"), "a message without the key"
        return
    show_plan([run])
    frozen = tmp_path / "config.yaml"
    frozen.write_text(to_yaml(run.config), encoding="utf-8")
    read = load_config(frozen)
    assert to_yaml(read) == to_yaml(run.config), "the worker reads another configuration than the launcher wrote"
    assert run_name(read) == run_name(run.config)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    make_imagefolder(root, 12)
    return root


@pytest.mark.timeout(100_000)
@examples(20)
@given(configured=configurations(worker=True))
def test_a_plan_trains_one_step_or_ends_with_a_message(process: Programs, images: Path, configured: Configured) -> None:
    overrides, changes = configured
    work = Path(tempfile.mkdtemp(prefix="largebatch-"))
    try:
        tree = base(*overrides)
        fixed = {"epochs": None, "steps": 1, "dataset.root": str(images), "batch_size": 4}
        if "model=timm" in overrides:
            fixed["model.name"] = "test_resnet"
        if tree["mode"]["name"] == "bt":
            fixed |= {"mode.eval_epochs": 1, "mode.projector": [16, 16]}
        tree = with_changes(tree, fixed | changes, work / "runs")
        run = planned(tree)
        if isinstance(run, str) or run.config.cluster.name == "slurm" or run.config.cluster.processes != 1:
            return
        folder = RunFolder(work / "runs" / "one")
        folder.path.mkdir(parents=True)
        folder.update_status(state="queued", message="", exit_code=0)
        folder.config.write_text(to_yaml(run.config), encoding="utf-8")
        ended = process.call("worker", str(folder.path), cwd=work)
        status = folder.read_status()
        assert_ends_in_order(ended, (0, 2), str(status), folder.log)
        if ended.code == 0:
            assert status["state"] in ("finished", "diverged"), ended
        else:
            assert (status["state"], status["exit_code"]) == ("failed", 2), ended
            assert status["message"], ended
            assert not folder.has_progress(), "the launcher would keep the folder"
    finally:
        shutil.rmtree(work)


@pytest.mark.parametrize("size", [10**9, 10**13])
def test_a_network_that_fits_into_no_memory_is_one_message(process: Programs, tmp_path: Path, size: int) -> None:
    ended = process.call("launch", *TINY, "mode=bt", f"mode.projector=[{size}]", "steps=1", cwd=tmp_path)
    assert_ends_in_order(ended, (2,), "")
    assert "error: out of memory (" in ended.output
    assert not (tmp_path / "runs").exists()
