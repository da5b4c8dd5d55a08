"""Leads over a reference row against the batch size."""

from __future__ import annotations

import numpy as np
import pytest
from made_runs import made, seeds

from largebatch.report.chart import styles
from largebatch.report.compare import Comparison, compare
from largebatch.report.lead import Lead, lead_by_batch, leads_of, slope
from largebatch.report.load import Run

BATCHES = (128, 512, 2048, 8192)
SEEDS = (-0.02, 0.01, 0.0, 0.03, -0.01)  # effects that rows share


def widening(per_doubling: float, noise: float = 0.001, seed: int = 0) -> Comparison:
    """Return AdamW and a row whose lead is 1 point at batch 128 and grows ``per_doubling``."""
    random, runs = np.random.default_rng(seed), list[Run]()
    for at, batch in enumerate(BATCHES):
        lead = 0.01 + 2 * at * per_doubling
        for name, mean in (("adamw", 0.7), ("lamb", 0.7 + lead)):
            tests = [mean + effect + noise * random.normal() for effect in SEEDS]
            runs += seeds(name, *tests, batch=batch)
    (comparison,) = compare(runs)
    return comparison


def test_a_lead_has_the_sign_of_its_row_and_pairs_seeds() -> None:
    comparison = widening(0.005)
    adamw, lamb = sorted(comparison.rows, key=lambda row: row.optimizer)
    leads = leads_of(comparison, lamb, adamw)
    assert [lead.batch_size for lead in leads] == list(BATCHES)
    assert [lead.difference for lead in leads] == pytest.approx([0.01, 0.02, 0.03, 0.04], abs=0.002)
    assert max(lead.half_width for lead in leads) < 0.005  # far below the 2 points of the seeds
    other = leads_of(comparison, adamw, lamb)
    assert [lead.difference for lead in other] == pytest.approx([-lead.difference for lead in leads])


def test_the_slope_s_interval_covers_the_true_change() -> None:
    covered, trials = 0, 120
    for seed in range(trials):
        comparison = widening(0.003, noise=0.004, seed=seed)
        adamw, lamb = sorted(comparison.rows, key=lambda row: row.optimizer)
        found = slope(leads_of(comparison, lamb, adamw))
        assert found is not None
        covered += abs(found.change - 0.003) <= found.half_width
    assert covered / trials > 0.93


def test_a_bend_widens_the_slope_s_interval() -> None:
    straight = [Lead(batch, 0.01 * at, 0.002) for at, batch in enumerate(BATCHES)]
    bent = [lead._replace(difference=(0.0, 0.03, 0.03, 0.0)[at]) for at, lead in enumerate(straight)]
    found, other = slope(straight), slope(bent)
    assert found is not None
    assert other is not None
    assert found.change == pytest.approx(0.005)
    assert other.half_width > 5 * found.half_width
    assert slope(straight[:1]) is None


def test_the_chart_draws_every_row_but_the_reference() -> None:
    comparison = widening(0.005)
    chart = lead_by_batch(comparison, styles([comparison]))
    assert chart is not None
    assert chart.title == "Lead over AdamW"
    (trace,) = chart.figure.data
    assert list(trace.y) == pytest.approx([1, 2, 3, 4], abs=0.2)
    assert len(trace.error_y.array) == len(BATCHES)
    assert "LAMB +0.50 ± 0." in chart.note or "LAMB +0.5 ± 0." in chart.note


def test_without_adamw_the_first_row_is_the_reference_and_two_batch_sizes_are_needed() -> None:
    runs = [run for batch in (128, 512) for name in ("lars", "lamb") for run in seeds(name, 0.5, 0.6, 0.7, batch=batch)]
    (comparison,) = compare(runs)
    chart = lead_by_batch(comparison, styles([comparison]))
    assert chart is not None
    assert chart.title == "Lead over LARS"
    for few in (runs[:6], [made("lars"), made("lamb")], seeds("lars", 0.5, 0.6, 0.7)):
        (comparison,) = compare(few)
        assert lead_by_batch(comparison, styles([comparison])) is None
