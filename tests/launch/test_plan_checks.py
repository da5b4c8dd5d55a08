"""The plan refuses what the worker would refuse, with the worker's sentence."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY, Launch, configuration
from datafiles import make_imagefolder
from pytorch_optimizer import get_supported_optimizers, load_optimizer
from steps import at_start

from largebatch.config.checks import validate
from largebatch.config.epochs import plan_epochs
from largebatch.config.optimizer_libraries import PytorchOptimizer
from largebatch.config.schema import Config
from largebatch.data import load_data
from largebatch.errors import UserError
from largebatch.launch import checks
from largebatch.launch.devices import resolve_devices

FOLDER = ("dataset=imagefolder", "dataset.image_size=8", "model=smallcnn", "tracker=none", "cluster.processes=1")


def planned(*overrides: str) -> Config:
    checks._class_sizes.cache_clear()
    config = configuration(*overrides)
    validate(config)
    resolve_devices(config)
    checks.check_run(config)
    return config


def refusal(refuse: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        refuse()
    return str(caught.value)


def in_worker(config: Config) -> None:
    data = load_data(config.dataset, config.seed, torch.device("cpu"), lambda line: None)
    epochs = plan_epochs(config, len(data.train))
    config.schedule.factor(config.steps or epochs.steps_of(config.epochs or 0), epochs.steps)


@pytest.mark.parametrize(
    ("schedule", "length"),
    [
        ("warmup_epochs=3", "epochs"), ("warmup_steps=12", "epochs"), ("warmup_epochs=3", "steps"),
        ("warmup_steps=12", "steps"),
    ],
)  # fmt: skip
def test_a_warm_up_as_long_as_the_training_is_refused(schedule: str, length: str) -> None:
    """An epoch of 64 images has 4 steps."""
    key, _, value = schedule.partition("=")
    for training, allowed in ((2, False), (3, False), (4, True)):
        number = training if length == "epochs" else 4 * training
        other = {"warmup_steps": "schedule.warmup_epochs=null"}.get(key, "schedule.warmup_steps=null")
        overrides = (*TINY, "schedule=warmup_cosine", f"schedule.{schedule}", other, f"{length}={number}")
        if allowed:
            in_worker(planned(*overrides))
            continue
        message = refusal(lambda overrides=overrides: planned(*overrides))
        assert message.startswith(f"schedule.{key}={value}: 12 steps of warm-up, but the training has {4 * training}.")
        assert message == refusal(lambda overrides=overrides: in_worker(configuration(*overrides)))


def test_a_warm_up_is_compared_without_the_number_of_images() -> None:
    """The data set is only on the nodes."""
    on_nodes = (*FOLDER, "cluster=slurm", "dataset.root=/nowhere", "batch_size=4", "schedule=warmup_cosine")
    assert "schedule.warmup_epochs=5: 5 epochs of warm-up, but the training has 5" in refusal(
        lambda: planned(*on_nodes, "schedule.warmup_epochs=5", "epochs=5")
    )
    assert "schedule.warmup_steps=5: 5 steps of warm-up, but the training has 5" in refusal(
        lambda: planned(*on_nodes, "schedule.warmup_steps=5", "schedule.warmup_epochs=null", "steps=5")
    )
    planned(*on_nodes, "schedule.warmup_epochs=5", "epochs=6")


def other_test_class(root: Path) -> None:
    next((root / "test").iterdir()).rename(root / "test" / "wolf")


def empty_class(root: Path) -> None:
    for file in next((root / "train").iterdir()).iterdir():
        file.unlink()


def no_test(root: Path) -> None:
    (root / "test").rename(root / "elsewhere")


def nothing(root: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("damage", "override", "words"),
    [
        (nothing, "batch_size=1000", "batch_size=1000: larger than the training set of "),
        (nothing, "dataset.train_size=7", "dataset.train_size=7: the files have "),
        (nothing, "dataset.num_classes=9", "dataset.num_classes=9: the files have "),
        (nothing, "dataset.val_fraction=0.01", "dataset.val_fraction=0.01: holding out "),
        (other_test_class, "seed=0", "wolf: no such class in "),
        (empty_class, "seed=0", "has no images (.jpg "),
        (no_test, "seed=0", "no test/ or val/ in dataset.root="),
    ],
)
def test_an_image_folder_is_refused_before_decoding(
    tmp_path: Path, damage: Callable[[Path], None], override: str, words: str
) -> None:
    make_imagefolder(tmp_path, 8)
    damage(tmp_path)
    overrides = (*FOLDER, f"dataset.root={tmp_path}", "batch_size=4", "steps=3", "optimizer=lamb", override)
    message = refusal(lambda: planned(*overrides))
    assert words in message
    assert message == refusal(lambda: in_worker(configuration(*overrides)))


def test_the_plan_agrees_with_the_worker_about_every_batch_and_held_out_part(tmp_path: Path) -> None:
    make_imagefolder(tmp_path, 3)
    base = configuration(*FOLDER, f"dataset.root={tmp_path}", "steps=3")
    for fraction, batch in itertools.product((0.0, 0.2, 0.4, 0.7), (1, 3, 4, 6, 7)):
        base.dataset.val_fraction, base.batch_size = fraction, batch
        verdicts = []
        for check in (checks.check_run, in_worker):
            try:
                check(base)
                verdicts.append("")
            except UserError as error:
                verdicts.append(str(error))
        assert verdicts[0] == verdicts[1], (fraction, batch)


def test_options_that_a_data_set_needs_are_named_in_the_plan() -> None:
    for overrides in (
        (*FOLDER, "dataset.image_size=null"), (*TINY, "dataset.train_size=null"), (*TINY, "dataset.num_classes=null"),
    ):  # fmt: skip
        key = overrides[-1]
        message = refusal(lambda overrides=overrides: validate(configuration(*overrides)))
        assert message.startswith(f"{key}: dataset=")
        assert message == refusal(lambda overrides=overrides: in_worker(configuration(*overrides)))


def test_timm_is_asked_for_its_names_once_and_only_if_it_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LARGEBATCH_CACHE", str(tmp_path))
    timm_model = (*TINY, "model=timm", "model.name=resnet81", "model.batch_norm=false")
    timm_optimizer = (*TINY, "optimizer=timm", "optimizer.name=lionn")
    python, listing = sys.executable, "listing the names of timm"
    checks._names.cache_clear()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    planned(*TINY)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(sys, "executable", python)
    models = refusal(lambda: planned(*timm_model))
    assert listing in capfd.readouterr().out
    checks._names.cache_clear()
    monkeypatch.setattr(sys, "executable", "/bin/false")  # the list is in the cache's folder now
    optimizers = refusal(lambda: planned(*timm_optimizer))
    names = checks._names("timm")
    assert names is not None
    for name in ("resnet18", "resnet18.a1_in1k", names["deprecated"][0]):
        planned(*TINY, "model=timm", f"model.name={name}", "model.batch_norm=false")
    assert listing not in capfd.readouterr().out
    checks._names.cache_clear()

    assert models.startswith("model.name=resnet81: timm has no such model; allowed: ")
    assert "did you mean resnet" in models
    assert optimizers.startswith("optimizer.name=lionn: timm has no such optimizer; allowed: ")
    assert "did you mean lion?" in optimizers


def test_the_plan_refuses_a_name_that_pytorch_optimizer_does_not_have() -> None:
    message = refusal(lambda: planned(*TINY, "optimizer=soap", "optimizer.name=soapp"))
    assert message.startswith("optimizer.name=soapp: pytorch_optimizer has no such optimizer; allowed: ")
    assert "did you mean soap?" in message
    planned(*TINY, "optimizer=soap")


def test_the_average_of_an_average_is_refused(tmp_path: Path) -> None:
    both = ("optimizer=schedulefree_sgd", "ema_decay=0.9")
    message = refusal(lambda: validate(configuration(*TINY, *both)))
    assert message.startswith("ema_decay=0.9: the optimizer schedulefreesgd averages the weights itself. Fix: ")
    assert message == refusal(lambda: at_start(tmp_path, *both))
    kinds = {name: load_optimizer(name) for name in get_supported_optimizers()}
    averaging = {name for name, kind in kinds.items() if callable(getattr(kind, "eval", None))}
    assert averaging == set(PytorchOptimizer.AVERAGING)


def test_the_program_refuses_before_a_worker_starts(launch: Launch, tmp_path: Path) -> None:
    make_imagefolder(tmp_path / "images", 3)
    result = launch(*FOLDER, f"dataset.root={tmp_path}/images", "batch_size=64", "dry_run=true")
    assert result.returncode == 2
    assert result.stderr.startswith("error: batch_size=64: larger than the training set of ")
