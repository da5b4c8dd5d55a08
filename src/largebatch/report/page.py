"""Write the report as one HTML file that needs no network, no server and no account."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from largebatch.report import figures, target_figures
from largebatch.report.chart import Chart, Styles, styles
from largebatch.report.compare import BY_VALIDATION, Comparison, differing, distinct
from largebatch.report.curves import MOST_POINTS, Histories, read_histories
from largebatch.report.fairness import warnings
from largebatch.report.layer_figures import Diagnosed, layer_charts, read_diagnosed
from largebatch.report.load import Problem, Run
from largebatch.report.maps import setting_maps
from largebatch.report.profiles import profiles, score_table
from largebatch.report.sensitivity import sensitivity_note, sensitivity_table
from largebatch.report.targets import Target, TimeToTarget, reached_table, time_to_target
from largebatch.report.tuning import tuning_curves
from largebatch.report.wording import (
    answer,
    cell_accuracy,
    cell_counts,
    decimals,
    plural,
    row_label,
    short,
    states,
    title,
    value,
)

# Points of all curves on the page, counted by cell. With all metrics, bands and axes a point takes about 600 bytes.
_BUDGET = 3_500
_FEWEST_POINTS = 24


def page(
    name: str, runs: Sequence[Run], problems: list[Problem], comparisons: Sequence[Comparison], target: Target
) -> str:
    """Return the whole file.

    Args:
        name: name of the folder of runs.
        problems: what is left out so far. Unreadable metrics and layers are added.
        target: the page shows the training to it.
    """
    style = styles(comparisons)
    histories = [read_histories(comparison, problems) for comparison in comparisons]
    diagnosed = [read_diagnosed(comparison, problems) for comparison in comparisons]
    cells = sum(len(comparison.shown) for comparison in comparisons)
    points = max(_FEWEST_POINTS, min(MOST_POINTS, _BUDGET // max(cells, 1)))
    with_layers = max(sum(map(len, diagnosed)), 1)
    times = [
        time_to_target(comparison, history, target) for comparison, history in zip(comparisons, histories, strict=True)
    ]
    of_sections = zip(comparisons, histories, times, diagnosed, strict=True)
    sections = [
        _section(f"c{number}", comparison, history, time, layers, len(layers) / with_layers, style, points)
        for number, (comparison, history, time, layers) in enumerate(of_sections, 1)
    ]
    found = profiles(comparisons, times)
    charts = [("profiles", target_figures.profile_chart(found, style))] if found else []
    charts += [named for section in sections for _, of_group in section["groups"] for named in of_group]
    payload = {
        key: chart.figure.to_plotly_json() | {"axes": {s.key: s.axes for s in chart.switches if s.axes}}
        for key, chart in charts
    }  # fmt: skip
    overall = None if found is None else {
        "charts": charts[:1], "scores": score_table(found), "left_out": found.left_out,
        "workloads": [[workload] for workload in found.workloads],
    }  # fmt: skip
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"), allow_nan=False)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.j2").render(
        name=name,
        sections=sections,
        overall=overall,
        problems=sorted(set(problems)),
        facts=_facts(runs),
        trouble=[
            (run.name, run.state, run.message) for run in runs if run.state not in ("finished", "running", "queued")
        ],
        payload=Markup(text.replace("<", "\\u003c")),  # no string in it can end the script element
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
    )


def _section(
    anchor: str, comparison: Comparison, histories: Histories, times: TimeToTarget | None, layers: list[Diagnosed],
    share: float, style: Styles, points: int,
) -> dict[str, Any]:  # fmt: skip
    """Return the template's values for one comparison.

    Args:
        share: part of the page's budget of layers, 0..1.
        points: most points of a curve.
    """
    runs_of = [[run for cell in comparison.row(row) for run in cell.runs] for row in comparison.rows]
    # A new chart needs its function in a file of figures and an entry here.
    groups: dict[str, list[Chart | None]] = {
        "Accuracy and training": [
            figures.accuracy_by_batch(comparison, style),
            figures.training_curves(comparison, histories, style, points),
        ],
        "Settings tried": [tuning_curves(comparison, style), *setting_maps(comparison)],
        "Speed": [
            target_figures.time_by_batch(comparison, times, style) if times else None,
            figures.speed_by_batch(comparison, style),
        ],
        "Schedules and layers": [
            figures.schedules(comparison, histories, style, points),
            *layer_charts(layers, share, style),
        ],
    }
    return {
        "anchor": anchor,
        "title": title(comparison),
        "answer": answer(comparison),
        "warnings": warnings(comparison),
        "columns": [f"batch {batch:,}" for batch in comparison.columns],
        "rows": _table(comparison, style),
        "caption": _caption(comparison),
        "groups": [
            (name, [(f"{anchor}-{i}-{j}", chart) for j, chart in enumerate(filter(None, charts))])
            for i, (name, charts) in enumerate(groups.items())
        ],
        # Tables below the charts of a group, with their notes.
        "tables": {
            "Settings tried": (sensitivity_note(comparison), sensitivity_table(comparison)),
            "Speed": (_reached_note(times), reached_table(comparison, times)) if times else ("", []),
        },
        "labels": [row_label(row) for row in comparison.rows],
        "keys": [
            [key, *(", ".join(map(value, distinct(of_row, key))) for of_row in runs_of)]
            for key in differing(comparison.runs)
        ],
        "settings": _settings_table(comparison),
    }


def _table(comparison: Comparison, style: Styles) -> list[dict[str, Any]]:
    digits = decimals(comparison)
    rows = []
    for row in comparison.rows:
        # Keys that vary within a cell: choosing a setting meant choosing their values.
        varied = sorted({key for cell in comparison.row(row) for key in differing(cell.runs)} - {"seed"})
        cells: list[dict[str, Any]] = []
        for batch in comparison.columns:
            cell = comparison.cells.get((row, batch))
            if cell is None:
                cells.append({"accuracy": "-"})
                continue
            options = cell.chosen.options if cell.chosen else {}
            cells.append({
                "accuracy": cell_accuracy(cell, digits),
                "bold": cell in comparison.bold,
                "lost": cell.mean is None,
                "setting": ", ".join(f"{short(key)} {value(options[key])}" for key in varied if key in options),
                "counts": cell_counts(cell),
            })  # fmt: skip
        rows.append({"label": row_label(row), "style": style[row], "cells": cells})
    return rows


def _caption(comparison: Comparison) -> str:
    by = {cell.chosen_by for cell in comparison.shown if cell.chosen}
    text = "Test accuracy in per cent: mean ± spread. The spread is the sample standard deviation over seeds. "
    if BY_VALIDATION in by:
        text += (
            "Validation chose the setting with the best mean validation accuracy, and in each run the epoch whose test "
            "accuracy is shown. The test set chose nothing. "
        )
    if by - {BY_VALIDATION}:
        text += "Without validation images, the table shows the test accuracy at the end of training. "
    text += (
        "Bold: the optimizer leads its column by more than the spread. Its range mean ± spread lies above the range of "
        "every other optimizer that finished. Without bold, no optimizer leads by more than the spread."
    )
    images = max((run.metric("test_images") or 0 for run in comparison.runs), default=0)
    return text + (f" Each of the {images:,.0f} test images counts {100 / images:.2g} %." if images else "")


def _reached_note(times: TimeToTarget) -> str:
    return (
        f"Training until the first evaluation or log entry that reaches {times.goal.text}: medians over the seeds of "
        "the chosen setting. A seed that never reaches it counts as infinity. A failed or unfinished run doesn't count."
    )


def _settings_table(comparison: Comparison) -> dict[str, Any]:
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


def _facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
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
        ("runs", f"{plural(len(runs), 'run')}: {', '.join(states(runs))}"),
        ("earlier repetitions", f"{set_aside} in previous-N folders, not counted" if set_aside else ""),
        ("seeds", ", ".join(map(str, distinct(runs, "seed")))),
        ("commit", ", ".join(commits)),
        ("versions", ", ".join(f"{package} {'/'.join(sorted(of))}" for package, of in sorted(versions.items()))),
        ("device-hours", ", ".join(f"{device}: {hours[device]:.2f}" for device in sorted(hours))),
        ("precision", ", ".join(sorted({str(run.summary.get("precision")) for run in done}))),
    ]
