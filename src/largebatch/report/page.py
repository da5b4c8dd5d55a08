"""Write the report as one HTML file that needs no network, no server and no account."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from largebatch.report import curves, figures, target_figures, wording
from largebatch.report.answer import answer, differences_table
from largebatch.report.cells import BY_VALIDATION, RowKey, differing, distinct, values
from largebatch.report.chart import Chart, Styles, styles
from largebatch.report.compare import Comparison
from largebatch.report.confusions import Errors, confused_pairs, confusion_chart, read_errors
from largebatch.report.critical import Critical, criticals
from largebatch.report.critical_figure import critical_chart
from largebatch.report.fairness import warnings
from largebatch.report.layer_figures import Diagnosed, layer_charts, read_diagnosed
from largebatch.report.lead import lead_by_batch
from largebatch.report.links import Links
from largebatch.report.load import Problem, Run
from largebatch.report.maps import setting_maps
from largebatch.report.profiles import profiles, score_table
from largebatch.report.sensitivity import sensitivity_note, sensitivity_table
from largebatch.report.targets import Target, TimeToTarget, reached_table, time_to_target
from largebatch.report.tuning import tuning_curves

# Points of all curves on the page, counted by cell. With all metrics, bands and axes a point takes about 600 bytes.
_BUDGET = 3_500
_FEWEST_POINTS = 24
_LR = "optimizer.lr"


def page(
    name: str, runs: Sequence[Run], problems: list[Problem], comparisons: Sequence[Comparison], target: Target,
    folder: Path,
) -> str:  # fmt: skip
    """Return the whole file.

    Args:
        name: name of the folder of runs.
        folder: the page's folder, from which it links to the runs.
        problems: folders and files left out so far. Unreadable metrics and layers are added.
        target: the page shows the training to it.
    """
    style, links = styles(comparisons), Links(folder, problems)
    histories = [curves.read_histories(comparison, problems) for comparison in comparisons]
    diagnosed = [read_diagnosed(comparison, problems) for comparison in comparisons]
    errors = [read_errors(comparison, problems) for comparison in comparisons]
    cells = sum(len(comparison.shown) for comparison in comparisons)
    points = max(_FEWEST_POINTS, min(curves.MOST_POINTS, _BUDGET // max(cells, 1)))
    with_layers = max(sum(map(len, diagnosed)), 1)
    times = [time_to_target(*pair, target) for pair in zip(comparisons, histories, strict=True)]
    of_sections = zip(comparisons, histories, times, diagnosed, errors, strict=True)
    sections = [
        _section(
            f"c{number}",
            comparison,
            history,
            time,
            criticals(comparison, time, problems) if time else [],
            layers,
            len(layers) / with_layers,
            wrong,
            style,
            points,
            links,
        )
        for number, (comparison, history, time, layers, wrong) in enumerate(of_sections, 1)
    ]
    found = profiles(comparisons, times)
    charts = [("profiles", target_figures.profile_chart(found, style))] if found else []
    overall = None if found is None else {
        "charts": charts[:], "scores": score_table(found), "left_out": found.left_out,
        "workloads": [[workload] for workload in found.workloads],
    }  # fmt: skip
    charts += [named for section in sections for _, of_group in section["groups"] for named in of_group]
    payload = {
        key: chart.figure.to_plotly_json() | {"axes": {s.key: s.axes for s in chart.switches if s.axes}}
        for key, chart in charts
    }
    trouble = [
        (links.both(run, run.name), run.state, run.message)
        for run in runs
        if run.state not in ("finished", "running", "queued")
    ]
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"), allow_nan=False)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.j2").render(
        name=name,
        sections=sections,
        overall=overall,
        problems=sorted(set(problems)),
        facts=facts(runs),
        trouble=trouble,
        payload=Markup(text.replace("<", "\\u003c")),  # no string in it can end the script element
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
    )


def _section(
    anchor: str, comparison: Comparison, histories: curves.Histories, times: TimeToTarget | None,
    critical: Sequence[Critical],
    layers: list[Diagnosed], share: float, errors: Errors, style: Styles, points: int, links: Links,
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
            lead_by_batch(comparison, style),
            figures.sharpness(comparison, histories, style, points),
            figures.noise(comparison, histories, style, points),
        ],
        "Settings tried": [tuning_curves(comparison, style), *setting_maps(comparison)],
        "Speed": [
            target_figures.time_by_batch(comparison, times, style) if times else None,
            critical_chart(comparison, critical, times.goal.text, style) if times else None,
            figures.speed_by_batch(comparison, style),
        ],
        "Errors": [confusion_chart(comparison, errors.confusions)],
        "Schedules and layers": [
            figures.schedules(comparison, histories, style, points),
            *layer_charts(layers, share, style),
        ],
    }
    return {
        "anchor": anchor,
        "title": wording.title(comparison),
        "answer": answer(comparison),
        "warnings": warnings(comparison),
        "columns": [f"batch {batch:,}" for batch in comparison.columns],
        "rows": [{"label": wording.row_label(row), "style": style[row]} for row in comparison.rows],
        "cells": [_cells(comparison, row) for row in comparison.rows],
        "caption": _caption(comparison),
        "differences": differences_table(comparison),
        "images": all(verdict.images for verdict in comparison.verdicts),
        "groups": [
            (name, [(f"{anchor}-{i}-{j}", chart) for j, chart in enumerate(filter(None, charts))])
            for i, (name, charts) in enumerate(groups.items())
        ],
        # Tables below the charts of a group, with their notes.
        "tables": {
            "Settings tried": (sensitivity_note(comparison), _plain(sensitivity_table(comparison))),
            "Errors": (
                "Classes that are confused most often at the end of training: class, prediction, and the number of "
                "test images over the seeds of the chosen setting.",
                confused_pairs(comparison, errors.confusions),
            ),
            "Speed": (_reached_note(times), _plain(reached_table(comparison, times))) if times else ("", []),
        },
        "worst": errors.worst,
        "keys": [
            [_breakable(key, "."), *(_breakable(_values(distinct(of_row, key)), "_") for of_row in runs_of)]
            for key in differing(comparison.runs)
        ],
        "settings": _settings_table(comparison, links),
    }


def _breakable(text: str, after: str) -> Markup:
    """Return text that a narrow column breaks after a mark between words, besides spaces."""
    return Markup(escape(after) + Markup("<wbr>")).join(text.split(after))


def _values(options: Sequence[Any]) -> str:
    return ", ".join(map(wording.value, options))


def _cells(comparison: Comparison, row: RowKey) -> list[dict[str, Any]]:
    """Return the row's results, for each batch size."""
    # Keys that vary within a cell: choosing a setting meant choosing their values.
    varied = sorted({key for cell in comparison.row(row) for key in differing(cell.runs)} - {"seed", _LR})
    cells: list[dict[str, Any]] = []
    for batch in comparison.columns:
        cell = comparison.cells.get((row, batch))
        if cell is None:
            cells.append({"text": "-"})
            continue
        options = cell.chosen.options if cell.chosen else {}
        tried = _values([options[_LR]] if options else distinct(cell.settings, _LR))
        others = (f"{wording.short(key)} {wording.value(options[key])}" for key in varied if key in options)
        setting = ", ".join([f"lr {tried}", *others])
        cells.append({
            "text": wording.cell_accuracy(cell, wording.decimals(comparison)),
            "bold": cell in comparison.bold,
            "lost": cell.mean is None,
            "small": [setting, wording.cell_counts(cell, comparison)],
        })  # fmt: skip
    return cells


def _caption(comparison: Comparison) -> str:
    by = {cell.chosen_by for cell in comparison.shown if cell.chosen}
    text = "Test accuracy in per cent: mean ± sample standard deviation over seeds (the mean is more certain). "
    if BY_VALIDATION in by:
        text += (
            "Validation chose the setting with the best mean validation accuracy, and in each run the epoch whose test "
            "accuracy is shown. The test set chose nothing. "
        )
    if by - {BY_VALIDATION}:
        text += "Without validation images, the table shows the test accuracy at the end of training. "
    if comparison.confirmed:
        text += (
            "Confirmation seeds: the chosen setting ran again on seeds that took no part in the choice, and the table "
            "shows only these runs. "
        )
    text += "Bold: the optimizer is ahead of every other one in its column, as the section on differences explains."
    images = max((run.metric("test_images") or 0 for run in comparison.runs), default=0)
    return text + (f" Each of the {images:,.0f} test images counts {100 / images:.2g} %." if images else "")


def _plain(lines: Sequence[Sequence[tuple[str, str]]]) -> list[list[dict[str, Any]]]:
    """Return cells of pairs of texts, as ``_cells`` does."""
    return [[{"text": main, "small": [more]} for main, more in of_row] for of_row in lines]


def _reached_note(times: TimeToTarget) -> str:
    return (
        f"Training until the first evaluation or log entry that reaches {times.goal.text}: medians over the seeds of "
        "the chosen setting. A seed that never reaches it counts as infinity. A failed or unfinished run doesn't count."
    )


def _settings_table(comparison: Comparison, links: Links) -> dict[str, Any]:
    """Return a line for every setting, with the keys that differ between settings. A seed links to its run."""
    digits = wording.decimals(comparison)
    keys = sorted(differing(comparison.runs).keys() - {"optimizer.name", "schedule.name", "batch_size", "seed"})

    def mean(runs: Sequence[Run], metric: str) -> str:
        accuracies = values(runs, metric)
        return f"{100 * statistics.fmean(accuracies):.{digits}f}" if accuracies else "-"

    lines = [
        [
            wording.row_label(cell.row),
            f"{cell.batch_size:,}",
            *(wording.value(setting.options.get(key)) for key in keys),
            Markup(", ").join(links.both(run, str(run.seed)) for run in runs),
            mean(runs, "best/val/accuracy"),
            mean(runs, "test/accuracy"),
            ", ".join(wording.states(runs)),
            word,
        ]
        for cell in comparison.cells.values()
        for setting in cell.settings
        for runs, word in (
            (setting.runs, "chosen" if setting is cell.chosen else ""),
            (setting.confirming, "confirmation"),
        )
        if runs
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
        ("runs", f"{wording.plural(len(runs), 'run')}: {', '.join(wording.states(runs))}"),
        ("earlier repetitions", f"{set_aside} in previous-N folders, not counted" if set_aside else ""),
        ("seeds", ", ".join(map(str, distinct(runs, "seed")))),
        ("commit", ", ".join(commits)),
        ("versions", ", ".join(f"{package} {'/'.join(sorted(of))}" for package, of in sorted(versions.items()))),
        ("device-hours", ", ".join(f"{device}: {hours[device]:.2f}" for device in sorted(hours))),
        ("precision", ", ".join(sorted({str(run.summary.get("precision")) for run in done}))),
    ]
