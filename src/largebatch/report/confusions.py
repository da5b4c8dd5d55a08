"""Errors of the chosen runs: confusion matrices, the classes confused most often, and the worst test images."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from largebatch.report.cells import Place
from largebatch.report.chart import Chart, Switch, batch_switch, new_figure, rounded, safe
from largebatch.report.compare import Comparison
from largebatch.report.load import Problem, Run, read_predictions_of
from largebatch.report.wording import row_label
from largebatch.runs.predictions import WORST, Predictions

_MOST_CLASSES = 30  # of a matrix: more would be too small to read
_PAIRS = 3  # pairs of classes in a cell of the table


class Confusion(NamedTuple):
    classes: tuple[str, ...]
    counts: NDArray[np.int64]  # of images by label and prediction, summed over seeds


class WorstImages(NamedTuple):
    label: str  # of the row
    image: str  # data URI
    captions: list[str]


class Errors(NamedTuple):
    confusions: dict[Place, Confusion]
    worst: list[WorstImages]


def read_errors(comparison: Comparison, problems: list[Problem]) -> Errors:
    """Return the confusions of all cells, and the worst images of all rows that have some."""
    return Errors(read_confusions(comparison, problems), worst_images(comparison, problems))


def read_confusions(comparison: Comparison, problems: list[Problem]) -> dict[Place, Confusion]:
    """Return the confusions of each cell at the end of training, over its reported runs that wrote predictions."""
    found: dict[Place, Confusion] = {}
    for cell in comparison.finished:
        of_cell = [one for run in cell.drawn if (one := read_predictions_of(run, problems)) is not None]
        if of_cell and all(one.classes == of_cell[0].classes for one in of_cell):
            counts = sum((one.confusion() for one in of_cell), np.zeros((), np.int64))
            found[cell.row, cell.batch_size] = Confusion(of_cell[0].classes, counts)
    return found


def confusion_chart(comparison: Comparison, found: Mapping[Place, Confusion]) -> Chart | None:
    """Draw a matrix for each cell: the part of a class's test images that each class is predicted for, in per cent."""
    drawn = {place: one for place, one in found.items() if len(one.classes) <= _MOST_CLASSES}
    if not drawn:
        return None
    rows = [row for row in comparison.rows if any(row == of for of, _ in drawn)]
    classes = [safe(name) for name in next(iter(drawn.values())).classes]
    axis = {"type": "category", "showgrid": False}
    figure = new_figure(
        "predicted class", "class", xaxis=axis, yaxis=axis | {"autorange": "reversed"}, height=160 + 24 * len(classes)
    )
    for (row, batch), (_, counts) in drawn.items():
        pick = {"row": row_label(row), "batch": f"{batch}"}
        per_cent = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        figure.add_heatmap(
            x=classes, y=classes, z=[[rounded(value, 3) for value in line] for line in per_cent.tolist()],
            zmin=0, zmax=100, colorscale="Blues", xgap=1, ygap=1, meta={"pick": pick},
            colorbar={"title": {"text": "%"}, "thickness": 12, "len": 0.9},
            hovertemplate="%{y} predicted as %{x}: %{z} %<extra></extra>",
        )  # fmt: skip
    names = [row_label(row) for row in rows]
    switches = [Switch("row", "optimizer", [(name, name) for name in names]), batch_switch(batch for _, batch in drawn)]
    note = "Test images at the end of training, over the seeds of the chosen setting."
    return Chart("Confusion matrix", note, figure, switches)


def confused_pairs(comparison: Comparison, found: Mapping[Place, Confusion]) -> list[list[dict[str, Any]]]:
    """Return a table's cell for each row and batch size: the classes confused most often, and their images."""

    def cell(one: Confusion | None) -> dict[str, Any]:
        if one is None:
            return {"text": "-", "small": []}
        counts = one.counts.copy()
        np.fill_diagonal(counts, 0)
        order = np.argsort(-counts, axis=None, kind="stable")[:_PAIRS]
        places = [(i, j) for i, j in zip(*np.unravel_index(order, counts.shape), strict=True) if counts[i, j]]
        pairs = [f"{one.classes[i]} as {one.classes[j]}: {counts[i, j]:,}" for i, j in places]
        return {"text": pairs[0] if pairs else "none", "small": pairs[1:]}

    if not found:
        return []
    return [[cell(found.get((row, batch))) for batch in comparison.columns] for row in comparison.rows]


def worst_images(comparison: Comparison, problems: list[Problem]) -> list[WorstImages]:
    """Return the worst test images of each row, of the run with the smallest seed in the cell with the best mean.

    Only runs with ``tracker.images=true`` wrote them.
    """
    found = []
    for row in comparison.rows:
        cells = [cell for cell in comparison.row(row) if cell.mean is not None]
        best = max(cells, key=lambda cell: cell.mean or 0.0, default=None)
        run: Run | None = min(best.drawn, key=lambda run: run.seed) if best is not None else None
        if run is None or not run.folder.worst_images.exists():
            continue
        predictions = read_predictions_of(run, problems)
        if predictions is not None:
            data = base64.b64encode(run.folder.worst_images.read_bytes()).decode()
            label = f"{row_label(row)}, batch {run.config['batch_size']:,}, seed {run.seed}"
            found.append(WorstImages(label, f"data:image/png;base64,{data}", _captions(predictions)))
    return found


def _captions(predictions: Predictions) -> list[str]:
    names = predictions.classes
    return [
        f"image {i:,}: {names[predictions.label[i]]} as {names[predictions.prediction[i]]}, "
        f"loss {predictions.loss[i]:.3g}"
        for i in predictions.worst(WORST).tolist()
    ]
