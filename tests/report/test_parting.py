"""Branches of a checkpoint at several batch sizes: where their loss parts."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from made_runs import made

from largebatch.report.compare import compare
from largebatch.report.load import Run
from largebatch.report.parting import Parting, parting

BATCHES = (128, 256, 512, 1024)


def branches(losses: dict[int, list[float]], metric: str = "test/loss", images: float = 1000.0) -> list[Run]:
    return [
        made("sgd", batch=batch, seed=seed, start_from="base@3", facts={metric: loss, "training_examples": images})
        for batch, of_seeds in losses.items()
        for seed, loss in enumerate(of_seeds)
    ]


def parted(runs: list[Run]) -> Parting:
    (comparison,) = compare(runs)
    found = parting(list(comparison.cells.values()))
    assert found is not None
    return found


def test_the_loss_parts_where_the_paired_differences_do() -> None:
    """Seeds differ by far more than batch sizes, so only pairs of equal seeds show where the loss parts."""
    seeds = [1.0, 1.5, 2.0, 2.5]
    above = {128: 1.0, 256: 1.001, 512: 1.002, 1024: 1.10}
    found = parted(branches({batch: [factor * loss for loss in seeds] for batch, factor in above.items()}))
    assert [one.parted for one in found.branches] == [None, False, False, True]
    assert (
        found.words == "up to a batch size of 512, no images are lost; from 1,024 on, equal images give a higher loss"
    )
    estimate = found.branches[-1].above
    assert estimate is not None
    assert estimate.value == pytest.approx(0.1)
    assert re.search(r"1,024 +1\.9250 +\+10\.0% \(\+10\.0% to \+10\.0%\) +yes +4", found.text)


def test_a_loss_is_compared_with_the_best_smaller_batch_size() -> None:
    """At one learning rate for all, a larger batch may have a lower loss first, and then a higher one."""
    seeds = [1.0, 1.1, 1.2]
    found = parted(branches({b: [f * x for x in seeds] for b, f in ((128, 1.0), (256, 0.8), (512, 0.9), (1024, 0.7))}))
    assert [one.above.value if one.above else None for one in found.branches] == [
        None, pytest.approx(-0.2), pytest.approx(0.125), pytest.approx(-0.125),
    ]  # fmt: skip
    assert [one.parted for one in found.branches] == [None, False, True, False]


def test_intervals_cover_the_true_difference_in_90_of_100() -> None:
    random, covered, trials = np.random.default_rng(0), 0, 400
    for _ in range(trials):
        seeds = 1 + 0.2 * random.normal(size=5)
        losses = {128: seeds.tolist(), 256: (seeds * (1.03 + 0.02 * random.normal(size=5))).tolist()}
        estimate = parted(branches(losses)).branches[1].above
        assert estimate is not None
        assert estimate.low is not None
        assert estimate.high is not None
        covered += estimate.low <= 0.03 <= estimate.high
    assert 0.86 < covered / trials < 0.94


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ({128: [1.0, 1.1, 1.2], 256: [1.0, 1.1, 1.201]}, "the loss parts at none of the batch sizes tried: up to 256"),
        ({128: [1.0, 1.1], 256: [1.2, 1.3]}, "fewer than 3 common seeds can't tell where the loss parts"),
        ({128: [1.0, 1.1, 1.2], 256: [0.9, 1.3, 1.2]}, "beyond 128, these seeds can't tell where the loss parts"),
        ({128: [1.0, 1.1, 1.2], 256: [1.2, 1.3, 1.41]}, "from 256 on, equal images give a higher loss"),
    ],
)
def test_one_sentence_tells_it(losses: dict[int, list[float]], words: str) -> None:
    assert parted(branches(losses)).words.startswith(words)


def test_unequal_images_and_losses_of_0_are_not_compared() -> None:
    assert "only losses above 0 can be compared" in parted(branches({128: [0.0] * 3, 256: [1.0] * 3})).text
    found = parted([*branches({128: [1.0]}), *branches({256: [1.1]}, images=1100.0)])
    assert found.branches == []
    assert found.words == "the branches saw 1,000 to 1,100 images; only equal numbers can be compared"


def test_branches_have_a_comparison_of_their_own_and_validation_loss_decides() -> None:
    runs = branches({batch: [1.0, 1.1, 1.2] for batch in BATCHES}, "val/loss")
    other, own = compare([*runs, made("sgd", batch=128)])
    assert {other.dataset, own.dataset} == {"digits", "digits, from base@3"}
    found = parted(runs)
    assert found.metric == "val/loss"
    record = found.record()
    assert [one["batch_size"] for one in record["branches"]] == list(BATCHES)
    assert not any(math.isnan(one["loss"]) for one in record["branches"])
