"""Runs that start from another run's weights: the head is new, the rest equal, and a resume needs no source."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, configuration
from programs import Programs
from runs import parameters, timeless

from largebatch.config.schema import Config
from largebatch.errors import UserError
from largebatch.launch.composition import Composed
from largebatch.launch.plan import PlannedRun, make_plan
from largebatch.runs.folder import RunFolder
from largebatch.tracking.console import Console
from largebatch.training.set_up import set_up

MODEL = ("model=smallcnn", "model.norm=batch")
SOURCE = (
    *MODEL, "mode=bt", "dataset=digits", "batch_size=64", "steps=2", "mode.knn_every=0", "mode.eval_epochs=1",
    "mode.eval_batch_size=1024", "tracker=none",
)  # fmt: skip
TARGET = (*TINY, *MODEL, "model.freeze=true", "steps=6", "checkpoint.every_steps=2", "optimizer.lr=0.1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, process: Programs) -> tuple[Path, Path]:
    """Train a source with mode ``bt``, and a frozen target from it on other classes. Return the folders."""
    folder = tmp_path_factory.mktemp("weights")
    source = process.train(folder, *SOURCE)
    return source, process.train(folder, *TARGET, f"model.weights={source.name[-8:]}")


def planned(*overrides: str, runs_dir: Path) -> PlannedRun:
    from dataclasses import asdict

    tree = asdict(configuration(*overrides, f"runs_dir={runs_dir}"))
    (run,) = make_plan([Composed(overrides, tree, None, multirun=False)])
    return run


def test_a_frozen_run_keeps_the_backbone_of_its_source_and_trains_a_head(runs: tuple[Path, Path]) -> None:
    source, target = runs
    before, after = parameters(source), parameters(target)
    backbone = {name: before[f"backbone.{name}"] for name in after if not name.startswith("head.")}
    assert len(backbone) == len(after) - 2
    assert all(torch.equal(after[name], tensor) for name, tensor in backbone.items())  # running statistics too
    assert after["head.weight"].shape[0] == 4
    assert float(after["head.bias"].abs().sum()) > 0
    log = (target / "log.txt").read_text()
    assert "loaded 24 tensors; the head (head.weight, head.bias) starts anew" in log
    assert "model.freeze=true: trains head.weight, head.bias" in log
    (saved,) = [torch.load(path, weights_only=True) for path in target.glob("checkpoints/step-*6.pt")]
    assert sum(len(group["params"]) for group in saved["optimizer"]["param_groups"]) == 2


def test_the_same_command_resumes_exactly_after_its_source_is_gone(
    runs: tuple[Path, Path], tmp_path: Path, process: Programs
) -> None:
    source, target = runs
    copy = tmp_path / "runs" / target.name
    shutil.copytree(target, copy)
    (copy / "checkpoints" / "step-00000006.pt").unlink()
    (copy / "summary.json").unlink()
    RunFolder(copy).update_status(state="preempted")
    config = (copy / "config.yaml").read_text()
    gone = source.with_name("gone")
    source.rename(gone)  # the frozen configuration has its absolute path
    try:
        assert process.train(tmp_path, *TARGET, f"model.weights={source.name[-8:]}") == copy
    finally:
        gone.rename(source)
    assert "resumed after step 4 of 6" in (copy / "log.txt").read_text()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [target.name]
    assert all(torch.equal(a, b) for a, b in zip(parameters(copy).values(), parameters(target).values(), strict=True))
    assert timeless(copy) == timeless(target)
    assert "weights_hash: null" not in config


def test_the_identity_follows_the_content_of_the_file_and_not_its_place(tmp_path: Path) -> None:
    names = set()
    for name, content in (("a.pt", b"1"), ("b.pt", b"1"), ("c.pt", b"2")):
        (tmp_path / name).write_bytes(content)
        names.add(planned(*TINY, f"model.weights={tmp_path / name}", runs_dir=tmp_path).folder.name)
    names.add(planned(*TINY, runs_dir=tmp_path).folder.name)
    assert len(names) == 3


def test_a_source_that_is_missing_or_unfinished_is_named(tmp_path: Path) -> None:
    RunFolder(tmp_path / "runs" / "some-run").path.mkdir(parents=True)
    RunFolder(tmp_path / "runs" / "some-run").update_status(state="running")
    for given, problem in (
        (tmp_path / "none.pt", f"model.weights={tmp_path / 'none.pt'}: no such file"),
        ("other", "model.weights=other: no run in "),
        ("some", "model.weights=some: the run hasn't finished; it is running"),
    ):
        with pytest.raises(UserError) as error:
            planned(*TINY, f"model.weights={given}", runs_dir=tmp_path / "runs")
        assert str(error.value).startswith(problem)


def test_a_file_that_changed_after_the_plan_is_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / "a.pt")
    config = planned(*TINY, f"model.weights={tmp_path / 'a.pt'}", runs_dir=tmp_path).config
    torch.save({"x": torch.ones(1)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: has changed since the run was planned"):
        _set_up(config, tmp_path)
    (tmp_path / "a.pt").unlink()
    with pytest.raises(UserError, match=r"a\.pt: no such file"):
        _set_up(config, tmp_path)


@pytest.mark.parametrize("optimizer", ["clars", "lars", "adamw"])
def test_every_kind_of_optimizer_gets_the_head_alone(optimizer: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    (tmp_path / "run").mkdir()
    from largebatch.models.build import build_model

    config = configuration(*TINY, *MODEL, f"optimizer={optimizer}", "steps=2")
    torch.save(build_model(config.model, 4, 1).state_dict(), tmp_path / "a.pt")
    run = planned(
        *TINY, *MODEL, f"optimizer={optimizer}", "steps=2", "model.freeze=true", f"model.weights={tmp_path / 'a.pt'}",
        runs_dir=tmp_path,
    )  # fmt: skip
    assert run.config.batch_norm_size is None
    phase = _set_up(run.config, tmp_path / "run")
    before = {name: tensor.clone() for name, tensor in phase.training.model.state_dict().items()}
    phase.training.step = 1
    phase.gradient(phase.batches())
    phase.update(None)
    changed = {n for n, tensor in phase.training.model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed == {"head.weight", "head.bias"}


def _set_up(config: Config, folder: Path):  # type: ignore[no-untyped-def]
    with Console(folder / "log.txt", False) as console:
        return set_up(config, RunFolder(folder), 0, 1, torch.device("cpu"), console, None)
