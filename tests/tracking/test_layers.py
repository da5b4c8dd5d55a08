"""Layer statistics wait on the device, leave it together, and are complete in the table and in W&B."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from conftest import ROOT, environment
from offline import history_of
from torch.utils._python_dispatch import TorchDispatchMode

from largebatch.tracking.layers import CAPACITY, LayerLog
from largebatch.tracking.rows import COLUMNS, Layer, LayerRow, RowOrder

LAYERS = [Layer("conv1.weight", 4), Layer("head.bias", 1)]


def statistics(step: int, layers: int = 2) -> dict[str, torch.Tensor]:
    """Return values that identify step, column and layer, exact in fp32."""
    return {column: step + i / 4 + torch.arange(layers) / 16 for i, column in enumerate(COLUMNS)}


def expected(step: int, layers: int = 2) -> list[dict[str, Any]]:
    """Return the table's rows of a step."""
    values = {column: [step + i / 4 + layer / 16 for layer in range(layers)] for i, column in enumerate(COLUMNS)}
    names = [("conv1.weight", 4), ("head.bias", 1)][:layers]
    return [
        {"step": step, "layer": name, "dimensions": dimensions, **{c: values[c][layer] for c in COLUMNS}}
        for layer, (name, dimensions) in enumerate(names)
    ]


def table(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    return rows


def layer_log(folder: Path, step: int = 0) -> tuple[LayerLog, list[LayerRow]]:
    """Return a log of ``layers.parquet``, and the list of the rows that leave the device."""
    left: list[LayerRow] = []
    return LayerLog(folder / "layers.parquet", step, left.append), left


class Operations(TorchDispatchMode):
    """List the operations on the device, without views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not function.is_view:
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_adding_a_row_is_one_operation_and_a_full_buffer_is_read_once(tmp_path: Path) -> None:
    log, left = layer_log(tmp_path)
    log.add(1, LAYERS, statistics(1))
    for step in range(2, CAPACITY):
        given = statistics(step)
        with Operations() as operations:
            log.add(step, LAYERS, given)
        assert operations.names == ["aten.stack.out"]
    assert left == []
    log.add(CAPACITY, LAYERS, statistics(CAPACITY))
    assert [row.step for row in left] == list(range(1, CAPACITY + 1))
    assert not (tmp_path / "layers.parquet").exists()
    log.to_write()()
    assert len(left) == CAPACITY
    assert table(tmp_path / "layers.parquet") == [row for step in range(1, CAPACITY + 1) for row in expected(step)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_not_waited_for(tmp_path: Path) -> None:
    log, left = layer_log(tmp_path)
    given = {column: values.cuda() for column, values in statistics(3).items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, CAPACITY):
            log.add(step, LAYERS, given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert left == []
    log.to_write()()
    assert len(left) == CAPACITY - 1


@pytest.mark.parametrize("rows", [1, CAPACITY - 1, CAPACITY, CAPACITY + 1, 3 * CAPACITY + 5])
@pytest.mark.parametrize("write_every", [7, 10**9])
def test_every_row_is_written_once_and_in_order(tmp_path: Path, rows: int, write_every: int) -> None:
    log, left = layer_log(tmp_path)
    for step in range(1, rows + 1):
        log.add(step, LAYERS, statistics(step))
        if step % write_every == 0:
            log.to_write()()
    log.to_write()()
    assert table(tmp_path / "layers.parquet") == [row for step in range(1, rows + 1) for row in expected(step)]
    assert [row.step for row in left] == list(range(1, rows + 1))
    assert left[-1].metrics() == {
        f"layers/{column}/{row['layer']}": row[column] for row in expected(rows) for column in COLUMNS
    }


def test_tensors_that_the_caller_reuses_are_copied(tmp_path: Path) -> None:
    log, _ = layer_log(tmp_path)
    given, layers = statistics(1), list(LAYERS)
    log.add(1, layers, given)
    for values in given.values():
        values.zero_()
    layers.clear()
    log.to_write()()
    assert table(tmp_path / "layers.parquet") == expected(1)


def test_another_set_of_layers_starts_a_new_buffer(tmp_path: Path) -> None:
    log, left = layer_log(tmp_path)
    for step in (1, 2):
        log.add(step, LAYERS, statistics(step))
    assert left == []
    log.add(3, LAYERS[:1], statistics(3, layers=1))
    assert [row.step for row in left] == [1, 2]
    log.add(4, [], statistics(4, layers=0))
    assert len(left) == 2
    log.to_write()()
    assert table(tmp_path / "layers.parquet") == [*expected(1), *expected(2), *expected(3, layers=1)]


def test_a_resumed_run_keeps_the_rows_up_to_its_step(tmp_path: Path) -> None:
    path = tmp_path / "layers.parquet"
    first, _ = layer_log(tmp_path)
    for step in (1, 2, 3, 4):
        first.add(step, LAYERS, statistics(step))
    first.to_write()()
    second, _ = layer_log(tmp_path, 2)
    second.add(3, LAYERS, statistics(30))
    second.to_write()()
    assert [row["step"] for row in table(path)] == [1, 1, 2, 2, 3, 3]
    assert [row["weight_norm"] for row in table(path)][4:] == [30.0, 30.0625]
    third, _ = layer_log(tmp_path)  # from the start, as after damaged checkpoints
    third.add(1, LAYERS, statistics(1))
    third.to_write()()
    assert table(path) == expected(1)


def test_no_rows_make_no_file(tmp_path: Path) -> None:
    log, left = layer_log(tmp_path)
    log.to_write()()
    assert left == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_stored_in_fp32(tmp_path: Path, dtype: torch.dtype) -> None:
    log, _ = layer_log(tmp_path)
    log.add(1, LAYERS, {column: torch.tensor([0.5, 1 / 3], dtype=dtype) for column in COLUMNS})
    third = float(torch.tensor(1 / 3, dtype=dtype).float())
    log.to_write()()
    assert [row["weight_norm"] for row in table(tmp_path / "layers.parquet")] == [0.5, third]


@pytest.mark.parametrize("every", [1, 3, 20])
@pytest.mark.parametrize("steps", [1, 999, 1000, 1001, 20_000, 20_001, 250_000])
def test_wandb_gets_at_most_a_thousand_later_rows_and_all_of_a_short_run(every: int, steps: int) -> None:
    interval = RowOrder(lambda *_: None, every, steps).layers_every
    assert interval % every == 0
    assert steps // interval <= 1000
    if steps // every <= 1000:
        assert interval == every or steps // every == 1000
    else:
        assert steps // interval >= 400


def test_a_histogram_has_no_parameters_of_one_dimension() -> None:
    row = LayerRow(3, LAYERS, [[1.0, 2.0], [3.0, 4.0], [5.0, 1.0], [7.0, 1.0]])
    assert list(row.columns().values()) == [[1.0], [3.0], [5.0], [7.0]]
    assert len(row.metrics()) == 8


def test_wandb_gets_the_rows_of_the_table(tmp_path: Path) -> None:
    """They arrive late, but none is dropped. W&B gets the first and every third, to stay near a thousand."""
    run = tmp_path / "digits-0123abcd"
    run.mkdir()
    command = [sys.executable, str(ROOT / "tests" / "tools" / "record_layers.py"), str(run)]
    subprocess.run(command, env=environment(), cwd=tmp_path, check=True, timeout=60)
    rows = table(run / "layers.parquet")
    assert [(row["step"], row["layer"]) for row in rows] == [
        (step, layer.name) for step in range(1, 71) for layer in (LAYERS if step <= 40 else LAYERS[:1])
    ]

    history, summary = history_of(run)
    layers = [row for row in history if "layers/weight_norm/conv1.weight" in row]
    assert [row["step"] for row in layers] == sorted({1, 2, 5, 10, *range(3, 71, 3)})
    assert len(history) == len(layers) + 1
    for got in layers:
        want = {
            f"layers/{column}/{row['layer']}": row[column]
            for row in rows
            if row["step"] == got["step"]
            for column in COLUMNS
        }
        values = {name: float(value) for name, value in got.items()}  # W&B's reader prints NaN as a string
        assert values == pytest.approx({"step": got["step"], "epoch": got["step"] / 10, **want}, rel=0, nan_ok=True)
    infinite, undefined = (next(row for row in layers if row["step"] == step) for step in (6, 9))
    assert float(infinite["layers/gradient_norm/head.bias"]) == math.inf
    assert math.isnan(float(undefined["layers/trust_ratio/head.bias"]))
    assert (summary["step"], summary["epoch"]) == (75, 7.5), "the last layer row is older than the run's end"
