"""The program trains on data sets in their true file formats, and names damaged files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from datafiles import make_cifar10, make_cifar100, make_imagefolder, make_tinyimagenet
from programs import Programs

SHORT = ("model=smallcnn", "batch_size=10", "steps=3", "tracker=none", "cluster.threads=1")


def summary(run: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((run / "summary.json").read_text())
    return found


def test_cifar10(tmp_path: Path, process: Programs) -> None:
    make_cifar10(tmp_path / "data")
    run = process.train(tmp_path, "dataset=cifar10", "dataset.verify=false", f"dataset.root={tmp_path}/data", *SHORT)
    assert (summary(run)["train_images"], summary(run)["test_images"]) == (100, 20)


def test_cifar10_pickled_by_python_3(tmp_path: Path, process: Programs) -> None:
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        images = rng.integers(0, 256, (12, 3072), dtype=np.uint8)
        entry = {"data": images, "labels": [*range(10), 0, 1], "filenames": ["x.png"] * 12, "batch_label": name}
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{i}" for i in range(10)]}))
    process.train(tmp_path, "dataset=cifar10", "dataset.verify=false", f"dataset.root={tmp_path}/data", *SHORT)


def test_cifar100(tmp_path: Path, process: Programs) -> None:
    make_cifar100(tmp_path / "data")
    run = process.train(tmp_path, "dataset=cifar100", "dataset.verify=false", f"dataset.root={tmp_path}/data", *SHORT)
    assert summary(run)["classes"] == 100


def test_tinyimagenet(tmp_path: Path, process: Programs) -> None:
    make_tinyimagenet(tmp_path / "data", classes=4, train_per_class=5)
    run = process.train(tmp_path, "dataset=tinyimagenet", f"dataset.root={tmp_path}/data", *SHORT)
    assert summary(run)["classes"] == 4


@pytest.mark.parametrize("channels", [1, 3])
def test_image_folder_of_grey_28x28_pngs(tmp_path: Path, process: Programs, channels: int) -> None:
    make_imagefolder(tmp_path / "pictures", 28, 1)
    options = ("dataset.image_size=28", f"dataset.channels={channels}", "batch_size=6")
    process.train(tmp_path, "dataset=imagefolder", f"dataset.root={tmp_path}/pictures", *SHORT, *options)


def test_a_truncated_file_error_names_the_file(tmp_path: Path, process: Programs) -> None:
    batch = make_cifar10(tmp_path / "data") / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:1000])
    result = process.call("launch", "dataset=cifar10", "dataset.verify=false", *SHORT, cwd=tmp_path)
    assert result.code == 2
    assert str(batch) in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()
