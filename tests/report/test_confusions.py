"""Errors in the report: confusion matrices, the classes confused most often, worst images, damaged files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_runs import seeds, write_run

from largebatch.report.build import report
from largebatch.report.compare import Comparison, compare
from largebatch.report.confusions import confused_pairs, confusion_chart, read_errors
from largebatch.report.load import Problem
from largebatch.runs.folder import RunFolder
from largebatch.runs.predictions import Predictions, write_predictions

CLASSES = ("cat", "dog", "owl")
LABELS = np.array([0, 0, 0, 0, 1, 1, 2, 2])
PREDICTED = np.array([[0, 0, 1, 2, 1, 1, 2, 0], [0, 1, 1, 0, 1, 1, 2, 2]])  # by two seeds
PNG = b"\x89PNG some image"


def predictions(seed: int) -> Predictions:
    loss = np.where(PREDICTED[seed] == LABELS, 0.1, 1 + np.arange(8)).astype(np.float32)
    return Predictions(CLASSES, LABELS, PREDICTED[seed], loss)


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    """Return a comparison of LARS, of which two seeds wrote predictions, and LAMB without any."""
    runs = []
    for run in seeds("lars", 0.6, 0.7):
        folder = RunFolder(tmp_path / run.name)
        folder.path.mkdir()
        write_predictions(folder.predictions, predictions(run.seed))
        runs.append(replace(run, folder=folder))
    (one,) = compare([*runs, *seeds("lamb", 0.5, 0.5)])
    return one


def test_a_matrix_has_the_predictions_of_all_seeds_in_per_cent_of_a_class(comparison: Comparison) -> None:
    chart = confusion_chart(comparison, read_errors(comparison, []).confusions)
    assert chart is not None
    (matrix,) = chart.figure.data
    assert matrix.z == ([50, 37.5, 12.5], [0, 100, 0], [25, 0, 75])
    assert list(matrix.x) == list(matrix.y) == list(CLASSES)
    assert matrix.meta["pick"] == {"row": "LARS", "batch": "128"}
    assert [[option for option, _ in switch.options] for switch in chart.switches] == [["LARS"], ["128"]]


def test_the_table_has_the_classes_confused_most_often(comparison: Comparison) -> None:
    lars, lamb = confused_pairs(comparison, read_errors(comparison, []).confusions)
    assert lars == [{"text": "cat as dog: 3", "small": ["cat as owl: 1", "owl as cat: 1"]}]
    assert lamb == [{"text": "-", "small": []}]


def test_many_classes_have_a_table_and_no_matrix(comparison: Comparison) -> None:
    found = read_errors(comparison, []).confusions
    many = {
        place: one._replace(classes=tuple(map(str, range(31))), counts=np.ones((31, 31), np.int64))
        for place, one in found.items()
    }
    assert confusion_chart(comparison, many) is None
    assert confused_pairs(comparison, many)[0][0]["text"] == "0 as 1: 1"


def test_the_page_shows_the_worst_images_that_a_run_wrote(tmp_path: Path) -> None:
    runs_dir, page = tmp_path / "runs", tmp_path / "page.html"
    folder = write_run(runs_dir, "seed=0")
    write_predictions(folder.predictions, predictions(0))
    report(runs_dir, str(page))
    assert "cat as dog: 1" in page.read_text()
    assert "largest loss" not in page.read_text()
    folder.worst_images.write_bytes(PNG)
    report(runs_dir, str(page))
    text = page.read_text()
    assert "data:image/png;base64,iVBORyBzb21lIGltYWdl" in text
    assert text.index("image 7: owl as cat, loss 8") < text.index("image 3: cat as owl, loss 4")


def test_a_run_without_predictions_has_no_section_about_errors(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "seed=0")
    report(tmp_path / "runs", str(tmp_path / "page.html"))
    assert "<h3>Errors</h3>" not in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("damage", ["cut", "label"])
def test_damaged_predictions_are_named_and_left_out(comparison: Comparison, damage: str) -> None:
    run = comparison.runs[1]
    if damage == "cut":
        run.folder.predictions.write_bytes(run.folder.predictions.read_bytes()[:-5])
    else:
        write_predictions(run.folder.predictions, replace(predictions(1), prediction=PREDICTED[1] + 1))
    problems: list[Problem] = []
    found = read_errors(comparison, problems).confusions
    assert [one.counts.sum() for one in found.values()] == [8]
    assert {problem.where for problem in problems} == {run.name}
    assert problems[0].what.startswith("predictions.parquet can't be read (")
