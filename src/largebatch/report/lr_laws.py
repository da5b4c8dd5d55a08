"""Fit laws of the best learning rate over the batch size, and compare them.

A law is ``log lr(B) = log c + shape(log B, parameter)``. Errors of log learning rates are normal with known standard
errors, so chi² is twice the negative log-likelihood. Limits come from the profile likelihood. Akaike weights
``exp(-AIC / 2)`` with ``AIC = chi² + 2 * parameters`` tell how much the data prefer a law.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

from largebatch.report.best_lr import Best, Estimate
from largebatch.report.wording import listed, three_digits

Floats = NDArray[np.float64]
FEWEST_BATCHES = 3
_WITHIN = 2.7055  # of chi² at the minimum: 90 % of one parameter
_RULED_OUT = 0.1  # of the best law's weight
_MISFIT = 0.01  # p-value below which a law doesn't fit
_BEYOND = math.log(1e4)  # noise scales from the smallest batch / 10^4 to the largest * 10^4
_POINTS = 6001


@dataclass(frozen=True)
class Law:
    """Law of the best learning rate.

    Attributes:
        formula: with the batch size B and the law's parameter.
        shape: log of lr / c, from log B and the parameter: the exponent, or log N. They broadcast.
        parameter: ``"N"``, ``"a"`` or ``""``.
        includes: laws that are a limit or a special case of this law.
        fixed: known value of the parameter. None: fitted.
    """

    name: str
    formula: str
    shape: Callable[[Floats, Floats], Floats]
    parameter: str = ""
    includes: tuple[str, ...] = ()
    fixed: float | None = None

    @property
    def fitted(self) -> int:
        """Number of fitted parameters."""
        return 1 + bool(self.parameter and self.fixed is None)


def _surge(b: Floats, n: Floats) -> Floats:
    return np.asarray(-np.logaddexp(0.5 * (n - b), 0.5 * (b - n)) + math.log(2))


LAWS = (
    Law("constant", "lr = c", lambda b, _: 0 * b),
    Law("linear", "lr = c * B", lambda b, _: b),
    Law("sqrt", "lr = c * sqrt(B)", lambda b, _: b / 2),
    Law("power", "lr = c * B^a", lambda b, a: a * b, "a", ("constant", "linear", "sqrt")),
    Law("sgd", "lr = c / (1 + N/B)", lambda b, n: -np.logaddexp(0.0, n - b), "N", ("constant", "linear")),
    Law("adam", "lr = c / sqrt(1 + N/B)", lambda b, n: -np.logaddexp(0.0, n - b) / 2, "N", ("constant", "sqrt")),
    Law("surge", "lr = c / (0.5 * (sqrt(N/B) + sqrt(B/N)))", _surge, "N", ("sqrt", "surge_measured")),
)


def surge_with(noise_scale: float) -> Law:
    """Return the surge law with a measured noise scale, in images."""
    formula = f"surge with the measured N = {three_digits(noise_scale)}"
    return Law("surge_measured", formula, _surge, "N", (), math.log(noise_scale))


class Fit(NamedTuple):
    """Fitted law.

    Attributes:
        c: the law's factor.
        parameter: N in images, or the exponent a. None: the law has no parameter, or it is known.
        p: probability of a worse fit if the law is true.
        weight: Akaike weight, in 0..1. The weights of all laws have the sum 1.
        next: best learning rate at the next batch size.
    """

    law: Law
    c: float
    parameter: Estimate | None
    chi2: float
    p: float
    weight: float
    next: Estimate


class Choice(NamedTuple):
    """Law that the data choose, or the reason why they choose none.

    Attributes:
        law: the simplest law that isn't ruled out, if all others that aren't ruled out include it. Else None.
        sure: weight of this law and of those that include it.
        lr: best learning rate at the next batch size; its interval covers every law that isn't ruled out. None: no law
            fits.
        words: one sentence.
    """

    law: Law | None
    sure: float
    lr: Estimate | None
    words: str


def fit_laws(bests: Sequence[Best], next_batch: int, laws: Sequence[Law] = LAWS) -> list[Fit]:
    """Fit every law. Empty with fewer than three batch sizes that have a best learning rate."""
    known = [best for best in bests if best.log is not None]
    if len(known) < FEWEST_BATCHES:
        return []
    b = np.log([float(best.batch_size) for best in known])
    y = np.array([best.log for best in known], dtype=float)
    w = np.array([best.deviation for best in known]) ** -2.0
    fits = [fit_law(law, b, y, w, math.log(next_batch)) for law in laws]
    aic = np.array([fit.chi2 + 2 * fit.law.fitted for fit in fits])
    weights = np.exp(-(aic - aic.min()) / 2)
    return [fit._replace(weight=float(weight)) for fit, weight in zip(fits, weights / weights.sum(), strict=True)]


def fit_law(law: Law, b: Floats, y: Floats, w: Floats, next_b: float) -> Fit:
    """Fit one law, without its weight.

    Args:
        b, y: logarithms of batch sizes and of the best learning rates.
        w: inverse variances of ``y``.
        next_b: logarithm of the batch size to predict.
    """
    if law.fixed is not None or not law.parameter:
        grid = np.array([law.fixed or 0.0])
    elif law.parameter == "N":
        grid = np.linspace(b.min() - _BEYOND, b.max() + _BEYOND, _POINTS)
    else:
        grid = np.linspace(-3, 3, _POINTS)
    shapes = law.shape(b[None, :], grid[:, None]) + np.zeros((len(grid), 1))
    log_c = ((y - shapes) * w).sum(axis=1) / w.sum()
    chi2 = (w * (y - shapes - log_c[:, None]) ** 2).sum(axis=1)
    best = int(chi2.argmin())
    inside = chi2 <= chi2[best] + _WITHIN
    # At a value of the parameter, log c is normal with the variance 1 / sum of w.
    reach = np.sqrt(np.maximum(chi2[best] + _WITHIN - chi2[inside], 0.0) / w.sum())
    at_next = law.shape(np.array(next_b), grid) + log_c
    prediction = Estimate(
        math.exp(at_next[best]),
        math.exp((at_next[inside] - reach).min()),
        math.exp((at_next[inside] + reach).max()),
    )
    parameter = None
    if len(grid) > 1:
        value = np.exp(grid) if law.parameter == "N" else grid
        first, last = np.flatnonzero(inside)[[0, -1]]
        low = None if first == 0 else float(value[first])
        high = None if last == len(grid) - 1 else float(value[last])
        endless = high is None and chi2[-1] - chi2[best] < 1e-3
        parameter = Estimate(math.inf if endless else float(value[best]), low, high)
    p = float(special.chdtrc(len(y) - law.fitted, chi2[best]))
    return Fit(law, math.exp(log_c[best]), parameter, float(chi2[best]), p, 0.0, prediction)


def choose(fits: Sequence[Fit]) -> Choice:
    """Choose a law, or refuse to."""
    best = max(fits, key=lambda fit: fit.weight)
    possible = [fit for fit in fits if fit.weight >= _RULED_OUT * best.weight and fit.p >= _MISFIT]
    if not possible:
        worst = max(fit.p for fit in fits)
        return Choice(None, 0.0, None, f"no law fits; the best has p = {worst:.2g}")
    low, high = min(fit.next.low or 0.0 for fit in possible), max(fit.next.high or math.inf for fit in possible)
    for fit in possible:
        if all(fit.law.name in (other.law.name, *other.law.includes) for other in possible):
            sure = sum(other.weight for other in fits if fit.law.name in (other.law.name, *other.law.includes))
            also = [f"{other.law.name}{_value(other)}" for other in possible if other is not fit]
            words = f"{fit.law.name}, {fit.law.formula}{_value(fit)}"
            words += f", has {sure:.0%} of the weight with the laws that include it"
            words += f". Not ruled out, but not needed: {listed(also)}" if also else ""
            return Choice(fit.law, sure, Estimate(fit.next.value, low, high), words)
    total = sum(fit.weight for fit in possible)
    value = math.exp(sum(fit.weight * math.log(fit.next.value) for fit in possible) / total)
    names = listed([f"{fit.law.name} ({fit.weight:.0%})" for fit in sorted(possible, key=lambda fit: -fit.weight)])
    words = f"the data can't tell the laws apart, so none is chosen: {names} are possible"
    return Choice(None, 0.0, Estimate(value, low, high), words)


def _value(fit: Fit) -> str:
    return f" with {parameter_text(fit)}" if fit.parameter else ""


def parameter_text(fit: Fit) -> str:
    """Return ``"N = 900 (500 to 1,200)"``, ``"N above 500"``, or an empty text without a fitted parameter."""
    if fit.parameter is None:
        return ""
    bounded = fit.parameter.low is not None and fit.parameter.high is not None
    return f"{fit.law.parameter} {'= ' if bounded else ''}{fit.parameter.text}"
