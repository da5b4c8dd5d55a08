"""TVLARS's phi and schedules with and without warm-up, over 100 epochs of CIFAR-10 at two batch sizes.

`python docs/plots/phi.py [FILE]` writes FILE, by default phi.svg beside this script. Every call writes the same file.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from largebatch.config.schedules import Cosine, WarmupCosine
from largebatch.optim.tvlars import phi

EPOCHS, WARM = 100, 10  # WARM: epochs of warm-up, and of phi's delay
BATCHES = {512: 98, 16384: 4}  # steps an epoch of 50,000 images, the last batch included

PAPER, RELEASED = "TVLARS, paper's form", "TVLARS, released program"
# Hue by lambda (Okabe and Ito's colours), line style by form, so that the figure is readable in grey.
STYLES = {
    f"{PAPER}, λ = 1e-4": {"color": "#56B4E9", "linestyle": "-"},
    f"{PAPER}, λ = 1e-3": {"color": "#0072B2", "linestyle": "-"},
    f"{PAPER}, λ = 1e-2": {"color": "#D55E00", "linestyle": "-"},
    f"{RELEASED}, λ = 1e-3": {"color": "#0072B2", "linestyle": (0, (5, 2))},
    f"{RELEASED}, λ = 1e-2": {"color": "#D55E00", "linestyle": (0, (5, 2))},
    "linear warm-up + cosine": {"color": "black", "linestyle": (0, (1, 1))},
    "cosine": {"color": "#666666", "linestyle": (0, (6, 2, 1, 2))},
}


def curves(batch: int, steps_per_epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return epochs, and by label the factor of the learning rate, each of shape [steps]."""
    total, warm = EPOCHS * steps_per_epoch, WARM * steps_per_epoch
    steps = torch.arange(1, total + 1)  # TVLARS counts from 1
    floor = 0.001 * batch / 256
    schedules = {"linear warm-up + cosine": WarmupCosine(final_factor=0.001, warmup_epochs=WARM), "cosine": Cosine()}
    found = {f"{PAPER}, λ = 1e-{n}": phi(steps, 10.0**-n, 1.0, warm, floor) for n in (4, 3, 2)}
    found |= {f"{RELEASED}, λ = 1e-{n}": phi(steps, 10.0**-n, 0.1, 0.0, 0.0) for n in (3, 2)}
    for label, schedule in schedules.items():
        factor = schedule.factor(total, steps_per_epoch)
        found[label] = torch.tensor([factor(step) for step in range(total)])  # schedules count from 0
    return steps / steps_per_epoch, found


def curve_id(label: str, batch: int) -> str:
    """Return the curve's ``id`` in the SVG file."""
    return re.sub("[^a-z0-9]+", "-", f"{label} {batch}".lower())


def panel(axes: Axes, batch: int, steps_per_epoch: int) -> None:
    epochs, found = curves(batch, steps_per_epoch)
    axes.axvline(WARM, color="#BBBBBB", linewidth=0.8)
    for label, values in found.items():
        axes.plot(epochs.tolist(), values.tolist(), label=label, gid=curve_id(label, batch), **STYLES[label])
    axes.set_title(f"batch {batch:,}: {steps_per_epoch} steps an epoch")
    axes.set_xlabel("epoch")
    axes.set_xlim(0, EPOCHS)
    axes.set_ylim(0, 1.12)
    axes.spines[["top", "right"]].set_visible(False)


def draw() -> Figure:
    # Positions are fixed, not computed from the size of the text, so that every matplotlib draws the same curves.
    figure = Figure(figsize=(9, 4.6))
    left, right = figure.subplots(1, 2, sharey=True)
    figure.subplots_adjust(left=0.07, right=0.985, top=0.93, bottom=0.31, wspace=0.06)
    for axes, (batch, steps_per_epoch) in zip((left, right), BATCHES.items(), strict=True):
        panel(axes, batch, steps_per_epoch)
    left.set_ylabel("factor of the learning rate")
    note = f"delay, warm-up: {WARM} epochs"
    left.annotate(note, (WARM, 1.11), (3, 0), textcoords="offset points", va="top", fontsize=8, color="#555555")
    figure.legend(*left.get_legend_handles_labels(), loc="lower center", ncols=3, frameon=False, handlelength=3.2)
    return figure


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("phi.svg")
    matplotlib.rcdefaults()  # ignore the user's settings
    salt = {"svg.hashsalt": "phi"}  # without it, names inside the file are random
    with matplotlib.rc_context({**salt, "lines.linewidth": 1.8, "font.size": 10, "axes.titlesize": 10}):
        draw().savefig(target, format="svg", metadata={"Date": None, "Title": "TVLARS's phi and schedules"})


if __name__ == "__main__":
    main()
