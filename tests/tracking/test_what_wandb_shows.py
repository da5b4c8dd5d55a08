"""Contents of a run's page in W&B, sent by the real program to a loopback server; and failing servers."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import ROOT, TINY, configuration, environment
from copies import local_rows, timeless
from PIL import Image
from programs import Programs
from recorder import Recorded, recorder
from runs import the_run
from runs import timeless as timeless_rows

from largebatch.config.identity import run_name, setting_hash, setting_name
from largebatch.config.typed import to_yaml
from largebatch.data.load import load_data
from largebatch.runs.predictions import read_predictions
from largebatch.tracking.images import save_images
from largebatch.tracking.tracker import shown_config

TOOLS = ROOT / "tests" / "tools"
KEY = "c0ffee" * 6 + "beef"
RUN = [*(item for item in TINY if item != "tracker=none"), "cluster.threads=1"]
PLAIN = ["dataset.crop_padding=0", "dataset.flip=false", "dataset.rotation=0"]


def launch(folder: Path, server: Recorded, *overrides: str) -> subprocess.CompletedProcess[str]:
    around = {**environment(), "HOME": str(folder), **server.environment(KEY)}
    command = [sys.executable, str(ROOT / "launch.py"), *RUN, *overrides]
    return subprocess.run(command, cwd=folder, env=around, capture_output=True, text=True, timeout=120, check=False)


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{path}.{key}".lstrip("."))
    else:
        yield path, tree


def test_a_run_with_every_tracker_option(tmp_path: Path) -> None:
    extras = ["tracker.images=true", "tracker.alerts=true", "tracker.checkpoints=true", "tracker.layers_every=5"]
    extras += ["tracker.predictions=true", "tracker.run_name=mine"]
    more = ["dataset.val_fraction=0.25", "steps=12", "tracker.notes=a note", "tracker.tags=[mine]", "tracker.group=g"]
    with recorder() as server:
        done = launch(tmp_path, server, *extras, *more, *PLAIN)
        assert done.returncode == 0, done.stderr
        assert server.unknown == []
        taken, run = server.run, the_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"], "nothing is outside the run folder"

    announced = taken.announced[0]
    assert (announced["groupName"], announced["jobType"], announced["notes"]) == ("g", "clf", "a note")
    assert announced["tags"] == ["synthetic", "smallcnn", "lars", "constant", "mine"]
    assert (taken.config["optimizer"]["name"], taken.config["batch_size"]) == ("lars", 16)
    assert taken.config["optimizer_label"] == "lars + constant"
    assert taken.config["resolved"]["git_dirty"] in (True, False)
    assert len(taken.config["resolved"]["git_commit"]) == 40

    assert announced["displayName"] == "mine"

    first, *rows, last = taken.rows()
    found = read_predictions(run / "predictions.parquet")
    table = json.loads(taken.files[last["predictions"]["path"]])
    assert table["columns"] == ["image", "label", "prediction", "loss"]
    columns = list(zip(*table["data"], strict=True))
    assert columns[0] == tuple(range(21))
    assert columns[1] == tuple(found.classes[label] for label in found.label)
    assert columns[2] == tuple(found.classes[label] for label in found.prediction)
    matrix = json.loads(taken.files[last["confusion_matrix_table"]["path"]])
    assert [row[2] for row in matrix["data"]] == found.confusion().flatten().tolist()
    assert (first["step"], first["images"]["_type"]) == (0, "image-file")
    assert taken.files[first["images"]["path"]] == (run / "images.png").read_bytes()
    assert [timeless(row) for row in rows] == local_rows(run, 3)
    histograms = [row["layers/weight_norm"] for row in rows if "layers/weight_norm" in row]
    assert [sum(histogram["values"]) for histogram in histograms] == [5] * 4, "all weights, at steps 1, 2, 5 and 10"
    assert taken.events, "processor and memory"

    summary = json.loads((run / "summary.json").read_text())
    kept = {path.name: path.read_bytes() for path in (run / "checkpoints").iterdir()}
    by_alias = {alias["alias"]: artifact for artifact in server.artifacts.values() for alias in artifact["aliases"]}
    assert all(artifact["committed"] for artifact in server.artifacts.values())
    assert by_alias["last"]["files"]["checkpoint.pt"] == kept["step-00000012.pt"]
    assert by_alias["best"]["files"]["checkpoint.pt"] == kept["best.pt"]
    of_best = json.loads(by_alias["best"]["metadata"])
    assert of_best["val/accuracy"] == summary["best/val/accuracy"]
    assert of_best["epoch"] == summary["best/epoch"]
    assert torch.load(run / "checkpoints" / "best.pt", weights_only=True)["step"] == 3 * of_best["epoch"]
    assert taken.alerts == []

    raw = load_data(configuration(*RUN, *more, *PLAIN).dataset, 0, torch.device("cpu"), print, 1).train.images
    originals = {numpy.asarray(image).tobytes() for image in raw.pixels[:, 0]}  # type: ignore[attr-defined]
    grid = numpy.asarray(Image.open(run / "images.png"))[::8, ::8]
    tiles = [grid[8 * y : 8 * y + 8, 8 * x : 8 * x + 8].tobytes() for y in range(2) for x in range(8)]
    assert set(tiles) <= originals, "the images themselves, as nothing was augmented"
    assert len(set(tiles)) > 8


def test_two_views_are_shown_one_above_the_other(tmp_path: Path) -> None:
    pixels = torch.arange(2 * 3).view(2 * 3, 1, 1, 1).expand(-1, 3, 64, 64) / 5  # two views of three images
    mean, std = (0.5, 0.25, 0.0), (0.5, 1.0, 2.0)
    scaled = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    save_images(scaled, 2, mean, std, tmp_path / "images.png")
    grid = numpy.asarray(Image.open(tmp_path / "images.png"))
    assert grid.shape == (128, 512, 3)
    assert grid[::64, ::64, 1].tolist() == [[0, 51, 102, 0, 0, 0, 0, 0], [153, 204, 255, 0, 0, 0, 0, 0]]


def test_a_diverging_run_raises_an_alert_and_has_a_tag(tmp_path: Path) -> None:
    with recorder() as server:
        done = launch(tmp_path, server, "optimizer=sgd", "optimizer.lr=1e20", "steps=8", "tracker.alerts=true")
        assert done.returncode == 0, done.stderr
        (alert,) = server.run.alerts
        assert alert["title"] == f"{the_run(tmp_path).name} diverged"
        tags = [announced["tags"] for announced in server.run.announced if announced.get("tags")]
        assert [tag in tags[-1] for tag in ("diverged", "sgd")] == [True, True]
        assert server.run.summary["state"] == "diverged"
        assert "not finite at step" in alert["text"]
        assert server.run.summary["state"] == "diverged"
        assert server.unknown == []


def test_a_failing_run_raises_an_alert(tmp_path: Path) -> None:
    run = run_folder(tmp_path, "tracker.alerts=true")
    with recorder() as server:
        process = work(run, server.environment(KEY), "fails")
        process.communicate(timeout=60)
        assert process.returncode == 1
        (alert,) = server.run.alerts
        assert (alert["title"], alert["text"]) == (f"{run.name} failed", "RuntimeError: as told")
        assert server.run.exit_code == 1
        assert server.unknown == []


@pytest.mark.parametrize("preset", ["mode=bt", "optimizer=tvlars", "model=resnet18", "optimizer=timm"])
def test_wandb_can_filter_by_every_configuration_value(preset: str) -> None:
    more = ["optimizer.name=lion"] if preset == "optimizer=timm" else []
    config = configuration(preset, *more)
    for path, value in leaves(shown_config(config, {"lr": 1.0, "git_commit": None})):
        plain = value if isinstance(value, list) else [value]
        assert all(isinstance(each, str | int | float | bool) for each in plain), path


def test_seeds_of_one_setting_share_its_name() -> None:
    one, other, another = (configuration(*RUN, more) for more in ("seed=0", "seed=1", "optimizer.momentum=0.8"))
    assert setting_name(one) == setting_name(other) != setting_name(another)
    assert run_name(one) != run_name(other)
    assert setting_name(one).endswith(setting_hash(one))
    assert setting_name(one).startswith("synthetic-smallcnn-clf-lars-constant-b16-lr6-")


# ---- failing servers: the run finishes in time and its folder is complete ----

FAULTED = ["steps=1000", "eval_every=80", "tracker.layers_every=7"]


def run_folder(folder: Path, *overrides: str) -> Path:
    """Return a run folder as the launcher makes it for the worker."""
    config = configuration(*RUN, *FAULTED, *overrides)
    run = folder / run_name(config)
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(config))
    return run


def work(run: Path, around: dict[str, str], *how: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(TOOLS / "worker.py"), str(run), *how], cwd=run.parent, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**environment(), "HOME": str(run.parent), "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1", **around},
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, process: Programs) -> Path:
    run = run_folder(tmp_path_factory.mktemp("undisturbed"), "tracker=none")
    ended = process.call("worker", str(run), cwd=run)
    assert ended.code == 0, ended.output
    return run


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["500", "403", "gone", "slow"])
def test_a_failing_server_takes_nothing_from_the_run_folder(tmp_path: Path, fault: str, undisturbed: Path) -> None:
    run = run_folder(tmp_path)
    with recorder() as server:
        if fault == "slow":
            server.delay = 0.4
        process = work(run, server.environment(KEY), *(["impatient"] if fault != "slow" else []))
        if fault in ("500", "403", "gone"):
            deadline = time.monotonic() + 60
            while not any(taken.history for taken in server.runs.values()):
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.02)
            server.status = int(fault) if fault != "gone" else 200
        if fault != "gone":
            out, errors = process.communicate(timeout=60)
    if fault == "gone":
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, out + errors
    assert timeless_rows(run) == timeless_rows(undisturbed)
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "finished"
    summary = json.loads((run / "summary.json").read_text())
    assert status["ended"] - status["started"] < summary["wall_seconds"] + 20

    said = [line for line in (run / "log.txt").read_text().splitlines() if "W&B" in line]
    expected = {
        "500": "could not finish: TimeoutError", "403": "RuntimeError: W&B refused data", "gone": "could not finish",
        "slow": "W&B online",
    }  # fmt: skip
    assert expected[fault] in said[-1], said

    # A sync uploads the rest.
    with recorder() as server:
        command = [sys.executable, "-m", "largebatch.cli", "sync", str(tmp_path)]
        around = {**environment(), "HOME": str(tmp_path), **server.environment(KEY)}
        if fault != "slow":
            subprocess.run(command, env=around, cwd=tmp_path, check=True, timeout=60)
            assert [timeless(row) for row in server.run.rows()] == local_rows(run, 4)
            assert server.run.summary["test/accuracy"] == summary["test/accuracy"]
            assert server.unknown == []
