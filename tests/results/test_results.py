"""A run's result in use: Python, exports, evaluations and predictions agree with the run's own metrics."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, environment
from PIL import Image
from programs import Programs

from largebatch import load_run
from largebatch.cli import main
from largebatch.config.datasets import Digits
from largebatch.data import load_data
from largebatch.data.batches import BatchLoader
from largebatch.errors import UserError
from largebatch.results.run import LoadedRun
from largebatch.runs.predictions import read_predictions

DIGITS = (
    "dataset=digits", "dataset.val_fraction=0.1", "model=tinycnn", "optimizer=adam", "optimizer.lr=0.01",
    "batch_size=256", "epochs=3", "tracker=none", "tracker.checkpoints=true", "tracker.images=true",
)  # fmt: skip
BT = (
    "mode=bt", "dataset=digits", "model=tinycnn", "batch_size=64", "steps=2", "mode.knn_every=0",
    "mode.eval_epochs=1", "mode.eval_batch_size=1024", "tracker=none",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, process: Programs) -> Path:
    return process.train(tmp_path_factory.mktemp("results"), *DIGITS)


@pytest.fixture(scope="module")
def bt_folder(tmp_path_factory: pytest.TempPathFactory, process: Programs) -> Path:
    return process.train(tmp_path_factory.mktemp("results"), *BT)


@pytest.fixture(scope="module")
def run(folder: Path) -> LoadedRun:
    return load_run(folder)


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert main(["evaluate", *arguments, "--json", "-"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_a_run_of_an_own_model_evaluates_as_in_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], process: Programs
) -> None:
    shutil.copytree(ROOT / "examples" / "mylab", tmp_path / "mylab", ignore=shutil.ignore_patterns("__pycache__"))
    own = ("model=custom", "model.target=mylab.model:Perceptron", "model.batch_norm=false")
    run = load_run(process.train(tmp_path, *(o for o in DIGITS if o != "model=tinycnn"), *own, "epochs=1"))
    assert evaluated(capsys, str(run.folder.path))["test/accuracy"] == run.summary["test/accuracy"]
    assert run.backbone()(torch.zeros(1, *run.shape)).shape == (1, 64)


def test_import_largebatch_imports_neither_torch_nor_the_rest() -> None:
    code = "import sys, largebatch; print(sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'largebatch')))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "src", env=environment(), capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "['largebatch']"


def test_a_loaded_run_classifies_test_images_as_in_training(run: LoadedRun) -> None:
    data = load_data(Digits(name="digits"), seed=0)
    network = run.model()
    assert not network.training
    with torch.no_grad():
        logits = network(run.normalised(data.test.images.pixels))
    assert float((logits.argmax(1) == data.test.labels).double().mean()) == run.summary["test/accuracy"]
    assert run.classes == data.classes
    assert run.shape == (1, 8, 8)
    assert run.config.model.name == "tinycnn"
    assert run.metrics[-1]["test/accuracy"] == run.summary["test/accuracy"]


def test_transform_of_a_file_equals_the_evaluation_s_input(run: LoadedRun, tmp_path: Path) -> None:
    test = load_data(Digits(name="digits"), seed=0).test
    pixels = test.images.pixels[5, 0].numpy()
    Image.fromarray(pixels).save(tmp_path / "five.png")
    loader = BatchLoader(run.config.dataset, run.mean, run.std, torch.device("cpu"), 0, 1)
    expected, _ = next(loader.evaluate(test, 1, torch.tensor([5])))
    assert torch.equal(run.transform(tmp_path / "five.png"), expected[0])
    assert torch.equal(run.transform(Image.fromarray(pixels)), expected[0])


def test_evaluate_repeats_the_numbers_of_the_summary(
    folder: Path, run: LoadedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluated(capsys, str(folder))
    for name in ("val/loss", "val/accuracy", "test/loss", "test/accuracy", "test/top5"):
        assert found[name] == pytest.approx(run.summary[name], rel=1e-6), name
    assert found["images"] == {"val": 144, "test": 360}
    assert found["step"] == run.summary["step"]
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    earlier = sorted((copy / "checkpoints").glob("step-*.pt"))[-2]
    earlier.replace(copy / "checkpoints" / "best.pt")
    best = evaluated(capsys, str(copy), "--best")
    (row,) = [row for row in run.metrics if row["step"] == best["step"] and "test/loss" in row]
    assert best["step"] == int(earlier.stem.removeprefix("step-")) < found["step"]
    assert best["test/loss"] == pytest.approx(row["test/loss"], rel=1e-6)


def test_evaluate_repeats_the_probe_s_numbers(bt_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((bt_folder / "summary.json").read_text())
    found = evaluated(capsys, str(bt_folder))
    assert found["test/accuracy"] == summary["test/accuracy"]
    assert found["test/loss"] == pytest.approx(summary["test/loss"], rel=1e-5)


def folder_of_digits(root: Path, names: tuple[str, ...]) -> Path:
    """Write test images of digits as files, in folders of these classes."""
    data = load_data(Digits(name="digits"), seed=0)
    for part in ("train", "test"):
        for label, name in enumerate(names):
            place = root / part / name
            place.mkdir(parents=True)
            chosen = (data.test.labels == int(name[-1]) if name[-1].isdigit() else label).nonzero().flatten().tolist()
            for i in chosen[:12]:
                Image.fromarray(data.test.images.pixels[i, 0].numpy()).save(place / f"{i:03}.png")
    return root


def test_evaluate_on_other_images_matches_classes_by_name(
    folder: Path, run: LoadedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder_of_digits(tmp_path / "files", ("3", "8"))  # labels 0 and 1 there, 3 and 8 in the run
    found = evaluated(capsys, str(folder), "--dataset", "imagefolder", f"dataset.root={root}")
    paths = sorted((root / "test").rglob("*.png"))
    with torch.no_grad():
        predicted = run.model()(torch.stack([run.transform(path) for path in paths])).argmax(1).tolist()
    right = [run.classes[label] == path.parent.name for path, label in zip(paths, predicted, strict=True)]
    assert found["test/accuracy"] == pytest.approx(np.mean(right))
    assert found["images"] == {"test": 24}


def test_evaluate_names_what_it_cannot_do(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder_of_digits(tmp_path / "files", ("3", "cat8"))
    assert main(["evaluate", str(folder), "--dataset", "imagefolder", f"dataset.root={root}"]) == 2
    assert "has 1 of 2 classes that the run doesn't know, such as cat8" in capsys.readouterr().err
    assert main(["evaluate", str(folder), "optimizer.lr=3"]) == 2
    assert "optimizer.lr=3: only the data set can change" in capsys.readouterr().err


def test_a_surface_has_the_training_loss_at_its_centre(
    folder: Path, run: LoadedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = load_data(run.config.dataset, run.config.seed).train
    with torch.no_grad():
        logits = run.model()(run.normalised(train.images.pixels))
    expected = torch.nn.functional.cross_entropy(logits, train.labels).item()
    out = tmp_path / "slice.html"
    all_images = ("--samples", str(len(train)), "--points", "3", "--out", str(out))
    for options, rows in (("--radius", "0.1"), 1), (("--plane", "--seed", "1"), 3):
        assert main(["surface", str(folder), *all_images, *options]) == 0
        assert capsys.readouterr().out.split() == [str(out), str(tmp_path / "slice.json")]
        found = json.loads((tmp_path / "slice.json").read_text())
        assert (len(found["loss"]), len(found["loss"][0]), found["images"]) == (rows, 3, len(train))
        assert found["loss"][rows // 2][1] == pytest.approx(expected, rel=1e-5)
        assert found["loss"][0][0] != pytest.approx(expected, rel=1e-5)
        assert "Plotly.newPlot" in out.read_text()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--points", "4"], "--points 4: must be an odd number of at least 3. Fix: --points 5"),
        (["--radius", "0"], "--samples 512 --radius 0: must be above 0"),
        (["--points", "3", "--samples", "9", "--out", "a.json"], "the numbers get this name. Fix: --out a.html"),
        (["--out", "no/a.html"], "--out no/a.html: no is not a folder. Fix: create it"),
    ],
)
def test_an_impossible_surface_is_refused(
    folder: Path, options: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["surface", str(folder), *options]) == 2
    assert problem in capsys.readouterr().err


def test_a_surface_of_another_mode_is_refused(bt_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["surface", str(bt_folder)]) == 2
    assert "mode=bt. Allowed: runs with mode=clf" in capsys.readouterr().err


def test_predict_names_a_broken_image_and_predicts_the_others(
    folder: Path, run: LoadedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder_of_digits(tmp_path / "files", ("3", "8")) / "test"
    (root / "3" / "broken.png").write_bytes(b"no image")
    (single := tmp_path / "one.png").write_bytes(next((root / "8").iterdir()).read_bytes())
    assert main(["predict", str(folder), str(root), str(single), str(tmp_path / "missing.png")]) == 1
    printed = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(printed.out)))
    assert len(rows) == 25
    assert rows[-1]["file"] == str(single)
    with torch.no_grad():
        logits = run.model()(torch.stack([run.transform(row["file"]) for row in rows]))
    assert [row["class"] for row in rows] == [run.classes[label] for label in logits.argmax(1).tolist()]
    assert [float(row["probability"]) for row in rows] == pytest.approx(
        logits.softmax(1).max(1).values.tolist(), abs=2e-6
    )
    errors = printed.err.splitlines()
    assert len(errors) == 2
    assert "broken.png can't be read as an image" in errors[0]
    assert "missing.png" in errors[1]
    assert main(["predict", str(folder), str(single), "--out", str(tmp_path / "out.csv")]) == 0
    assert (tmp_path / "out.csv").read_text().startswith("file,class,probability\n")


def test_exported_safetensors_give_the_model_s_outputs(folder: Path, run: LoadedRun, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file

    out = tmp_path / "digits.safetensors"
    assert main(["export", str(folder), "--to", "safetensors", "--out", str(out)]) == 0
    network = run.model()
    expected = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert expected.keys() == load_file(out).keys()
    for parameter in network.parameters():
        torch.nn.init.zeros_(parameter)
    network.load_state_dict(load_file(out))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items())
    with safe_open(out, "pt") as file:
        metadata = {key: json.loads(text) for key, text in file.metadata().items()}
    assert metadata["classes"] == list("0123456789")
    assert metadata["mean"] == list(run.mean)
    assert metadata["image"] == [1, 8, 8]
    assert metadata["run"] == folder.name
    assert folder.name.endswith(metadata["identity"])


def test_the_torch_export_of_a_backbone_has_no_classifier(
    bt_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(bt_folder), "--to", "torch"]) == 0
    found = torch.load(capsys.readouterr().out.strip(), weights_only=True)
    network = load_run(bt_folder).backbone()
    network.load_state_dict(found["state_dict"])
    assert found["metadata"]["output"] == "features"
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 256)


def test_an_onnx_export_gives_the_model_s_outputs(
    folder: Path, run: LoadedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = tmp_path / "digits.onnx"
    assert main(["export", str(folder), "--to", "onnx", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    images = torch.randn(5, *run.shape, generator=torch.Generator().manual_seed(0))
    for some in (images, images[:1]):  # any number of images
        (logits,) = runtime.InferenceSession(out).run(["logits"], {"images": some.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(logits, run.model()(some).numpy(), rtol=1e-4, atol=1e-5)
    metadata = {entry.key: json.loads(entry.value) for entry in onnx.load(out).metadata_props}
    assert metadata["std"] == list(run.std)
    assert metadata["classes"] == list(run.classes)


def test_a_missing_package_is_one_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)  # as if it weren't installed
    assert main(["export", str(folder), "--to", "onnx", "--out", str(tmp_path / "out.onnx")]) == 2
    assert capsys.readouterr().err == "error: onnx isn't installed. Fix: pip install 'largebatch[export]'\n"
    assert not list(tmp_path.iterdir())


def test_predictions_are_those_of_the_final_evaluation(folder: Path, run: LoadedRun) -> None:
    found = read_predictions(folder / "predictions.parquet")
    assert (found.label == found.prediction).mean() == run.summary["test/accuracy"]
    assert found.loss.mean() == pytest.approx(run.summary["test/loss"], rel=1e-5)
    assert found.classes == run.classes
    assert found.confusion().sum() == 360
    assert np.trace(found.confusion()) == round(360 * run.summary["test/accuracy"])
    assert found.loss[found.worst(3)].tolist() == sorted(found.loss.tolist())[:-4:-1]
    with Image.open(folder / "worst.png") as image:
        assert image.size == (8 * 64, 2 * 64)


def test_a_run_without_checkpoints_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "some-run").mkdir()
    (tmp_path / "some-run" / "status.json").write_text('{"state": "failed"}')
    with pytest.raises(UserError, match=r"has no last checkpoint. Fix: train the run"):
        load_run(tmp_path / "some-run")
    with pytest.raises(UserError, match=r"has no best checkpoint. Fix: train with tracker.checkpoints=true"):
        load_run("some-run", "best", tmp_path)
