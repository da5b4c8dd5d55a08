"""Runs with ``tracker=tensorboard``, read by TensorBoard's own reader."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy
import pyarrow.parquet
import pytest
from conftest import TINY, configuration
from PIL import Image
from programs import Programs

from largebatch.config.identity import run_name
from largebatch.runs.metrics import read_rows
from largebatch.runs.predictions import read_predictions
from largebatch.tracking.rows import COLUMNS

pytest.importorskip("tensorboard", reason="needs the extra tensorboard")

RUN = [
    *(item for item in TINY if item != "tracker=none"),
    "tracker=tensorboard", "tracker.images=true", "tracker.predictions=true", "steps=30",
    "optimizer.lr=0.25", "checkpoint.every_steps=20",
]  # fmt: skip


def reader(run: Path) -> Any:
    """Return TensorBoard's reader of a run, which keeps all events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"), dict.fromkeys(("scalars", "histograms", "images", "tensors"), 0))
    return found.Reload()


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Return step and value of all scalars, by tag."""
    found = reader(run)
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def expected_scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the values of ``metrics.jsonl`` and ``layers.parquet`` by name, except the epochs and times."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in read_rows(run / "metrics.jsonl"):
        for name in row.keys() - {"step", "epoch", "wall_seconds"}:
            if row[name] is not None:
                found.setdefault(name, []).append((row["step"], pytest.approx(row[name])))
    for row in pyarrow.parquet.read_table(run / "layers.parquet").to_pylist():
        for column in COLUMNS:
            value = pytest.approx(row[column])
            found.setdefault(f"layers/{column}/{row['layer']}", []).append((row["step"], value))
    return found


def without_epochs(found: dict[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    return {name: values for name, values in found.items() if name != "epoch"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, process: Programs) -> Path:
    """Return the folder of two finished runs."""
    folder = tmp_path_factory.mktemp("whole")
    for seed in (0, 1):
        process.train(folder, *RUN, f"seed={seed}")
    return folder / "runs"


def test_one_command_shows_all_runs_of_a_grid(runs: Path) -> None:
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    for run in runs.iterdir():
        assert f"TensorBoard: tensorboard --logdir {runs}\n" in (run / "log.txt").read_text()
    shown = EventMultiplexer().AddRunsFromDirectory(str(runs)).Reload()
    assert sorted(shown.Runs()) == sorted(f"{run.name}/tensorboard" for run in runs.iterdir())


def test_tensorboard_reads_every_row_histogram_and_image_of_a_run(runs: Path) -> None:
    run = next(runs.iterdir())
    assert without_epochs(scalars(run)) == expected_scalars(run)

    found = reader(run)
    assert sorted(found.Tags()["histograms"]) == sorted(f"layers/{column}" for column in COLUMNS)
    table = pyarrow.parquet.read_table(run / "layers.parquet").to_pylist()
    for event in found.Histograms("layers/weight_norm"):
        values = [row["weight_norm"] for row in table if row["step"] == event.step and row["dimensions"] > 1]
        shown = event.histogram_value
        assert (shown.num, shown.min, shown.max) == (len(values), min(values), max(values))
        assert sum(shown.bucket) == len(values)
    assert [event.step for event in found.Histograms("layers/weight_norm")] == [1, 2, 5, 10, 20]
    (matrix,) = found.Images("confusion_matrix")
    confusion = read_predictions(run / "predictions.parquet").confusion()
    shown = numpy.asarray(Image.open(io.BytesIO(matrix.encoded_image_string)).convert("L"))[::64, ::64]
    assert (shown == (255 * confusion / confusion.sum(axis=1, keepdims=True)).round()).all()
    (image,) = found.Images("images")
    with Image.open(run / "images.png") as written:
        assert Image.open(io.BytesIO(image.encoded_image_string)).tobytes() == written.convert("RGB").tobytes()


def test_tensorboard_shows_configuration_and_summary(runs: Path) -> None:
    from tensorboard.plugins.hparams import metadata

    run = next(runs.iterdir())
    found = reader(run)
    config, summary = (
        json.loads(found.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0])
        for name in ("config", "summary")
    )
    assert config["optimizer"]["lr"] == 0.25
    assert config["resolved"]["steps"] == 30
    written = json.loads((run / "summary.json").read_text())
    assert (summary["state"], summary["test/accuracy"]) == ("finished", written["test/accuracy"])
    contents = found.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    hparams = metadata.parse_session_start_info_plugin_data(contents).hparams
    assert hparams["optimizer.lr"].number_value == 0.25
    assert hparams["optimizer.name"].string_value == "lars"


def test_a_killed_and_resumed_run_has_each_step_once(tmp_path: Path, process: Programs) -> None:
    longer = [*RUN, "steps=150"]
    run = process.kill(tmp_path, 30, *longer)
    (first,) = (run / "tensorboard").iterdir()
    assert process.train(tmp_path, *longer) == run
    assert "resumed after step" in (run / "log.txt").read_text()
    assert without_epochs(scalars(run)) == expected_scalars(run)
    (second,) = (run / "tensorboard").iterdir()
    assert second.name > first.name, "TensorBoard reads files in the order of their names"


def test_a_full_disk_ends_the_copy_with_one_message(tmp_path: Path) -> None:
    from largebatch.tracking.tensorboard_run import TensorboardRun

    said: list[str] = []
    with Path("/dev/full").open("wb") as file:
        run = TensorboardRun(file, 0.0, said.append)
        run.log(0, {"step": 1, "epoch": 0.5, "train/loss": 2.0})
        run.log(1, {"step": 2, "epoch": 1.0, "train/loss": 1.0})
        run.finish("finished")
    assert said == ["TensorBoard logging ends: could not log: OSError: [Errno 28] No space left on device"]


def test_a_tracker_that_cannot_write_does_not_stop_the_run(tmp_path: Path, process: Programs) -> None:
    run = tmp_path / "runs" / run_name(configuration(*RUN))
    run.mkdir(parents=True)
    (run / "tensorboard").touch()
    assert process.train(tmp_path, *RUN) == run
    assert (run / "log.txt").read_text().count("tracker=tensorboard is off: ") == 1
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
