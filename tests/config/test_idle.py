"""Options that do nothing have a note, and options that do something have none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Launch, configuration

from largebatch.config.idle import idle_options, planned_length
from largebatch.config.lr_scaling import LrScalingConfig
from largebatch.config.options import problems_of
from largebatch.config.schedules import ScheduleConfig
from largebatch.optim import LARS, TVLARS


def notes(*overrides: str, steps: int = 200, epoch: int = 10) -> list[str]:
    return idle_options(configuration(*overrides), steps, epoch)


@pytest.mark.parametrize("steps", [2, 40, 300, 5000])
@pytest.mark.parametrize(("alpha", "delay_epochs", "gamma_min"), [(1, 0, 0), (0.1, 0, 0), (1, 10, "auto"), (3, 1, 2)])
def test_a_note_if_phi_falls_by_less_than_half(steps: int, alpha: float, delay_epochs: int, gamma_min: object) -> None:
    config = configuration(
        "optimizer=tvlars", "optimizer.lmbda=1", f"optimizer.alpha={alpha}", f"optimizer.delay_epochs={delay_epochs}",
        f"optimizer.gamma_min={gamma_min}",
    )  # fmt: skip
    floor = 0.001 * config.batch_size / 256 if gamma_min == "auto" else float(str(gamma_min))
    for lmbda in (0, 1e-6, 1e-4, 1e-3, 1e-2, 0.1, 30):
        config.optimizer.lmbda = lmbda  # type: ignore[attr-defined]
        with np.errstate(over="ignore"):
            phi = 1 / (alpha + np.exp(lmbda * (np.arange(1, steps + 1) - 10.0 * delay_epochs))) + floor
        found = idle_options(config, steps, 10)
        assert len(found) == (phi.min() > phi.max() / 2)
        if found:
            assert found[0].startswith(f"optimizer.lmbda={lmbda:g}: ")
            assert ("TVLARS is LARS at" in found[0]) == (phi.max() < 1.2 * phi.min())
            fix = found[0].rpartition("Fix: ")[2]
            if fix.startswith("optimizer.lmbda_relative=10 or optimizer.lmbda="):
                config.optimizer.lmbda = float(fix.rpartition("=")[2])  # type: ignore[attr-defined]
                assert idle_options(config, steps, 10) == []


@pytest.mark.parametrize("steps", [10, 1000])
def test_a_relative_lambda_is_named_by_its_own_key(steps: int) -> None:
    relative = ("optimizer=tvlars", "optimizer.gamma_min=0", "optimizer.delay_epochs=0")
    assert notes(*relative, "optimizer.lmbda_relative=2", steps=steps) == []
    (note,) = notes(*relative, "optimizer.lmbda_relative=0.1", steps=steps)
    assert note.startswith("optimizer.lmbda_relative=0.1: phi falls only from 0.")
    assert note.endswith("Fix: optimizer.lmbda_relative=10")


def test_tvlars_with_constant_phi_is_lars_with_twice_the_learning_rate_for_biases() -> None:
    (note,) = notes("optimizer=tvlars", "optimizer.lmbda=0", "optimizer.gamma_min=0", "optimizer.lr_1d_ratio=null")
    assert "TVLARS is LARS at 0.5 times the learning rate, with 2 times that learning rate for biases" in note
    inputs, labels = torch.randn(32, 5), torch.randint(0, 3, (32,))
    trained = []
    for tvlars in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        if tvlars:
            optimizer: torch.optim.Optimizer = TVLARS(model.parameters(), lr=2.0, weight_decay=1e-3, lmbda=0.0)
        else:
            groups = [[p for p in model.parameters() if (p.ndim > 1) == many] for many in (True, False)]
            both = [{"params": groups[0], "lr": 1.0}, {"params": groups[1], "lr": 2.0}]
            optimizer = LARS(both, lr=1.0, weight_decay=1e-3)
        for _ in range(20):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        trained.append([p.detach() for p in model.parameters()])
    for one, other in zip(*trained, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("own", ["optimizer.lr_1d=0.1", "optimizer.adapt_1d=true"])
def test_no_word_about_biases_that_phi_does_not_change_or_changes_too(own: str) -> None:
    (note,) = notes("optimizer=tvlars", "optimizer.lmbda=0", own)
    assert "biases" not in note


@pytest.mark.parametrize(
    ("given", "starts"),
    [
        ("warmup_epochs=6.6", None),
        ("warmup_epochs=6.8", "schedule.warmup_epochs=6.8: 68 of 200 steps are warm-up"),
        ("warmup_epochs=0.2", None),
        ("warmup_epochs=0.1", "schedule.warmup_epochs=0.1: at most one step"),
        ("warmup_epochs=0.01", "schedule.warmup_epochs=0.01: at most one step"),
        ("warmup_epochs=0", None),
    ],
)
@pytest.mark.parametrize("schedule", ["warmup_cosine", "warmup_poly"])
def test_a_warm_up_is_longer_than_a_step_and_shorter_than_a_third(
    schedule: str, given: str, starts: str | None
) -> None:
    found = notes("optimizer=lars", f"schedule={schedule}", f"schedule.{given}")
    assert [note.startswith(str(starts)) for note in found] == [True] * (starts is not None)


def test_a_warm_up_in_steps() -> None:
    steps = ("optimizer=lars", "schedule=warmup_cosine", "schedule.warmup_epochs=null")
    assert notes(*steps, "schedule.warmup_steps=66") == []
    (note,) = notes(*steps, "schedule.warmup_steps=100")
    assert note.startswith("schedule.warmup_steps=100: 100 of 200 steps are warm-up")
    assert note.endswith("Fix: 66.7 or less, or train longer")
    (note,) = notes(*steps, "schedule.warmup_steps=1")
    assert note.startswith("schedule.warmup_steps=1: at most one step")


@pytest.mark.parametrize(
    ("overrides", "starts"),
    [
        (("schedule=cosine",), None),
        (("schedule=cosine", "schedule.final_factor=1"), "schedule.final_factor=1: the learning rate changes by"),
        (
            ("schedule=warmup_poly", "schedule.warmup_epochs=2", "schedule.power=1e-8"),
            "schedule.power=1e-08: the learning",
        ),
        (("optimizer=sgd", "optimizer.weight_decay=1e-9"), "optimizer.weight_decay=1e-09: learning rate * decay"),
        (("optimizer=sgd", "optimizer.weight_decay=1e-7"), None),  # 0.1 * 1e-7 * 200 = 2e-6
        (("optimizer=sgd", "optimizer.weight_decay=0"), None),
        (("optimizer=adagrad", "optimizer.lr_decay=1e-9"), "optimizer.lr_decay=1e-09: the learning rate falls by"),
        (("optimizer=adagrad", "optimizer.lr_decay=1e-4"), None),
        (("optimizer=adagrad",), None),
    ],
)
def test_a_decay_that_changes_nothing(overrides: tuple[str, ...], starts: str | None) -> None:
    found = notes("optimizer=lars", *overrides) if "optimizer" not in overrides[0] else notes(*overrides)
    assert [note.startswith(str(starts)) for note in found] == [True] * (starts is not None)


@pytest.mark.parametrize(("decay", "idle"), [(0.9, False), (0.98, False), (0.99, True), (0.9999, True)])
def test_an_average_that_still_holds_the_initial_weights(decay: float, idle: bool) -> None:
    found = notes("optimizer=lars", f"ema_decay={decay}")
    assert [note.startswith(f"ema_decay={decay}: after 200 steps, ") for note in found] == [True] * idle
    assert [note.endswith("Fix: ema_decay=0.95 or less, or train longer, or no ema_decay") for note in found] == [
        True
    ] * idle


@pytest.mark.parametrize(("patience", "every", "idle"), [(18, 1, False), (19, 1, True), (3, 4, False), (4, 4, True)])
def test_a_patience_as_long_as_the_training(patience: int, every: int, idle: bool) -> None:
    """The first evaluation is always the best so far: of 20 evaluations, or of 5."""
    found = notes("optimizer=lars", f"early_stopping={patience}", f"eval_every={every}")
    assert [note.startswith(f"early_stopping={patience}: the run has {20 // every} ") for note in found] == [
        True
    ] * idle


def test_a_growing_batch_is_as_long_as_its_epochs() -> None:
    """It takes more steps than batches of ``batch_size`` are in its epochs."""
    growing = ("batch_schedule.shape=doubling", "batch_schedule.start=32", "batch_size=256", "epochs=20")
    early, warm_up = notes(
        "optimizer=lars", *growing, "early_stopping=19", "schedule=warmup_cosine", "schedule.warmup_epochs=8", steps=700
    )[::-1]
    assert early.startswith("early_stopping=19: the run has 20 evaluation(s)")
    assert warm_up.startswith("schedule.warmup_epochs=8: 80 of 200 steps are warm-up")


@pytest.mark.parametrize(("size", "idle"), [(1, False), (256, False), (512, True)])
def test_groups_as_large_as_the_batch(size: int, idle: bool) -> None:
    found = notes("optimizer=clars", "batch_size=512", f"optimizer.sample_size={size}")
    assert [note.startswith("optimizer.sample_size=512: one group is the whole batch") for note in found] == [
        True
    ] * idle


def test_a_run_without_steps_has_no_notes() -> None:
    assert notes("optimizer=tvlars", steps=0) == notes("optimizer=tvlars", steps=1) == []


@pytest.mark.parametrize(
    ("overrides", "note"),
    [
        (["dataset.erasing.fill=pixel"], "dataset.erasing: its options do nothing, because it is off"),
        (["dataset.erasing.fill=pixel", "dataset.erasing.probability=0.1"], None),
        (["dataset.rand_augment.magnitude=5"], "Fix: dataset.rand_augment.operations=2"),
        (["dataset.resized_crop.ratio=[1,1]"], "Fix: dataset.resized_crop.scale=[0.08,1]"),
        (["dataset.color_jitter.probability=0.5"], "Fix: dataset.color_jitter.brightness=0.4"),
        (["mode=bt", "dataset.color_jitter.hue=0.1"], "dataset.color_jitter: does nothing, because mode=bt trains on"),
        (["mode=bt", "dataset.color_jitter.hue=0.1", "mode.eval_augmentation=true"], None),
        (["mode.mix_per=pair"], "mode.mix_per=pair: does nothing without mode.mixup or mode.cutmix"),
        (["mode.mix_per=pair", "mode.cutmix=1"], None),
    ],
)
def test_a_note_about_augmentation_that_is_off(overrides: list[str], note: str | None) -> None:
    found = [line for line in notes(*overrides) if line.startswith(("dataset.", "mode."))]
    assert len(found) == (note is not None)
    assert note is None or note in found[0]


EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_experiments_have_no_notes(experiment: str) -> None:
    config = configuration(f"experiment={experiment}")
    length = planned_length(config)
    assert length is not None
    assert idle_options(config, *length) == []


@pytest.fixture(scope="module")
def schedules() -> dict[str, ScheduleConfig]:
    """Return every preset, composed with the default optimizer."""
    names = [path.stem for path in (ROOT / "conf" / "schedule").glob("*.yaml")]
    return {name: configuration(f"schedule={name}").schedule for name in names}


OPTIMIZERS = sorted(path.stem for path in (ROOT / "conf" / "optimizer").glob("*.yaml"))


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "tvlars_published"])
def test_the_presets_have_no_notes_at_the_default_size(optimizer: str, schedules: dict[str, ScheduleConfig]) -> None:
    config = configuration(f"optimizer={optimizer}")
    length = planned_length(config)
    assert length is not None
    for name, config.schedule in schedules.items():
        assert idle_options(config, *length) == [], name


@pytest.mark.parametrize(
    ("last_batch", "steps", "epoch"),
    [("drop", 9700, 97), ("keep", 9800, 98), ("carry", 9765, 50_000 / 512)],
)
def test_the_planned_length_is_the_length_of_the_run(last_batch: str, steps: int, epoch: float) -> None:
    cifar = ("dataset=cifar10", "batch_size=512", f"dataset.last_batch={last_batch}")
    assert planned_length(configuration(*cifar, "epochs=100")) == (steps, epoch)
    assert planned_length(configuration(*cifar, "steps=7", "epochs=null")) == (7, epoch)


def test_the_planned_length_counts_training_images() -> None:
    config = configuration("dataset=cifar10", "dataset.val_fraction=0.1", "dataset.last_batch=drop", "epochs=2")
    assert planned_length(config) == (174, 87)
    assert planned_length(configuration("dataset=imagefolder")) is None


def test_the_plan_and_a_run_print_each_note_once(launch: Launch, tmp_path: Path) -> None:
    grid = ("-m", "optimizer=tvlars", "optimizer.lmbda=1e-6,1", "seed=0,1", "epochs=40", "dry_run=true")
    result = launch(*grid)
    assert result.returncode == 0, result.stderr
    (note,) = (line for line in result.stdout.splitlines() if line.startswith("note: "))
    assert note.startswith("note: optimizer.lmbda=1e-06: phi falls only from 0.502 to 0.502 in 112 steps")
    assert note.endswith("[optimizer.lmbda=1e-06 seed=0 and 1 more]")


def test_a_list_in_place_of_a_number_is_a_problem() -> None:
    """OmegaConf refuses it too, but the report reads frozen configurations without OmegaConf."""
    assert problems_of(LrScalingConfig(noise_scale=[1])) == ["noise_scale=[1]: must be a single value"]  # type: ignore[arg-type]
    assert problems_of(LrScalingConfig(noise_scale=1.0)) == []
