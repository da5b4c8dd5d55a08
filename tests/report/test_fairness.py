"""Unfair comparisons have warnings, and fair comparisons have none."""

from __future__ import annotations

import re

import pytest
from made_runs import made, seeds

from largebatch.report.compare import compare
from largebatch.report.fairness import warnings
from largebatch.report.load import Run

SPACE = {"optimizer.lr": [0.25, 16.0]}
FAIR = [
    *[made(name, lr=lr, seed=seed, batch=batch, val=val, space=SPACE)
      for name in ("lars", "tvlars") for batch in (128, 1024)
      for lr, val in ((1.0, 0.5), (2.0, 0.9), (3.0, 0.5)) for seed in (0, 1, 2)],
]  # fmt: skip


def warned(runs: list[Run]) -> dict[str, str]:
    (comparison,) = compare(runs)
    return {warning.title: warning.text for warning in warnings(comparison)}


def test_a_fair_comparison_has_no_warning() -> None:
    assert warned(FAIR) == {}


def changed(**changes: object) -> list[Run]:
    """Return the fair runs, with changes to TVLARS at batch 1,024."""
    return [
        run if (run.config["optimizer"]["name"], run.config["batch_size"]) != ("tvlars", 1024)
        else made("tvlars", batch=1024, lr=run.config["optimizer"]["lr"], seed=run.config["seed"],
                  val=run.metric("best/val/accuracy"), **{"space": SPACE, **changes})  # type: ignore[arg-type]
        for run in FAIR
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("runs", "title", "says"),
    [
        ([run for run in FAIR
          if run.config["optimizer"] != {"name": "lars", "lr": 3.0} or run.config["batch_size"] < 999],
         "Unequal number of trials", "at 1,024 LARS 2 and TVLARS 3"),
        ([made(name, lr=lr, seed=seed) for name in ("lars", "lamb") for lr in (1.0, 2.0) for seed in (0, 1, 2)],
         "Settings chosen on the test set", "every optimizer at every batch size.*dataset.val_fraction=0.1"),
        (changed(epochs=20), "Training of different length (epochs)", "At batch 1,024.*LARS: 10; TVLARS: 20"),
        (changed(model__stem="cifar"), "Different conditions (model.stem)", "LARS: -; TVLARS: cifar"),
        (changed(dataset__val_fraction=0.2), "Different conditions (dataset.val_fraction)", "LARS: 0.1; TVLARS: 0.2"),
        (changed(facts={"precision": "bf16"}), "Different precision", "bf16 and fp32"),
        (changed(facts={"channels_last": True}), "Different memory format (channels_last)", "False and True"),
        (changed(facts={"tf32": True}), "Different use of TF32", "False and True"),
        (changed(facts={"compiled": True}), "Different use of torch.compile", "False and True"),
        (changed(facts={"steps": 1000, "optim/skipped_steps": 11}), "Skipped optimizer steps", "TVLARS up to 1.1%"),
        (changed(batch_norm_size=64), "Different conditions (batch_norm_size)", "At batch 1,024.*LARS: -; TVLARS: 64"),
        (changed(facts={"device": "NVIDIA H100"}), "Different device", "NVIDIA H100 and cpu"),
        ([*FAIR, made("tvlars", lr=2.0, seed=3, state="diverged", facts={"device": "NVIDIA H100"})],
         "Different device", "NVIDIA H100 and cpu"),
        ([*FAIR, made("tvlars", lr=2.0, seed=3, state="diverged", facts={"precision": "bf16"})],
         "Different precision", "bf16 and fp32"),
        (changed(facts={"versions": {"torch": "2.16.0"}}), "Different version of torch", "2.15.0 and 2.16.0"),
        (changed(facts={"git_commit": "b" * 40}), "Different versions of the program", "aaaaaaaaaa and bbbbbbbbbb"),
        (changed(facts={"git_dirty": True}), "Uncommitted changes", "in 9 runs"),
        (changed(state="preempted"), "Runs without a result", "9 preempted"),
        ([run for run in FAIR if run.config["seed"] == 0], "One seed only", "single seed"),
        ([run for run in FAIR if run.config["seed"] < 2], "Fewer than 3 seeds", "two seeds"),
        ([run for run in FAIR if run.config["seed"] < 2 or run.config["optimizer"]["name"] == "lars"],
         "Different seeds", "At batch 128 and 1,024"),
        ([run for run in FAIR if run.config["seed"] < 1 or run.config["optimizer"]["lr"] == 2.0],
         "Settings with unequal numbers of seeds", "high by luck"),
        (changed(space={"optimizer.lr": [0.25, 2.0]}),
         "Best learning rate at the edge of the range", "^For TVLARS at 1,024, the chosen"),
        (changed(space={}), "Undeclared search space", "^For TVLARS at 1,024, several values of optimizer.lr"),
        (changed(space={"optimizer.lr": [0.01, 16.0]}), "Search spaces of different size", "3.2 decades"),
        ([run for run in FAIR if run.config["optimizer"]["name"] == "lars" or run.config["optimizer"]["lr"] == 2.0],
         "Untuned beside tuned optimizers", "^For TVLARS, a single setting"),
        ([run for run in FAIR if run.config["optimizer"]["name"] == "lars" or run.config["batch_size"] == 128],
         "Missing runs", "TVLARS at 1,024"),
        ([*FAIR, made("lars", lr=2.0, seed=3, val=0.9, state="diverged"), made("tvlars", lr=2.0, seed=3, val=0.9)],
         "Some seeds diverged", "^For LARS at 128, some seeds of the chosen setting diverged"),
        (changed(facts={"stopped_early": True, "steps": 900, "step": 400}),
         "Training stopped early", "^For TVLARS at 1,024, early_stopping ended some runs .* early_stopping=null"),
        (changed(facts={"stopped_early": True, "steps": 900, "step": 40}),
         "Very few optimizer steps", "^Training was short: 40 steps at batch 1,024. "),
        (changed(early_stopping=5), "Different conditions (early_stopping)", "LARS: -; TVLARS: 5"),
        (changed(mode__label_smoothing=0.1), "Different conditions (mode.label_smoothing)", "LARS: -; TVLARS: 0.1"),
        (changed(clip_norm=1.0), "Different conditions (clip_norm)", "LARS: -; TVLARS: 1"),
        (changed(ema_decay=0.9), "Different conditions (ema_decay)", "LARS: -; TVLARS: 0.9"),
        (changed(facts={"steps": 20}), "Very few optimizer steps", "^Training was short: 20 steps at batch 1,024. "),
        ([*seeds("lars", 0.5, 0.5, 0.5, epochs=10), *seeds("lars", 0.6, 0.6, 0.6, epochs=20)],
         "Settings of different length (epochs)", "LARS"),
    ],
)  # fmt: skip
def test_an_unfair_comparison_has_its_warning(runs: list[Run], title: str, says: str) -> None:
    found = warned(runs)
    assert title in found, found
    assert re.search(says, found[title]), found[title]


def test_a_key_that_varies_for_every_optimizer_is_fair() -> None:
    runs = [
        made(name, lr=lr, seed=seed, val=0.5 + (lr == 2.0) * 0.4, model__init=init,
             space={**SPACE, "model.init": ["default", "kaiming_normal"]})
        for name in ("lars", "tvlars") for lr in (1.0, 2.0, 3.0) for seed in (0, 1, 2)
        for init in ("default", "kaiming_normal")
    ]  # fmt: skip
    assert warned(runs) == {}


def test_the_largest_learning_rate_that_trained_is_at_the_edge() -> None:
    """A diverged learning rate above it doesn't hide that."""
    runs = [
        made(name, lr=lr, seed=seed, val=val, state="diverged" if lr == 3.0 else "finished", space=SPACE)
        for name in ("lars", "tvlars") for lr, val in ((1.0, 0.5), (2.0, 0.9), (3.0, 0.1)) for seed in (0, 1, 2)
    ]  # fmt: skip
    assert set(warned(runs)) == {"Best learning rate at the edge of the range"}


def test_an_option_without_effect_is_named_with_its_cells() -> None:
    """At batch 128 there are enough steps for phi to fall."""
    whole = {"lr_scaling": {"rule": "none"}, "optimizer__lmbda": 1e-3}
    runs = [
        made("tvlars", batch=batch, seed=seed, facts={"steps": steps, "steps_per_epoch": steps // 10}, **whole)
        for batch, steps in ((128, 4000), (1024, 200), (2048, 100)) for seed in (0, 1, 2)
    ]  # fmt: skip
    (text,) = (text for title, text in warned(runs).items() if title.startswith("Option without effect"))
    assert text.startswith("TVLARS at 1,024: optimizer.lmbda=0.001: phi falls only from 0.500 to 0.450 in 200 steps")
    assert "TVLARS at 2,048: optimizer.lmbda=0.001: phi falls only from 0.500 to 0.475 in 100 steps" in text


def test_an_average_without_effect_is_named_and_an_invalid_decay_is_no_error() -> None:
    for decay, named in ((0.999, True), (0.5, False), (2.0, False), ("high", False)):
        runs = [
            made("lars", seed=seed, facts={"steps": 100, "steps_per_epoch": 10}, ema_decay=decay,
                 lr_scaling={"rule": "none"})
            for seed in (0, 1, 2)
        ]  # fmt: skip
        assert ("Option without effect (ema_decay)" in warned(runs)) == named


def test_options_of_another_version_are_no_error() -> None:
    runs = seeds(
        "tvlars", 0.5, 0.5, 0.5, facts={"steps": 10, "steps_per_epoch": 1}, optimizer__unknown=1, lr_scaling={}
    )
    assert not any("effect" in title for title in warned(runs))


def test_a_batch_schedule_is_unfair_unless_each_row_names_it() -> None:
    growing = {"batch_schedule": {"shape": "linear", "start": 32}}
    constant = {"batch_schedule": {"shape": "constant"}}
    same = compare([*seeds("adamw", 0.5, 0.6, 0.7, **growing), *seeds("adamw", 0.5, 0.6, 0.7, **constant)])[0]
    other = compare([*seeds("adamw", 0.5, 0.6, 0.7, **growing), *seeds("lamb", 0.5, 0.6, 0.7, **constant)])[0]
    for comparison, expected in ((same, []), (other, ["batch_schedule.shape", "batch_schedule.start"])):
        titles = [warning.title for warning in warnings(comparison) if "batch_schedule" in warning.title]
        assert titles == [f"Different conditions ({key})" for key in expected]
