"""Fill the tables of the page with text."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from largebatch.report.chart import Styles
from largebatch.report.compare import BY_VALIDATION, Comparison, Place, differing, distinct
from largebatch.report.curves import Reached
from largebatch.report.load import Run
from largebatch.report.wording import cell_accuracy, cell_counts, decimals, plural, row_label, short, states, value


def comparison_table(comparison: Comparison, style: Styles) -> list[dict[str, Any]]:
    digits = decimals(comparison)
    rows = []
    for row in comparison.rows:
        # Keys that vary within a cell: choosing a setting meant choosing their values.
        varied = sorted({key for cell in comparison.row(row) for key in differing(cell.runs)} - {"seed"})
        cells = []
        for batch in comparison.columns:
            cell = comparison.cells.get((row, batch))
            if cell is None:
                cells.append({"accuracy": "-", "lost": False})
                continue
            options = cell.chosen.options if cell.chosen else {}
            cells.append({
                "accuracy": cell_accuracy(cell, digits),
                "bold": cell in comparison.bold,
                "lost": cell.mean is None,
                "setting": ", ".join(f"{short(key)} {value(options[key])}" for key in varied if key in options),
                "counts": cell_counts(cell),
            })  # fmt: skip
        drawn = style[row]
        rows.append({"label": row_label(row), "colour": drawn.colour, "dash": drawn.dash, "cells": cells})
    return rows


def caption(comparison: Comparison) -> list[str]:
    by = {cell.chosen_by for cell in comparison.shown if cell.chosen}
    said = ["Test accuracy in per cent: mean ± spread. The spread is the sample standard deviation over seeds."]
    if BY_VALIDATION in by:
        said.append(
            "Validation chose the setting with the best mean validation accuracy, and in each run the epoch whose test "
            "accuracy is shown. The test set chose nothing."
        )
    if by - {BY_VALIDATION}:
        said.append("Without validation images, the table shows the test accuracy at the end of training.")
    said.append(
        "Bold: the optimizer leads its column by more than the spread. Its range mean ± spread lies above the range of "
        "every other optimizer that finished. Without bold, no optimizer leads by more than the spread."
    )
    images = max((run.metric("test_images") or 0 for run in comparison.runs), default=0)
    if images:
        said.append(f"Each of the {images:,.0f} test images counts {100 / images:.2g} %.")
    return said


def reached_table(comparison: Comparison, reached: Mapping[Place, Reached]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return two lines of text for each batch size of each row."""

    def lines(result: Reached | None) -> tuple[str, str]:
        if result is None or not result.runs:
            return "-", ""
        seeds = f"{result.reached} of {plural(result.runs, 'seed')}"
        if result.at is None:
            return "never", seeds
        return f"{result.at.steps:,.0f} steps", f"{result.at.epochs:.3g} epochs, {result.at.seconds:.3g} s; {seeds}"

    return [
        (row_label(row), [lines(reached.get((row, batch))) for batch in comparison.columns]) for row in comparison.rows
    ]


def keys_table(comparison: Comparison) -> list[list[str]]:
    """Return the keys that differ between runs, with each row's values."""
    runs_of = [[run for cell in comparison.row(row) for run in cell.runs] for row in comparison.rows]
    found = []
    for key in differing(comparison.runs):
        found.append([key, *(", ".join(map(value, distinct(runs, key))) for runs in runs_of)])
    return found


def settings_table(comparison: Comparison) -> dict[str, Any]:
    """Return a line for every setting, with the keys that differ between settings."""
    digits = decimals(comparison)
    keys = sorted(differing(comparison.runs).keys() - {"optimizer.name", "schedule.name", "batch_size", "seed"})

    def mean(values: list[float]) -> str:
        return f"{100 * statistics.fmean(values):.{digits}f}" if values else "-"

    lines = [
        [
            row_label(cell.row),
            f"{cell.batch_size:,}",
            *(value(setting.options.get(key)) for key in keys),
            ", ".join(str(run.config["seed"]) for run in setting.runs),
            mean(setting.values("best/val/accuracy")),
            mean(setting.values("test/accuracy")),
            ", ".join(states(setting.runs)),
            "chosen" if setting is cell.chosen else "",
        ]
        for cell in comparison.cells.values()
        for setting in cell.settings
    ]
    heads = ["optimizer", "batch", *keys, "seeds", "best validation [%]", "test at the end [%]", "runs", ""]
    return {"heads": heads, "lines": lines}


def facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Return the facts about all runs: number, seeds, program, machine and device-hours."""
    done = [run for run in runs if run.done]
    hours: dict[str, float] = defaultdict(float)
    versions: dict[str, set[str]] = defaultdict(set)
    commits: dict[str, None] = {}  # in the order of runs
    for run in done:
        processes = run.metric("processes") or 1
        hours[str(run.summary.get("device", "unknown"))] += (run.metric("wall_seconds") or 0.0) * processes / 3600
        changes = " (with changes)" if run.summary.get("git_dirty") else ""
        commits[f"{run.summary.get('git_commit') or 'unknown'}{changes}"] = None
        found = run.summary.get("versions")
        for package, version in found.items() if isinstance(found, dict) else ():
            versions[str(package)].add(str(version))
    set_aside = sum(1 for run in runs for _ in run.folder.path.glob("previous-*"))
    return [
        ("runs", f"{plural(len(runs), 'run')}: {', '.join(states(runs))}" if runs else "none"),
        ("earlier repetitions", f"{set_aside} in previous-N folders, not counted" if set_aside else ""),
        ("seeds", ", ".join(str(seed) for seed in sorted({run.config["seed"] for run in runs}))),
        ("commit", ", ".join(commits)),
        ("versions", ", ".join(f"{package} {'/'.join(sorted(of))}" for package, of in sorted(versions.items()))),
        ("device-hours", ", ".join(f"{device}: {hours[device]:.2f}" for device in sorted(hours))),
        ("precision", ", ".join(sorted({str(run.summary.get("precision")) for run in done}))),
    ]
