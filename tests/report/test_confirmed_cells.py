"""Confirmation runs take no part in the choice of a setting, and confirmed cells report only them."""

from __future__ import annotations

import statistics

import pytest
from made_runs import made, seeds

from largebatch.report.build import records, table
from largebatch.report.cells import Cell, RowKey
from largebatch.report.compare import Comparison, compare
from largebatch.report.confirm import fresh_seeds
from largebatch.report.fairness import warnings
from largebatch.report.load import Run
from largebatch.report.wording import cell_accuracy

LARS, LAMB = RowKey("lars", "constant"), RowKey("lamb", "constant")


def confirming(optimizer: str, *tests: float, first: int = 3, **more: object) -> list[Run]:
    """Return confirmation runs with seeds from ``first``."""
    return [
        made(optimizer, test=test, seed=first + number, **({"val": 0.99, "confirms": True} | more))  # type: ignore[arg-type]
        for number, test in enumerate(tests)
    ]


def exploring(optimizer: str, test: float = 0.90, lr: float = 1.0) -> list[Run]:
    """Return runs of two settings with seeds 0 to 2. Validation chooses ``lr``."""
    chosen = seeds(optimizer, test - 0.01, test, test + 0.01, lr=lr, val=0.9)
    return chosen + seeds(optimizer, 0.2, 0.2, 0.2, lr=2 * lr, val=0.3)


def compared(*runs: list[Run]) -> tuple[Comparison, Cell]:
    """Return the comparison and LARS's cell."""
    (comparison,) = compare(run for some in runs for run in some)
    return comparison, comparison.cells[LARS, 128]


def test_a_confirmed_cell_reports_only_its_confirmation_runs() -> None:
    tests = (0.80, 0.82, 0.87, 0.83)
    _, cell = compared(exploring("lars"), confirming("lars", *tests))
    assert [run.config["seed"] for run in cell.reported] == [3, 4, 5, 6]
    assert (cell.mean, cell.spread) == pytest.approx((statistics.mean(tests), statistics.stdev(tests)))
    assert (cell.seeds, cell.trials, cell.drawn) == (4, 2, cell.reported)


def test_confirmation_runs_take_no_part_in_the_choice() -> None:
    earlier = confirming("lars", 0.99, 0.99, lr=2.0, val=1.0)  # of a setting that was chosen before
    _, cell = compared(exploring("lars"), earlier)
    assert cell.chosen is not None
    assert cell.chosen.options["optimizer.lr"] == 1.0
    assert (cell.mean, cell.confirmed) == (pytest.approx(0.90), False)
    _, again = compared(exploring("lars"), earlier, confirming("lars", 0.7, 0.7))
    assert (again.mean, again.confirmed) == (pytest.approx(0.7), True)


def test_confirmation_runs_without_an_outcome_change_nothing() -> None:
    comparison, cell = compared(exploring("lars"), confirming("lars", 0.5, 0.5, state="running"))
    assert (cell.mean, cell.seeds, comparison.confirmed) == (pytest.approx(0.90), 3, False)
    assert "(2 settings, 3 seeds, 2 not finished)" in table(comparison)


def test_the_table_says_which_cells_are_confirmed() -> None:
    comparison, _ = compared(exploring("lars"), confirming("lars", 0.8, 0.82), exploring("lamb", 0.5))
    lars, lamb = table(comparison).splitlines()[-2:]
    assert "81.0 ± 1.4 (2 settings, 2 confirmation seeds)" in lars
    assert "50.0 ± 1.0 (2 settings, 3 seeds, unconfirmed)" in lamb
    (warning,) = [one for one in warnings(comparison) if one.title == "Unconfirmed cells"]
    assert warning.text.startswith("For LAMB, the same runs chose")
    nothing, _ = compared(exploring("lars"), exploring("lamb"))
    assert "confirm" not in table(nothing) + str(warnings(nothing))


def test_equal_counts_of_all_cells_are_below_the_table() -> None:
    lars, lamb = exploring("lars"), exploring("lamb", 0.5)
    *rows, empty, below = table(compared(lars, lamb)[0]).splitlines()
    assert rows[-2:] == ["| LARS | **90.0 ± 1.0** |", "| LAMB | 50.0 ± 1.0 |"]
    assert (empty, below) == ("", "Each cell: 2 settings, 3 seeds.")


def test_an_unconfirmed_cell_does_not_lead_confirmed_cells() -> None:
    lars, lamb = exploring("lars", 0.9), exploring("lamb", 0.5)
    fresh = confirming("lars", 0.9, 0.91, 0.9), confirming("lamb", 0.5, 0.52, 0.5)
    same_seeds = confirming("lamb", 0.5, 0.52, 0.5, first=0)
    assert compared(lars, lamb)[0].bold
    assert not compared(lars, same_seeds, lamb)[0].bold
    assert compared(lars, lamb, *fresh)[0].bold


@pytest.mark.parametrize(
    ("state", "shown"), [("diverged", "1 diverged"), ("failed", "1 failed"), ("preempted", "1 preempted")]
)
def test_a_lost_confirmation_seed_is_visible_and_its_cell_is_not_bold(state: str, shown: str) -> None:
    lost = confirming("lars", 0.1, first=6, state=state)
    lamb = confirming("lamb", 0.5, 0.51, 0.5, 0.5)
    comparison, cell = compared(
        exploring("lars"), confirming("lars", 0.9, 0.9, 0.9), lost, exploring("lamb", 0.5), lamb
    )
    assert not comparison.bold
    assert cell.mean == pytest.approx(0.9)
    assert f"90.0 ± 0.0 (2 settings, 3 confirmation seeds, {shown})" in table(comparison)
    titles = {warning.title for warning in warnings(comparison)}
    assert ("Some seeds diverged" if state == "diverged" else "Runs without a result") in titles


def test_a_cell_whose_confirmation_runs_all_failed_shows_no_accuracy() -> None:
    comparison, cell = compared(exploring("lars"), confirming("lars", 0.9, 0.9, state="failed"))
    assert cell_accuracy(cell, 1) == "not finished"
    assert "not finished (2 settings, 0 confirmation seeds, 2 failed)" in table(comparison)


def test_different_seeds_are_judged_by_the_reported_runs() -> None:
    lars = [*exploring("lars"), *confirming("lars", 0.9, 0.9)]
    lamb = seeds("lamb", 0.9, lr=1.0, val=0.9)  # one seed chooses
    for first, expected in ((3, False), (4, True)):
        comparison, _ = compared(lars, lamb, confirming("lamb", 0.9, 0.9, first=first))
        assert ("Different seeds" in {warning.title for warning in warnings(comparison)}) == expected


def test_the_records_name_the_reported_runs() -> None:
    comparison, _ = compared(exploring("lars"), confirming("lars", 0.8, 0.82))
    found = [(row["lr"], row["seed"], row["chosen"], row["confirms"], row["reported"]) for row in records([comparison])]
    assert [row for row in found if row[0] == 1.0] == [
        *[(1.0, seed, True, False, None) for seed in (0, 1, 2)],
        *[(1.0, seed, True, True, "best/test/accuracy") for seed in (3, 4)],
    ]
    assert all(row[2:] == (False, False, None) for row in found if row[0] == 2.0)


@pytest.mark.parametrize(
    ("used", "confirmed", "expected"),
    [
        ([0, 1, 2], [], [3, 4, 5]),
        ([7], [], [8, 9, 10]),
        ([0, 1], [2, 3, 4], [2, 3, 4]),  # a repeated command
        ([0, 1], [2, 3, 4, 5], [2, 3, 4]),  # fewer seeds than before
        ([0, 1], [2], [2, 3, 4]),  # more
        ([0, 1, 2, 9], [2, 3], [3, 10, 11]),  # runs since then have used a seed
    ],
)
def test_fresh_seeds_have_chosen_nothing(used: list[int], confirmed: list[int], expected: list[int]) -> None:
    runs = [made(seed=seed) for seed in used] + [made(lr=2.0, seed=seed, confirms=True) for seed in confirmed]
    assert fresh_seeds(runs, 3) == expected
