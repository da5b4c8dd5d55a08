"""Rate of false and of rightly named leaders in simulated reports.

Simulated reports of three batch sizes. The accuracy of an optimizer at a seed is normal with standard deviation 1, and
correlated over optimizers by rho, because a seed gives all of them the same first weights. Ratings of a report:
`false`: equal optimizers, a leader at any batch size; `1 sd`, `2 sd`: the first optimizer leads by so much at the first
batch size, and is named there. Rivals of the report's rule: Welch's test, the paired t-test, and the paired t-test with
the variance pooled over all optimizers and batch sizes; each against every other optimizer, corrected by Holm.
The choice among settings is simulated with runs of all settings, through the report's own comparison.
`python benchmarks/verdict.py [--reports 200] [--smallest]`
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from shared import parsed, print_table

from largebatch.report.compare import compare
from largebatch.report.inference import LEVEL, compared, decide, holm
from largebatch.report.load import Run
from largebatch.runs.folder import RunFolder

Floats = NDArray[np.float64]
Column = Floats  # accuracy [optimizers, seeds]
COLUMNS = 3


def normal(draws: np.random.Generator, shape: tuple[int, int]) -> Floats:
    return np.asarray(draws.standard_normal(shape))


def heavy_tails(draws: np.random.Generator, shape: tuple[int, int]) -> Floats:
    return np.asarray(draws.standard_t(4, shape) / np.sqrt(2))


def unequal_optimizers(draws: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """Return noise with standard deviations from 0.5 to 1.5."""
    return np.asarray(draws.standard_normal(shape) * np.linspace(0.5, 1.5, shape[0])[:, None])


def near_100_percent(draws: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """Return skewed noise: the number of errors of accuracies near 100 %."""
    return (2 - draws.poisson(2, shape)) / np.sqrt(2)


Noise = Callable[[np.random.Generator, tuple[int, int]], Floats]


def draw(
    draws: np.random.Generator, optimizers: int, seeds: int, rho: float, lead: float = 0.0, noise: Noise = normal,
    scales: Sequence[float] = (1.0,) * COLUMNS, tied: int | None = None,
) -> list[Column]:  # fmt: skip
    """Return a report's columns.

    Args:
        lead: of the first optimizer in the first column, in standard deviations.
        scales: standard deviation of each column.
        tied: number of optimizers that share the best true mean; the others are far behind. None: all.
    """
    columns = []
    for scale in scales:
        own = noise(draws, (optimizers, seeds))
        column = np.sqrt(1 - rho) * own + np.sqrt(rho) * draws.standard_normal((1, seeds))
        column[tied:] -= 0 if tied is None else 100
        columns.append(scale * column)
    columns[0][0] += lead * scales[0]
    return columns


def ours(columns: list[Column]) -> list[int | None]:
    """Return the row that the report names in each column, or None."""
    named = [{row: dict(enumerate(values)) for row, values in enumerate(column)} for column in columns]
    return [decision.leader for decision in decide([list(rows) for rows in named], compared(named, {}))]


def _by_tests(columns: list[Column], p: Callable[[Column, int], Floats]) -> list[int | None]:
    """Return the leaders by the p-values of the best row against each row."""
    best = [int(column.mean(axis=1).argmax()) for column in columns]
    largest = [float(np.delete(p(column, row), row).max()) for column, row in zip(columns, best, strict=True)]
    return [row if value <= LEVEL else None for row, value in zip(best, holm(largest), strict=True)]


def welch(columns: list[Column]) -> list[int | None]:
    return _by_tests(columns, lambda column, row: stats.ttest_ind(column[row], column, axis=1, equal_var=False).pvalue)


def paired(columns: list[Column]) -> list[int | None]:
    def p(column: Column, row: int) -> Floats:
        differences = column[row] - np.delete(column, row, axis=0)
        return np.insert(stats.ttest_1samp(differences, 0, axis=1).pvalue, row, 1)

    return _by_tests(columns, p)


def pooled(columns: list[Column]) -> list[int | None]:
    centred = [column - column.mean(axis=1, keepdims=True) for column in columns]
    residuals = [column - column.mean(axis=0) for column in centred]
    rows, seeds = columns[0].shape
    df = len(columns) * (rows - 1) * (seeds - 1)
    error = np.sqrt(2 / seeds * sum((residual**2).sum() for residual in residuals) / df)

    def p(column: Column, row: int) -> Floats:
        means = column.mean(axis=1)
        return np.asarray(2 * stats.t.sf(np.abs(means[row] - means) / error, df))

    return _by_tests(columns, p)


RULES = {"Welch": welch, "paired": paired, "pooled": pooled, "report": ours}


def rates(reports: int, optimizers: int, seeds: int, rho: float, **options: object) -> dict[str, list[float]]:
    """Return for each rule: reports with a false leader, with a lead of 1 sd named, with a lead of 2 sd named [%]."""
    found: dict[str, list[float]] = {rule: [] for rule in RULES}
    for lead in (0.0, 1.0, 2.0):
        draws = np.random.default_rng(0)
        drawn = [draw(draws, optimizers, seeds, rho, lead, **options) for _ in range(reports)]  # type: ignore[arg-type]
        for name, rule in RULES.items():
            leaders = [rule(columns) for columns in drawn]
            hits = [found_[0] == 0 for found_ in leaders] if lead else [any(x is not None for x in f) for f in leaders]
            found[name].append(100 * float(np.mean(hits)))
    return found


def coverage(reports: int, optimizers: int, seeds: int, rho: float, **options: object) -> float:
    """Return how often the 95 % interval of a pair covers the true difference of 0 [%]."""
    draws, covered = np.random.default_rng(1), []
    for _ in range(reports):
        columns = draw(draws, optimizers, seeds, rho, **options)  # type: ignore[arg-type]
        named = [{row: dict(enumerate(values)) for row, values in enumerate(column)} for column in columns]
        covered += [pair.difference <= pair.half_width() for of_column in compared(named, {}) for pair in of_column]
    return 100 * float(np.mean(covered))


def print_power(reports: int) -> None:
    lines = []
    for optimizers in (2, 5, 8):
        for rho in (0.0, 0.5):
            for seeds in (2, 3, 5, 10, 20):
                found = rates(reports, optimizers, seeds, rho)
                lines.append([optimizers, rho, seeds, *(" / ".join(f"{x:.1f}" for x in found[r]) for r in RULES)])
    print("false / 1 sd / 2 sd, in % of reports\n")
    print_table(["optimizers", "rho", "seeds", *RULES], lines, left=3)


def print_false_leaders(reports: int) -> None:
    """Print the reports with a false leader for other noise, and the coverage of the intervals."""
    kinds: dict[str, dict[str, object]] = {
        "normal": {},
        "heavy tails (t, 4 df)": {"noise": heavy_tails},
        "optimizers' sd from 0.5 to 1.5": {"noise": unequal_optimizers},
        "columns' sd 0.5, 1, 2": {"scales": (0.5, 1.0, 2.0)},
        "columns' sd 0.1, 1, 10": {"scales": (0.1, 1.0, 10.0)},
        "near 100 % (Poisson errors)": {"noise": near_100_percent},
    }
    lines = []
    for name, options in kinds.items():
        for optimizers, tied in ((2, None), (5, None), (5, 2)):
            cells: list[float] = []
            for seeds in (3, 5, 10):
                draws = np.random.default_rng(2)
                drawn = [draw(draws, optimizers, seeds, 0.5, tied=tied, **options) for _ in range(reports)]  # type: ignore[arg-type]
                cells += [
                    100 * float(np.mean([any(x is not None for x in rule(c)) for c in drawn]))
                    for rule in (pooled, ours)
                ]
            cells += [coverage(reports // 4, optimizers, n, 0.5, **options) for n in (3, 5, 10)]
            lines.append([name, f"{optimizers}, {tied or 'all'} tied", *(f"{cell:.1f}" for cell in cells)])
    heads = [f"{rule}, {seeds} seeds" for seeds in (3, 5, 10) for rule in ("pooled", "report")]
    print("Reports with a false leader, and coverage of the 95 % intervals, in %\n")
    print_table(["noise", "optimizers", *heads, *(f"coverage, {seeds} seeds" for seeds in (3, 5, 10))], lines, left=2)


def made(optimizer: str, setting: int, batch: int, seed: int, accuracy: float) -> Run:
    """Return a finished run, as the report loads it. Validation and test accuracy are the same."""
    config = {
        "dataset": {"name": "digits", "val_fraction": 0.1}, "model": {"name": "smallcnn"}, "mode": {"name": "clf"},
        "optimizer": {"name": optimizer, "lr": 2.0**setting}, "schedule": {"name": "constant"},
        "batch_size": batch, "epochs": 10, "seed": seed,
    }  # fmt: skip
    summary = {"best/val/accuracy": accuracy, "best/test/accuracy": accuracy, "best/chosen_by": "val/accuracy"}
    return Run(RunFolder(Path(f"{optimizer}-{setting}-{batch}-{seed}")), config, "finished", "", summary)


def print_choice(reports: int) -> None:
    """Print the reports with a false leader if the best of many equal settings is compared."""
    lines = []
    for settings in ((1, 1), (7, 7), (49, 49), (1, 7), (1, 49), (7, 7, 7)):
        cells = []
        for seeds in (3, 5):
            draws, false = np.random.default_rng(3), 0
            for _ in range(reports):
                runs = []
                for column in range(COLUMNS):
                    of_seed = draws.standard_normal(seeds)
                    for name, number in zip(("lars", "lamb", "sgd"), settings, strict=False):
                        own = 0.5 + 0.01 * (draws.standard_normal((number, seeds)) + of_seed)
                        runs += [
                            made(name, *at, 128 << column, seed, own[at][seed])
                            for at in np.ndindex(number)
                            for seed in range(seeds)
                        ]
                false += bool(compare(runs)[0].bold)
            cells.append(f"{100 * false / reports:.1f}")
        lines.append([", ".join(map(str, settings)), *cells])
    print("Reports with a false leader, in %, if each optimizer shows the best of its settings\n")
    print_table(["settings of each optimizer", "3 seeds", "5 seeds"], lines, left=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reports", type=int, default=200)
    arguments = parsed(parser, reports=4)
    print_power(arguments.reports)
    print_false_leaders(arguments.reports)
    print_choice(max(arguments.reports // 10, 2))


if __name__ == "__main__":
    main()
