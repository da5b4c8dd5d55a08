"""Verdicts: intervals and p-values against SciPy's, error rates by simulation, and what is never said."""

from __future__ import annotations

import numpy as np
import pytest
from made_runs import made, seeds
from scipy import stats

from largebatch.report.answer import answer, differences_table
from largebatch.report.cells import RowKey
from largebatch.report.compare import Comparison, compare
from largebatch.report.inference import compared, decide, holm
from largebatch.report.load import Run
from largebatch.report.verdict import image_variance

LARS, TVLARS, LAMB = (RowKey(name, "constant") for name in ("lars", "tvlars", "lamb"))
DRAWS = np.random.default_rng(20261127).standard_normal((3, 3, 5))


def named(*columns: np.ndarray) -> list[dict[int, dict[int, float]]]:
    return [{row: dict(enumerate(values)) for row, values in enumerate(column)} for column in columns]


def test_a_single_pair_has_the_interval_and_the_p_value_of_the_paired_t_test() -> None:
    column = DRAWS[0, :2]
    ((pair,),) = compared(named(column), {})
    reference = stats.ttest_rel(column[pair.first], column[pair.second])
    assert pair.p == pytest.approx(reference.pvalue)
    low, high = reference.confidence_interval(0.95)
    assert (pair.difference - pair.half_width(), pair.difference + pair.half_width()) == pytest.approx((low, high))


def test_equal_variances_are_pooled_over_pairs_and_columns() -> None:
    """With one variance, the test is that of a two-way layout of optimizer and seed, pooled over columns."""
    columns = [np.array([values, values[[1, 2, 0, 4, 3]] + 1.0]) for values in DRAWS[:, 0]]
    equal = [column - column.mean(1, keepdims=True) for column in columns]
    scaled = [e / np.sqrt((e[0] - e[1]).var(ddof=1)) + [[0.0], [0.5]] for e in equal]
    pairs = [pair for of_column in compared(named(*scaled), {}) for pair in of_column]
    for pair in pairs:
        assert pair.variances == pytest.approx(np.ones(len(pair.variances)))
        assert max(pair.dfs) == 3 * 4
        assert pair.p < stats.ttest_rel(scaled[0][1], scaled[0][0]).pvalue


def test_variances_that_differ_are_not_pooled() -> None:
    columns = [scale * column for scale, column in zip((1e-3, 1.0, 1e3), DRAWS, strict=True)]
    for of_column, column in zip(compared(named(*columns), {}), columns, strict=True):
        for pair in of_column:
            own = stats.ttest_rel(column[pair.first], column[pair.second]).confidence_interval(0.95)
            assert 0.4 < 2 * pair.half_width() / (own.high - own.low) < 2.5


def test_holm_corrects_as_in_his_example() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_image_variance_is_that_of_a_bootstrap_over_images() -> None:
    draws = np.random.default_rng(1)
    difficulty = draws.beta(4, 1, 2000)  # of each image, shared by optimizers and seeds
    gain = draws.normal(0, 0.3, 2000)
    first, second = ([draws.random(2000) < (difficulty + sign * gain).clip(0, 1) for _ in range(4)] for sign in (0, 1))
    found = image_variance(first, second)
    assert found is not None
    true = np.mean([(difficulty + gain).clip(0, 1) - difficulty], axis=0)
    assert found == pytest.approx(true.var() / 2000, rel=0.15)
    assert image_variance([*first[:3], None], second) is None
    assert image_variance(first, [bits[:-1] for bits in second]) is None


# Error rates. Standard errors of a rate of 5 %: 0.7 points with 1,000 reports, 0.5 points with 2,000.


def reports(optimizers: int, count: int, lead: float = 0.0, scales: tuple[float, ...] = (1, 1, 1), n: int = 5) -> list:
    draws = np.random.default_rng(optimizers)
    found = []
    for _ in range(count):
        columns = [s * (draws.normal(0, 0.7, (optimizers, n)) + draws.normal(0, 0.7, n)) for s in scales]
        columns[0][0] += lead
        found.append(named(*columns))
    return found


def leaders(report: list[dict[int, dict[int, float]]]) -> list[int | None]:
    return [decision.leader for decision in decide([list(column) for column in report], compared(report, {}))]


@pytest.mark.parametrize("optimizers", [2, 4])
def test_at_most_five_of_a_hundred_reports_name_a_false_leader(optimizers: int) -> None:
    found = [any(row is not None for row in leaders(one)) for one in reports(optimizers, 1000)]
    assert np.mean(found) < 0.065


def test_batch_sizes_of_different_noise_name_a_false_leader_less_often_than_with_a_pooled_variance() -> None:
    """With standard deviations of 0.3, 1 and 3, a variance pooled over the columns names one in 15 % of reports."""
    found = [any(row is not None for row in leaders(one)) for one in reports(2, 2000, scales=(0.3, 1, 3))]
    assert np.mean(found) < 0.1


def test_more_seeds_find_a_true_leader_more_often() -> None:
    power = [np.mean([leaders(r)[0] == 0 for r in reports(4, 200, 2.0, n=n)]) for n in (3, 5, 10)]
    assert power[0] > 0.4
    assert power[1] > power[0] + 0.2
    assert power[2] > 0.98


def test_intervals_cover_the_true_difference() -> None:
    pairs = [pair for report in reports(4, 100, n=3) for of_column in compared(report, {}) for pair in of_column]
    assert 0.93 < np.mean([pair.difference <= pair.half_width() for pair in pairs]) < 0.97


# What is said.


def comparison_of(*runs: Run) -> Comparison:
    (comparison,) = compare(runs)
    return comparison


AHEAD = seeds("tvlars", 0.90, 0.91, 0.92, 0.93)


def test_the_leader_is_named_with_its_lead() -> None:
    comparison = comparison_of(*AHEAD, *seeds("lars", 0.851, 0.86, 0.87, 0.879), *seeds("lamb", 0.7, 0.71, 0.72, 0.73))
    (verdict,) = comparison.verdicts
    assert verdict.leader is comparison.cells[TVLARS, 128]
    assert comparison.bold == [verdict.leader]
    assert answer(comparison).startswith(
        "At batch 128 TVLARS is ahead of all 2 others (p < 0.001): 91.5 ± 1.3 %, 5.0 points ["
    )
    heads, lines = differences_table(comparison)
    assert len(heads) == len(lines[0])
    assert [(line[1], line[5]) for line in lines] == [
        ("TVLARS - LARS", "ahead"), ("TVLARS - LAMB", "ahead"), ("LARS - LAMB", "ahead"),
    ]  # fmt: skip


def test_a_leader_by_one_image_without_spread_is_not_ahead() -> None:
    comparison = comparison_of(
        *seeds("tvlars", *3 * [357 / 360], facts={"test_images": 360}),
        *seeds("lars", *3 * [356 / 360], facts={"test_images": 360}),
    )
    assert comparison.bold == []


def test_equal_optimizers_are_not_told_apart() -> None:
    comparison = comparison_of(*AHEAD, *seeds("lars", 0.91, 0.90, 0.92, 0.929))
    assert comparison.bold == []
    text = answer(comparison)
    assert text.startswith(
        "At batch 128 TVLARS has the highest mean (91.5 ± 1.3 %), and isn't told apart from LARS. The difference"
    )
    assert "4 seeds show one of" in text


@pytest.mark.parametrize(
    "others",
    [
        seeds("lars", 0.5),
        seeds("lars", 0.5, 0.5),
        [made("lars", test=0.5, seed=seed) for seed in (5, 6, 7, 8)],  # no common seed
    ],
)
def test_too_few_common_seeds_decide_nothing(others: list[Run]) -> None:
    comparison = comparison_of(*AHEAD, *others)
    assert comparison.bold == []
    assert answer(comparison) == (
        "At batch 128 TVLARS has the highest mean (91.5 ± 1.3 %). "
        "Too few seeds to say if it is ahead of LARS: 3 common seeds are needed."
    )


@pytest.mark.parametrize("state", ["diverged", "failed", "running"])
def test_an_optimizer_with_a_missing_seed_is_never_ahead(state: str) -> None:
    comparison = comparison_of(*AHEAD, made("tvlars", seed=4, state=state), *seeds("lars", 0.5, 0.5, 0.5, 0.5, 0.5))
    assert comparison.bold == []
    assert "It can't be ahead, because one of its seeds diverged or didn't finish." in answer(comparison)


def test_columns_without_a_comparison_are_named() -> None:
    comparison = comparison_of(*seeds("lars", 0.8, batch=64), *[made(seed=s, state="diverged") for s in (0, 1)])
    assert answer(comparison) == (
        "At batch 64 only LARS has a result (80.0 %).\nAt batch 128 every run diverged or has not finished."
    )


def test_a_leader_at_the_common_seeds_is_named_although_another_mean_is_higher() -> None:
    """LARS has the higher mean by four further seeds; at each common seed TVLARS is five points ahead."""
    others = seeds("lars", 0.85, 0.86, 0.87, 0.88, 0.99, 0.99, 0.99, 0.99)
    comparison = comparison_of(*AHEAD, *others)
    (verdict,) = comparison.verdicts
    assert verdict.best is comparison.cells[LARS, 128]
    assert verdict.leader is comparison.cells[TVLARS, 128]
    assert answer(comparison).startswith(
        "At batch 128 TVLARS is ahead of LARS at their common seeds (p < 0.001): 91.5 ± 1.3 %, 5.0 points [4.8"
    )


def test_settings_next_to_each_other_count_in_the_correction() -> None:
    """The best of five settings of nearly one learning rate is one trial, but as lucky as the best of five."""
    near = [run for i in range(5) for run in seeds("tvlars", 0.90, 0.91, 0.92, 0.93, lr=1 + i / 1000, val=0.9)]
    comparison = comparison_of(*near, *seeds("lars", 0.88, 0.899, 0.895, 0.91, val=0.9))
    cell = comparison.cells[TVLARS, 128]
    assert (cell.trials, cell.choices) == (1, 5)
    ((difference,),) = (verdict.differences for verdict in comparison.verdicts)
    assert difference.p == pytest.approx(5 * difference.pair.p)


def test_the_best_of_many_equal_settings_is_flattered_and_not_ahead() -> None:
    draws = np.random.default_rng(3)
    flattered, ahead = [], 0
    for _ in range(100):
        runs = [
            made(name, lr=1.0 + lr, seed=seed, test=value, val=value)
            for name, settings in (("lars", 1), ("tvlars", 30))
            for lr in range(settings)
            for seed, value in enumerate(0.5 + 0.02 * draws.standard_normal(3))
        ]
        comparison = comparison_of(*runs)
        ahead += bool(comparison.bold)
        flattered.append(comparison.cells[TVLARS, 128].flattery or 0.0)
        assert comparison.cells[LARS, 128].flattery == 0
    # The largest of 30 means of 3 seeds is 2.04 * 0.02 / sqrt(3) above 0.5.
    assert np.mean(flattered) == pytest.approx(2.04 * 0.02 / np.sqrt(3), rel=0.15)
    assert ahead <= 5
