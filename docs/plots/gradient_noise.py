"""How much the gradients of single images disagree over a training with CLARS, at each batch size.

`python docs/plots/gradient_noise.py RUNS_DIR [FILE]` draws the chosen CLARS runs of a folder, one for each batch size.
FILE is by default gradient_noise.svg beside this script; equal runs give an equal file.

CLARS's trust ratio is `trust_coefficient * ||w|| / (mean_i ||g_i|| + weight_decay * ||w||)`. layers.parquet has it,
and the norms of the weight and of the batch's gradient g, so the mean norm of the images' gradients g_i follows. The
figure shows the median over layers of mean_i ||g_i|| / ||g||: 1 if all images agree, about sqrt(batch size) if their
gradients are independent noise.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import matplotlib
import pyarrow.parquet
from matplotlib.figure import Figure

from largebatch.report.compare import compare
from largebatch.report.load import Run, load_runs

# Okabe and Ito's colours, with line styles that are readable in grey.
LOOKS: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "linestyle": "-"},
    {"color": "#D55E00", "linestyle": "--"},
    {"color": "#009E73", "linestyle": ":"},
)


def disagreement(run: Run) -> tuple[list[float], list[float]]:
    """Return the parts of the training in 0..1, and the medians over layers of ``mean_i ||g_i|| / ||g||``."""
    options, steps = run.summary["optimizer_options"], run.summary["steps"]
    coefficient, decay = options["trust_coefficient"], options["weight_decay"]
    by_step: dict[int, list[float]] = {}
    columns = ["step", "weight_norm", "gradient_norm", "trust_ratio", "dimensions"]
    for row in pyarrow.parquet.read_table(run.folder.layers).to_pylist():
        step, weight, gradient, ratio = (row[column] for column in columns[:4])
        if row["dimensions"] > 1 and gradient and ratio:
            by_step.setdefault(step, []).append((coefficient * weight / ratio - decay * weight) / gradient)
    return [step / steps for step in by_step], [statistics.median(of) for of in by_step.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs_dir", type=Path)
    parser.add_argument("file", type=Path, nargs="?", default=Path(__file__).with_suffix(".svg"))
    options = parser.parse_args()
    runs, _ = load_runs(options.runs_dir)
    cells = [cell for cell in compare(runs)[0].shown if cell.row.optimizer == "clars" and cell.drawn]
    matplotlib.rcdefaults()  # ignores the user's settings
    with matplotlib.rc_context({"svg.hashsalt": "gradient_noise", "font.size": 9, "axes.titlesize": 9}):
        figure = Figure(figsize=(5, 3.2))
        axes = figure.subplots()
        figure.subplots_adjust(left=0.12, right=0.97, top=0.9, bottom=0.15)
        for cell, look in zip(cells, LOOKS, strict=False):
            axes.plot(*disagreement(cell.drawn[0]), label=f"batch {cell.batch_size:,}", **look)
        axes.set_yscale("log")
        axes.set_title("mean norm of images' gradients / norm of their mean")
        axes.set_xlabel("part of the training")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        figure.savefig(options.file, format="svg", metadata={"Date": None, "Title": "Disagreement of gradients"})


if __name__ == "__main__":
    main()
