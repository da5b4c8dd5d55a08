"""The tables of the page, as text for its template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from largebatch.report.chart import Style
from largebatch.report.compare import BY_VALIDATION, Cell, Comparison, RowKey, differing, row_of, value_order
from largebatch.report.curves import Reached
from largebatch.report.load import Run
from largebatch.report.wording import cell_counts, cell_figure, decimals, percent, plural, row_label, value


def comparison_table(comparison: Comparison, style: Mapping[RowKey, Style]) -> list[dict[str, Any]]:
    digits = decimals(comparison)
    bold = {(lead.best.row, lead.batch_size) for lead in comparison.leads if lead.clear and lead.best}
    rows = []
    for row in comparison.rows:
        varied = _varied([comparison.cells[place] for place in comparison.cells if place[0] == row])
        cells = []
        for batch in comparison.columns:
            cell = comparison.cells.get((row, batch))
            if cell is None:
                cells.append({"figure": "-", "lost": False})
                continue
            options = cell.chosen.options if cell.chosen else {}
            setting = [f"{key.rpartition('.')[2]} {value(options[key])}" for key in varied if key in options]
            cells.append({
                "figure": cell_figure(cell, digits),
                "bold": (row, batch) in bold,
                "lost": cell.mean is None,
                "setting": ", ".join(setting),
                "counts": cell_counts(cell),
            })  # fmt: skip
        drawn = style[row]
        rows.append({"label": row_label(row), "colour": drawn.colour, "dash": drawn.dash, "cells": cells})
    return rows


def _varied(cells: Sequence[Cell]) -> list[str]:
    """Keys that were varied within a cell, so that choosing meant choosing them."""
    return sorted({key for cell in cells for key in differing(run for s in cell.settings for run in s.runs)} - {"seed"})


def caption(comparison: Comparison) -> list[str]:
    by = {cell.chosen_by for cell in comparison.shown if cell.chosen}
    said = [
        "Test accuracy in per cent: mean ± spread (the sample standard deviation over seeds), and what it rests on."
    ]
    if BY_VALIDATION in by:
        said.append(
            "Validation chose: of several settings the one with the best mean validation accuracy, and in each run the "
            "epoch whose test accuracy is shown. The test set chose nothing."
        )
    if by - {BY_VALIDATION}:
        said.append("Without a validation part the figure is the test accuracy at the end of training.")
    said.append(
        "Bold: leads its column by more than the spread, that is, its range mean ± spread lies above the range of "
        "every other optimizer that finished. Without bold, no optimizer is ahead beyond the spread."
    )
    images = max((run.figure("test_images") or 0 for run in comparison.runs), default=0)
    if images:
        said.append(f"One of the {images:,.0f} test images is {100 / images:.2g} %.")
    return said


def reached_table(comparison: Comparison, reached: Sequence[Reached]) -> list[tuple[str, list[tuple[str, str]]]]:
    """By row a main and a small line for each batch size."""
    found = {(one.cell.row, one.cell.batch_size): one for one in reached}

    def said(one: Reached | None) -> tuple[str, str]:
        if one is None or not one.runs:
            return "-", ""
        seeds = f"{one.reached} of {plural(one.runs, 'seed')}"
        if one.steps is None or one.epochs is None or one.seconds is None:
            return "never", seeds
        return f"{one.steps:,.0f} steps", f"{one.epochs:.3g} epochs, {one.seconds:.3g} s; {seeds}"

    return [
        (row_label(row), [said(found.get((row, batch))) for batch in comparison.columns]) for row in comparison.rows
    ]


def keys_table(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """The keys that differ between runs, with each row's values."""
    of_row = {
        row: [run for run in comparison.runs if row_of(run, [k for k, _ in row.extra]) == row]
        for row in comparison.rows
    }
    lines = []
    for key in differing(comparison.runs):
        values = [sorted({run.options.get(key) for run in of_row[row]}, key=value_order) for row in comparison.rows]
        lines.append((key, [", ".join(map(value, of_key)) for of_key in values]))
    return lines


def settings_table(comparison: Comparison) -> dict[str, Any]:
    """Every setting that was tried, with the keys that differ between them."""
    digits = decimals(comparison)
    places = {"optimizer.name", "schedule.name", "batch_size", "seed"}
    keys = [key for key in differing(comparison.runs) if key not in places]
    lines = []
    for row in comparison.rows:
        for batch in comparison.columns:
            cell = comparison.cells.get((row, batch))
            for setting in cell.settings if cell else ():
                validation = setting.values("best/val/accuracy")
                test = setting.values("test/accuracy")
                lines.append([
                    row_label(row), f"{batch:,}", *(value(setting.options.get(key)) for key in keys),
                    ", ".join(str(run.config["seed"]) for run in setting.runs),
                    percent(sum(validation) / len(validation), digits) if validation else "-",
                    percent(sum(test) / len(test), digits) if test else "-",
                    ", ".join(f"{count} {state}" for state, count in _states(setting.runs).items()),
                    "chosen" if cell and setting is cell.chosen else "",
                ])  # fmt: skip
    heads = ["optimizer", "batch", *keys, "seeds", "best validation [%]", "test at the end [%]", "runs", ""]
    return {"heads": heads, "lines": lines}


def _states(runs: Sequence[Run]) -> dict[str, int]:
    found: dict[str, int] = {}
    for run in runs:
        found[run.state] = found.get(run.state, 0) + 1
    return dict(sorted(found.items()))


def facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """What was run, where and for how long."""
    done = [run for run in runs if run.done]
    hours: dict[str, float] = {}
    for run in done:
        device, processes = str(run.summary.get("device", "unknown")), run.figure("processes") or 1
        hours[device] = hours.get(device, 0.0) + (run.figure("wall_seconds") or 0.0) * processes / 3600
    states = ", ".join(f"{count} {state}" for state, count in _states(runs).items())
    commits: dict[str, None] = {}
    for run in done:
        commit, dirty = run.summary.get("git_commit"), run.summary.get("git_dirty")
        commits[(str(commit) if commit else "not known") + (" (with changes)" if dirty else "")] = None
    versions: dict[str, set[str]] = {}
    for run in done:
        found = run.summary.get("versions")
        for package, version in found.items() if isinstance(found, dict) else ():
            versions.setdefault(str(package), set()).add(str(version))
    set_aside = sum(1 for run in runs for _ in run.folder.path.glob("previous-*"))
    return [
        ("runs", f"{plural(len(runs), 'run')}: {states}" if runs else "none"),
        *([("earlier repetitions", f"{set_aside} set aside (previous-N), not counted")] if set_aside else []),
        ("seeds", ", ".join(str(seed) for seed in sorted({run.config["seed"] for run in runs}))),
        ("commit", ", ".join(commits)),
        ("versions", ", ".join(f"{package} {'/'.join(sorted(of))}" for package, of in sorted(versions.items()))),
        ("device-hours", ", ".join(f"{device}: {hours[device]:.2f}" for device in sorted(hours))),
        ("precision", ", ".join(sorted({str(run.summary.get("precision")) for run in done}))),
    ]
