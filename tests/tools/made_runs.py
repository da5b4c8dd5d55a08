"""Made-up runs for tests: loaded runs, and run folders with real files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conftest import configuration

from largebatch.config.identity import run_name
from largebatch.config.schema import Config
from largebatch.config.typed import to_yaml
from largebatch.report.load import Run
from largebatch.runs.folder import RunFolder
from largebatch.runs.metrics import MetricsLog

FACTS = {
    "precision": "fp32", "channels_last": False, "tf32": False, "compiled": False, "device": "cpu (x86_64)",
    "git_commit": "a" * 40, "git_dirty": False,
    "test_images": 1000, "versions": {"torch": "2.15.0"}, "processes": 1, "wall_seconds": 36.0,
    "images_per_second": 100.0,
}  # fmt: skip


def made(
    optimizer: str = "lars", schedule: str = "constant", *, batch: int = 128, lr: float = 1.0, seed: int = 0,
    test: float | None = 0.5, val: float | None = None, last: float | None = None, state: str = "finished",
    facts: dict[str, Any] | None = None, **options: Any,
) -> Run:  # fmt: skip
    """Return a loaded run.

    Args:
        test: reported test accuracy: with ``val`` at the epoch that validation chose, else at the end.
        val: best validation accuracy. None: no validation images.
        last: test accuracy at the end, if it differs from ``test``.
        options: further configuration keys, with ``__`` for dots.
    """
    config: dict[str, Any] = {
        "dataset": {"name": "digits", "val_fraction": 0.0 if val is None else 0.1},
        "model": {"name": "smallcnn"}, "mode": {"name": "clf"}, "schedule": {"name": schedule},
        "optimizer": {"name": optimizer, "lr": lr}, "batch_size": batch, "epochs": 10, "seed": seed,
    }  # fmt: skip
    for key, value in options.items():
        *path, name = key.split("__")
        node = config
        for part in path:
            node = node[part]
        node[name] = value
    summary = FACTS | {"test/accuracy": test if last is None else last, "best/test/accuracy": test}
    summary |= {"best/chosen_by": "test/accuracy" if val is None else "val/accuracy"}
    summary |= {} if val is None else {"best/val/accuracy": val}
    summary |= facts or {}
    if state not in ("finished", "diverged"):
        summary = {}
    name = f"{optimizer}-{schedule}-b{batch}-lr{lr:g}-s{seed}-{len(options)}"
    return Run(RunFolder(Path("nowhere") / name), config, state, "", summary)


def seeds(optimizer: str, *tests: float, **more: Any) -> list[Run]:
    """Return the runs of a setting with seeds 0, 1, ... and these test accuracies."""
    return [made(optimizer, test=test, seed=seed, **more) for seed, test in enumerate(tests)]


def write_run(runs_dir: Path, *overrides: str, accuracies: tuple[float, ...] = (0.4, 0.5), **status: Any) -> RunFolder:
    """Write the folder of a finished run, with one test accuracy for each epoch."""
    config: Config = configuration(*overrides)
    folder = RunFolder(runs_dir / run_name(config))
    folder.path.mkdir(parents=True)
    folder.config.write_text(to_yaml(config))
    folder.update_status(**({"state": "finished", "message": ""} | status))
    log = MetricsLog(folder.metrics, 0)
    for epoch, accuracy in enumerate(accuracies, 1):
        where = {"step": 10 * epoch, "epoch": float(epoch), "examples": 1280 * epoch, "wall_seconds": 2.0 * epoch}
        log.write(where | {"train/loss": 1 / epoch, "optim/lr": 0.1, "test/accuracy": accuracy, "test/loss": 1.0})
    log.close()
    summary = FACTS | {"test/accuracy": accuracies[-1], "best/chosen_by": "test/accuracy"}
    folder.summary.write_text(json.dumps(summary))
    return folder
