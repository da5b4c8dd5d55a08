"""The schedules ``wsd`` and ``step``, whose parts are relative to the training's length."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import configuration
from torch import nn

from largebatch.config.checks import check_training, validate
from largebatch.config.identity import identity
from largebatch.config.idle import idle_options
from largebatch.errors import UserError

NO_WARMUP = "schedule.warmup_epochs=null"


def factors(*overrides: str, steps: int, epoch_steps: float = 5) -> list[float]:
    factor = configuration(*overrides).schedule.factor(steps, epoch_steps)
    return [factor(step) for step in range(steps)]


@pytest.mark.parametrize("milestones", [[0.5], [0.3, 0.7], [1 / 3, 2 / 3, 8 / 9]])
@pytest.mark.parametrize("steps", [9, 90, 1000])
def test_step_equals_torch_s_multi_step_schedule(milestones: list[float], steps: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    at = [math.ceil(milestone * steps - 1e-9) for milestone in milestones]
    theirs = torch.optim.lr_scheduler.MultiStepLR(optimizer, at, gamma=0.2)
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    step = ("schedule=step", f"schedule.milestones={milestones}", "schedule.gamma=0.2", NO_WARMUP)
    assert factors(*step, steps=steps) == pytest.approx(expected, rel=1e-12)


def test_step_follows_the_imagenet_recipe_at_every_batch_size() -> None:
    """Warm-up over 5 of 90 epochs, and a tenth at epochs 30, 60 and 80."""
    for epoch_steps in (1, 10, 156.25):
        steps = round(90 * epoch_steps)
        factor = configuration("schedule=step").schedule.factor(steps, epoch_steps)
        by_epoch = {epoch: factor(math.ceil(epoch * epoch_steps)) for epoch in (5, 29, 30, 59, 60, 79, 80, 89)}
        assert list(by_epoch.values()) == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
        assert factor(0) == pytest.approx(1 / round(5 * epoch_steps))


@pytest.mark.parametrize(("shape", "fallen"), [("linear", lambda x: x), ("sqrt", math.sqrt)])
def test_wsd_is_stable_and_falls_in_the_last_part(shape: str, fallen: object) -> None:
    wsd = ("schedule=wsd", f"schedule.shape={shape}", "schedule.final_factor=0.1", "schedule.decay_fraction=0.25")
    got = factors(*wsd, "schedule.warmup_epochs=2", steps=100)
    assert got[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert got[10:76] == [1.0] * 66
    assert callable(fallen)
    assert got[75:] == pytest.approx([0.1 + 0.9 * (1 - fallen(step / 25)) for step in range(25)])


@pytest.mark.parametrize("schedule", ["wsd", "step"])
def test_the_factor_at_a_part_of_the_training_is_the_same_at_every_length(schedule: str) -> None:
    functions = [
        (steps, configuration(f"schedule={schedule}", NO_WARMUP).schedule.factor(steps, 7)) for steps in (90, 900, 9000)
    ]
    for part in (0.0, 0.3, 0.5, 0.7, 0.9):
        first, *others = (factor(round(part * steps)) for steps, factor in functions)
        assert others == pytest.approx([first] * 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["schedule=wsd", "schedule.decay_fraction=0.95"],
         r"^schedule.warmup_epochs=10.*: 36 steps of warm-up, but with schedule.decay_fraction=0.95 the learning rate "
         r"falls after 21.6 of 432"),
        (["schedule=step", "schedule.milestones=[0.05,0.5]", "schedule.warmup_epochs=null", "schedule.warmup_steps=30"],
         r"^schedule.warmup_steps=30: 30 steps of warm-up, but with schedule.milestones=\[0.05, 0.5\] the"),
        (["schedule=step", "schedule.warmup_epochs=120"], r"schedule.warmup_epochs=120: .* warm-up, but the training"),
    ],
)  # fmt: skip
def test_a_warm_up_past_the_first_fall_is_refused(overrides: list[str], message: str) -> None:
    config = configuration(*overrides, "batch_size=400", "epochs=120")
    validate(config)
    with pytest.raises(UserError, match=message):
        check_training(config, 1440)


def test_a_warm_up_past_the_first_fall_is_refused_without_the_number_of_images() -> None:
    """The plan doesn't know the images of every data set, but epochs of a warm-up and of a training compare."""
    config = configuration("schedule=step", "schedule.warmup_epochs=50", "epochs=120")
    with pytest.raises(UserError, match=r"50 epochs of warm-up, but with schedule.milestones=.* falls after 40 of 120"):
        check_training(config, None)
    config.schedule = configuration("schedule=step", "schedule.warmup_epochs=40").schedule
    check_training(config, None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["schedule=step", "schedule.milestones=[0.5,0.5]"], "each must be larger than the one before"),
        (["schedule=step", "schedule.milestones=[0.5,1]"], "must be one or more numbers above 0 and below 1"),
        (["schedule=step", "schedule.milestones=[]"], "must be one or more numbers"),
        (["schedule=step", "schedule.gamma=0"], "schedule.gamma=0.0: must be a finite number above 0"),
        (["schedule=wsd", "schedule.decay_fraction=0"], "must be a finite number above 0 and at most 1"),
        (["schedule=wsd", "schedule.shape=square"], "allowed: sqrt, linear"),
        (["schedule=wsd", "schedule.warmup_steps=3"], "exactly one must be set"),
    ],
)
def test_the_message_names_a_wrong_value_of_a_schedule(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(configuration(*overrides))
    assert overrides[1].partition("=")[0] in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "note"),
    [
        (["schedule=step", "schedule.gamma=1"], "schedule.gamma=1: the learning rate changes by"),
        (["schedule=step", "schedule.milestones=[0.999]"], "schedule.milestones=[0.999]: the learning rate changes by"),
        (["schedule=wsd", "schedule.final_factor=1"], "schedule.final_factor=1: the learning rate changes by"),
        (["schedule=wsd", "schedule.decay_fraction=0.001"], "schedule.decay_fraction=0.001: the learning rate"),
        (["schedule=step"], None),
        (["schedule=wsd"], None),
    ],
)
def test_a_note_if_the_learning_rate_never_falls(overrides: list[str], note: str | None) -> None:
    found = idle_options(configuration("optimizer=lars", *overrides, NO_WARMUP), 200, 10)
    assert [one.startswith(str(note)) for one in found] == [True] * (note is not None)


@pytest.mark.parametrize(
    "override", ["schedule.decay_fraction=0.3", "schedule.shape=linear", "schedule.final_factor=1"]
)
def test_options_of_wsd_are_decisive(override: str) -> None:
    assert identity(configuration("schedule=wsd", override)) != identity(configuration("schedule=wsd"))
