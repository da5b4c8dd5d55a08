"""W&B groups of grids: the same runs have the same group."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT, TINY

from largebatch.launch.composition import compose_grid, store_defaults
from largebatch.launch.plan import make_plan


@pytest.fixture(autouse=True)
def _without_a_group_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)


def group(*overrides: str) -> str | None:
    """Return the only group of a grid's runs."""
    store_defaults()
    plan = make_plan(compose_grid([*TINY, *overrides], ROOT / "conf"))
    (found,) = {run.config.tracker.group for run in plan}
    return found


def test_a_grid_has_a_group_with_its_axes_that_depends_on_its_runs_alone() -> None:
    found = group("optimizer.lr=1,2", "seed=0,1")
    assert re.fullmatch("lr-seed-[0-9a-f]{8}", str(found))
    assert group("optimizer.lr=2.0,1.0", "seed=range(0,2)", "cluster.threads=1") == found
    assert group("optimizer.lr=1,2", "seed=0,1,2") != found


def test_a_given_group_and_the_sweep_s_name_come_before_the_derived_group(monkeypatch: pytest.MonkeyPatch) -> None:
    assert group("seed=0") is None, "no grid"
    assert group("seed=0,1", "sweeps=demo", "optimizer=lars") == "demo"
    monkeypatch.setenv("WANDB_RUN_GROUP", "theirs")
    assert group("seed=0,1") == "theirs"
    assert group("seed=0,1", "sweeps=demo", "optimizer=lars") == "theirs"
    assert group("seed=0,1", "tracker.group=ours") == "ours"
