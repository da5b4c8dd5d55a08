"""Choice of settings, means, spreads and leaders, compared with values computed by hand and by NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from made_runs import made, seeds

from largebatch.report.compare import RowKey, compare, differing
from largebatch.report.load import Run
from largebatch.report.wording import answer, cell_accuracy, cell_counts, row_label

LARS, TVLARS, LAMB = (RowKey(name, "constant") for name in ("lars", "tvlars", "lamb"))


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
    runs = [
        made("tvlars"), made("lars", "warmup_cosine"), made("lars"), made("sgd"), made("newcomer"),
        made("lars", optimizer__denominator="sum_of_norms"),
    ]  # fmt: skip
    (comparison,) = compare(runs)
    names = [(row.optimizer, row.schedule) for row in comparison.rows]
    expected = [("lars", "constant"), ("lars", "warmup_cosine"), ("tvlars", "constant"), ("sgd", "constant")]
    assert names == [*expected, ("newcomer", "constant")]
    (comparison,) = compare(runs, by=["optimizer.denominator"])
    assert sum(row.optimizer == "lars" for row in comparison.rows) == 3
    assert row_label(comparison.rows[1]) == "LARS, denominator=sum_of_norms"


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


# Leaders.

AHEAD = seeds("tvlars", 0.90, 0.92, 0.94)  # 0.92 ± 0.02: range from 0.90 to 0.94


@pytest.mark.parametrize(
    ("others", "clear"),
    [
        (seeds("lars", 0.85, 0.87, 0.89), True),  # range up to 0.89
        (seeds("lars", 0.86, 0.88, 0.90), False),  # range up to 0.90: the ranges touch
        (seeds("lars", 0.87, 0.89, 0.91), False),
        (seeds("lars", 0.50), False),  # one seed: no spread
        (
            seeds("lars", 0.5, 0.5) + seeds("lamb", 0.50, 0.95),
            False,
        ),  # 0.725 ± 0.318: the third range counts too
        (seeds("lars", 0.5, 0.5) + [made("lamb", seed=s, state="diverged") for s in (0, 1)], True),
        ([made("lamb", seed=s, state="diverged") for s in (0, 1)], False),  # no other optimizer finished
        ([], False),
    ],
)
def test_the_best_leads_clearly_if_its_range_is_above_all_others(others: list[Run], clear: bool) -> None:
    (lead,) = compare(AHEAD + others)[0].leads
    assert lead.best is not None
    assert (lead.best.row, lead.clear) == (TVLARS, clear)


def test_a_cell_with_a_diverged_seed_never_leads_clearly() -> None:
    runs = [*AHEAD, made("tvlars", seed=3, state="diverged"), *seeds("lars", 0.5, 0.5)]
    (lead,) = compare(runs)[0].leads
    assert not lead.clear


def test_equal_means_have_no_leader() -> None:
    (lead,) = compare(seeds("tvlars", 0.9, 0.9) + seeds("lars", 0.9, 0.9))[0].leads
    assert not lead.clear


def test_leaders_match_the_formula_in_numpy() -> None:
    draws = np.random.default_rng(0)
    kinds = set()
    for _ in range(300):
        figures = draws.normal(draws.uniform(0.5, 0.6, (3, 1)), 0.02, (3, 4))
        (lead,) = compare([run for name, row in zip(("lars", "lamb", "tvlars"), figures, strict=True)
                           for run in seeds(name, *row)])[0].leads  # fmt: skip
        low, high = (figures.mean(1) + sign * figures.std(1, ddof=1) for sign in (-1, 1))
        best = int(figures.mean(1).argmax())
        assert lead.best is not None
        assert lead.best.row == (LARS, LAMB, TVLARS)[best]
        assert lead.clear == bool(low[best] > np.delete(high, best).max())
        kinds.add(lead.clear)
    assert kinds == {True, False}


def test_the_answer_names_each_leader_and_the_columns_without_a_leader() -> None:
    runs = [
        *seeds("tvlars", 0.968, 0.971, 0.974, batch=1024), *seeds("lars", 0.90, 0.91, 0.92, batch=1024),
        *seeds("tvlars", 0.98, 0.99, 0.985, batch=64), *seeds("lars", 0.985, 0.985, 0.98, batch=64),
    ]  # fmt: skip
    (comparison,) = compare(runs)
    assert answer(comparison) == (
        "At batch 1,024 TVLARS leads with 97.1 ± 0.3 %, n = 3 (next: LARS, 91.0 ± 1.0 %). "
        "At batch 64 no optimizer is ahead beyond the spread (highest mean: TVLARS 98.5 ± 0.5 %)."
    )


def test_the_answer_explains_why_there_is_no_leader() -> None:
    (comparison,) = compare([*seeds("lars", 0.9), *seeds("tvlars", 0.95, 0.96), *seeds("lars", 0.8, batch=64)])
    assert answer(comparison) == (
        "At batch 128 no leader can be named, because an optimizer has only one seed and so no spread "
        "(highest mean: TVLARS 95.5 ± 0.7 %). At batch 64 only one optimizer has a result (LARS 80.0 %)."
    )


def test_differing_returns_the_keys_with_several_values() -> None:
    found = differing([made(lr=1.0), made(lr=2.0), made("tvlars", optimizer__lmbda=1e-3)])
    assert found == {
        "optimizer.lr": [1.0, 2.0], "optimizer.name": ["lars", "tvlars"], "optimizer.lmbda": [None, 1e-3],
    }  # fmt: skip


def test_keys_that_cannot_change_a_result_make_no_setting() -> None:
    runs = [made(seed=0, runs_dir="here"), made(seed=1, runs_dir="there")]
    (cell,) = compare(runs)[0].cells.values()
    assert (cell.trials, cell.seeds) == (1, 2)
