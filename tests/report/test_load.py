"""The report reads complete runs and names everything else in the folder, without a traceback."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import configuration
from made_runs import write_run

from largebatch.config.identity import decisive, identity
from largebatch.report.compare import compare
from largebatch.report.curves import read_histories
from largebatch.report.load import Problem, flat, load_runs, number, read_history, read_layers, thinned
from largebatch.runs.folder import RunFolder
from largebatch.tracking.rows import COLUMNS

LARS = ("optimizer=lars", "dataset=digits")


def test_a_complete_run_is_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path, *LARS, "batch_size=256", "optimizer.lr=3")
    (run,), problems = load_runs(tmp_path)
    assert problems == []
    assert (run.name, run.state, run.config["batch_size"], run.options["optimizer.lr"]) == (
        folder.name, "finished", 256, 3.0,
    )  # fmt: skip
    assert run.metric("test/accuracy") == 0.5
    assert [row["test/accuracy"] for row in read_history(run, problems) if "test/accuracy" in row] == [0.4, 0.5]


def test_options_are_the_keys_of_the_identity(tmp_path: Path) -> None:
    write_run(tmp_path, "optimizer=tvlars", "dataset=digits")
    (run,), _ = load_runs(tmp_path)
    config = configuration("optimizer=tvlars", "dataset=digits")
    assert run.name.endswith(identity(config))
    assert "cluster.name" not in run.options
    assert "dataset.root" not in run.options
    assert run.options["optimizer.lmbda_relative"] == config.optimizer.lmbda_relative
    assert decisive(run.config)["dataset"]["val_fraction"] == 0.0


def overwrite(name: str, text: str) -> Callable[[RunFolder], None]:
    return lambda folder: (folder.path / name).write_text(text) and None  # type: ignore[return-value]


def remove(name: str) -> Callable[[RunFolder], None]:
    return lambda folder: (folder.path / name).unlink()


def config_with(key: str, value: str) -> Callable[[RunFolder], None]:
    def damage(folder: RunFolder) -> None:
        folder.config.write_text(re.sub(f"(?m)^{key}: .*", f"{key}: {value}", folder.config.read_text()))

    return damage


def without_key(folder: RunFolder) -> None:
    """Remove batch_size from config.yaml."""
    kept = [line for line in folder.config.read_text().splitlines() if not line.startswith("batch_size:")]
    folder.config.write_text("\n".join(kept))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (overwrite("status.json", ""), "status.json can't be read"),
        (overwrite("status.json", '{"state": "fini'), "status.json can't be read"),
        (overwrite("status.json", "[]"), "status.json is not a mapping"),
        (overwrite("status.json", "{}"), "status.json has an unknown state (None)"),
        (overwrite("status.json", '{"state": "exploded"}'), "('exploded')"),
        (remove("status.json"), "status.json is missing"),
        (remove("config.yaml"), "config.yaml is missing"),
        (overwrite("config.yaml", ""), "config.yaml is not a mapping"),
        (overwrite("config.yaml", "dataset: {name: [unclosed"), "config.yaml can't be read"),
        (overwrite("config.yaml", "\0\1"), "config.yaml can't be read"),
        (overwrite("config.yaml", "dataset: digits\n"), "config.yaml has no valid dataset.name"),
        (overwrite("config.yaml", "dataset.name: digits\n"), "config.yaml has no valid dataset.name"),
        (config_with("  name", "odd"), "config.yaml has an unknown data set or mode"),
        (config_with("batch_size", "-1"), "config.yaml has an invalid batch size or learning rate"),
        (config_with("batch_size", "true"), "config.yaml has no valid batch_size (True)"),
        (config_with("  lr", ".nan"), "config.yaml has an invalid batch size or learning rate"),
        (without_key, "config.yaml has no valid batch_size (None)"),
        (remove("summary.json"), "summary.json is missing"),
        (overwrite("summary.json", '{"test/accuracy": 0.'), "summary.json can't be read"),
        (overwrite("summary.json", '{"test/accuracy": null}'), "summary.json has no test/accuracy"),
    ],
)
def test_a_damaged_run_is_left_out_and_named(damage: Callable[[RunFolder], None], says: str, tmp_path: Path) -> None:
    whole = write_run(tmp_path, *LARS)
    broken = write_run(tmp_path, *LARS, "seed=1")
    damage(broken)
    runs, problems = load_runs(tmp_path)
    assert [run.name for run in runs] == [whole.name]
    ((where, what),) = [(problem.where, problem.what) for problem in problems]
    assert where == broken.name
    assert says in what


def test_other_folders_are_named_and_files_and_hidden_folders_skipped(tmp_path: Path) -> None:
    write_run(tmp_path, *LARS)
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    (tmp_path / ".slurm").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    runs, problems = load_runs(tmp_path)
    assert len(runs) == 1
    assert problems == [Problem("photos", "not a run folder: it has no config.yaml, status.json or metrics.jsonl")]


def test_a_copied_folder_does_not_count_as_a_second_seed(tmp_path: Path) -> None:
    folder = write_run(tmp_path, *LARS)
    shutil.copytree(folder.path, tmp_path / "zz-copy")
    runs, problems = load_runs(tmp_path)
    assert [run.name for run in runs] == [folder.name]
    assert problems == [
        Problem("zz-copy", f"the same configuration and seed as {folder.name}; only {folder.name} counts")
    ]  # fmt: skip


def test_a_running_state_without_a_process_is_interrupted(tmp_path: Path) -> None:
    write_run(tmp_path, *LARS, state="running")
    (run,), problems = load_runs(tmp_path)
    assert (run.state, run.done, problems) == ("interrupted", False, [])


def test_earlier_repetitions_inside_a_run_are_no_runs(tmp_path: Path) -> None:
    folder = write_run(tmp_path, *LARS)
    shutil.copytree(folder.path, tmp_path / "previous")
    (tmp_path / "previous").rename(folder.path / "previous-1")
    runs, problems = load_runs(tmp_path)
    assert (len(runs), problems) == (1, [])


def test_an_incomplete_last_row_is_skipped_and_a_broken_row_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path, *LARS)
    runs, problems = load_runs(tmp_path)
    with folder.metrics.open("a") as file:
        file.write('{"step": 30, "epo')
    (comparison,) = compare(runs)
    assert len(read_histories(comparison, problems)[folder.name]) == 2
    assert problems == []
    with folder.metrics.open("a") as file:
        file.write("\n")
    assert read_histories(comparison, problems)[folder.name] == []
    ((where, what),) = [(problem.where, problem.what) for problem in problems]
    assert where == folder.name
    assert what.startswith("metrics.jsonl can't be read (")
    assert what.endswith("its curves are left out")


def test_rows_without_a_valid_step_are_skipped(tmp_path: Path) -> None:
    folder = write_run(tmp_path, *LARS)
    with folder.metrics.open("a") as file:
        file.write('[]\n{"step": NaN, "epoch": 9}\n{"epoch": 9}\n{"step": 30, "epoch": 3, "test/accuracy": 1e308}\n')
    (run,), problems = load_runs(tmp_path)
    assert [row["step"] for row in read_history(run, problems)] == [10, 20, 30]
    assert number(1e308) is None  # so no curve contains it
    assert problems == []


def test_layers_are_read_at_few_steps_and_damaged_files_named(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    folder = write_run(tmp_path, *LARS)
    (run,), problems = load_runs(tmp_path)
    assert read_layers(run, 10, problems) is None  # a run without layer statistics is no problem
    rows = [(step, layer, step + at) for step in range(1, 102) for at, layer in enumerate(("b", "a"))]
    columns = {"step": [r[0] for r in rows], "layer": [r[1] for r in rows]}
    columns["dimensions"] = [4 if r[1] == "b" else 1 for r in rows]
    norms = {name: [float(r[2]) for r in rows] for name in COLUMNS}
    pyarrow.parquet.write_table(pyarrow.table(columns | norms), folder.layers)
    layers = read_layers(run, 3, problems)
    assert layers is not None
    assert (layers.steps, layers.names, layers.dimensions) == ([1, 26, 101], ["b", "a"], [4, 1])
    assert layers.columns["gradient_norm"] == [[1.0, 26.0, 101.0], [2.0, 27.0, 102.0]]
    assert problems == []

    content = folder.layers.read_bytes()
    for cut in (content[: len(content) // 2], b"", content[:-1]):
        folder.layers.write_bytes(cut)
        found: list[Problem] = []
        assert read_layers(run, 3, found) is None
        assert found[0].what.startswith("layers.parquet can't be read (")


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("most", [2, 3, 7, 19, 100])
def test_thinned_keeps_both_ends(most: int, power: int) -> None:
    kept = thinned(list(range(20)), most, power)
    assert (kept[0], kept[-1], len(kept)) == (0, 19, min(most, 20))
    assert kept == sorted(set(kept))


def test_thinned_keeps_the_first_items_and_at_most_doubles_the_distance_of_the_last() -> None:
    kept = thinned(list(range(1000)), 120, power=2)
    assert kept[:8] == list(range(8))
    distances = [after - before for before, after in itertools.pairwise(kept)]
    assert max(distances) <= 2 * 1000 / 119 + 1


def test_flat_joins_keys_and_drops_none() -> None:
    tree = {"a": {"b": 1, "c": None, "d": {}}, "e": [1, 2], "f": json.loads("true")}
    assert flat(tree) == {"a.b": 1, "e": "[1, 2]", "f": True}
