"""Images in Arrow shards, listed without torch: the plan counts them and the worker decodes them.

The folder is that of ``DatasetDict.save_to_disk`` of Hugging Face datasets: ``root/<split>/state.json`` names the
shards. A shard is a stream of Arrow record batches with an Image column (bytes and path) and a ClassLabel column. The
schema's metadata ``huggingface`` describes them and has the class names. Arrow doesn't compress the bytes of an image,
so each image is a range of bytes of its shard, and any process can read it without Arrow and in any order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from largebatch.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow
    from numpy.typing import NDArray

TEST_SPLITS = ("test", "validation", "val")
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream
_HOW = "it must be the folder of save_to_disk of a DatasetDict (Hugging Face datasets)"


@dataclass(frozen=True)
class Rows:
    """Images of a split.

    Attributes:
        files: shards.
        places: int64 [N, 4]: the index of the image's shard, the number of its row in the shard, the first of its bytes
            in the shard, and their number (-1: the row has none).
        labels: int64 [N]; -1: unknown.
        classes: names.
    """

    files: tuple[str, ...]
    places: NDArray[np.int64]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]

    @property
    def class_sizes(self) -> tuple[int, ...]:
        """Number of images of each class."""
        import numpy as np

        return tuple(np.bincount(self.labels, minlength=len(self.classes)).tolist())


_Part = tuple["NDArray[np.int64]", "NDArray[np.int64]"]  # places and labels


class _Columns(NamedTuple):
    image: str
    label: str
    classes: tuple[str, ...]


def find_rows(name: str, root: Path) -> tuple[Rows, Rows]:
    """Return the rows of ``root/train`` and of the test set: the first of ``TEST_SPLITS`` that has labels.

    Raises:
        UserError: naming the file that is missing or damaged, the row without a label, or the class without a row.
            ``name`` is the data set's.
    """
    if not (root / "train" / "state.json").is_file():
        one = "; it has one split only, which train_test_split divides" if (root / "state.json").is_file() else ""
        raise UserError(f"dataset={name}: no train/state.json in dataset.root={root}{one}; {_HOW}")
    train = _split(root / "train")
    _check_labels(train)
    for label, size in enumerate(train.class_sizes):
        if size == 0:
            raise UserError(
                f"{root / 'train'}: no row has the class {train.classes[label]} (label {label}). Fix: name the classes "
                "of the rows alone, by cast_column with a ClassLabel"
            )
    found = [split for split in TEST_SPLITS if (root / split / "state.json").is_file()]
    for split in found:
        test = _split(root / split)
        if (test.labels >= 0).any() or split == found[-1]:  # Hub test sets without labels have -1
            if test.classes != train.classes:
                raise UserError(f"{root / split}: has other class names than {root / 'train'}")
            _check_labels(test)
            return train, test
    missing = " or ".join(f"{split}/state.json" for split in TEST_SPLITS)
    raise UserError(f"dataset={name}: no {missing} in dataset.root={root}; {_HOW}")


def _check_labels(rows: Rows) -> None:
    if len(rows.labels) == 0:
        raise UserError(f"{Path(rows.files[0]).parent}: has no rows")
    wrong = (rows.labels < 0) | (rows.labels >= len(rows.classes))
    if wrong.any():
        first = int(wrong.argmax())
        file, number = rows.places[first, :2].tolist()
        raise UserError(
            f"row {number} of {rows.files[file]}: has the label {rows.labels[first]}. Allowed: 0 to "
            f"{len(rows.classes) - 1}, the positions in its {len(rows.classes)} class names"
        )


def _split(folder: Path) -> Rows:
    import numpy as np

    state = folder / "state.json"
    try:
        files = [folder / Path(shard["filename"]).name for shard in json.loads(state.read_bytes())["_data_files"]]
    except (ValueError, KeyError, TypeError):
        files = []
    if not files:
        raise UserError(f"{state}: names no shards; {_HOW}")
    places, labels, columns = [], [], None
    for number, file in enumerate(files):
        found, parts = _shard(file, number)
        if columns not in (None, found):
            raise UserError(f"{file}: has other columns or class names than {files[0]}")
        columns = found
        places += [part for part, _ in parts]
        labels += [part for _, part in parts]
    assert columns is not None
    return Rows(tuple(map(str, files)), np.concatenate(places), np.concatenate(labels), columns.classes)


def _shard(file: Path, index: int) -> tuple[_Columns, list[_Part]]:
    """Return the columns and the parts of the shard with this index."""
    import pyarrow

    try:
        if file.stat().st_size <= len(_END):
            raise UserError(f"{file}: is cut short")
        with pyarrow.memory_map(str(file)) as mapped:
            whole = mapped.read_buffer()
            if whole[-len(_END) :].to_pybytes() != _END:
                raise UserError(f"{file}: is damaged or cut short: the end of an Arrow stream is missing")
            stream = pyarrow.ipc.open_stream(whole)
            columns = _columns(file, stream.schema)
            return columns, list(_parts(file, index, stream, columns, whole))
    except (OSError, ValueError, LookupError, AttributeError, pyarrow.ArrowException) as error:
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{file}: is missing, but {file.parent / 'state.json'} names it") from None
        raise UserError(f"{file}: isn't a readable Arrow stream ({' '.join(str(error).split())})") from error


def _columns(file: Path, schema: pyarrow.Schema) -> _Columns:
    """Return the names of the Image and the ClassLabel column, and the class names."""
    import pyarrow

    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    kinds = {column: feature.get("_type") for column, feature in features.items() if isinstance(feature, dict)}
    images, labels = ([c for c, kind in kinds.items() if kind == wanted] for wanted in ("Image", "ClassLabel"))
    if len(images) != 1 or len(labels) != 1:
        found = ", ".join(f"{column} ({kind})" for column, kind in kinds.items()) or "none with a Hugging Face type"
        raise UserError(
            f"{file}: has the columns {found}. Allowed: one Image and one ClassLabel column. Fix: remove_columns "
            "leaves out others, cast_column sets a type"
        )
    image, label = (schema.field(column).type for column in (*images, *labels))
    in_bytes = pyarrow.types.is_struct(image) and image.get_field_index("bytes") >= 0
    stored = image.field("bytes").type if in_bytes else image
    if not (in_bytes and (stored == pyarrow.binary() or stored == pyarrow.large_binary())):
        raise UserError(f"{file}: column {images[0]} is of type {image}. Allowed: struct with bytes of type binary")
    if not pyarrow.types.is_integer(label):
        raise UserError(f"{file}: column {labels[0]} is of type {label}. Allowed: integers")
    names = features[labels[0]].get("names")
    if not isinstance(names, list) or len(names) < 2 or not all(isinstance(one, str) for one in names):
        raise UserError(f"{file}: column {labels[0]} has the class names {names}. Allowed: two or more texts")
    return _Columns(images[0], labels[0], tuple(names))


def _parts(
    file: Path, index: int, stream: pyarrow.RecordBatchReader, columns: _Columns, whole: pyarrow.Buffer
) -> Iterator[_Part]:
    """Yield places and labels of no row, and of each record batch."""
    import numpy as np

    yield np.empty((0, 4), np.int64), np.empty(0, np.int64)
    first = 0
    for batch in stream:
        images, labels = batch.column(columns.image), batch.column(columns.label)
        images.validate(full=True)
        if labels.null_count:
            row = first + labels.is_null().to_pylist().index(True)
            raise UserError(f"row {row} of {file}: has no label. Allowed: 0 to {len(columns.classes) - 1}")
        begins, sizes = _ranges(file, images, whole)
        numbers = np.arange(first, first + len(batch))
        yield np.stack([np.full_like(numbers, index), numbers, begins, sizes], 1), labels.to_numpy().astype(np.int64)
        first += len(batch)


def _ranges(
    file: Path, images: pyarrow.StructArray, whole: pyarrow.Buffer
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first byte of each image in ``whole`` and the number of bytes, -1 for null."""
    import numpy as np
    import pyarrow

    data = images.field("bytes")
    _, offsets, values = data.buffers()
    if len(data) == 0 or values is None:
        return np.zeros(len(data), np.int64), np.full(len(data), -1)
    kind = np.int64 if data.type == pyarrow.large_binary() else np.int32
    ends = np.frombuffer(offsets, kind)[data.offset : data.offset + len(data) + 1].astype(np.int64)
    base = values.address - whole.address
    if not 0 <= base <= base + values.size <= whole.size:
        raise UserError(f"{file}: is compressed. Fix: save_to_disk writes it uncompressed")
    absent = images.is_null().to_numpy(zero_copy_only=False) | data.is_null().to_numpy(zero_copy_only=False)
    return base + ends[:-1], np.where(absent, -1, np.diff(ends))
