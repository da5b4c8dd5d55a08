"""Trials, edges, gaps and declared search spaces, on cells whose answer is plain to see."""

from __future__ import annotations

import math

import pytest
from made_runs import made

from largebatch.report.cells import Cell
from largebatch.report.compare import Comparison, compare
from largebatch.report.fairness import warnings
from largebatch.report.load import Run
from largebatch.report.spaces import at_edge, beside_gap, space_size, tuned_keys
from largebatch.report.trials import apart, distinct_trials

LR = "optimizer.lr"


def searched(
    *values: float, best: float, key: str = LR, space: list[object] | None = None, diverged: tuple[float, ...] = (),
    optimizer: str = "lars", **more: object,
) -> list[Run]:  # fmt: skip
    """Return one run for each value of ``key``. Validation chooses ``best``; the runs of ``diverged`` diverged."""
    declared = {} if space is None else {"space": {key: space}}
    option = key.replace(".", "__")
    return [
        made(
            optimizer,
            val=0.9 if value == best else 0.5,
            state="diverged" if value in diverged else "finished",
            **{option: value, **declared, **more},
        )  # type: ignore[arg-type]
        for value in values
    ]


def comparison_of(*runs: list[Run]) -> Comparison:
    (comparison,) = compare(run for some in runs for run in some)
    return comparison


def cell_of(*runs: list[Run]) -> Cell:
    (cell,) = comparison_of(*runs).cells.values()
    return cell


def warned(*runs: list[Run]) -> dict[str, str]:
    return {warning.title: warning.text for warning in warnings(comparison_of(*runs))}


# Trials.


@pytest.mark.parametrize(
    ("values", "trials"),
    [
        ((1.0, 1.0000001, 1.0000002), 1),
        ((1.0, 1.049), 1),
        ((1.0, 1.051), 2),
        ((1e-6, 1.2e-6), 2),
        ((1.0, 1.04, 1.08, 1.12), 2),  # 1.08 is apart from 1, 1.12 isn't apart from 1.08
        ((0.5, 1.0, 2.0), 3),
    ],
)
def test_learning_rates_within_five_per_cent_are_one_trial(values: tuple[float, ...], trials: int) -> None:
    assert cell_of(searched(*values, best=values[0])).trials == trials


@pytest.mark.parametrize(
    ("key", "one", "other", "expected"),
    [
        ("optimizer.weight_decay", 0.0, 1e-4, True),
        ("optimizer.weight_decay", 0.0, 0.0, False),
        ("optimizer.lr", 0.95, 0.99, False),  # a learning rate has no meaning at 1
        ("optimizer.momentum", 0.95, 0.99, True),
        ("optimizer.momentum", 0.9, 0.9000001, False),
        ("schedule.warmup_epochs", 5, 10, True),
        ("schedule.warmup_epochs", 5, 5.0, False),
        ("optimizer.nesterov", True, False, True),
        ("optimizer.denominator", "norm_of_sum", "sum_of_norms", True),
        ("optimizer.betas", "[0.9, 0.99]", "[0.9, 0.999]", True),
        ("optimizer.gamma_min", 0.1, "auto", True),
        ("optimizer.gamma_min", None, 0.1, True),
    ],
)
def test_options_are_apart(key: str, one: object, other: object, expected: bool) -> None:
    assert apart(key, one, other) == apart(key, other, one) == expected


def test_a_trial_needs_one_option_that_is_apart() -> None:
    near = [{"optimizer.lr": 1.0, "optimizer.lmbda": 1e-3}, {"optimizer.lr": 1.01, "optimizer.lmbda": 1.01e-3}]
    assert len(distinct_trials(near)) == 1
    assert len(distinct_trials([*near, {"optimizer.lr": 1.0, "optimizer.lmbda": 1e-4}])) == 2
    assert distinct_trials([]) == []


def test_a_diverged_setting_is_a_trial_and_an_unfinished_one_is_not() -> None:
    runs = [*searched(1.0, 2.0, 4.0, best=1.0, diverged=(4.0,)), made(lr=8.0, val=0.5, state="running")]
    assert cell_of(runs).trials == 3


# Edges.


@pytest.mark.parametrize(
    ("values", "best", "space", "diverged", "expected"),
    [
        ((1.0, 2.0, 3.0), 2.0, None, (), False),
        ((1.0, 2.0, 3.0), 3.0, None, (), True),
        ((1.0, 2.0, 3.0), 1.0, None, (), True),
        ((1.0, 2.0, 3.0), 2.0, None, (3.0,), True),  # the largest that trained
        ((0.5, 1.0, 1.0000001), 1.0, None, (), True),
        ((1.0, 3.0), 3.0, [0.1, 10.0], (), False),  # log 30 / log 100 = 0.74 of the range
        ((1.0, 7.0), 7.0, [0.1, 10.0], (), True),  # 0.92
        ((0.15, 1.0), 0.15, [0.1, 10.0], (), True),  # 0.09
        ((0.2, 1.0), 0.2, [0.1, 10.0], (), False),  # 0.15
        ((1.0, 3.0, 9.0), 3.0, [0.1, 10.0], (9.0,), True),
        ((0.3, 1.0, 3.0), 1.0, [0.1, 10.0], (3.0,), True),
        ((0.3, 1.0, 3.0), 1.0, [0.1, 10.0], (0.3,), True),
        ((0.3, 1.0, 3.0), 1.0, [0.1, 10.0], (), False),
    ],
)
def test_the_edge_of_the_learning_rates(
    values: tuple[float, ...], best: float, space: list[object] | None, diverged: tuple[float, ...], expected: bool
) -> None:
    assert at_edge(cell_of(searched(*values, best=best, space=space, diverged=diverged)), LR) == expected


def test_every_tuned_number_has_an_edge() -> None:
    for key, values in {"schedule.warmup_epochs": (1, 5, 20), "optimizer.momentum": (0.8, 0.9, 0.99)}.items():
        for best, expected in zip(values, (True, False, True), strict=True):
            assert at_edge(cell_of(searched(*values, best=best, key=key)), key) == expected
    assert not at_edge(cell_of(searched(0.0, 1e-4, best=0.0, key="optimizer.weight_decay")), "optimizer.weight_decay")
    words = [made(val=val, model__init=name) for name, val in (("a", 0.9), ("b", 0.1))]
    assert tuned_keys(cell_of(words)) == ["model.init"]
    assert not at_edge(cell_of(words), "model.init")


def test_a_range_in_linear_scale_has_its_edge_in_the_outer_tenth() -> None:
    key = "schedule.warmup_epochs"
    for best, expected in ((1, True), (3, False), (17, False), (19, True)):
        cell = cell_of(searched(1, 3, 17, 19, best=best, key=key, space=[0, 20]))
        assert at_edge(cell, key) == expected


# Gaps.


@pytest.mark.parametrize(
    ("values", "best", "space", "diverged", "expected"),
    [
        ((1.0, 3.9), 1.0, None, (), False),
        ((1.0, 4.1), 1.0, None, (), True),
        ((1.0, 4.1), 4.1, None, (), True),
        ((0.01, 1.0, 3.0), 3.0, None, (), False),  # the gap isn't beside the chosen value
        ((1.0, 3.0, 100.0), 3.0, None, (100.0,), True),  # diverged values end a gap too
        ((1.0, 3.0), 3.0, [0.5, 10.0], (), False),
        ((1.0, 3.0), 3.0, [0.5, 13.0], (), True),  # nothing between 3 and the end of the space
    ],
)
def test_a_gap_beside_the_chosen_learning_rate(
    values: tuple[float, ...], best: float, space: list[object] | None, diverged: tuple[float, ...], expected: bool
) -> None:
    assert beside_gap(cell_of(searched(*values, best=best, space=space, diverged=diverged)), LR) == expected


def test_only_options_in_log_scale_have_gaps() -> None:
    assert not beside_gap(cell_of(searched(1, 20, best=1, key="schedule.warmup_epochs")), "schedule.warmup_epochs")
    for key in ("optimizer.lmbda", "optimizer.weight_decay", "mode.lmbda", "optimizer.lr_1d"):
        assert beside_gap(cell_of(searched(1e-4, 1e-2, best=1e-2, key=key)), key)
    assert not beside_gap(
        cell_of(searched(0.0, 1e-2, best=1e-2, key="optimizer.weight_decay")), "optimizer.weight_decay"
    )


# Declared spaces.


def test_the_size_of_a_space_is_its_keys_and_decades() -> None:
    space = {LR: [0.1, 10], "optimizer.lmbda": [1e-4, 1e-2], "schedule.warmup_epochs": [0, 20],
             "optimizer.nesterov": [False, True]}  # fmt: skip
    runs = [made(lr=lr, val=0.5, space=space) for lr in (1.0, 2.0)]
    assert space_size(cell_of(runs)) == (4, pytest.approx(math.log10(10 / 0.1) + math.log10(1e-2 / 1e-4)))
    wider = [made(lr=lr, val=0.5, space={LR: [0.01, 1]}) for lr in (0.02, 0.2)]
    assert space_size(cell_of(runs, wider)) == (
        1,
        pytest.approx(3),
    )  # joined, without keys that some runs don't declare


def test_an_undeclared_space_is_named_with_its_keys() -> None:
    text = warned(searched(1.0, 2.0, 3.0, best=2.0))["Undeclared search space"]
    assert text.startswith("For LARS, several values of optimizer.lr were tried")
    assert "Undeclared search space" not in warned(searched(1.0, 2.0, 3.0, best=2.0, space=[0.5, 5]))
    partly = searched(1.0, 2.0, best=2.0, space=[0.5, 5]) + searched(3.0, best=2.0)
    assert "Undeclared search space" in warned(partly)
    assert "Undeclared search space" not in warned(searched(1.0, 1.0000001, best=1.0))  # one trial


@pytest.mark.parametrize(
    ("lars", "lamb", "expected"),
    [
        ([0.1, 10], [0.001, 0.1], False),  # two decades each
        ([0.1, 10], [0.001, 0.2], False),
        ([0.1, 10], [0.001, 1], True),
    ],
)
def test_spaces_of_a_column_are_compared(lars: list[object], lamb: list[object], expected: bool) -> None:
    found = warned(
        searched(1.0, 2.0, best=1.0, space=lars), searched(0.01, 0.02, best=0.01, space=lamb, optimizer="lamb")
    )
    assert ("Search spaces of different size" in found) == expected
    if expected:
        assert (
            "at 128 LARS 1 key over 2.0 decades and LAMB 1 key over 3.0 decades"
            in found["Search spaces of different size"]
        )


def test_spaces_with_different_numbers_of_keys_differ() -> None:
    space = {LR: [0.1, 10], "optimizer.nesterov": [False, True]}
    sgd = [made("sgd", lr=lr, val=0.5, space=space) for lr in (1.0, 2.0)]
    assert "Search spaces of different size" in warned(searched(1.0, 2.0, best=1.0, space=[0.1, 10]), sgd)


def test_an_untuned_optimizer_beside_tuned_ones_is_named() -> None:
    lars, lamb = searched(1.0, 2.0, best=1.0), searched(0.01, best=0.01, optimizer="lamb")
    text = warned(lars, lamb)["Untuned beside tuned optimizers"]
    assert text.startswith("For LAMB, a single setting was tried")
    assert "Untuned beside tuned optimizers" not in warned(lamb, searched(1.0, best=1.0))


def test_warnings_name_the_tuned_option() -> None:
    found = warned(searched(1e-4, 1e-3, 1e-1, best=1e-1, key="optimizer.lmbda", optimizer="tvlars"))
    assert found["Best lambda at the edge of the range"].startswith("For TVLARS, the chosen lambda is at the edge")
    assert found["Wide gap beside the best lambda"].startswith("For TVLARS, the chosen lambda and the next")
    assert "Best learning rate at the edge of the range" not in found
