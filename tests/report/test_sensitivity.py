"""Accuracy lost with another learning rate, compared with values computed by hand."""

from __future__ import annotations

import pytest
from made_runs import made, seeds

from largebatch.report.cells import Cell
from largebatch.report.compare import compare
from largebatch.report.load import Run
from largebatch.report.sensitivity import lost, sensitivity_table


def tried(*points: tuple[float, float], **more: object) -> list[Run]:
    return [made(lr=lr, val=val, **more) for lr, val in points]  # type: ignore[arg-type]


def only_cell(runs: list[Run]) -> Cell:
    ((_, cell),) = compare(runs)[0].cells.items()
    return cell


@pytest.mark.parametrize(
    ("points", "factor", "expected"),
    [
        ([(1.0, 0.80), (2.0, 0.90), (4.0, 0.70)], 2, [0.1, 0.2]),
        ([(1.0, 0.80), (2.0, 0.90), (4.0, 0.70)], 4, [None, None]),
        ([(0.5, 0.60), (2.0, 0.90), (16.0, 0.60)], 2, [0.15, 0.1]),  # halfway down, a third of the way up
        ([(0.5, 0.60), (2.0, 0.90), (16.0, 0.60)], 4, [0.3, 0.2]),
        ([(1.0, 0.90), (3.0, 0.80)], 2, [None, 0.063093]),  # 0.1 * log(2) / log(3)
        ([(0.1, 0.50), (0.3, 0.70), (0.9, 0.90)], 4, [0.252372, None]),  # 0.4 * log(4) / log(9): both lines are equal
    ],
)
def test_the_accuracy_is_interpolated_over_the_logarithm_of_the_learning_rate(
    points: list[tuple[float, float]], factor: float, expected: list[float | None]
) -> None:
    found = lost(only_cell(tried(*points)), factor)
    assert found == [None if loss is None else pytest.approx(loss, abs=1e-6) for loss in expected]


def test_a_diverged_seed_counts_as_zero() -> None:
    runs = [*tried((1.0, 0.9), (2.0, 0.8)), *tried((1.0, 0.9), seed=1), made(lr=2.0, val=0.8, seed=1, state="diverged")]
    assert lost(only_cell(runs), 2) == [None, pytest.approx(0.5)]


def test_only_settings_with_equal_other_options_are_compared() -> None:
    runs = [
        *tried((1.0, 0.9), (4.0, 0.5), optimizer__lmbda=1e-3),
        *tried((2.0, 0.1), optimizer__lmbda=1e-4),
        made(lr=8.0, optimizer__lmbda=1e-3, state="running"),
    ]
    assert lost(only_cell(runs), 2) == [None, pytest.approx(0.2)]
    assert lost(only_cell(runs), 8) == [None, None]


def test_the_table_has_the_worse_direction() -> None:
    runs = [
        *tried((0.5, 0.60), (1.0, 0.80), (2.0, 0.90), (4.0, 0.70)),
        *tried((1.0, 0.9), batch=1024),
        *[made("tvlars", lr=lr, val=val, batch=1024) for lr, val in ((1.0, 0.9), (5.0, 0.8))],
    ]
    (comparison,) = compare(runs)
    assert sensitivity_table(comparison) == [
        [("factor 2: 20.0", "factor 4: ≥ 30.0"), ("-", "")],
        [("-", ""), ("factor 2: ≥ 4.3", "factor 4: ≥ 8.6")],
    ]


def test_a_learning_rate_outside_of_the_grid_was_not_tried() -> None:
    (comparison,) = compare(tried((1.0, 0.9), (1.5, 0.8)))
    assert sensitivity_table(comparison) == [[("factor 2: not tried", "factor 4: not tried")]]


def test_a_comparison_with_single_learning_rates_has_no_table() -> None:
    (comparison,) = compare([*seeds("lars", 0.5, 0.6), *seeds("tvlars", 0.7, lr=2.0)])
    assert sensitivity_table(comparison) == []
