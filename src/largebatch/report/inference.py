"""Statistics of a comparison: differences between rows at the same seeds, their intervals and p-values.

Model: in a column, the accuracy of a row at a seed is the row's mean, plus an effect of the seed that all rows share
(same weights, same order of images), plus noise. Paired differences remove the seed's effect. Their variances are
shrunk as in limma (Smyth 2004): the variance s² of a pair with ν degrees of freedom follows s0² F(ν, d0) for a common
variance s0². Here s0² is that of the pair's column, which is itself shrunk towards that of all columns, because batch
sizes often differ in noise. Each d0 isn't estimated but averaged over ``_PRIOR_DF``, weighted by the likelihood of the
variances. d0 = ∞ means equal variances.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import special

Row = TypeVar("Row", bound=Hashable)
Floats = NDArray[np.float64]

FEWEST_SEEDS = 3  # with fewer paired seeds, nothing is claimed
LEVEL = 0.05
POWER = 0.8
_PRIOR_DF = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, np.inf])
_PRIOR_WEIGHTS = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 6.0]) / 12
_MOST_SEEDS = 1000


@dataclass(frozen=True)
class Pair(Generic[Row]):
    """Difference in accuracy between two rows at the same batch size and the same seeds.

    Attributes:
        first: the row with the higher mean over these seeds.
        seeds: number of paired seeds, at least 2.
        difference: mean over the seeds of the first row's accuracy minus the second's, in 0..1.
        weights: probabilities of the values of d0, shape [K].
        variances: variance of a single seed's difference for each d0, shape [K].
        dfs: degrees of freedom of ``variances``, shape [K].
        image_variance: variance of the difference due to the choice of test images.
    """

    first: Row
    second: Row
    seeds: int
    difference: float
    weights: Floats
    variances: Floats
    dfs: Floats
    image_variance: float

    @property
    def p(self) -> float:
        """Two-sided p-value of the hypothesis that the rows are equal, without correction. 1 with too few seeds."""
        return 1.0 if self.seeds < FEWEST_SEEDS else float(self._tail(self.difference))

    def half_width(self, level: float = LEVEL) -> float:
        """Return half the width of the interval that covers the true difference with probability 1 - ``level``."""
        low, high = 0.0, 1.0
        while self._tail(high) > level:
            high *= 2
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self._tail(middle) > level else (low, middle)
        return high

    def smallest_shown(self, level: float) -> float:
        """Return the smallest true difference that a test at ``level`` shows with probability ``POWER``."""
        return self.half_width(level) + float(special.ndtri(POWER)) * math.sqrt(self._error)

    def seeds_to_settle(self, level: float) -> int | None:
        """Return the number of seeds with which ``smallest_shown`` is the observed difference. None: over 1,000."""
        variance = float(self.weights @ self.variances)
        df = float(self.weights @ np.minimum(self.dfs, 1e6)) / (self.seeds - 1)
        for seeds in range(self.seeds + 1, _MOST_SEEDS + 1):
            quantiles = special.ndtri(POWER) - special.stdtrit(df * (seeds - 1), level / 2)
            if quantiles * math.sqrt(variance / seeds + self.image_variance) <= self.difference:
                return seeds
        return None

    @property
    def _error(self) -> float:
        """Variance of ``difference``."""
        return float(self.weights @ self.variances) / self.seeds + self.image_variance

    def _tail(self, difference: float) -> float:
        """Return the probability of a larger absolute difference between equal rows."""
        of_seeds = self.variances / self.seeds
        total = of_seeds + self.image_variance
        if not total.all():
            return float(difference == 0)
        dfs = self.dfs * (total / of_seeds.clip(1e-300)) ** 2  # Satterthwaite; there are many images
        return float(self.weights @ (2 * special.stdtr(dfs, -difference / np.sqrt(total))))


def compared(
    columns: Sequence[Mapping[Row, Mapping[int, float]]],
    image_variances: Mapping[tuple[int, Row, Row], float],
    resolution: float = 0.0,
) -> list[list[Pair[Row]]]:
    """Return all pairs of rows with two or more common seeds, for each column.

    Args:
        columns: for each column, the accuracy in 0..1 of each row by seed.
        image_variances: by column and rows; 0 if missing.
        resolution: accuracy of one test image. No variance of a seed's difference is smaller than its square.
    """
    found = [
        (column, first, second, differences)
        for column, rows in enumerate(columns)
        for first, second in itertools.combinations(rows, 2)
        if len(differences := _paired(rows[first], rows[second])) > 1
    ]
    if not found:
        return [[] for _ in columns]
    variances = np.array([d.var(ddof=1) for *_, d in found]).clip(max(resolution**2, 1e-12))
    dfs = np.array([len(d) - 1.0 for *_, d in found])
    _, of_column = np.unique([column for column, *_ in found], return_inverse=True)
    weights, shrunk, total = _shrunk(variances, dfs, of_column)
    pairs: list[list[Pair[Row]]] = [[] for _ in columns]
    for (column, first, second, differences), variance, df in zip(found, shrunk, total, strict=True):
        of_images = image_variances.get((column, first, second), 0.0)
        higher, lower = (first, second) if differences.mean() >= 0 else (second, first)
        mean = abs(float(differences.mean()))
        pairs[column].append(Pair(higher, lower, len(differences), mean, weights, variance, df, of_images))
    return pairs


def _paired(first: Mapping[int, float], second: Mapping[int, float]) -> Floats:
    """Return the differences at the common seeds."""
    return np.array([first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())])


def _shrunk(variances: Floats, dfs: Floats, columns: NDArray[np.intp]) -> tuple[Floats, Floats, Floats]:
    """Shrink the variances of pairs towards that of their column, and those of columns towards a common one.

    Args:
        variances: s² of each pair, shape [P].
        dfs: ν of each pair, shape [P].
        columns: index of each pair's column, shape [P].

    Returns:
        Probability of each combination of d0 within and between columns, shape [K]; variances and degrees of freedom,
        shape [P, K].
    """
    number = np.bincount(columns)[
        columns
    ]  # of pairs in the column: R (R - 1) / 2 of R rows, but R - 1 independent ones
    shares = 2 / ((1 + np.sqrt(1 + 8 * number)) / 2)
    df_of: Floats = np.bincount(columns, shares * dfs).astype(np.float64)
    variance_of: Floats = np.bincount(columns, shares * dfs * variances) / df_of
    common, between = _common_variance(variance_of, df_of, np.ones(len(df_of)))
    column_variances = _weighted(common, variance_of, df_of)[columns]
    column_dfs = np.minimum(_PRIOR_DF + df_of[:, None], df_of.sum())[columns]
    relative, within = _common_variance(variances / variance_of[columns], dfs, np.where(number > 1, shares, 0.0))
    own = [
        _weighted(column_variances[:, [k]] * relative, variances, dfs) for k in range(len(_PRIOR_DF))
    ]  # by d0 between columns; [P, d0 within columns]
    own_dfs = [np.minimum(_PRIOR_DF + dfs[:, None], column_dfs[:, [k]]) for k in range(len(_PRIOR_DF))]
    return np.outer(between, within).ravel(), np.concatenate(own, axis=1), np.concatenate(own_dfs, axis=1)


def _weighted(priors: Floats, variances: Floats, dfs: Floats) -> Floats:
    """Return (d0 s0² + ν s²) / (d0 + ν) for each d0, from s0² of shape [K] or [P, K]. Shape [P, K]."""
    with np.errstate(invalid="ignore"):
        found = (_PRIOR_DF * priors + (dfs * variances)[:, None]) / (_PRIOR_DF + dfs[:, None])
    return np.where(np.isinf(_PRIOR_DF), priors, found)


def _common_variance(variances: Floats, dfs: Floats, shares: Floats) -> tuple[Floats, Floats]:
    """Return s0² (by maximum likelihood) and the probability of each d0. Without shares: 1, and d0 = ∞.

    Args:
        variances: s² of each pair, shape [P].
        dfs: ν of each pair, shape [P].
        shares: weight of each pair in the likelihood, shape [P].
    """
    if not shares.any():
        return np.ones(len(_PRIOR_DF)), np.isinf(_PRIOR_DF).astype(np.float64)
    d0 = _PRIOR_DF[np.isfinite(_PRIOR_DF), None]
    pooled = (shares * dfs) @ variances / (shares @ dfs)
    common = np.full(len(d0), pooled)
    for _ in range(50):  # expectation maximisation over the pairs' true variances
        common = shares.sum() / ((d0 + dfs) / (d0 * common[:, None] + dfs * variances) @ shares)
    # Log densities of s², of the scaled F distribution and for d0 = ∞ of the scaled χ², without terms that all share.
    x = dfs * variances / (d0 * common[:, None])
    density = dfs / 2 * np.log(x) - (dfs + d0) / 2 * np.log1p(x) - special.betaln(dfs / 2, d0 / 2)
    x = dfs * variances / (2 * pooled)
    equal = dfs / 2 * np.log(x) - x - special.gammaln(dfs / 2)
    logarithm = np.append(density @ shares, equal @ shares) + np.log(_PRIOR_WEIGHTS)
    return np.append(common, pooled), special.softmax(logarithm)


@dataclass(frozen=True)
class Decision(Generic[Row]):
    """Result of the tests of a column. All p-values are corrected for the tests of all columns.

    Attributes:
        leader: the row that is ahead of all others, or None.
        leader_p: p-value of the row with the highest mean as the leader.
        pair_p: p-value of each pair, by its two rows.
        ahead: pairs whose first row is ahead.
    """

    leader: Row | None
    leader_p: float
    pair_p: dict[tuple[Row, Row], float]
    ahead: set[tuple[Row, Row]]


def decide(
    columns: Sequence[Sequence[Row]],
    pairs: Sequence[Sequence[Pair[Row]]],
    incomplete: Container[tuple[int, Row]] = (),
    trials: Mapping[tuple[int, Row], int] = MappingProxyType({}),
) -> list[Decision[Row]]:
    """Test for each column if a row is ahead of all others, and for each pair if its first row is ahead.

    A row leads if it is ahead of every other row, so its largest p-value counts, corrected by Holm's method for the
    number of columns. It needs no correction for the number of rows. p-values of pairs are corrected by Holm's method
    for the number of all pairs.

    Args:
        columns: the rows of each column.
        pairs: result of ``compared``.
        incomplete: column and row of cells that are never ahead.
        trials: by column and row, the number of settings of which the same seeds chose the best; 1 if missing. The
            p-values of pairs whose first row is this row are multiplied by it (Bonferroni). The choice flatters the
            second row too, which makes its rivals' tests conservative.
    """

    def p_of(column: int, pair: Pair[Row]) -> float:
        return min(pair.p * trials.get((column, pair.first), 1), 1.0)

    usable = [
        [pair for pair in of_column if pair.seeds >= FEWEST_SEEDS and (column, pair.first) not in incomplete]
        for column, of_column in enumerate(pairs)
    ]
    best: dict[int, tuple[Row, float]] = {}
    for column, (rows, of_column) in enumerate(zip(columns, usable, strict=True)):
        for row in rows if len(rows) > 1 else ():
            won = [p_of(column, pair) for pair in of_column if pair.first == row]
            if len(won) == len(rows) - 1:
                best[column] = row, max(won)
    leader_p = dict(zip(best, holm([p for _, p in best.values()]), strict=True))
    places = [(column, pair.first, pair.second) for column, of_column in enumerate(usable) for pair in of_column]
    corrected = holm([p_of(column, pair) for column, of_column in enumerate(usable) for pair in of_column])
    pair_p = dict(zip(places, corrected, strict=True))
    decisions = []
    for column, of_column in enumerate(usable):
        p = {(pair.first, pair.second): pair_p[column, pair.first, pair.second] for pair in of_column}
        leader = best[column][0] if leader_p.get(column, 1.0) <= LEVEL else None
        ahead = {rows for rows in p if p[rows] <= LEVEL or rows[0] == leader}
        decisions.append(Decision(leader, leader_p.get(column, 1.0), p, ahead))
    return decisions


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's method, in the given order."""
    corrected, highest = [1.0] * len(p), 0.0
    for done, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        highest = max(highest, min((len(p) - done) * p[index], 1.0))
        corrected[index] = highest
    return corrected
