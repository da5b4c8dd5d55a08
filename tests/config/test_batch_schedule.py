"""Batch sizes that grow during a training: stages, learning rates and refusals."""

from __future__ import annotations

import math

import pytest
from conftest import configuration

from largebatch.config.batch import BatchPlan, plan_training
from largebatch.config.checks import validate
from largebatch.config.epochs import Epochs, lr_factor, plan_epochs, planned_steps
from largebatch.errors import UserError

IMAGES = 1437  # of digits
NORM_TEST = ("batch_schedule.shape=norm_test", "batch_schedule.start=32")
GROWING = {
    "steps": ("batch_schedule.sizes=[32,96]", "batch_schedule.at=[0.2,0.55]", "batch_size=256"),
    "linear": ("batch_schedule.start=32", "batch_size=256"),
    "doubling": ("batch_schedule.start=16", "batch_size=256", "batch_schedule.until=0.7"),
    "seesaw": ("batch_schedule.start=32", "batch_size=256", "schedule=cosine"),
}


def planned(shape: str, *overrides: str) -> Epochs:
    return plan_epochs(configuration(*GROWING[shape], f"batch_schedule.shape={shape}", "epochs=9", *overrides), IMAGES)


def walk(epochs: Epochs, steps: int) -> list[tuple[int, int]]:
    """Return examples before each step and its size, by addition."""
    found, seen = [], 0
    for step in range(steps):
        found.append((seen, epochs.size(step)))
        seen += epochs.size(step)
    return found


@pytest.mark.parametrize("shape", list(GROWING))
def test_counts_follow_from_the_sizes_of_all_steps(shape: str) -> None:
    epochs = planned(shape)
    whole = epochs.steps_of(9)
    for step, (seen, size) in enumerate(walk(epochs, whole + 5)):
        assert epochs.examples(step) == seen
        assert epochs.place(step) == divmod(seen, IMAGES)
        assert epochs.completed(step) == seen // IMAGES
        assert epochs.epoch(step) == seen / IMAGES
        assert (seen + size <= 9 * IMAGES) == (step < whole)  # the last step that fits
    assert epochs.size(whole) == 256


def sizes_at(epochs: Epochs, *parts: float) -> list[int]:
    """Return the size of the first step after each part of nine epochs."""
    steps = walk(epochs, epochs.steps_of(9))
    return [next(size for seen, size in steps if seen >= part * 9 * IMAGES) for part in parts]


def test_each_shape_has_its_sizes() -> None:
    assert sizes_at(planned("steps"), 0, 0.19, 0.21, 0.53, 0.57) == [32, 32, 96, 96, 256]
    assert sizes_at(planned("linear"), 0, 0.06, 0.08, 0.25, 0.3, 0.45, 0.52) == [32, 32, 64, 128, 160, 224, 256]
    assert sizes_at(planned("doubling"), 0, 0.16, 0.19, 0.36, 0.54, 0.68, 0.72) == [16, 16, 32, 64, 128, 128, 256]


@pytest.mark.parametrize("schedule", ["cosine", "warmup_cosine", "wsd"])
def test_seesaw_doubles_where_the_schedule_has_halved(schedule: str) -> None:
    """Against the equation at every step: lr * sqrt(B / B_0) of a schedule that would have fallen to B_0 / B."""
    more = () if schedule == "cosine" else ("schedule.warmup_epochs=1",)
    config = configuration(
        *GROWING["seesaw"][:2], "batch_schedule.shape=seesaw", "batch_schedule.lr_rule=sqrt", f"schedule={schedule}",
        "epochs=9", "optimizer=adamw", *more,
    )  # fmt: skip
    epochs, total = plan_epochs(config, IMAGES), 9 * IMAGES / 256
    factor, base = lr_factor(config, epochs), config.schedule.factor(round(total), IMAGES / 256)
    for step, (seen, size) in enumerate(walk(epochs, epochs.steps_of(9))):
        at = seen / 256
        assert factor(step) == pytest.approx(base(at) * math.sqrt(size / 256))
        if seen > 1.2 * IMAGES:  # after the warm-up
            # A stage begins with a whole step, and the warm-up is a whole number of steps.
            lower, wanted = (
                32 * 2 ** min(math.floor(-math.log2(max(base(max(one, 0)), 1e-9))), 3) for one in (at - 1.5, at + 0.5)
            )
            assert lower <= size <= wanted


def test_without_a_growing_batch_the_schedule_counts_steps() -> None:
    config = configuration("batch_size=100", "schedule=cosine", "epochs=9")
    epochs = plan_epochs(config, IMAGES)
    steps = planned_steps(config, epochs)
    assert epochs.stages == ()
    expected = config.schedule.factor(steps, epochs.steps)
    assert [lr_factor(config, epochs)(step) for step in range(steps)] == [expected(step) for step in range(steps)]


def test_a_warm_up_counts_images_and_never_exceeds_1() -> None:
    config = configuration(
        *GROWING["linear"],
        "batch_schedule.shape=linear",
        "schedule=warmup_cosine",
        "schedule.warmup_epochs=2",
        "epochs=9",
    )
    epochs = plan_epochs(config, IMAGES)
    factor = lr_factor(config, epochs)
    values = [(epochs.examples(step) / IMAGES, factor(step)) for step in range(epochs.steps_of(9))]
    assert max(value for _, value in values) <= 1
    assert all(value < 1 for epoch, value in values if epoch < 1.7)
    assert any(value > 0.95 for epoch, value in values if 1.7 < epoch < 2.5)


def test_each_process_has_as_many_micro_batches_at_every_size() -> None:
    config = configuration(*GROWING["linear"], "batch_schedule.shape=linear", "epochs=9", "optimizer=sgd")
    for processes in (1, 2, 4):
        plan, epochs = plan_training(config, processes), plan_epochs(config, IMAGES)
        assert plan.micro_batch == 32 // processes
        for stage in epochs.stages:
            pieces = [plan.pieces(rank, stage.size) for rank in range(processes)]
            assert {len(one) for one in pieces} == {stage.size // 32}
            assert {part.stop - part.start for one in pieces for part in one} == {plan.micro_batch}


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (("batch_schedule.start=32",), "start=32: does nothing with batch_schedule.shape=constant. Allowed shapes: li"),
        (("batch_schedule.lr_rule=sqrt",), "lr_rule=sqrt: does nothing with batch_schedule.shape=constant. Allowed "),
        (
            ("batch_schedule.shape=linear", "batch_schedule.start=32", "batch_schedule.eta=0.1"),
            "eta=0.1: does nothing with batch_schedule.shape=linear. Allowed shapes: norm_test. Fix: ",
        ),
        ((*NORM_TEST, "batch_schedule.until=0.7"), "until=0.7: does nothing with batch_schedule.shape=norm_test"),
        ((*NORM_TEST, "batch_schedule.small_batch=12"), "small_batch=12: must divide batch_schedule.start=32 and be"),
        ((*NORM_TEST, "batch_schedule.small_batch=32"), "small_batch=32: must divide batch_schedule.start=32 and be"),
        ((*NORM_TEST, "batch_schedule.start=1"), "small_batch=None: must divide batch_schedule.start=1 and be smaller"),
        ((*NORM_TEST, "batch_schedule.eta=1"), "batch_schedule.eta=1.0: must be a finite number above 0 and below 1"),
        ((*NORM_TEST, "micro_batch=auto"), "not allowed with micro_batch=auto. Fix: leave it out: passes have"),
        ((*NORM_TEST, "checkpoint.keep_at=[0.5]"), "not allowed with parts in checkpoint.keep_at. Fix: numbers of"),
        (("batch_schedule.shape=linear",), "batch_schedule.start=None: batch_schedule.shape=linear needs the first"),
        (("batch_schedule.shape=linear", "batch_schedule.start=48"), "start=48: must divide batch_size=256 and be"),
        (("batch_schedule.shape=doubling", "batch_schedule.start=256"), "start=256: must divide batch_size=256 and"),
        (
            ("batch_schedule.shape=seesaw", "batch_schedule.start=64", "batch_size=192"),
            "batch_size=192 must be start times a power of 2 with shape=seesaw",
        ),
        (("batch_schedule.shape=steps",), "batch_schedule.sizes=[] and batch_schedule.at=[]: must have as many"),
        (
            ("batch_schedule.shape=seesaw", "batch_schedule.start=32", "schedule=constant"),
            "needs a schedule that falls below a half, not schedule=constant",
        ),
        (
            ("batch_schedule.shape=steps", "batch_schedule.sizes=[64,300]", "batch_schedule.at=[0.1,0.2]"),
            "batch_schedule.sizes=[64, 300]: must grow up to below batch_size=256",
        ),
        (
            ("batch_schedule.shape=steps", "batch_schedule.sizes=[64,128]", "batch_schedule.at=[0.3,0.2]"),
            "batch_schedule.at=[0.3, 0.2]: must grow, between 0 and 1",
        ),
        (("batch_schedule.shape=linear", "batch_schedule.start=32", "mode=bt"), "not allowed with mode=bt. Fix: "),
        (("batch_schedule.shape=linear", "batch_schedule.start=32", "steps=9"), "not allowed with steps=9. Fix: "),
        (
            ("batch_schedule.shape=linear", "batch_schedule.start=32", "dataset.last_batch=keep"),
            "not allowed with dataset.last_batch=keep. Fix: carry",
        ),
        (("batch_schedule.shape=linear", "batch_schedule.start=32", "optimizer=tvlars"), "not allowed with optimizer"),
        (
            (
                "batch_schedule.shape=linear", "batch_schedule.start=32", "schedule=warmup_cosine",
                "schedule.warmup_steps=5", "schedule.warmup_epochs=null",
            ),
            "not allowed with schedule.warmup_steps=5. Fix: schedule.warmup_epochs",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(overrides: tuple[str, ...], problem: str) -> None:
    with pytest.raises(UserError) as error:
        validate(configuration("batch_size=256", *overrides))
    assert problem in str(error.value)


def test_sizes_that_processes_cannot_share_are_refused() -> None:
    steps = ("batch_size=256", "batch_schedule.shape=steps", "batch_schedule.at=[0.5]")
    config = configuration(*steps, "batch_schedule.sizes=[33]")
    message = r"batch_schedule: a batch of 33 images can't be divided over 2 process\(es\).*multiples of 2$"
    with pytest.raises(UserError, match=message):
        plan_training(config, 2)
    unequal = (*steps, "batch_schedule.sizes=[24,40]", "batch_schedule.at=[0.3,0.5]")  # 8 divides all sizes
    with pytest.raises(UserError, match=r"batch of 40 .* micro-batches of 12. Fix: micro_batch=4$"):
        plan_training(configuration(*unequal), 2)
    assert plan_training(configuration(*unequal, "micro_batch=4"), 2).micro_batch == 4


def test_batch_norm_is_over_as_many_images_at_every_size() -> None:
    growing = (*GROWING["doubling"], "batch_schedule.shape=doubling", "epochs=9", "optimizer=sgd", "model.norm=batch")
    for processes, sync_bn, size in ((1, "false", 16), (2, "false", 8), (2, "true", 16)):
        config = configuration(*growing, f"sync_bn={sync_bn}")
        assert plan_training(config, processes).group == config.batch_norm_size == size
        assert plan_training(config, processes).group == size  # again, by the worker
    config = configuration(*growing, "batch_norm_size=64")  # more than the first batch
    with pytest.raises(UserError, match=r"a batch of 16 images can't be divided .* Fix: batch_norm_size=16$"):
        plan_training(config, 1)


def test_a_batch_that_grows_while_it_trains_keeps_the_images_of_all_steps() -> None:
    config = configuration(*NORM_TEST, "batch_size=256", "epochs=9", "schedule=cosine", "batch_schedule.lr_rule=sqrt")
    epochs = plan_epochs(config, IMAGES)
    before, factor = planned_steps(config, epochs), lr_factor(config, epochs)
    assert before == 9 * IMAGES // 32
    for step, size in ((11, 64), (12, 96), (40, 256)):
        epochs.grow(step, size)
    steps = planned_steps(config, epochs)
    walked = walk(epochs, steps)
    assert [size for _, size in walked[:11] + walked[12:40]] == [32] * 11 + [96] * 28
    assert [epochs.examples(step) for step in range(steps)] == [seen for seen, _ in walked]
    assert 9 * IMAGES - 256 < epochs.examples(steps) <= 9 * IMAGES
    for step, (seen, size) in enumerate(walked):
        schedule = config.schedule.decay(seen / 256 / round(9 * IMAGES / 256))
        assert factor(step) == pytest.approx(schedule * math.sqrt(size / 256), abs=1e-3)


@pytest.mark.parametrize(
    ("size", "trace", "squared", "expected"),
    [
        (32, 8.0, 1.0, 32),  # tr(S) / b = 0.25 * |g|^2
        (32, 8.1, 1.0, 64),
        (64, 23.9, 1.0, 96),
        (96, 8.1, 1.0, 96),  # it never shrinks
        (32, 63.9, 1.0, 256),
        (32, 1e9, 1.0, 256),
        (32, 8.1, 0.0, 256),
        (32, 0.0, 0.0, 32),
        (32, math.nan, math.inf, 32),  # an overflow in fp16
    ],
)
def test_the_next_size_by_the_norm_test(size: int, trace: float, squared: float, expected: int) -> None:
    growth = configuration(*NORM_TEST, "batch_size=256").batch_schedule
    assert growth.after_test(size, 256, trace, squared) == expected


def test_passes_of_the_norm_test_don_t_depend_on_the_processes() -> None:
    def divided(processes: int, *overrides: str) -> BatchPlan:
        config = configuration(*NORM_TEST, "batch_size=256", "optimizer=sgd", *overrides)
        return plan_training(config, processes)

    eight, whole = "batch_schedule.small_batch=8", ("batch_schedule.small_batch=8", "model.norm=batch")
    assert {divided(n, eight).micro_batch for n in (1, 2, 4)} == {8}
    assert {divided(n).micro_batch for n in (1, 2)} == {16}
    assert divided(2, "micro_batch=20").micro_batch == 16  # a limit
    assert [divided(n, *whole).group for n in (1, 4)] == [8, 8]
    assert divided(4, *whole, "sync_bn=true", "batch_norm_size=32").group == 32
    for processes, overrides, problem in (
        (
            4,
            (),
            r"small_batch=16: batch_schedule\.start=32 can't be divided over 4 .* Fix: batch_schedule\.small_batch=8",
        ),
        (3, (eight,), r"can't be divided over 3 .* Fix: batch_schedule\.start that is a multiple of 3"),
        (1, ("micro_batch=8",), r"micro_batch=8: batch_schedule\.small_batch=16 images are one pass\. Fix: "),
        (1, ("model.norm=batch", "batch_norm_size=32"), r"batch_norm_size=32: batch norm is over 16 images, because"),
    ):
        with pytest.raises(UserError, match=problem):
            divided(processes, *overrides)
