"""The images of a step, and of the held-out part."""

import itertools

import pytest
import torch
from conftest import configuration

from largebatch.config.epochs import Epochs, plan_epochs
from largebatch.data.sampling import evaluation_share, global_batches, hold_out
from largebatch.errors import UserError


def take(n, iterator):
    return [(step, indices.tolist()) for step, indices in itertools.islice(iterator, n)]


def by_hand(last_batch, epochs=4):
    """Return the batches of 3 of 10 images, made from the epochs' orders with plain lists."""
    orders = [take(1, global_batches(Epochs(10, 10, "drop"), 5, epoch))[0][1] for epoch in range(epochs)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    if last_batch == "carry":
        orders = [[image for order in orders for image in order]]
    batches = [order[first : first + 3] for order in orders for first in range(0, len(order), 3)]
    return [batch for batch in batches if len(batch) == 3 or last_batch == "keep"]


HOW = {"carry": Epochs(10, 3, "carry"), "keep": Epochs(10, 3, "keep", rest=1), "drop": Epochs(10, 3, "drop")}


@pytest.mark.parametrize("how", HOW)
def test_batches_are_those_made_by_hand(how):
    expected = by_hand(how)
    epochs = HOW[how]
    assert [indices for _, indices in take(len(expected), global_batches(epochs, 5, 0))] == expected
    assert [epochs.size(step) for step in range(len(expected))] == list(map(len, expected))
    assert [epochs.examples(step) for step in range(len(expected))] == [
        sum(map(len, expected[:step])) for step in range(len(expected))
    ]


def test_carry_uses_every_image_once_an_epoch():
    images = [image for _, batch in take(10, global_batches(HOW["carry"], 0, 0)) for image in batch]
    assert [sorted(images[first : first + 10]) for first in (0, 10, 20)] == 3 * [list(range(10))]


@pytest.mark.parametrize(
    ("how", "an_epoch", "seven", "ends"),
    [
        ("carry", 10 / 3, 23, [4, 7, 10, 14, 17, 20, 24]),  # the first steps at or after 10, 20, 30 ... images
        ("keep", 4, 28, [4, 8, 12, 16, 20, 24]),
        ("drop", 3, 21, [3, 6, 9, 12, 15, 18, 21, 24]),
    ],
)
def test_steps_and_ends_of_epochs(how, an_epoch, seven, ends):
    epochs = HOW[how]
    assert epochs.steps == an_epoch
    assert epochs.steps_of(7) == seven
    assert [step for step in range(25) if epochs.ends(step)] == ends
    assert [step for step in range(25) if epochs.ends(step, every=3)] == ends[2::3]


@pytest.mark.parametrize("last_batch", ["carry", "keep", "drop"])
@pytest.mark.parametrize("parts", [1, 2, 5, 7, 10, 50, 1000])
@pytest.mark.parametrize(("images", "batch_size"), [(100, 10), (103, 10), (50_000, 7), (1, 1)])
def test_parts_of_an_epoch_end_where_whole_numbers_say(
    last_batch: str, parts: int, images: int, batch_size: int
) -> None:
    epochs = Epochs(images, batch_size, last_batch, images % batch_size if last_batch == "keep" else 0)
    one = images if last_batch == "carry" else int(epochs.steps)
    per_step = batch_size if last_batch == "carry" else 1
    expected = [step for step in range(1, 900) if step * per_step * parts // one > (step - 1) * per_step * parts // one]
    assert [step for step in range(900) if epochs.ends(step, every=1 / parts)] == expected


def test_equal_images_per_epoch_at_every_batch_size_of_the_default():
    """``drop`` leaves out 29 % of the digits at batch 512 and 1,024, and 1 % at 128."""
    sizes = (128, 512, 1024)
    for how, seen in {"keep": [14370] * 3, "drop": [14080, 10240, 10240]}.items():
        plans = [plan_epochs(configuration(f"dataset.last_batch={how}", f"batch_size={size}"), 1437) for size in sizes]
        assert [plan.examples(plan.steps_of(10)) for plan in plans] == seen
    for size in sizes:
        plan = plan_epochs(configuration(f"batch_size={size}"), 1437)
        assert plan.steps * size == 1437
        assert 0 <= 14370 - plan.examples(plan.steps_of(10)) < size  # only the last batch can't fill up


@pytest.mark.parametrize(("batch", "steps"), [(512, 98), (16384, 4), (32768, 2)])
def test_published_experiments_have_the_steps_of_their_program(batch, steps):
    assert plan_epochs(configuration("experiment=cifar10", f"batch_size={batch}"), 50_000).steps == steps


@pytest.mark.parametrize(
    ("overrides", "images", "rest"),
    [
        ((), 13, 1),
        ((), 12, 0),
        (("model.norm=batch",), 13, 0),  # batch norm of one image isn't defined, so the image is left out
        (("model.norm=batch",), 14, 2),
        (("model.norm=batch", "batch_norm_size=2"), 15, 2),  # not groups of one and two
        (("mode=bt",), 13, 0),
    ],
)
def test_a_kept_batch_has_groups_of_two_images_or_more_where_one_is_not_enough(overrides, images, rest):
    config = configuration("batch_size=4", "dataset.last_batch=keep", *overrides)
    assert plan_epochs(config, images).rest == rest


def test_clars_samples_must_divide_a_kept_batch():
    command = ("optimizer=clars", "optimizer.sample_size=4", "batch_size=8")
    plan_epochs(configuration(*command), 13)
    plan_epochs(configuration(*command, "dataset.last_batch=keep"), 12)
    with pytest.raises(UserError, match=r"optimizer.sample_size=4: doesn't divide the 5 images .* Fix: dataset.last_b"):
        plan_epochs(configuration(*command, "dataset.last_batch=keep"), 13)


def test_every_epoch_and_every_seed_has_its_own_order():
    whole = Epochs(50, 50, "carry")
    first, second = (take(1, global_batches(whole, seed=0, start_step=epoch)) for epoch in (0, 1))
    other = take(1, global_batches(whole, seed=1, start_step=0))
    assert first[0][1] != second[0][1]
    assert first[0][1] != other[0][1]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("start", [1, 3, 4, 7])
def test_a_later_start_continues_the_same_sequence(start, how):
    unbroken = take(12, global_batches(HOW[how], seed=5, start_step=0))
    assert take(12 - start, global_batches(HOW[how], seed=5, start_step=start)) == unbroken[start:]


def test_a_batch_larger_than_the_training_set_raises():
    assert plan_epochs(configuration("batch_size=10"), 10).steps == 1
    with pytest.raises(UserError, match=r"batch_size=11.* 10 images"):
        plan_epochs(configuration("batch_size=11"), 10)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 7, 360])
def test_evaluation_shares_are_disjoint_and_complete(n, processes):
    shares = [evaluation_share(n, rank, processes).tolist() for rank in range(processes)]
    assert sorted(itertools.chain(*shares)) == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_held_out_part_is_exact_and_stratified():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 21)
    kept, held = hold_out(labels, 10, seed=0)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(101))
    # shares 4.95, 2.97 and 2.08: after rounding down, the two largest remainders get one more image
    assert torch.bincount(labels[held]).tolist() == [5, 3, 2]


def test_held_out_part_depends_on_the_seed():
    labels = torch.arange(200) % 4
    first, again, other = (hold_out(labels, 40, seed)[1].tolist() for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(("count", "side"), [(2, "the held-out part"), (10, "the training set")])
def test_a_class_without_images_on_one_side_raises(count, side):
    labels = torch.tensor([0] * 10 + [1])
    with pytest.raises(UserError, match=rf"leaves no image of class 1, which has 1, in {side}"):
        hold_out(labels, count, seed=0)
