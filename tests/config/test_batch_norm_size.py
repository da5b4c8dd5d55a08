"""Images that batch norm normalises over: part of a run's identity, and the only effect of a batch's division."""

from __future__ import annotations

import pytest
from conftest import configuration

from largebatch.config.batch import BatchPlan
from largebatch.config.checks import validate
from largebatch.config.identity import run_name
from largebatch.config.schema import Config
from largebatch.errors import UserError
from largebatch.launch.devices import resolve_devices

BATCH_NORM = ("model.norm=batch", "batch_size=512")


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def planned(*overrides: str) -> Config:
    """Return the configuration of a planned run."""
    config = configuration(*overrides)
    validate(config)
    resolve_devices(config)
    return config


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        (["model.norm=batch"], 512),
        (["model.norm=batch", "cluster.processes=2"], 256),
        (["model.norm=batch", "cluster.processes=2", "sync_bn=true"], 512),
        (["model.norm=batch", "cluster.processes=2", "micro_batch=64"], 64),
        (["model.norm=batch", "cluster.processes=2", "micro_batch=64", "sync_bn=true"], 128),
        (["model.norm=batch", "cluster.processes=2", "micro_batch=auto"], 256),
        (["model.norm=batch", "cluster=slurm", "cluster.nodes=2", "cluster.processes_per_node=4"], 64),
        (["model.norm=batch", "cluster=slurm", "cluster.nodes=2", "cluster.gpus_per_node=4"], 64),
        (["model=resnet18", "dataset=cifar10"], 512),
        (["model=effb0", "dataset=cifar10", "cluster.processes=4"], 128),
        (["model=timm"], 512),
        (["model=timm", "model.batch_norm=false"], None),
        ([], None),
        (["cluster.processes=4", "micro_batch=32"], None),
        (["mode=bt", "cluster.processes=2"], None),  # statistics of the projector are over the global batch
        (["mode=bt", "cluster.processes=2", "model.norm=batch"], 256),
        (["mode=bt", "cluster.processes=2", "mode.exact=false"], 256),  # the loss is over each micro-batch
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_the_launcher_computes_the_size(overrides: list[str], size: int | None) -> None:
    assert planned("batch_size=512", *overrides).batch_norm_size == size


@pytest.mark.usefixtures("four_gpus")
def test_the_size_counts_the_processes_that_start_by_default() -> None:
    assert planned(*BATCH_NORM).batch_norm_size == 128
    assert planned(*BATCH_NORM, "cluster.devices=[0,1]").batch_norm_size == 256


DIVISIONS = [
    (), ("cluster.processes=2",), ("cluster.processes=4",), ("micro_batch=128",), ("micro_batch=auto",),
    ("cluster.processes=2", "micro_batch=128"), ("cluster.processes=4", "sync_bn=true", "micro_batch=32"),
]  # fmt: skip


def test_a_given_size_gives_one_name_for_every_division() -> None:
    names = {run_name(planned(*BATCH_NORM, "batch_norm_size=128", *division)) for division in DIVISIONS}
    assert len(names) == 1
    assert names == {run_name(planned(*BATCH_NORM, "micro_batch=128"))}


def test_another_number_of_processes_is_another_name_with_batch_norm_only() -> None:
    assert run_name(planned(*BATCH_NORM)) != run_name(planned(*BATCH_NORM, "cluster.processes=2"))
    assert len({run_name(planned(*division)) for division in DIVISIONS}) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["batch_norm_size=128"], "batch_norm_size=128: smallcnn has no batch norm here. Fix: leave it out"),
        (["model.norm=batch", "batch_norm_size=100"], r"batch_norm_size=100: .* Fix: batch_norm_size=128$"),
        (["model.norm=batch", "batch_norm_size=1024"], "doesn't divide the 512 images .* Fix: batch_norm_size=512$"),
        (
            ["model.norm=batch", "batch_norm_size=512", "cluster.processes=2"],
            "doesn't divide the 256 images .* Fix: batch_norm_size=256, or sync_bn=true",
        ),
        (
            ["model.norm=batch", "batch_norm_size=3", "cluster.processes=2", "sync_bn=true"],
            "batch_norm_size=3: doesn't divide the global batch .* Fix: batch_norm_size=2$",
        ),
        (
            ["model.norm=batch", "batch_norm_size=128", "micro_batch=64"],
            "micro_batch=64: batch_norm_size=128 needs micro-batches of 128 images. Fix: leave out one of the two",
        ),
        (["model.norm=batch", "batch_norm_size=0"], "batch_norm_size=0: must be an integer of at least 1"),
        (
            ["mode=bt", "mode.exact=false", "sync_bn=true", "cluster.processes=2"],
            "sync_bn=true: not allowed with mode.exact=false on 2 processes",
        ),
        (["mode=bt", "mode.exact=false", "batch_norm_size=1"], "mode.exact=false: correlates the images"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_size_without_effect_or_in_conflict_is_one_error(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        planned("batch_size=512", *overrides)
    assert len(str(caught.value).splitlines()) == 1


def numbers(pieces: tuple[slice, ...]) -> list[list[int]]:
    return [list(range(100))[piece] for piece in pieces]


def test_pieces_of_a_batch_by_hand() -> None:
    """Groups with common statistics are the same images for any number of processes."""
    assert numbers(BatchPlan(8, 1, 2).pieces(0)) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert numbers(BatchPlan(8, 2, 2).pieces(1)) == [[4, 5], [6, 7]]
    synchronised = BatchPlan(8, 2, 2, synchronised=True)
    assert [numbers(synchronised.pieces(rank)) for rank in (0, 1)] == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    assert numbers(BatchPlan(8, 1, 4).pieces(0)) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_pieces_of_a_smaller_batch_by_hand() -> None:
    """Sizes differ by at most one, and a process may have none."""
    assert numbers(BatchPlan(8, 1, 4).pieces(0, 5)) == [[0, 1], [2, 3, 4]]
    assert [numbers(BatchPlan(8, 2, 4).pieces(rank, 5)) for rank in (0, 1)] == [[[0, 1]], [[2, 3, 4]]]
    assert sorted(numbers(BatchPlan(8, 2, 4).pieces(rank, 3)) for rank in (0, 1)) == [[], [[0, 1, 2]]]
    synchronised = BatchPlan(8, 2, 4, synchronised=True)
    assert [numbers(synchronised.pieces(rank, 5)) for rank in (0, 1)] == [[[0, 1]], [[2, 3, 4]]]
    assert numbers(BatchPlan(16, 1, 8, together=4).pieces(0, 12)) == [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11]]


@pytest.mark.parametrize("synchronised", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("images", [1, 2, 7, 12, 24])
def test_every_image_is_in_one_piece(images: int, processes: int, synchronised: bool) -> None:
    plan = BatchPlan(24, processes, 4, synchronised=synchronised)
    pieces = [plan.pieces(rank, images) for rank in range(processes)]
    assert sorted(n for mine in pieces for piece in numbers(mine) for n in piece) == list(range(images))
    if synchronised:
        assert len({len(mine) for mine in pieces}) == 1  # every process takes part in every pass
