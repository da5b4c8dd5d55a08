"""Best learning rates and their laws: data generated from a law give the law and its noise scale back."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from made_runs import made

from largebatch.report.best_lr import Best, best_lr, chosen_accuracy, seed_noise
from largebatch.report.cells import Cell
from largebatch.report.compare import compare
from largebatch.report.load import Run
from largebatch.report.lr_laws import LAWS, choose, fit_laws, surge_with
from largebatch.report.wording import three_digits

BATCHES = (4, 16, 64, 256, 1024, 4096, 16384, 65536)
NEXT = 131072
N = 700.0
IMAGES = {"val_images": 6000}
OPTIMA: dict[str, Callable[[float], float]] = {
    "constant": lambda b: 0.02,
    "linear": lambda b: 0.02 * b / 256,
    "sqrt": lambda b: 0.02 * math.sqrt(b / 256),
    "power": lambda b: 0.02 * (b / 256) ** 0.25,
    "sgd": lambda b: 0.5 / (1 + N / b),
    "adam": lambda b: 0.1 / math.sqrt(1 + N / b),
    "surge": lambda b: 0.02 / (0.5 * (math.sqrt(N / b) + math.sqrt(b / N))),
}


def grid(
    optimum: Callable[[float], float], batches: tuple[int, ...] = BATCHES, *, factor: float = 2.0, steps: int = 4,
    noise: float = 0.0, seeds: int = 1, width: float = 0.15, generator: int = 0,
) -> list[Run]:  # fmt: skip
    """Return runs whose log validation error is a parabola in the log learning rate, with its vertex at ``optimum``."""
    random = np.random.default_rng(generator)
    runs = []
    for batch in batches:
        middle = round(math.log(optimum(batch), factor))
        for power in range(middle - steps, middle + steps + 1):
            for seed in range(seeds):
                lr = factor**power
                error = 0.1 * math.exp(width * math.log(lr / optimum(batch)) ** 2 + noise * random.normal())
                val = 1 - min(error, 0.9)
                runs.append(made("adam", batch=batch, lr=lr, seed=seed, val=val, facts=IMAGES))
    return runs


def cells(runs: list[Run]) -> list[Cell]:
    (comparison,) = compare(runs)
    return list(comparison.cells.values())


def bests(runs: list[Run]) -> list[Best]:
    found = cells(runs)
    noise = seed_noise(found, chosen_accuracy)
    return [best_lr(cell, chosen_accuracy(cell), noise) for cell in found]


@pytest.mark.parametrize("law", OPTIMA)
def test_data_of_a_law_give_the_law_and_its_parameter_back(law: str) -> None:
    optimum = OPTIMA[law]
    found = bests(grid(optimum))
    for best in found:
        assert best.lr is not None
        assert best.lr.value == pytest.approx(optimum(best.batch_size), rel=0.02)
    fits = fit_laws(found, NEXT)
    choice = choose(fits)
    assert choice.law is not None
    assert choice.law.name == law
    assert choice.sure > 0.9
    fit = next(fit for fit in fits if fit.law.name == law)
    if fit.law.parameter:
        assert fit.parameter is not None
        assert fit.parameter.value == pytest.approx(N if fit.law.parameter == "N" else 0.25, rel=0.1)
    assert choice.lr is not None
    assert choice.lr.value == pytest.approx(optimum(NEXT), rel=0.1)
    assert choice.lr.low is not None
    assert choice.lr.high is not None
    assert choice.lr.low < optimum(NEXT) < choice.lr.high


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("width", [0.1, 0.3])
def test_the_interval_of_the_best_learning_rate_covers_the_truth(seeds: int, width: float) -> None:
    noise = math.sqrt(0.9 / (0.1 * 6000))  # of 6,000 images
    covered = []
    for generator in range(8):
        shifted = 0.02 * 2 ** (generator / 8)

        def optimum(batch: float, shifted: float = shifted) -> float:
            return shifted * math.sqrt(batch)

        runs = grid(optimum, noise=noise, seeds=seeds, width=width, generator=generator)
        for best in bests(runs):
            if best.lr:
                assert best.lr.low is not None
                assert best.lr.high is not None
                covered.append(best.lr.low < optimum(best.batch_size) < best.lr.high)
    assert len(covered) > 50
    assert np.mean(covered) > 0.87


def test_the_interval_of_the_noise_scale_covers_the_truth_in_90_percent() -> None:
    random = np.random.default_rng(1)
    sgd = [law for law in LAWS if law.name == "sgd"]
    covered = []
    for _ in range(500):
        found = [Best(b, 7, math.log(OPTIMA["sgd"](b)) + 0.2 * random.normal(), 0.2) for b in BATCHES]
        ((fit,)) = fit_laws(found, NEXT, sgd)
        assert fit.parameter is not None
        low, high = fit.parameter.low or 0.0, fit.parameter.high or math.inf
        covered.append((low < N < high, (fit.next.low or 0) < OPTIMA["sgd"](NEXT) < (fit.next.high or math.inf)))
    of_noise_scale, of_prediction = np.mean(covered, axis=0)
    assert 0.87 < of_noise_scale < 0.93
    assert 0.87 < of_prediction < 0.95  # the interval is that of the worst value of N


def test_a_best_learning_rate_at_the_edge_is_refused() -> None:
    runs = [run for run in grid(OPTIMA["sqrt"], (64,)) if run.config["optimizer"]["lr"] < 0.01]
    (best,) = bests(runs)
    assert best.lr is None
    assert best.reason == "at the edge: of the learning rates tried, the highest is best: try higher ones"
    runs = [run for run in grid(OPTIMA["sqrt"], (64,)) if run.config["optimizer"]["lr"] > 0.01]
    assert bests(runs)[0].reason.endswith("the lowest is best: try lower ones")


def test_beside_a_cliff_the_interval_covers_the_truth() -> None:
    """A wide parabola on one side tells little, so it must not move the optimum away from the best tried."""
    random = np.random.default_rng(5)
    covered = []
    for _ in range(60):
        optimum, cliff = 2 ** random.uniform(-0.5, 0.5), 2 ** random.uniform(-1.0, 1.0)
        runs = []
        for power in range(-3, 4):
            over = math.log(2.0**power / optimum)
            error = 0.1 * math.exp(0.1 * over**2 + 0.02 * random.normal())
            state = "finished" if over < math.log(cliff) else "diverged"
            runs.append(made(lr=2.0**power, val=1 - error, state=state, facts=IMAGES))
        (best,) = bests(runs)
        if best.lr is not None:
            assert best.lr.low is not None
            assert best.lr.high is not None
            covered.append(best.lr.low < optimum * min(cliff, 1.0) < best.lr.high)
    assert len(covered) > 50
    assert np.mean(covered) > 0.85


def test_a_diverged_learning_rate_ends_the_range() -> None:
    runs = [*[made(lr=lr, val=val, facts=IMAGES) for lr, val in ((1, 0.85), (2, 0.88), (4, 0.9))]]
    assert bests(runs)[0].lr is None
    (best,) = bests([*runs, made(lr=8, val=0.9, state="diverged", facts=IMAGES)])
    assert best.lr is not None
    assert best.lr.value == pytest.approx(4)
    assert best.lr.high is not None
    assert 4 < best.lr.high < 8  # the interval reaches into the step before the cliff


def test_equal_learning_rates_are_flat() -> None:
    for generator in range(10):
        (best,) = bests(grid(lambda _: 0.02, (64,), noise=0.04, width=0.0, generator=generator))
        assert best.lr is None
        assert best.reason.startswith(("flat", "at the edge"))


def test_only_the_learning_rate_differs_between_the_points_of_a_parabola() -> None:
    runs = grid(OPTIMA["sqrt"], (64,))
    others = [made("adam", batch=64, lr=lr, val=0.2, facts=IMAGES, optimizer__eps=1e-3) for lr in (0.0625, 0.03)]
    assert bests([*runs, *others]) == bests(runs)
    (best,) = bests(runs[:1])
    assert best.reason == "only 1 learning rate tried; a parabola needs 3"


def test_learning_rates_count_after_scaling() -> None:
    scaling = {"rule": "sqrt", "base_batch": 256, "noise_scale": None, "force": False}
    runs = [
        made(batch=1024, lr=lr, val=val, facts=IMAGES, lr_scaling=scaling)
        for lr, val in ((0.5, 0.8), (1.0, 0.9), (2.0, 0.8))
    ]
    (best,) = bests(runs)
    assert best.lr is not None
    assert best.lr.value == pytest.approx(2.0, rel=1e-3)


def test_the_noise_comes_from_the_scatter_over_seeds_without_their_common_part() -> None:
    random = np.random.default_rng(0)
    runs = []
    for seed in range(20):
        common = 0.3 * random.normal()  # an easier or harder set of validation images
        for lr in (1.0, 2.0, 4.0, 8.0):
            error = 0.1 * math.exp(common + 0.05 * random.normal() + 0.1 * math.log(lr / 3) ** 2)
            runs.append(made(lr=lr, seed=seed, val=1 - error, facts=IMAGES))
    assert seed_noise(cells(runs), chosen_accuracy) == pytest.approx(0.05, rel=0.2)
    few = [run for run in runs if run.seed < 2]
    assert seed_noise(cells(few), chosen_accuracy) is None


def test_laws_that_the_data_cannot_tell_apart_are_not_chosen_from() -> None:
    found = [Best(b, 7, math.log(OPTIMA["sgd"](b)), 0.5) for b in (128, 1024, 8192)]
    choice = choose(fit_laws(found, 16384))
    assert choice.law is None
    assert choice.words.startswith("the data can't tell the laws apart, so none is chosen: ")
    assert choice.lr is not None
    assert (choice.lr.low or 0) < OPTIMA["sgd"](16384) < (choice.lr.high or 0)


def test_two_batch_sizes_have_no_law_and_data_of_no_law_fit_none() -> None:
    assert fit_laws([Best(64, 7, 0.0, 0.1), Best(128, 7, 0.1, 0.1), Best(256, 7)], 512) == []
    zigzag = [Best(b, 7, 2.0 * (i % 2), 0.1) for i, b in enumerate(BATCHES)]
    choice = choose(fit_laws(zigzag, NEXT))
    assert (choice.law, choice.lr) == (None, None)
    assert choice.words.startswith("no law fits; ")


def test_a_noise_scale_beyond_the_batches_has_only_a_lower_limit() -> None:
    found = [Best(b, 7, math.log(OPTIMA["sqrt"](b)), 0.1) for b in BATCHES]
    fits = {fit.law.name: fit for fit in fit_laws(found, NEXT)}
    parameter = fits["surge"].parameter
    assert parameter is not None
    assert (parameter.value, parameter.high) == (math.inf, None)
    assert parameter.low is not None
    assert parameter.low > 65536
    assert parameter.text == f"above {three_digits(parameter.low)}"


def test_a_measured_noise_scale_makes_surge_a_law_without_a_fitted_parameter() -> None:
    found = [Best(b, 7, math.log(OPTIMA["surge"](b)), 0.1) for b in BATCHES]
    choice = choose(fit_laws(found, NEXT, (*LAWS, surge_with(N))))
    assert choice.law is not None
    assert choice.law.name == "surge_measured"
    wrong = choose(fit_laws(found, NEXT, (*LAWS, surge_with(10 * N))))
    assert wrong.law is not None
    assert wrong.law.name == "surge"
