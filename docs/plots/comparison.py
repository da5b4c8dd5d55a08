"""Write the answer, the table and the picture of a comparison from a folder of runs.

`python docs/plots/comparison.py RUNS_DIR NAME` writes NAME.md and NAME.svg beside this script. NAME.md has the commit,
the date and the machine of the runs. Equal runs give equal files. With several data sets, models or modes, NAME.md has
a part for each, and the picture shows the first. With `--lead`, a table has each row's lead over AdamW, and the picture
shows it in place of LNR. The pages that show the files name the command of the runs.
"""

from __future__ import annotations

import argparse
import datetime
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from largebatch.report.answer import answer
from largebatch.report.build import table
from largebatch.report.cells import RowKey
from largebatch.report.chart import styles
from largebatch.report.compare import Comparison, compare
from largebatch.report.layer_figures import QUANTITIES, Diagnosed, read_diagnosed
from largebatch.report.lead import all_leads, slope
from largebatch.report.load import Run, load_runs
from largebatch.report.page import facts
from largebatch.report.wording import row_label, title

_LINES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
_MARKS = {"circle": "o", "square": "s", "diamond-open": "D", "triangle-up-open": "^"}


def looks(comparison: Comparison) -> dict[RowKey, dict[str, object]]:
    """Return how matplotlib draws each row: in the report's style, or by position if all rows share an optimizer."""
    report, rows = styles([comparison]), comparison.rows
    alone = len(rows) > 1 and len({row.optimizer for row in rows}) == 1
    found = {}
    for index, row in enumerate(rows):
        style = report[row]
        colour = matplotlib.colormaps["viridis"](index / len(rows)) if alone else style.colour
        found[row] = {
            "color": colour, "linestyle": _LINES.get(style.dash, "-"), "linewidth": 1.5, "markersize": 5,
            "marker": "os^Dv*"[index % 6] if alone else _MARKS.get(style.symbol, "x"),
            "markerfacecolor": "white" if style.symbol.endswith("-open") and not alone else colour,
            "label": row_label(row).partition(", ")[2] or row_label(row) if alone else row_label(row),
        }  # fmt: skip
    return found


def accuracy(axes: Axes, comparison: Comparison, look: dict[RowKey, dict[str, object]]) -> None:
    """Draw the test accuracy of the chosen settings against batch size, with the spread over seeds."""
    for index, row in enumerate(comparison.rows):
        cells = [cell for cell in comparison.shown if cell.row == row and cell.mean is not None]
        aside = 2 ** (0.05 * (index - (len(comparison.rows) - 1) / 2))  # keeps marks from hiding each other
        axes.errorbar(
            [cell.batch_size * aside for cell in cells],
            [100 * (cell.mean or 0) for cell in cells],
            [100 * (cell.spread or 0) for cell in cells],
            capsize=2.5,
            **look[row],
        )
    _batch_axis(axes, comparison.columns)
    axes.set_title("test accuracy, mean and spread over seeds")
    axes.set_ylabel("%")


def _batch_axis(axes: Axes, batches: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [f"{batch:,}" for batch in batches])
    axes.minorticks_off()
    axes.set_xlabel("batch size")


def leads(axes: Axes, comparison: Comparison, look: dict[RowKey, dict[str, object]]) -> None:
    """Draw each row's lead over AdamW against batch size, with 95 % intervals."""
    reference, found = all_leads(comparison)
    for index, (row, of_row) in enumerate(found.items()):
        aside = 2 ** (0.05 * (index - (len(found) - 1) / 2))
        axes.errorbar(
            [lead.batch_size * aside for lead in of_row],
            [100 * lead.difference for lead in of_row],
            [100 * lead.half_width for lead in of_row],
            capsize=2.5,
            **look[row],
        )
    _batch_axis(axes, comparison.columns)
    axes.axhline(0, color="#888", linewidth=1)
    axes.set_title(f"lead over {row_label(reference)}, 95 % intervals")
    axes.set_ylabel("points of accuracy")


def ratios(axes: Axes, diagnosed: list[Diagnosed], look: dict[RowKey, dict[str, object]]) -> None:
    """Draw LNR, as the median over the weights of all layers, at the largest batch size."""
    largest = max(cell.batch_size for cell, _ in diagnosed)
    _, grid_of = QUANTITIES["lnr"]
    for one in diagnosed:
        cell, layers = one
        if cell.batch_size == largest and one.kind == "weights":
            columns = [[v for v in column if v] for column in zip(*grid_of(layers), strict=True)]
            points = [(step, statistics.median(c)) for step, c in zip(layers.steps, columns, strict=True) if c]
            axes.plot(*zip(*points, strict=True), **look[cell.row] | {"marker": None})
    axes.set_yscale("log")
    axes.set_title(f"weight norm / gradient norm (LNR), batch {largest:,}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("median over layers")


def draw(comparison: Comparison, diagnosed: list[Diagnosed], lead: bool) -> Figure:
    look = looks(comparison)
    # Fixed positions, independent of text size: every version of matplotlib draws the same.
    columns = max(1, min(5, 110 // (max(len(str(one["label"])) for one in look.values()) + 10)))
    lines = math.ceil(len(look) / columns)
    height = 3.5 + 0.2 * lines
    figure = Figure(figsize=(9, height))
    left, right = figure.subplots(1, 2)
    bottom = (0.6 + 0.2 * lines) / height
    figure.subplots_adjust(left=0.07, right=0.985, top=1 - 0.32 / height, bottom=bottom, wspace=0.2)
    accuracy(left, comparison, look)
    if lead:
        leads(right, comparison, look)
    elif diagnosed:
        ratios(right, diagnosed, look)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*left.get_legend_handles_labels(), loc="lower center", ncols=columns, frameon=False, handlelength=3.2)
    return figure


def learning_rates(comparison: Comparison) -> str:
    """Return a table of the chosen ``optimizer.lr``. Empty without a choice.

    If the runs scale it from one batch size, each cell also has the points of validation accuracy that the row loses
    there with the value chosen at that batch size: the error of the scaling rule.
    """
    chosen = {key: cell.chosen for key, cell in comparison.cells.items() if cell.chosen and cell.trials > 1}
    if not chosen:
        return ""
    bases = {s.options["lr_scaling.base_batch"] for s in chosen.values() if s.options["lr_scaling.rule"] != "none"}
    base = bases.pop() if len(bases) == 1 else None
    sizes = " | ".join(f"batch {batch:,}" for batch in comparison.columns)
    name = f"chosen at batch {base:,}" if base in comparison.columns else ""
    lines = [f"| learning rate{name and f' (points lost by the one {name})'} | {sizes} |"]
    lines.append("|---|" + "---|" * len(comparison.columns))
    for row in comparison.rows:
        texts = []
        for batch in comparison.columns:
            setting = chosen.get((row, batch))
            text = f"{setting.options['optimizer.lr']:g}" if setting else "-"
            if setting and name and base != batch and (row, base) in chosen:
                wanted = chosen[row, base].options["optimizer.lr"]
                cell = comparison.cells[row, batch]
                others = [s.score(cell.chosen_by) for s in cell.settings if s.options["optimizer.lr"] == wanted]
                text += f" ({100 * (setting.score(cell.chosen_by) - max(others)):.1f})" if others else ""
            texts.append(text)
        lines.append(f"| {row_label(row)} | {' | '.join(texts)} |")
    return "\n".join(lines)


def lead_table(comparison: Comparison) -> str:
    """Return a table of each row's lead over AdamW and its change per doubling of the batch, with 95 % intervals."""
    reference, found = all_leads(comparison)
    sizes = " | ".join(f"batch {batch:,}" for batch in comparison.columns)
    lines = [f"| lead over {row_label(reference)} [points] | {sizes} | per doubling |"]
    lines.append("|---|" + "---|" * (len(comparison.columns) + 1))
    for row, of_row in found.items():
        known = {lead.batch_size: _points(lead.difference, lead.half_width) for lead in of_row}
        change = slope(of_row)
        texts = [known.get(batch, "-") for batch in comparison.columns]
        texts.append(_points(change.change, change.half_width) if change else "-")
        lines.append(f"| {row_label(row)} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _points(value: float, half_width: float) -> str:
    return f"{100 * value:+.2f} ± {100 * half_width:.2f}"


def origin(runs: Sequence[Run]) -> str:
    """Return a sentence about the runs: number, time, date, machine and program."""
    known = dict(facts(runs))
    ends = sorted(run.folder.read_status()["updated"] for run in runs if run.done)
    days = sorted(
        {datetime.datetime.fromtimestamp(end, datetime.UTC).date().isoformat() for end in (ends[0], ends[-1])}
    )
    parts = [
        known["runs"],
        f"device-hours on {known['device-hours']}",
        " to ".join(days),
        f"commit {known['commit']}",
        known["versions"],
    ]
    return "; ".join(parts) + "."


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the table and the picture of a comparison.")
    parser.add_argument("runs_dir", type=Path)
    parser.add_argument("name", help="of the files, without ending")
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent, help="of the files")
    parser.add_argument("--by", metavar="KEY", action="append", default=[], help="as for largebatch report")
    parser.add_argument("--lead", action="store_true", help="leads over AdamW, instead of the ratio of norms")
    options = parser.parse_args()
    target = options.folder / options.name
    runs, problems = load_runs(options.runs_dir)
    comparisons = compare(runs, options.by)
    diagnosed = [] if options.lead else read_diagnosed(comparisons[0], problems)
    for problem in problems:
        print(f"skipped: {problem.where}: {problem.what}", file=sys.stderr)
    parts = []
    for comparison in comparisons:
        heading = f"**{title(comparison)}**" if len(comparisons) > 1 else ""
        verdicts = "\n".join(f"- {line}" for line in answer(comparison).splitlines())
        leads_table = lead_table(comparison) if options.lead else ""
        parts += [heading, verdicts, table(comparison), leads_table, learning_rates(comparison)]
    parts = [part for part in (*parts, origin(runs)) if part]
    target.with_suffix(".md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    matplotlib.rcdefaults()  # ignores the user's settings
    salt = {"svg.hashsalt": "comparison"}  # without it, names inside the file are random
    with matplotlib.rc_context({**salt, "font.size": 9, "axes.titlesize": 9}):
        metadata = {
            "Date": None,
            "Title": f"Test accuracy against batch size, and {'leads' if options.lead else 'LNR'}",
        }
        draw(comparisons[0], diagnosed, options.lead).savefig(
            target.with_suffix(".svg"), format="svg", metadata=metadata
        )


if __name__ == "__main__":
    main()
