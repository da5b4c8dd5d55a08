"""The images of a step, and of the held-out part."""

import itertools

import pytest
import torch

from largebatch.data import steps_per_epoch
from largebatch.data.sampling import evaluation_share, global_batches, hold_out
from largebatch.errors import UserError


def take(n, iterator):
    return [(step, indices.tolist()) for step, indices in itertools.islice(iterator, n)]


def test_an_epoch_uses_each_image_at_most_once_and_drops_the_rest():
    steps = take(3, global_batches(10, 3, seed=0, start_step=0))
    images = [i for _, indices in steps for i in indices]
    assert [step for step, _ in steps] == [0, 1, 2]
    assert len(images) == len(set(images)) == 9
    assert set(images) <= set(range(10))


def test_every_epoch_and_every_seed_has_its_own_order():
    first, second = (take(1, global_batches(50, 50, seed=0, start_step=epoch)) for epoch in (0, 1))
    other = take(1, global_batches(50, 50, seed=1, start_step=0))
    assert first[0][1] != second[0][1]
    assert first[0][1] != other[0][1]


@pytest.mark.parametrize("start", [1, 3, 4, 7])
def test_a_later_start_continues_the_same_sequence(start):
    unbroken = take(12, global_batches(10, 3, seed=5, start_step=0))
    assert take(12 - start, global_batches(10, 3, seed=5, start_step=start)) == unbroken[start:]


def test_a_batch_larger_than_the_training_set_raises():
    assert steps_per_epoch(10, 10) == 1
    with pytest.raises(UserError, match=r"batch_size=11.* 10 images"):
        steps_per_epoch(10, 11)


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
