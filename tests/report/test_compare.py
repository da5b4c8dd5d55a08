"""Rows, settings, the choice among settings, means and spreads, compared with values computed by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from made_runs import made, seeds
from omegaconf import OmegaConf

from largebatch.report.answer import answer
from largebatch.report.cells import RowKey, differing
from largebatch.report.compare import compare
from largebatch.report.wording import cell_accuracy, cell_counts, row_label

LARS = RowKey("lars", "constant")


def test_a_cell_has_the_mean_and_the_sample_deviation_over_seeds() -> None:
    (comparison,) = compare(seeds("lars", 0.90, 0.92, 0.94))
    cell = comparison.cells[LARS, 128]
    assert cell.mean == pytest.approx(0.92)
    assert cell.spread == pytest.approx(0.02)  # sqrt((0.02² + 0 + 0.02²) / 2)
    assert (cell.seeds, cell.trials, cell.diverged) == (3, 1, 0)
    assert cell_accuracy(cell, 1) == "92.0 ± 2.0"
    assert cell_counts(cell) == "1 setting, 3 seeds"


def test_one_seed_has_no_spread() -> None:
    (comparison,) = compare(seeds("lars", 0.9))
    assert comparison.cells[LARS, 128].spread is None
    assert cell_accuracy(comparison.cells[LARS, 128], 2) == "90.00"


def test_validation_chooses_the_setting_and_the_test_set_only_reports() -> None:
    runs = [
        *seeds("lars", 0.99, 0.97, lr=1.0, val=0.80),  # better on the test set
        *seeds("lars", 0.90, 0.94, lr=2.0, val=0.85, last=0.5),  # chosen by validation
    ]
    cell = compare(runs)[0].cells[LARS, 128]
    assert cell.chosen is not None
    assert cell.chosen.options["optimizer.lr"] == 2.0
    assert cell.chosen_by == "best/val/accuracy"
    assert cell.mean == pytest.approx(0.92)  # at the epoch that validation chose, not at the end
    assert cell.trials == 2


def test_the_best_mean_over_seeds_wins_and_not_the_best_seed() -> None:
    runs = [
        *[made(lr=1.0, seed=seed, val=val) for seed, val in enumerate((0.99, 0.50))],  # mean 0.745
        *[made(lr=2.0, seed=seed, val=val) for seed, val in enumerate((0.76, 0.75))],  # mean 0.755
    ]
    chosen = compare(runs)[0].cells[LARS, 128].chosen
    assert chosen is not None
    assert chosen.options["optimizer.lr"] == 2.0


def test_without_validation_images_the_last_test_accuracy_is_reported() -> None:
    runs = [made(lr=1.0, test=0.9, last=0.7), made(lr=2.0, test=0.8, last=0.8)]
    cell = compare(runs)[0].cells[LARS, 128]
    assert cell.chosen_by == "test/accuracy"
    assert cell.mean == 0.8


def test_validation_chooses_only_if_every_setting_has_a_validation_accuracy() -> None:
    runs = [made(lr=1.0, val=0.99, test=0.6), made(lr=2.0, test=0.8)]
    cell = compare(runs)[0].cells[LARS, 128]
    assert (cell.chosen_by, cell.mean) == ("test/accuracy", 0.8)


def test_a_diverged_seed_counts_as_zero_in_the_choice_of_a_setting() -> None:
    runs = [
        *[made(lr=1.0, seed=seed, val=0.9) for seed in (0, 1)],
        made(lr=1.0, seed=2, val=0.2, state="diverged"),  # (0.9 + 0.9 + 0) / 3 = 0.6
        *[made(lr=2.0, seed=seed, val=0.7) for seed in (0, 1, 2)],
    ]
    cell = compare(runs)[0].cells[LARS, 128]
    assert cell.chosen is not None
    assert cell.chosen.options["optimizer.lr"] == 2.0
    assert cell_counts(cell) == "2 settings, 3 seeds, 1 diverged at other settings"


def test_a_cell_shows_diverged_if_all_its_runs_diverged() -> None:
    (comparison,) = compare([made(seed=seed, state="diverged") for seed in (0, 1)])
    cell = comparison.cells[LARS, 128]
    assert (cell.chosen, cell.mean, cell.diverged) == (None, None, 2)
    assert cell_accuracy(cell, 1) == "diverged"
    assert answer(comparison) == "At batch 128 every run diverged or has not finished."


def test_unfinished_runs_are_counted_but_are_no_trials() -> None:
    runs = [made(lr=1.0), made(lr=2.0, state="running"), made(lr=3.0, state="failed")]
    cell = compare(runs)[0].cells[LARS, 128]
    assert cell.trials == 1
    assert cell_counts(cell) == "1 setting, 1 seed, 2 not finished"


def test_each_optimizer_each_schedule_and_each_by_value_has_its_own_row() -> None:
    runs = [made("tvlars"), made("lars", "warmup_cosine"), made("lars"), made("sgd"), made("newcomer")]
    (comparison,) = compare(runs)
    names = [(row.optimizer, row.schedule) for row in comparison.rows]
    expected = [("lars", "constant"), ("lars", "warmup_cosine"), ("tvlars", "constant"), ("sgd", "constant")]
    assert names == [*expected, ("newcomer", "constant")]
    (comparison,) = compare([*runs, made("lars", lr=10.0), made("lars", lr=2.5)], by=["optimizer.lr"])
    assert [row_label(row) for row in comparison.rows if row[:2] == ("lars", "constant")] == [
        "LARS, lr=1",
        "LARS, lr=2.5",
        "LARS, lr=10",
    ]


def test_the_presets_of_libraries_have_the_names_of_their_papers() -> None:
    presets = [OmegaConf.load(file) for file in (Path(__file__).parents[2] / "conf/optimizer").glob("*.yaml")]
    names = {preset.name for preset in presets if "library" in preset} - {"custom"}
    assert {"soap", "lion"} <= names
    for name in names:
        (row,) = compare([made(name)])[0].rows
        assert row_label(row) != name


@pytest.mark.parametrize(
    ("optimizer", "option", "value", "labels"),
    [
        ("lars", "denominator", "sum_of_norms", ["LARS, denominator=norm_of_sum", "LARS, denominator=sum_of_norms"]),
        ("tvlars", "norm_clip", 10.0, ["TVLARS, norm_clip=off", "TVLARS, norm_clip=on"]),
        ("sgd", "nesterov", True, ["SGD, nesterov=false", "SGD, nesterov=true"]),
        ("lamb", "bias_correction", False, ["LAMB, bias_correction=false", "LAMB, bias_correction=true"]),
        ("tvlars", "gamma_min", "auto", ["TVLARS"]),
        ("lars", "weight_decay", 1e-4, ["LARS"]),
        ("sgd", "momentum", 0.5, ["SGD"]),
        ("lamb", "betas", [0.9, 0.95], ["LAMB"]),
    ],
)
def test_another_algorithm_is_another_row_and_another_number_is_not(
    optimizer: str, option: str, value: object, labels: list[str]
) -> None:
    (comparison,) = compare([made(optimizer), made(optimizer, lr=2.0, **{f"optimizer__{option}": value})])
    assert [row_label(row) for row in comparison.rows] == labels


def test_each_data_set_model_and_mode_is_its_own_comparison() -> None:
    runs = [made(), made(model__name="resnet18"), made(mode__name="bt"), made(dataset__name="cifar10")]
    assert [(c.dataset, c.model, c.mode) for c in compare(runs)] == [
        ("cifar10", "smallcnn", "clf"), ("digits", "resnet18", "clf"), ("digits", "smallcnn", "bt"),
        ("digits", "smallcnn", "clf"),
    ]  # fmt: skip


def test_seeds_share_a_setting_and_warm_up_lengths_do_not() -> None:
    runs = [made("lars", "warmup_cosine", seed=s, schedule__warmup_epochs=w) for s in (0, 1) for w in (5, 10)]
    (cell,) = compare(runs)[0].cells.values()
    assert (cell.trials, [len(setting.runs) for setting in cell.settings]) == (2, [2, 2])


def test_differing_returns_the_keys_with_several_values() -> None:
    found = differing([made(lr=1.0), made(lr=2.0), made("tvlars", optimizer__lmbda=1e-3)])
    assert found == {
        "optimizer.lr": [1.0, 2.0], "optimizer.name": ["lars", "tvlars"], "optimizer.lmbda": [None, 1e-3],
    }  # fmt: skip


def test_keys_that_cannot_change_a_result_make_no_setting() -> None:
    runs = [made(seed=0, runs_dir="here"), made(seed=1, runs_dir="there")]
    (cell,) = compare(runs)[0].cells.values()
    assert (cell.trials, cell.seeds) == (1, 2)


def test_runs_on_different_data_of_one_name_never_share_a_cell() -> None:
    first = [replace(run, data="aaaa") for run in seeds("lars", 0.9, 0.8)]
    other = [replace(run, data="bbbb") for run in seeds("lars", 0.2)]
    one, two, three = compare([*first, *other, made("lars", seed=7, state="queued")])
    assert [one.dataset, two.dataset, three.dataset] == [
        "digits (data aaaa)", "digits (data bbbb)", "digits (data unknown)",
    ]  # fmt: skip
    assert one.cells[LARS, 128].mean == pytest.approx(0.85)
    assert two.cells[LARS, 128].mean == pytest.approx(0.2)
    (together,) = compare([*first, made("lars", seed=7, state="queued")])
    assert together.dataset == "digits"


def test_a_growing_batch_is_a_row_of_its_own() -> None:
    runs = [
        *seeds("adamw", 0.5, 0.6, batch_schedule={"shape": "seesaw", "start": 32}),
        *seeds("adamw", 0.7, 0.8, batch_schedule={"shape": "constant"}),
    ]
    (comparison,) = compare(runs)
    assert [row.extra for row in comparison.rows] == [
        (("batch_schedule", "constant"),),
        (("batch_schedule", "seesaw"),),
    ]
    assert [cell.mean for cell in comparison.cells.values()] == pytest.approx([0.75, 0.55])
