"""``predictions.parquet``: label, prediction and loss of each test image at a run's final evaluation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from largebatch.runs.folder import replace_file

WORST = 16  # images with the largest loss in a run's worst.png


@dataclass(frozen=True)
class Predictions:
    """Predictions for n test images, in the order of the data set.

    Attributes:
        classes: names of the classes, by label.
        label, prediction: integers [n].
        loss: cross-entropy, float32 [n].
    """

    classes: tuple[str, ...]
    label: NDArray[np.integer[Any]]
    prediction: NDArray[np.integer[Any]]
    loss: NDArray[np.float32]

    def worst(self, most: int) -> NDArray[np.int64]:
        """Return the indices of the ``most`` images with the largest loss, the largest first."""
        return np.argsort(-self.loss, kind="stable")[:most]

    def confusion(self) -> NDArray[np.int64]:
        """Return the number of images by label (rows) and prediction (columns), [classes, classes]."""
        count = len(self.classes)
        places = self.label.astype(np.int64) * count + self.prediction
        return np.bincount(places, minlength=count**2).reshape(count, count)


def write_predictions(path: Path, found: Predictions) -> None:
    """Write the table, with the names of the classes in the schema's metadata. Labels take two bytes if they can."""
    import pyarrow
    import pyarrow.parquet

    small = np.int16 if len(found.classes) <= 1 << 15 else np.int32
    table = pyarrow.table(
        {"label": found.label.astype(small), "prediction": found.prediction.astype(small), "loss": found.loss}
    ).replace_schema_metadata({"classes": json.dumps(found.classes)})
    replace_file(path, partial(pyarrow.parquet.write_table, table))


def read_predictions(path: Path) -> Predictions:
    """Return the content of the file.

    Raises:
        ValueError: a label or a prediction isn't one of the classes.
        Exception: the file can't be read, of a type of ``pyarrow`` or of Python.
    """
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path, columns=["label", "prediction", "loss"])
    classes = tuple(map(str, json.loads(table.schema.metadata[b"classes"])))
    label, prediction, loss = (table[name].to_numpy() for name in ("label", "prediction", "loss"))
    for name, values in (("label", label), ("prediction", prediction)):
        if values.dtype.kind != "i" or (len(values) and not 0 <= values.min() <= values.max() < len(classes)):
            raise ValueError(f"a {name} isn't one of the {len(classes)} classes")
    return Predictions(classes, label, prediction, loss.astype(np.float32))
