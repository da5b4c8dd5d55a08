"""Instruments over a training: sharpness or gradient noise scale; surfaces of the loss; the critical batch size.

`python docs/plots/instruments.py sharpness RUNS_DIR [FILE]` draws the runs of a folder that measured the sharpness
(`instruments.sharpness_every`), one line each. FILE is by default sharpness.svg beside this script; equal runs give an
equal file. Left: the largest eigenvalue of the Hessian. Right: learning rate times the preconditioned eigenvalue, over
the limit beyond which steps on a quadratic diverge.

`python docs/plots/instruments.py noise RUNS_DIR [FILE]` draws the runs with `instruments.noise_scale`, to noise.svg.
Left: the gradient noise scale in its 90 % interval, and the batch size. Right: the cosine of successive gradients in
its interval, and thin the cosine `1 / (1 + noise scale / batch size)` of gradients at fixed weights.

`python docs/plots/instruments.py surface FOLDER [FILE]` draws the JSON files of `largebatch surface` in a folder, to
surface.svg. Left: all slices along one direction, by the files' names. Right: the first plane.

`python docs/plots/instruments.py critical FILE.json [FILE]` draws the answer of `largebatch critical RUNS --json`, to
critical.svg: steps and images to the target against the batch size, with each row's hyperbola.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
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
Points = list[tuple[float, ...]]


def limit(options: dict[str, Any]) -> float:
    """Return the largest stable product of learning rate and preconditioned eigenvalue on a quadratic."""
    if "betas" in options:  # the momentum is a mean of gradients
        beta = options["betas"][0]
        return 2 * (1 + beta) / (1 - beta)
    momentum = options.get("momentum", 0.0)
    return 2 * (1 + momentum) / (1 + 2 * momentum if options.get("nesterov") else 1)


def measured(run: Run, *names: str) -> Points:
    """Return the epoch and these metrics, of the rows that have all."""
    rows = read_rows(run.folder.metrics)
    return [(row["epoch"], *values) for row in rows if None not in (values := [row.get(name) for name in names])]


def products(run: Run) -> Points:
    """Return (epoch, learning rate times preconditioned eigenvalue over its limit)."""
    found: Points = []
    lr = None
    for row in read_rows(run.folder.metrics):
        lr = row.get("optim/lr", lr)
        if row.get("sharpness/preconditioned") is not None and lr is not None:
            product = lr * row["sharpness/preconditioned"]
            found.append((row["epoch"], product / limit(run.summary["optimizer_options"])))
    return found


def sharpness(runs: Sequence[Run], left: Axes, right: Axes) -> None:
    for run, look in zip(runs, LOOKS, strict=False):
        name = run.config["optimizer"]["name"].upper()
        left.plot(*zip(*measured(run, "sharpness/eigenvalue"), strict=True), label=name, **look)
        if found := products(run):
            right.plot(*zip(*found, strict=True), label=name, **look)
    right.axhline(1, color="#999999", linewidth=0.8)
    left.set(title="largest eigenvalue of the Hessian", xlabel="epoch", ylim=(0, None))
    right.set(title="learning rate x preconditioned eigenvalue / limit", xlabel="epoch", ylim=(0, None))


def noise(runs: Sequence[Run], left: Axes, right: Axes) -> None:
    for run, look in zip(runs, LOOKS, strict=False):
        name, batch = run.config["optimizer"]["name"].upper(), run.config["batch_size"]
        for axes, metric in ((left, "noise/scale"), (right, "noise/cosine")):
            axes.plot(*zip(*measured(run, metric), strict=True), label=name, **look)
            ends = measured(run, f"{metric}_low", f"{metric}_high")
            if ends:
                axes.fill_between(*zip(*ends, strict=True), color=look["color"], alpha=0.15, linewidth=0)
        expected = [(epoch, 1 / (1 + scale / batch)) for epoch, scale in measured(run, "noise/scale")]
        right.plot(*zip(*expected, strict=True), **look | {"linewidth": 0.6})
        left.axhline(batch, color="#999999", linewidth=0.8)
    right.axhline(0, color="#999999", linewidth=0.8)
    left.set(title="gradient noise scale [images]", xlabel="epoch", ylim=(0, None))
    right.set(title="cosine of successive gradients", xlabel="epoch")


def surface(files: Sequence[Path], left: Axes, right: Axes) -> None:
    found = {file.stem: json.loads(file.read_text()) for file in files}
    slices = {name: one for name, one in found.items() if len(one["loss"]) == 1}
    for (name, one), look in zip(slices.items(), LOOKS, strict=False):
        left.plot(one["at"], one["loss"][0], label=name.upper(), **look)
    left.set(title="training loss along a random direction", xlabel="distance, in norms of a filter", ylim=(0, None))
    plane = next(one for one in found.values() if len(one["loss"]) > 1)
    lines = right.contour(plane["at"], plane["at"], plane["loss"], levels=[0.3, 0.5, 1, 2, 4, 8], cmap="viridis")
    right.clabel(lines, fontsize=7)
    right.set(title="training loss in a random plane", xlabel="first direction")
    right.set_ylabel("second direction", labelpad=0)


def critical(answer: dict[str, Any], left: Axes, right: Axes) -> None:
    for row, look in zip([row for row in answer["rows"] if row["critical_batch"]], LOOKS, strict=False):
        known = [time for time in row["batches"] if time["steps"]]
        sizes = np.array([time["batch_size"] for time in known])
        between = np.geomspace(sizes[0], sizes[-1], 50)
        curve = row["fewest_steps"]["value"] * (1 + row["critical_batch"]["value"] / between)
        for axes, quantity, line in ((left, "steps", curve), (right, "images", curve * between)):
            values = np.array([time[quantity] for time in known])
            errors = values * [time["deviation"] for time in known]
            axes.errorbar(sizes, values, errors, fmt="o", markersize=3, color=look["color"])
            axes.plot(between, line, label=row["row"], **look)
    ticks = sorted({time["batch_size"] for row in answer["rows"] for time in row["batches"]})
    goal = "{metric} {value:g}".format(**answer["target"])
    for axes, quantity in ((left, "steps"), (right, "images")):
        axes.set(title=f"{quantity} to {goal}", xlabel="batch size", xscale="log", yscale="log")
        axes.set_xticks(ticks, [f"{size:,}" for size in ticks])
        axes.set_xticks([], minor=True)
        axes.tick_params(axis="y", which="minor", labelleft=False)


def runs_with(metric: str, folder: Path) -> list[Run]:
    runs, _ = load_runs(folder)
    found = [run for run in runs if run.done and measured(run, metric)]
    return sorted(found, key=lambda run: str(run.config["optimizer"]["name"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kind", choices=["sharpness", "noise", "surface", "critical"])
    parser.add_argument("folder", type=Path, help="of runs, or of files of largebatch surface; or a JSON file")
    parser.add_argument("file", type=Path, nargs="?", help="KIND.svg beside this script by default")
    options = parser.parse_args()
    matplotlib.rcdefaults()  # ignores the user's settings
    with matplotlib.rc_context({"svg.hashsalt": options.kind, "font.size": 9, "axes.titlesize": 9}):
        figure = Figure(figsize=(8, 3))
        left, right = figure.subplots(1, 2)
        figure.subplots_adjust(left=0.07, right=0.98, top=0.9, bottom=0.16, wspace=0.2)
        if options.kind == "sharpness":
            sharpness(runs_with("sharpness/eigenvalue", options.folder), left, right)
        elif options.kind == "noise":
            noise(runs_with("noise/scale", options.folder), left, right)
        elif options.kind == "critical":
            critical(json.loads(options.folder.read_text())[0], left, right)
        else:
            surface(sorted(options.folder.glob("*.json")), left, right)
        left.legend(frameon=False)
        file = options.file or Path(__file__).with_name(f"{options.kind}.svg")
        figure.savefig(file, format="svg", metadata={"Date": None, "Title": options.kind.capitalize()})


if __name__ == "__main__":
    main()
