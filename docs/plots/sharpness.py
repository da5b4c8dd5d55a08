"""Sharpness over a training, and the optimizer's steps against the limit of stability.

`python docs/plots/sharpness.py RUNS_DIR [FILE]` draws the runs of a folder that measured the sharpness
(`instruments.sharpness_every`), one line each. FILE is by default sharpness.svg beside this script; equal runs give an
equal file.

Left: the largest eigenvalue of the Hessian. Right: learning rate times the preconditioned eigenvalue, over the limit
beyond which steps on a quadratic diverge.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from largebatch.report.load import Run, load_runs
from largebatch.runs.metrics import read_rows

# Okabe and Ito's colours, with line styles that are readable in grey.
LOOKS: tuple[dict[str, Any], ...] = (
    {"color": "#009E73", "linestyle": ":"},
    {"color": "#0072B2", "linestyle": "-"},
    {"color": "#D55E00", "linestyle": "--"},
    {"color": "#000000", "linestyle": "-."},
)
Points = list[tuple[float, float]]


def limit(options: dict[str, Any]) -> float:
    """Return the largest stable product of learning rate and preconditioned eigenvalue on a quadratic."""
    if "betas" in options:  # the momentum is a mean of gradients
        beta = options["betas"][0]
        return 2 * (1 + beta) / (1 - beta)
    momentum = options.get("momentum", 0.0)
    return 2 * (1 + momentum) / (1 + 2 * momentum if options.get("nesterov") else 1)


def measured(run: Run) -> tuple[Points, Points]:
    """Return (epoch, eigenvalue), and (epoch, product over its limit)."""
    eigenvalues: Points = []
    products: Points = []
    lr = None
    for row in read_rows(run.folder.metrics):
        lr = row.get("optim/lr", lr)
        if row.get("sharpness/eigenvalue") is not None:
            eigenvalues.append((row["epoch"], row["sharpness/eigenvalue"]))
        if row.get("sharpness/preconditioned") is not None and lr is not None:
            product = lr * row["sharpness/preconditioned"]
            products.append((row["epoch"], product / limit(run.summary["optimizer_options"])))
    return eigenvalues, products


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs_dir", type=Path)
    parser.add_argument("file", type=Path, nargs="?", default=Path(__file__).with_suffix(".svg"))
    options = parser.parse_args()
    runs, _ = load_runs(options.runs_dir)
    found = [(run.config["optimizer"]["name"], *measured(run)) for run in runs if run.done]
    found = sorted((one for one in found if one[1]), key=lambda one: one[0])
    matplotlib.rcdefaults()  # ignores the user's settings
    with matplotlib.rc_context({"svg.hashsalt": "sharpness", "font.size": 9, "axes.titlesize": 9}):
        figure = Figure(figsize=(8, 3))
        left, right = figure.subplots(1, 2)
        figure.subplots_adjust(left=0.07, right=0.98, top=0.9, bottom=0.16, wspace=0.2)
        for (name, eigenvalues, products), look in zip(found, LOOKS, strict=False):
            left.plot(*zip(*eigenvalues, strict=True), label=name.upper(), **look)
            if products:
                right.plot(*zip(*products, strict=True), label=name.upper(), **look)
        right.axhline(1, color="#999999", linewidth=0.8)
        left.set(title="largest eigenvalue of the Hessian", xlabel="epoch", ylim=(0, None))
        right.set(title="learning rate x preconditioned eigenvalue / limit", xlabel="epoch", ylim=(0, None))
        left.legend(frameon=False)
        figure.savefig(options.file, format="svg", metadata={"Date": None, "Title": "Sharpness"})


if __name__ == "__main__":
    main()
