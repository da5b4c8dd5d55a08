"""Tuning curves against all choices of trials, and their bands against simulation and the Kolmogorov-Smirnov test."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from made_runs import made, seeds
from scipy import stats

from largebatch.report.chart import styles
from largebatch.report.compare import compare
from largebatch.report.load import Run
from largebatch.report.tuning import CONFIDENCE, band, cdf_limits, coverage, expected_best, tuning_curves


@pytest.mark.parametrize("scores", [[0.3], [0.9, 0.0, 0.7], [0.2, 0.8, 0.5, 0.5, 0.0, 0.0, 0.97]])
def test_the_expected_best_is_the_mean_over_all_choices_of_trials(scores: list[float]) -> None:
    for k in range(1, len(scores) + 1):
        best = [max(chosen) for chosen in itertools.combinations(scores, k)]
        assert expected_best(scores, k) == pytest.approx(np.mean(best), abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 60, 300])
@pytest.mark.parametrize("confidence", [0.05, 0.5, 0.95, 0.999])
def test_the_probability_of_constant_limits_is_that_of_the_kolmogorov_smirnov_test(n: int, confidence: float) -> None:
    ranks = np.arange(1, n + 1)
    distance = stats.kstwo(n).ppf(confidence)
    low, high = np.clip(ranks / n - distance, 0, 1), np.clip((ranks - 1) / n + distance, 0, 1)
    # SciPy approximates the distribution for large n.
    assert coverage(low, high) == pytest.approx(confidence, abs=1e-9 if n < 100 else 1e-5)


@pytest.mark.parametrize("n", [3, 4, 12, 40])
def test_all_limits_hold_together_with_the_given_confidence(n: int) -> None:
    low, high = cdf_limits(n)
    uniform = np.sort(np.random.default_rng(n).random((100_000, n)), axis=1)
    held = np.mean(np.all((low <= uniform) & (uniform <= high), axis=1))
    assert held == pytest.approx(CONFIDENCE, abs=0.003)  # four standard errors
    # Each interval leaves out as much on the left as on the right, and equally much at all ranks.
    ranks = np.arange(1, n + 1)
    tails = [stats.beta(ranks, n + 1 - ranks).cdf(low), stats.beta(ranks, n + 1 - ranks).sf(high)]
    assert np.ptp(tails) < 1e-9


def test_the_band_is_the_expectation_for_the_outermost_distributions() -> None:
    """E[X] = 1 - integral of the distribution function, for X in 0..1."""
    scores, ks = [0.4, 0.0, 0.9, 0.7], [1, 2, 4]
    lower, upper = band(scores, ks)
    low, high = cdf_limits(4)
    x = (np.arange(100_000) + 0.5) / 100_000
    below = np.searchsorted(np.sort(scores), x, side="right")
    for i, k in enumerate(ks):
        assert lower[i] == pytest.approx(1 - np.mean(np.append(high, 1.0)[below] ** k), abs=1e-4)
        assert upper[i] == pytest.approx(1 - np.mean(np.insert(low, 0, 0.0)[below] ** k), abs=1e-4)
        assert lower[i] < expected_best(scores, k) < upper[i]


def test_the_band_is_that_of_opda() -> None:
    """The package opda 0.8.0, method ``ld_equal_tailed`` on 0..1, mean of three seeds of its simulation."""
    lower, upper = band([0.1, 0.8, 0.5, 0.4, 0.6], [1, 2, 5])
    assert lower == pytest.approx([0.1064, 0.1874, 0.3386], abs=1e-3)
    assert upper == pytest.approx([0.8769, 0.9655, 0.9987], abs=1e-3)


@pytest.mark.parametrize("decimals", [9, 1])  # 1: scores with ties
def test_the_true_curve_lies_in_the_band_at_all_numbers_of_trials(decimals: int) -> None:
    n, draws = 8, np.random.default_rng(0)
    accuracy = stats.beta(5, 2)
    many = np.round(accuracy.rvs((200_000, n), random_state=draws), decimals)
    truth = np.maximum.accumulate(many, axis=1).mean(axis=0)  # best of the first k
    held = []
    for _ in range(2000):
        scores = np.round(accuracy.rvs(n, random_state=draws), decimals)
        lower, upper = band(list(scores), list(range(1, n + 1)))
        held.append(bool(np.all((lower <= truth) & (truth <= upper))))
    assert np.mean(held) >= CONFIDENCE


def tuned(optimizer: str, *vals: float, **more: object) -> list[Run]:
    """Return settings with two seeds and these mean validation accuracies."""
    return [
        made(optimizer, lr=lr, seed=seed, val=val + difference, **more)  # type: ignore[arg-type]
        for lr, val in enumerate(vals, 1) for seed, difference in enumerate((-0.01, 0.01))
    ]  # fmt: skip


def test_a_curve_has_the_mean_of_the_best_of_each_number_of_trials() -> None:
    runs = [
        *tuned("lars", 0.5, 0.7, 0.6), *tuned("tvlars", 0.4, 0.6, 0.8, 0.7),
        *[made("tvlars", lr=9, seed=seed, state="diverged") for seed in (0, 1)],
        made("tvlars", lr=10, state="running"),  # no trial
        *tuned("lamb", 0.5, 0.6),  # too few trials
        *tuned("lars", 0.1, 0.2, 0.3, batch=1024),
    ]  # fmt: skip
    (comparison,) = compare(runs)
    chart = tuning_curves(comparison, styles([comparison]))
    assert chart is not None
    lines = {(line.name, line.meta["pick"]["batch"]): line for line in chart.figure.data if line.name}
    assert lines.keys() == {("LARS", "128"), ("TVLARS", "128"), ("LARS", "1024")}
    assert list(lines["LARS", "128"].x) == [1, 2, 3]
    assert list(lines["LARS", "128"].y) == [60.0, 66.67, 70.0]  # (0.7 + 0.7 + 0.6) / 3 for two trials
    # A diverged setting counts as 0. The best of two trials: (1 * 0.4 + 2 * 0.6 + 3 * 0.7 + 4 * 0.8) / 10.
    assert list(lines["TVLARS", "128"].y) == [50.0, 69.0, 75.0, 78.0, 80.0]
    assert chart.switches[0].options[0][0] == "1024"  # the page first shows the largest batch size
    assert chart.figure.layout.yaxis.title.text == "expected best accuracy [%]"
    assert "best validation accuracy" in chart.note
    (around,) = [band for band in chart.figure.data if band.meta["pick"].get("band") == "TVLARS"]
    assert list(around.x) == [1, 2, 3, 4, 5, 5, 4, 3, 2, 1]
    assert all(low < y < high for y, high, low in zip(
        lines["TVLARS", "128"].y, around.y[:5], around.y[:4:-1], strict=True))  # fmt: skip


def test_fewer_than_three_trials_have_no_curve() -> None:
    (comparison,) = compare([*tuned("lars", 0.5, 0.6), *seeds("tvlars", 0.5, 0.6, 0.7)])
    assert tuning_curves(comparison, styles([comparison])) is None


def test_alike_settings_are_one_trial_and_confirmation_runs_are_none() -> None:
    alike = [made("lars", lr=lr, val=val) for lr, val in ((1, 0.5), (1.01, 0.6), (2, 0.7), (4, 0.2))]
    runs = [*alike, *[made("lars", lr=2, seed=seed, val=0.9, confirms=True) for seed in (3, 4)]]
    (comparison,) = compare(runs)
    chart = tuning_curves(comparison, styles([comparison]))
    assert chart is not None
    (curve,) = [line for line in chart.figure.data if line.name]
    assert list(curve.y) == [50.0, 66.67, 70.0]  # of 0.6, 0.7 and 0.2
