"""The batches of training and evaluation: equal for any number of processes, accumulation and resume."""

import itertools
import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from datafiles import decoded, make_imagefolder

from largebatch.config.batch import plan_batch
from largebatch.config.datasets import DatasetConfig
from largebatch.config.epochs import Epochs
from largebatch.data import BatchLoader, FileImages, MemoryImages, Split
from largebatch.errors import UserError

CPU = torch.device("cpu")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


@pytest.fixture(scope="module")
def in_files(tmp_path_factory):
    root = make_imagefolder(tmp_path_factory.mktemp("tree"), size=12, train_per_class=10)
    paths = tuple(str(path) for path in sorted(root.glob("train/*/*.png")))
    return Split(FileImages(paths, channels=3, image_size=8), torch.arange(30) // 10)


@pytest.fixture(scope="module")
def in_memory(in_files):
    return Split(MemoryImages(decoded(in_files.images)), in_files.labels)


def config(**options):
    return DatasetConfig(name="imagefolder", crop_padding=2, **{"workers": 0, **options})


def training(
    split,
    steps,
    *,
    batch_size=12,
    rank=0,
    processes=1,
    micro_batch=12,
    seed=0,
    start_step=0,
    how=(),
    passes=1,
    last_batch="drop",
    **options,
):
    loader = BatchLoader(config(**options), MEAN, STD, CPU, rank, processes, "channels_last" in how)
    plan = plan_batch(batch_size, processes, micro_batch)
    rest = len(split) % batch_size if last_batch == "keep" else 0
    epochs = Epochs(len(split), batch_size, last_batch, rest)
    batches = loader.train(split, epochs, plan, seed, start_step, 2 if "two_views" in how else 1, passes)
    if plan.accumulation == 1:
        passes = 1
    count = passes * sum(len(plan.pieces(rank, epochs.size(start_step + step))) for step in range(steps))
    return list(itertools.islice(batches, count))


def joined(batches):
    """Concatenate micro-batches to a tensor of images and a tensor of labels."""
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def same(a, b):
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_shapes_and_types(in_memory):
    (images, labels), *_ = training(in_memory, 1, micro_batch=4)
    assert (images.dtype, images.shape) == (torch.float32, (4, 3, 8, 8))
    assert (labels.dtype, labels.shape) == (torch.int64, (4,))


def test_channels_last_images_are_the_same(in_memory, in_files):
    expected = training(in_memory, 2)
    for split in (in_memory, in_files):
        got = training(split, 2, how=["channels_last"])
        assert all(images.is_contiguous(memory_format=torch.channels_last) for images, _ in got)
        assert same(joined(got), joined(expected))


def test_two_views_of_each_image(in_memory):
    """A batch has the first and then the second views of the images of the classification batch."""
    (images, labels), *_ = training(in_memory, 1, micro_batch=4, how=["two_views", "channels_last"])
    assert images.shape == (8, 3, 8, 8)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(labels, training(in_memory, 1, micro_batch=4)[0][1])
    assert len({image.numpy().tobytes() for image in images}) == 8


@pytest.mark.parametrize("division", [{"micro_batch": 3}, {"processes": 2, "micro_batch": 6}, {"start_step": 1}])
def test_two_views_do_not_depend_on_the_division_of_the_batch(in_memory, in_files, division):
    def views(split, rank=0, steps=2, **options):
        batches = training(split, steps, rank=rank, how=["two_views"], **options)
        return torch.cat([images.unflatten(0, (2, -1)) for images, _ in batches], dim=1)

    whole = views(in_memory)
    if "start_step" in division:
        assert torch.equal(views(in_files, steps=1, **division), whole[:, 12:])
    else:
        ranks = [views(in_memory, rank, **division) for rank in range(division.get("processes", 1))]
        steps = [part for both in zip(*(r.chunk(2, dim=1) for r in ranks), strict=True) for part in both]
        assert torch.equal(torch.cat(steps, dim=1), whole)


def test_accumulation_uses_the_same_images(in_memory):
    whole = training(in_memory, 5)
    for micro_batch in (1, 3, 6):
        assert same(joined(training(in_memory, 5, micro_batch=micro_batch)), joined(whole))


@pytest.mark.parametrize("micro_batch", [2, 6])
def test_two_processes_use_the_same_images_as_one(in_memory, micro_batch):
    whole = joined(training(in_memory, 5))
    ranks = [joined(training(in_memory, 5, rank=r, processes=2, micro_batch=micro_batch)) for r in (0, 1)]
    for step in range(5):
        for whole_part, *rank_parts in zip(whole, *ranks, strict=True):
            of_ranks = torch.cat([part[step * 6 : step * 6 + 6] for part in rank_parts])
            assert torch.equal(of_ranks, whole_part[step * 12 : step * 12 + 12])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start_step", [1, 2, 5])
def test_a_resume_continues_the_unbroken_stream(in_memory, in_files, start_step, workers):
    """An epoch has two steps: resumes in the middle of an epoch, at its start, and in a later epoch."""
    unbroken = training(in_memory, 7)[start_step:]
    split = in_files if workers else in_memory
    resumed = training(split, 7 - start_step, start_step=start_step, workers=workers)
    assert same(joined(resumed), joined(unbroken))


@pytest.mark.parametrize("workers", [0, 2])
def test_files_and_memory_give_the_same_stream(in_memory, in_files, workers):
    """Over several epochs, and with more images a batch than a worker decodes at once."""
    expected = joined(training(in_memory, 7, micro_batch=6))
    assert same(joined(training(in_files, 7, micro_batch=6, workers=workers)), expected)

    large = torch.arange(90) % 30
    memory, files = (split.select(large) for split in (in_memory, in_files))
    expected = joined(training(memory, 2, batch_size=80, micro_batch=80))
    assert same(joined(training(files, 2, batch_size=80, micro_batch=80, workers=workers)), expected)


def test_equal_images_get_different_draws():
    split = Split(
        MemoryImages(torch.arange(192).to(torch.uint8).view(1, 3, 8, 8).expand(8, -1, -1, -1)), torch.zeros(8).long()
    )
    images, _ = joined(training(split, 2, batch_size=8, micro_batch=8))
    assert len({image.numpy().tobytes() for image in images}) > 12  # of 16; a few may be equal by chance
    another_seed, _ = joined(training(split, 2, batch_size=8, micro_batch=8, seed=1))
    assert not torch.equal(images, another_seed)


def test_without_augmentation_images_are_only_normalised(in_memory):
    off = {"flip": False, "rotation": 0.0}
    loader = BatchLoader(DatasetConfig(name="x", crop_padding=0, **off), MEAN, STD, CPU, rank=0, processes=1)
    batches = loader.train(in_memory, Epochs(30, 30, "carry"), plan_batch(30, 1, 30), seed=0, start_step=0)
    images, labels = next(iter(batches))
    assert torch.bincount(labels).tolist() == [10, 10, 10]
    pixels = (images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255
    got = sorted(image.round().to(torch.uint8).numpy().tobytes() for image in pixels)
    assert got == sorted(image.numpy().tobytes() for image in in_memory.images.pixels)


def test_global_random_state_is_not_changed(in_files):
    """Otherwise the dropout of a resumed run would differ from that of an unbroken run."""
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    training(in_files, 2, workers=1)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("last_batch", ["carry", "keep"])
def test_a_last_batch_is_the_same_for_every_division_and_after_a_resume(in_memory, in_files, last_batch):
    """30 images in batches of 12; with ``keep`` the third batch has six, in two groups of at most four."""
    whole = joined(training(in_memory, 6, last_batch=last_batch))
    assert len(whole[1]) == {"carry": 72, "keep": 60}[last_batch]
    assert torch.bincount(whole[1][:30]).tolist() == [10, 10, 10]
    assert same(joined(training(in_memory, 6, micro_batch=4, last_batch=last_batch)), whole)
    assert same(joined(training(in_files, 6, micro_batch=4, workers=2, last_batch=last_batch)), whole)
    resumed = joined(training(in_memory, 3, start_step=3, last_batch=last_batch))
    assert same(resumed, tuple(part[-len(resumed[1]) :] for part in whole))
    ranks = [training(in_memory, 6, rank=rank, processes=2, micro_batch=3, last_batch=last_batch) for rank in (0, 1)]
    images = torch.cat([joined(batches)[0] for batches in ranks])
    assert sorted(image.sum().item() for image in images) == sorted(image.sum().item() for image in whole[0])


def evaluation(split, rank, processes, batch, workers=0, chosen=None):
    loader = BatchLoader(config(workers=workers), MEAN, STD, CPU, rank, processes)
    return list(loader.evaluate(split, batch, chosen))


@pytest.mark.parametrize("how", [(), ("two_views",)], ids=["plain", "two_views"])
@pytest.mark.parametrize(
    "division",
    [{"micro_batch": 3}, {"micro_batch": 12}, {"micro_batch": 3, "processes": 2, "rank": 1}, {"start_step": 3}],
    ids=str,
)
@pytest.mark.parametrize(("where", "workers"), [("memory", 0), ("files", 0), ("files", 2)])
def test_repeated_micro_batches_are_equal(in_memory, in_files, where, workers, division, how):
    """With passes=2 a step has all its micro-batches, then all again, pixel for pixel."""
    split = in_memory if where == "memory" else in_files
    division = {"micro_batch": 4, **division}
    once = training(in_memory, 3, how=how, **division)
    twice = training(split, 3, how=how, passes=2, workers=workers, **division)
    a_step = len(once) // 3
    expected = [batch for step in range(3) for batch in 2 * once[step * a_step : (step + 1) * a_step]]
    if a_step == 1:  # the only micro-batch of a step isn't repeated
        expected = once
    assert len(twice) == len(expected)
    assert all(same(got, batch) for got, batch in zip(twice, expected, strict=True))
    assert len({images.numpy().tobytes() for images, _ in twice}) == len(once)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 29, 30])
def test_evaluation_covers_each_image_exactly_once(in_memory, n, processes):
    split = in_memory.select(torch.arange(n))
    split = Split(split.images, torch.arange(n))  # labels that tell the images apart
    batches = [batch for rank in range(processes) for batch in evaluation(split, rank, processes, batch=4)]
    images, labels = joined(batches)
    assert labels.tolist() == list(range(n))
    assert all(len(part) <= 4 for _, part in batches)
    assert torch.equal(images, joined(evaluation(split, 0, 1, batch=n))[0])


def test_evaluation_from_files(in_files, in_memory):
    expected = joined(evaluation(in_memory, 0, 1, batch=30))
    assert same(joined(evaluation(in_files, 0, 1, batch=7, workers=2)), expected)
    assert evaluation(in_files.select(torch.arange(1)), 0, 3, batch=7, workers=1) == []


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("chosen", [[7], [3, 4, 29, 0, 11, 12, 13], list(range(30))], ids=len)
def test_evaluation_of_chosen_images_covers_them_in_their_order(in_memory, in_files, chosen, processes):
    every, _ = joined(evaluation(in_memory, 0, 1, batch=30))
    for split in (in_memory, in_files):
        told_apart = Split(split.images, torch.arange(30))
        ranks = [evaluation(told_apart, r, processes, 4, chosen=torch.tensor(chosen)) for r in range(processes)]
        batches = [batch for of_rank in ranks for batch in of_rank]
        images, labels = joined(batches)
        assert labels.tolist() == chosen
        assert torch.equal(images, every[chosen])
        assert all(len(part) <= 4 for _, part in batches)


def test_evaluation_of_no_chosen_images_is_no_batch(in_memory):
    assert evaluation(in_memory, 0, 1, batch=4, chosen=torch.empty(0, dtype=torch.int64)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_raises_with_its_name(in_files, tmp_path, workers):
    """The error is one readable message, also from a worker process."""
    bad = tmp_path / "bad.png"
    bad.write_bytes(Path(in_files.images.paths[3]).read_bytes()[:100])
    paths = (*in_files.images.paths[:20], str(bad))
    split = Split(FileImages(paths, 3, 8), torch.zeros(21).long())
    with pytest.raises(UserError, match=r"bad\.png can't be read as an image") as caught:
        evaluation(split, 0, 1, batch=4, workers=workers)
    assert "Traceback" not in str(caught.value)
    with pytest.raises(UserError, match=r"bad\.png"):
        training(split, 1, batch_size=21, micro_batch=7, workers=workers)


def one_rank(rank, split, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    seen = training(split, 4, rank=rank, processes=2, micro_batch=3, workers=1)
    count = torch.tensor(sum(len(labels) for _, labels in evaluation(split, rank, 2, batch=4, workers=1)))
    dist.all_reduce(count)
    torch.save((seen, count), folder / f"seen{rank}")
    dist.destroy_process_group()


def test_two_forked_gloo_processes_with_loader_workers(in_files, in_memory, tmp_path):
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=one_rank, args=(rank, in_files, tmp_path)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(100)
    assert [process.exitcode for process in ranks] == [0, 0]
    (first, count), (second, _) = (torch.load(tmp_path / f"seen{rank}") for rank in (0, 1))
    assert count == 30
    expected = training(in_memory, 4, micro_batch=6)  # the halves of a step in turn
    assert same(joined(first), joined(expected[0::2]))
    assert same(joined(second), joined(expected[1::2]))
