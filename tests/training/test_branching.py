"""Runs that start from a checkpoint of another run (``start_from``), and checkpoints that stay (``keep_at``)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, configuration
from programs import Programs
from runs import parameters
from same_run import assert_same_run
from test_bt_resume import as_if_killed
from test_start_from_weights import planned

from largebatch.config.checks import validate
from largebatch.config.schema import CheckpointConfig
from largebatch.errors import UserError
from largebatch.training.branching import with_own_options

# A batch is the whole training set, without augmentation: its order changes no more than rounding.
WHOLE = (
    *TINY, "batch_size=64", "dataset.crop_padding=0", "dataset.flip=false", "dataset.rotation=0", "optimizer=tvlars",
    "optimizer.lr=1", "cluster.threads=1", "checkpoint.every_steps=1", "tracker.layers_every=0",
)  # fmt: skip
BASE = (*WHOLE, "steps=6", "checkpoint.keep_at=[0.5,2]")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, process: Programs) -> tuple[Path, Path, tuple[str, ...]]:
    """Train a run, and a branch from its third step in other epochs' order. Return folders and the branch's command."""
    folder = tmp_path_factory.mktemp("branches")
    base = process.train(folder, *BASE)
    command = (*WHOLE, "steps=3", f"start_from={base.name[-8:]}@3")
    return base, process.train(folder, *command), command


def test_chosen_checkpoints_stay_beside_the_newest_two(runs: tuple[Path, Path, tuple[str, ...]]) -> None:
    base, branch, _ = runs
    assert [int(path.stem[5:]) for path in sorted(base.glob("checkpoints/step-*.pt"))] == [2, 3, 5, 6]
    assert len(list(branch.glob("checkpoints/step-*.pt"))) == 2


def test_a_branch_goes_on_with_weights_and_optimizer(runs: tuple[Path, Path, tuple[str, ...]]) -> None:
    base, branch, _ = runs
    assert f"starts from {base.name}@3: its weights" in (branch / "log.txt").read_text()
    before = torch.load(base / "checkpoints" / "step-00000003.pt", weights_only=True)["model"]
    moved = 0.0
    for name, expected in parameters(base).items():
        found = parameters(branch)[name]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        moved = max(moved, float((expected - before[name]).abs().max()))
    assert moved > 5e-3  # the three steps change the weights by far more than the tolerance


def test_a_branch_resumes_exactly_after_its_source_is_gone(
    runs: tuple[Path, Path, tuple[str, ...]], tmp_path: Path, process: Programs
) -> None:
    base, branch, command = runs
    copy = tmp_path / "runs" / branch.name
    shutil.copytree(branch, copy)
    as_if_killed(copy, 2)
    whole = (*command[:-1], f"start_from={base.name}@3")
    assert process.train(tmp_path, *whole) == copy
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [branch.name]
    assert "resumed after step 2 of 3" in (copy / "log.txt").read_text()
    assert_same_run(copy, branch)


def test_step_and_run_are_part_of_the_identity(runs: tuple[Path, Path, tuple[str, ...]]) -> None:
    base, branch, _ = runs
    runs_dir = base.parent
    names = [planned(*WHOLE, "steps=3", *more, runs_dir=runs_dir).folder.name for more in (
        (f"start_from={base.name}@3",), (f"start_from={base.name[:-4]}@3",), (f"start_from={base.name}@2",),
        (f"start_from={branch.name}@3",), (),
    )]  # fmt: skip
    assert names[0] == names[1] == branch.name
    assert len(set(names)) == 4
    frozen = planned(*WHOLE, "steps=3", f"start_from={base.name[-8:]}@3", runs_dir=runs_dir).config
    assert frozen.start_from == f"{base.name}@3"


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (("start_from=NAME@4",), "has no checkpoint of step 4. There are: 2, 3, 5, 6. Fix: train it with checkpoint."),
        (("start_from=nobody@3",), "start_from=nobody: no run in "),
        (("start_from=NAME",), "must be RUN@STEP"),
        (("start_from='@3'",), "must be RUN@STEP"),
        (("start_from=a/NAME@3",), "a path. Allowed: runs in runs_dir="),
        (("start_from=synthetic@3",), "matches 2 runs: synthetic-"),
        (("start_from=NAME@7",), "step 7. There are: 2, 3, 5, 6. Fix: a step of its training"),
        (
            ("start_from=NAME@3", "optimizer.nesterov=true"),
            "has optimizer.nesterov=false, this run optimizer.nesterov=true",
        ),
        (("start_from=NAME@3", "optimizer=lars"), "has optimizer=tvlars, this run optimizer=lars. Fix: optimizer=tvl"),
        (("start_from=NAME@3", "model=tinycnn"), "has model=smallcnn, this run model=tinycnn"),
    ],
)
def test_a_start_that_cannot_be_is_refused_in_the_plan(
    overrides: tuple[str, ...], problem: str, runs: tuple[Path, Path, tuple[str, ...]], tmp_path: Path
) -> None:
    base, _, _ = runs
    shutil.copytree(base, tmp_path / base.name)
    if "synthetic@" in overrides[0]:
        shutil.copytree(base, tmp_path / f"{base.name[:-8]}01234567")
    given = [override.replace("NAME", base.name) for override in overrides]
    with pytest.raises(UserError) as error:
        planned(*WHOLE, "steps=3", *given, runs_dir=tmp_path)
    assert problem in str(error.value)
    assert str(error.value).startswith("start_from=")


class Counting(torch.optim.SGD):
    """Has a counter among its defaults, as Schedule-Free and Prodigy of pytorch_optimizer have."""

    def __init__(self, params: list[torch.Tensor], lr: float = 0.1, **more: float) -> None:
        super().__init__(params, lr, **more)  # type: ignore[arg-type]
        self.defaults["weight_sum"] = 0.0
        for group in self.param_groups:
            group["weight_sum"] = 0.0


def test_counters_of_an_optimizer_go_on_with_the_branch_s_own_options() -> None:
    base, own = (Counting([torch.ones(3, requires_grad=True)], lr, momentum=lr / 4) for lr in (1, 2))
    base.param_groups[0] |= {"weight_sum": 7.0, "step": 4}
    own.load_state_dict(with_own_options(own, base.state_dict()))
    found = own.param_groups[0]
    assert (found["weight_sum"], found["step"], found["lr"], found["momentum"]) == (7.0, 4, 2, 0.5)


def test_a_branch_needs_mode_clf_and_no_other_weights() -> None:
    for overrides, problem in (
        (("mode=bt",), "start_from=a@1: not allowed with mode=bt. Allowed: mode=clf"),
        (("model.weights=b",), "start_from=a@1 and model.weights=b: only one may be set"),
    ):
        with pytest.raises(UserError) as error:
            validate(configuration(*TINY, *overrides, "start_from=a@1"))
        assert problem in str(error.value)


def test_steps_to_keep_are_steps_or_parts_of_the_training() -> None:
    assert CheckpointConfig(keep_at=[0.5, 0.001, 7, 100]).kept_steps(100) == {50, 1, 7, 100}
    for given in (101, 2.5, 0, -1):
        with pytest.raises(
            UserError, match=rf"keep_at={given}: must be an optimizer step up to the training's last, 1"
        ):
            CheckpointConfig(keep_at=[given]).kept_steps(100)
    with pytest.raises(UserError, match=r"checkpoint\.keep_at=9: must be"):
        planned(*TINY, "steps=8", "checkpoint.keep_at=[9]", runs_dir=Path("nowhere"))


def test_another_network_is_named(runs: tuple[Path, Path, tuple[str, ...]], tmp_path: Path, process: Programs) -> None:
    base, _, _ = runs
    shutil.copytree(base, tmp_path / "runs" / base.name)
    command = (*WHOLE, "steps=3", f"start_from={base.name}@3", "model.norm=batch")
    refused = process.call("launch", *command, cwd=tmp_path)
    assert refused.code == 2
    assert f"start_from={base.name}@3: has another network or optimizer (" in refused.stderr
    assert "Traceback" not in refused.stderr
