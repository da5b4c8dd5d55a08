"""Images in Arrow shards of Hugging Face datasets: the data of the same files in class folders, and damaged shards."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from conftest import Launch, configuration
from datafiles import IMAGE, decoded, make_arrow, make_imagefolder, save_split, save_table

from largebatch.config.arrow import find_rows
from largebatch.config.augmentation import ResizedCropConfig
from largebatch.config.batch import plan_batch
from largebatch.config.datasets import DatasetConfig
from largebatch.config.epochs import Epochs
from largebatch.data import BatchLoader, Split, load, load_data
from largebatch.errors import UserError
from largebatch.launch import checks

CROP = ResizedCropConfig([0.2, 1.0], source="file")
NAMES = ["cat", "dog", "eel"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_imagefolder(tmp_path_factory.mktemp("tree"), (24, 30), extension=".jpg")


@pytest.fixture
def root(tmp_path: Path, tree: Path) -> Path:
    return make_arrow(tmp_path / "shards", tree)


def config(root: Path, name: str = "arrow", **options: Any) -> DatasetConfig:
    return DatasetConfig(name=name, root=str(root), **{"image_size": 16, "workers": 0, **options})


def pixels(split: Split) -> torch.Tensor:
    return split.images.pixels if hasattr(split.images, "pixels") else decoded(split.images)


def refusal(root: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_data(config(root, **options), 0)
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- the same data as in class folders


@pytest.mark.parametrize(
    "options",
    [{}, {"channels": 1}, {"val_fraction": 0.4}, {"resize_size": 20}, {"resized_crop": CROP}],
    ids=["decoded", "grey", "validation", "resized", "crops from files"],
)
def test_the_data_are_those_of_the_same_files_in_folders(tree: Path, root: Path, options: dict[str, Any]) -> None:
    ours, theirs = (load_data(config(*where, **options), 7) for where in ((root,), (tree, "imagefolder")))
    assert ours.place == theirs.place == ("files" if "resized_crop" in options else "host")
    assert (ours.classes, ours.mean, ours.std) == (theirs.classes, theirs.mean, theirs.std)
    assert ours.content.classes == theirs.content.classes
    for one, other in ((ours.train, theirs.train), (ours.val, theirs.val), (ours.test, theirs.test)):
        assert (one is None) == (other is None) == (one is ours.val and "val_fraction" not in options)
        if one is not None and other is not None:
            assert torch.equal(pixels(one), pixels(other))
            assert torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_crops_are_those_of_the_files_bit_for_bit(tree: Path, root: Path, workers: int, views: int) -> None:
    found = []
    for where in ((root,), (tree, "imagefolder")):
        options = config(*where, resized_crop=CROP, crop_padding=0, rotation=0, workers=workers)
        split = load_data(options, 0).train
        loader = BatchLoader(options, (0.0,) * 3, (1 / 255,) * 3, torch.device("cpu"), 0, 1)
        batches = loader.train(split, Epochs(18, 6, "carry"), plan_batch(6, 1, None), 3, 0, views)
        found.append(list(itertools.islice(batches, 4)))
    for (images, labels), (expected, theirs) in zip(*found, strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(labels, theirs)


@pytest.mark.parametrize(("shards", "rows"), [(1, 100), (3, 1), (20, 1)])
def test_the_division_into_shards_changes_nothing(tmp_path: Path, tree: Path, shards: int, rows: int) -> None:
    one = load_data(config(make_arrow(tmp_path / "one", tree)), 0)
    other = load_data(config(make_arrow(tmp_path / "other", tree, shards, rows)), 0)
    assert torch.equal(one.train.images.pixels, other.train.images.pixels)
    assert torch.equal(one.test.labels, other.test.labels)
    assert one.content == other.content


def test_other_images_labels_or_classes_are_other_data(tmp_path: Path, tree: Path) -> None:
    files = [path.read_bytes() for path in sorted(tree.glob("train/*/*.jpg"))]
    labels = [i // 6 for i in range(18)]

    def content(images: list[bytes], labels: list[int], names: list[str]) -> Any:
        root = make_arrow(tmp_path / "root", tree)
        for split in ("train", "test"):
            save_split(root / split, images, labels, names)
        found = load_data(config(root), 0).content
        shutil.rmtree(root)
        return found

    before = asdict(content(files, labels, NAMES))
    assert content(files, labels, NAMES).difference(before) == ""
    assert "other images" in content([files[0] + b"more", *files[1:]], labels, NAMES).difference(before)
    assert "class cat: 5 training images" in content(files, [1, *labels[1:]], NAMES).difference(before)
    assert "new class fox" in content(files, labels, ["cat", "dog", "fox"]).difference(before)


def test_pixels_are_kept_until_a_shard_changes(root: Path, tree: Path) -> None:
    def lines() -> list[str]:
        said: list[str] = []
        load_data(config(root), 0, say=said.append)
        return said

    assert any("decoding 27 images" in line for line in lines())
    assert not any("decoding" in line for line in lines())
    shutil.rmtree(root / "train")
    make_arrow(root, tree, shards=3)
    assert any("was made from other files" in line for line in lines())


def test_a_test_set_without_labels_counts_as_missing(root: Path) -> None:
    """The Hub's test sets have the label -1."""
    (root / "test").rename(root / "validation")
    expected = load_data(config(root), 0).test.labels
    save_split(root / "test", [b"x", b"y"], [-1, -1], NAMES)
    assert torch.equal(load_data(config(root), 0).test.labels, expected)
    shutil.rmtree(root / "validation")
    assert f"row 0 of {root}/test/data-00000-of-00001.arrow: has the label -1. Allowed: 0 to 2, " in refusal(root)


# -- what is refused, in the plan and at the start


def missing_folder(root: Path) -> None:
    shutil.rmtree(root)


def one_split(root: Path) -> None:
    shutil.copytree(root / "train", root, dirs_exist_ok=True)
    shutil.rmtree(root / "train")


def no_test(root: Path) -> None:
    shutil.rmtree(root / "test")


def missing_shard(root: Path) -> None:
    shard(root).unlink()


def odd_state(root: Path) -> None:
    (root / "train" / "state.json").write_text('{"_data_files": [3]}')


def no_shard(root: Path) -> None:
    (root / "train" / "state.json").write_text('{"_data_files": []}')


def cut_in_a_batch(root: Path) -> None:
    shard(root).write_bytes(shard(root).read_bytes()[:5000])


def cut_between_batches(root: Path) -> None:
    """Arrow reads such a stream without an error."""
    data = shard(root).read_bytes()
    shard(root).write_bytes(data[:-8])
    assert pyarrow.ipc.open_stream(data[:-8]).read_all().num_rows == 9


def empty_shard(root: Path) -> None:
    shard(root).write_bytes(b"")


def parquet(root: Path) -> None:
    shard(root).write_bytes(b"PAR1" + bytes(100) + b"\xff\xff\xff\xff\0\0\0\0")


def table(root: Path, columns: dict[str, pyarrow.Array], features: dict[str, Any]) -> None:
    save_table(root / "train", pyarrow.table(columns), features)


LABELS = pyarrow.array([0, 1, 2], pyarrow.int64())
IMAGES = pyarrow.array([{"bytes": b"x", "path": None}] * 3, IMAGE)
LABEL = {"names": NAMES, "_type": "ClassLabel"}


def no_types(root: Path) -> None:
    table(root, {"image": IMAGES, "label": LABELS}, {})


def no_label_column(root: Path) -> None:
    value = {"dtype": "int64", "_type": "Value"}
    table(root, {"image": IMAGES, "label": LABELS}, {"image": {"_type": "Image"}, "label": value})


def two_label_columns(root: Path) -> None:
    columns = {"img": IMAGES, "fine": LABELS, "coarse": LABELS}
    table(root, columns, {"img": {"_type": "Image"}, "fine": LABEL, "coarse": LABEL})


def image_in_text(root: Path) -> None:
    table(root, {"image": pyarrow.array(["a.jpg"] * 3), "label": LABELS}, {"image": {"_type": "Image"}, "label": LABEL})


def label_in_text(root: Path) -> None:
    table(root, {"image": IMAGES, "label": pyarrow.array(NAMES)}, {"image": {"_type": "Image"}, "label": LABEL})


def absent_column(root: Path) -> None:
    table(root, {"image": IMAGES}, {"image": {"_type": "Image"}, "label": LABEL})


def one_class(root: Path) -> None:
    save_split(root / "train", [b"x"], [0], ["cat"])


def other_types_in_a_shard(root: Path) -> None:
    save_split(root / "other", [b"x"] * 3, [0, 1, 2], ["dog", "cat", "eel"])
    (root / "other" / "data-00000-of-00001.arrow").rename(root / "train" / "data-00001-of-00002.arrow")


def no_label(root: Path) -> None:
    save_split(root / "train", [b"x"] * 9, [*[0, 1, 2] * 2, 0, None, 1], NAMES)


def negative_label(root: Path) -> None:
    save_split(root / "train", [b"x"] * 9, [0, 1, 2, -1, *[2] * 5], NAMES)


def large_label(root: Path) -> None:
    save_split(root / "train", [b"x"] * 9, [0, 1, 2, *[1] * 5, 3], NAMES, shards=2)


def empty_class(root: Path) -> None:
    save_split(root / "train", [b"x"] * 4, [0, 0, 2, 2], NAMES)


def other_test_classes(root: Path) -> None:
    save_split(root / "test", [b"x"] * 3, [0, 1, 2], ["dog", "cat", "eel"])


def empty_test(root: Path) -> None:
    save_split(root / "test", [], [], NAMES)


def compressed(root: Path) -> None:
    whole = pyarrow.ipc.open_stream(shard(root).read_bytes()).read_all()
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    with pyarrow.ipc.new_stream(str(shard(root)), whole.schema, options=options) as stream:
        stream.write_table(whole)


def nothing(root: Path) -> None:
    pass


def shard(root: Path) -> Path:
    return root / "train" / "data-00000-of-00002.arrow"


FIRST, SECOND = "train/data-00000-of-00002.arrow", "train/data-00001-of-00002.arrow"
ONLY = "train/data-00000-of-00001.arrow"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            missing_folder,
            "dataset=arrow: no train/state.json in dataset.root=ROOT; it must be the folder of save_to",
        ),
        (one_split, "in dataset.root=ROOT; it has one split only, which train_test_split divides; it must be"),
        (no_test, "no test/state.json or validation/state.json or val/state.json in dataset.root=ROOT"),
        (missing_shard, f"ROOT/{FIRST}: is missing, but ROOT/train/state.json names it"),
        (odd_state, "ROOT/train/state.json: names no shards"),
        (no_shard, "ROOT/train/state.json: names no shards"),
        (cut_in_a_batch, f"ROOT/{FIRST}: is damaged or cut short: the end of an Arrow stream is missing"),
        (cut_between_batches, f"ROOT/{FIRST}: is damaged or cut short: the end of an Arrow stream is missing"),
        (empty_shard, f"ROOT/{FIRST}: is cut short"),
        (parquet, f"ROOT/{FIRST}: isn't a readable Arrow stream ("),
        (no_types, f"ROOT/{ONLY}: has the columns none with a Hugging Face type. Allowed: one Image and one Class"),
        (no_label_column, f"ROOT/{ONLY}: has the columns image (Image), label (Value). Allowed: one Image and"),
        (two_label_columns, "has the columns img (Image), fine (ClassLabel), coarse (ClassLabel). Allowed: "),
        (image_in_text, f"ROOT/{ONLY}: column image is of type string. Allowed: struct with bytes of type binary"),
        (label_in_text, f"ROOT/{ONLY}: column label is of type string. Allowed: integers"),
        (absent_column, f"ROOT/{ONLY}: isn't a readable Arrow stream ("),
        (one_class, f"ROOT/{ONLY}: column label has the class names ['cat']. Allowed: two or more texts"),
        (other_types_in_a_shard, f"ROOT/{SECOND}: has other columns or class names than ROOT/{FIRST}"),
        (no_label, f"row 7 of ROOT/{ONLY}: has no label. Allowed: 0 to 2"),
        (
            negative_label,
            f"row 3 of ROOT/{ONLY}: has the label -1. Allowed: 0 to 2, the positions in its 3 ",
        ),
        (large_label, f"row 4 of ROOT/{SECOND}: has the label 3. Allowed: 0 to 2"),
        (empty_class, "ROOT/train: no row has the class dog (label 1). Fix: "),
        (other_test_classes, "ROOT/test: has other class names than ROOT/train"),
        (empty_test, "ROOT/test: has no rows"),
        (compressed, f"ROOT/{FIRST}: is compressed. Fix: save_to_disk writes it uncompressed"),
    ],
)
def test_the_plan_and_the_worker_refuse_with_one_sentence(
    root: Path, damage: Callable[[Path], None], words: str
) -> None:
    damage(root)
    message = refusal(root)
    assert words.replace("ROOT", str(root)) in message
    assert planned(root) == message


def planned(root: Path, *overrides: str) -> str:
    """Return the plan's refusal."""
    checks._class_sizes.cache_clear()
    with pytest.raises(UserError) as caught:
        checks.check_run(configuration("dataset=arrow", f"dataset.root={root}", "batch_size=4", *overrides))
    return str(caught.value)


def test_the_plan_counts_the_rows(root: Path, launch: Launch) -> None:
    assert planned(root, "dataset.num_classes=9").startswith("dataset.num_classes=9: the files have 3")
    assert planned(root, "dataset.val_fraction=0.01").startswith("dataset.val_fraction=0.01: holding out ")
    ended = launch("dataset=arrow", f"dataset.root={root}", "batch_size=19", "tracker=none", "dry_run=true")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: batch_size=19: larger than the training set of 18")
    assert not (root / ".largebatch").exists()


def test_nothing_of_torch_is_needed_to_list_rows(root: Path) -> None:
    train, test = find_rows("arrow", root)
    assert train.class_sizes == (6, 6, 6)
    assert test.class_sizes == (3, 3, 3)
    for file, number, first, size in train.places.tolist():
        data = Path(train.files[file]).read_bytes()[first : first + size]
        assert data.startswith(b"\xff\xd8")
        assert data.endswith(b"\xff\xd9")
        assert number < 9


def test_large_and_sliced_arrays_and_other_names_of_columns(tmp_path: Path, tree: Path) -> None:
    """``datasets`` has large_binary too. Rows without an image may have bytes in the buffer."""
    files = [path.read_bytes() for path in sorted(tree.glob("train/*/*.jpg"))]
    kind = pyarrow.struct({"path": pyarrow.string(), "bytes": pyarrow.large_binary()})
    images = pyarrow.array([{"bytes": one, "path": None} for one in [b"before", *files, b"after"]], kind)[1:-1]
    labels = pyarrow.array([i // 6 for i in range(18)], pyarrow.int32())
    for split in ("train", "val"):
        columns = {"name": pyarrow.array(["x"] * 18), "klass": labels, "img": images}
        features = {"name": {"_type": "Value"}, "klass": LABEL, "img": {"_type": "Image", "decode": False}}
        save_table(tmp_path / split, pyarrow.table(columns), features, rows=5)
    expected = load_data(config(tree, "imagefolder"), 0).train
    found = load_data(config(tmp_path), 0)
    assert torch.equal(found.train.images.pixels, expected.images.pixels)
    assert torch.equal(found.test.labels, expected.labels)


# -- images that can't be read


@pytest.fixture(params=["decoded at the start", "decoded while training"])
def damaged(request: pytest.FixtureRequest, tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Shards with four images that can't be read, of 18."""
    if request.param == "decoded while training":
        monkeypatch.setattr(load, "host_memory", lambda: 1000)
    root = make_arrow(tmp_path / "shards", tree)
    images: list[bytes | None] = [path.read_bytes() for path in sorted(tree.glob("train/*/*.jpg"))]
    for row, bad in {2: None, 7: b"", 11: b"text", 17: images[17][:100]}.items():  # type: ignore[index]
        images[row] = bad
    save_split(root / "train", images, [i // 6 for i in range(18)], NAMES, shards=2)
    return root


def test_an_unreadable_row_stops_the_start_with_its_shard_and_number(damaged: Path) -> None:
    for _ in range(2):  # also from the list that the first start kept
        message = refusal(damaged)
        assert message.startswith(f"row 2 of {damaged}/{FIRST} can't be read as an image (it has no bytes): ")
        assert (
            f"dataset.on_error=skip skips 4 of 27 images, which can't be read: row 2 of {FIRST}, row 7 of {FIRST}, "
            f"row 2 of {SECOND} and 1 more"
        ) in message


def test_unreadable_rows_are_skipped_and_counted(damaged: Path, tree: Path) -> None:
    whole = load_data(config(tree, "imagefolder"), 0).train
    left = [i for i in range(18) if i not in (2, 7, 11, 17)]
    for _ in range(2):
        lines: list[str] = []
        data = load_data(config(damaged, on_error="skip"), 0, say=lines.append)
        assert data.skipped == 4
        assert any(line.startswith(f"skipped 4 of 27 images, which can't be read: row 2 of {FIRST}") for line in lines)
        assert torch.equal(pixels(data.train), pixels(whole)[left])
        assert torch.equal(data.train.labels, whole.labels[left])


def test_a_null_row_is_unreadable_too(tmp_path: Path, root: Path) -> None:
    images = pyarrow.array([None, {"bytes": b"x", "path": None}, None], IMAGE)
    table(root, {"image": images, "label": LABELS}, {"image": {"_type": "Image"}, "label": LABEL})
    message = refusal(root)
    assert message.startswith(f"row 0 of {root}/{ONLY} can't be read as an image (it has no bytes)")
    assert "skips 3 of 12 images" in message


def test_a_shard_that_is_cut_while_training_is_an_error_with_the_row(root: Path) -> None:
    options = config(root, resized_crop=CROP, crop_padding=0, rotation=0, mean=[0.5] * 3, std=[0.5] * 3)
    for workers, words in ((0, "of its"), (1, "of its")):
        data = load_data(options, 0)
        whole = shard(root).read_bytes()
        shard(root).write_bytes(whole[:3000])
        loader = BatchLoader(replace(options, workers=workers), data.mean, data.std, torch.device("cpu"), 0, 1)
        batches = loader.train(data.train, Epochs(18, 18, "carry"), plan_batch(18, 1, None), 0, 0)
        with pytest.raises(UserError, match=rf"row \d of .*{FIRST} can't be read as an image \(.*{words}.*bytes are"):
            next(batches)
        shard(root).write_bytes(whole)


# -- the library


def test_the_library_writes_what_these_tests_write(tmp_path: Path, tree: Path) -> None:
    datasets = pytest.importorskip("datasets")
    ours = make_arrow(tmp_path / "ours", tree)
    theirs = tmp_path / "theirs"
    loaded = datasets.load_dataset("imagefolder", data_dir=str(tree), cache_dir=str(tmp_path / "cache"))
    loaded.save_to_disk(theirs, num_shards={"train": 2, "test": 2})

    names = {path.relative_to(theirs) for path in theirs.rglob("*")}
    assert {path.relative_to(ours) for path in ours.rglob("*")} == names
    for path in theirs.rglob("state.json"):
        state, written = (json.loads((one / path.relative_to(theirs)).read_text()) for one in (theirs, ours))
        assert state.keys() == written.keys()
        assert state["_data_files"] == written["_data_files"]
    for path in theirs.rglob("*.arrow"):
        found, expected = (pyarrow.ipc.open_stream(one / path.relative_to(theirs)).schema for one in (ours, theirs))
        assert found == expected
        assert json.loads(found.metadata[b"huggingface"]) == json.loads(expected.metadata[b"huggingface"])
    for split in ("train", "test"):
        by_library = datasets.load_from_disk(ours)[split].cast_column("image", datasets.Image(decode=False))
        rows = find_rows("arrow", ours)[split == "test"]
        assert by_library["label"][:] == rows.labels.tolist()
        for row, (file, _, first, size) in zip(by_library["image"], rows.places.tolist(), strict=True):
            assert row["bytes"] == Path(rows.files[file]).read_bytes()[first : first + size]

    one, other = (load_data(config(root), 0) for root in (ours, theirs))
    assert (one.content, one.classes, one.mean) == (other.content, other.classes, other.mean)
    for split, same in ((one.train, other.train), (one.test, other.test)):
        assert torch.equal(split.images.pixels, same.images.pixels)
        assert np.array_equal(split.labels, same.labels)
