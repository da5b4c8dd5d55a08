"""Find options that do nothing in the runs of a comparison."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from largebatch.config.idle import idle_options
from largebatch.config.lr_scaling import LrScalingConfig
from largebatch.config.optimizers import OPTIMIZERS
from largebatch.config.options import problems_of
from largebatch.config.schedules import SCHEDULES
from largebatch.config.schema import Config
from largebatch.report.cells import Cell, Setting
from largebatch.report.compare import Comparison
from largebatch.report.load import number
from largebatch.report.wording import batches, row_label


def idle(comparison: Comparison) -> Iterator[tuple[str, str]]:
    """Yield title and text of a warning for each idle option. The text names the cells whose settings have it."""
    places: dict[str, dict[str, list[int]]] = defaultdict(dict)  # rows and batch sizes by note
    for cell in comparison.shown:
        for note in dict.fromkeys(note for setting in cell.settings for note in _notes(setting, cell)):
            places[note].setdefault(row_label(cell.row), []).append(cell.batch_size)
    found: dict[str, list[str]] = defaultdict(list)
    for note, rows in places.items():
        where = ", ".join(f"{row} at {batches(sizes)}" for row, sizes in rows.items())
        found[note.partition("=")[0]].append(f"{where}: {note}.")
    for key, said in found.items():
        yield f"Option without effect ({key})", " ".join(said)


def _notes(setting: Setting, cell: Cell) -> list[str]:
    """Return the notes of a setting with a known length, if this version knows and allows all of its options."""
    run = next((run for run in setting.runs if run.done), None)
    steps, epoch = (run.metric(name) if run else None for name in ("steps", "steps_per_epoch"))
    if run is None or steps is None or epoch is None:
        return []
    tree = run.config
    decay = number(tree.get("ema_decay")) or 0.0
    try:
        config = Config(
            optimizer=OPTIMIZERS[cell.row.optimizer](**tree["optimizer"]),
            schedule=SCHEDULES[cell.row.schedule](**tree["schedule"]),
            lr_scaling=LrScalingConfig(**tree["lr_scaling"]),
            batch_size=cell.batch_size,
            ema_decay=decay if 0 < decay < 1 else None,
        )
    except (KeyError, TypeError):
        return []
    if any(map(problems_of, (config.optimizer, config.schedule, config.lr_scaling))):
        return []
    return idle_options(config, int(run.metric("pretraining_steps") or steps), float(epoch))
