"""``largebatch surface``: the training loss around a run's weights, as numbers and a picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from largebatch.data import load_data
from largebatch.errors import UserError
from largebatch.instruments.slices import filter_normalised, loss_slice
from largebatch.modes import clf
from largebatch.results.evaluate import as_run, chosen_device, evaluated_config
from largebatch.results.run import LoadedRun
from largebatch.runs.folder import write_atomic
from largebatch.seeding import derive_seed
from largebatch.training.curvature import fixed_loss


def surface(
    run: LoadedRun, samples: int, points: int, radius: float, plane: bool, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Return the loss along one direction, or two, from the weights of a checkpoint.

    The loss is that of ``instruments.sharpness_every``, over ``samples`` training images.

    Args:
        points: number of points of a direction, odd so that the weights are one of them.
        radius: distance of the last point; 1 is a filter's own norm.
        plane: True for two directions.
        seed: of the directions.
        say: called with lines about slow work.

    Raises:
        UserError: for a number out of its range, a run of another mode, or as ``load_data``.
    """
    if points < 3 or points % 2 == 0:
        raise UserError(f"--points {points}: must be an odd number of at least 3. Fix: --points {max(points + 1, 3)}")
    if samples < 1 or not 0 < radius < float("inf"):
        raise UserError(f"--samples {samples} --radius {radius:g}: must be above 0")
    if run.config.mode.name != "clf":
        raise UserError(f"{run.folder.path}: mode={run.config.mode.name}. Allowed: runs with mode=clf")
    config, device = evaluated_config(run, ()), chosen_device("auto")
    config = replace(config, instruments=replace(config.instruments, sharpness_samples=samples))
    data = load_data(config.dataset, config.seed, device, say)
    state = as_run(run, config, data, device)
    network = run.model().to(device).to(memory_format=state.arithmetic.memory_format)
    loss = fixed_loss(state, network, network, clf)
    generator = torch.Generator().manual_seed(derive_seed(seed, "surface"))
    directions = [filter_normalised(list(network.parameters()), generator) for _ in range(1 + plane)]
    at = [radius * (2 * place / (points - 1) - 1) for place in range(points)]
    say(f"{points ** (1 + plane):,} points of the loss over {loss.total:,} training images")
    return {
        "run": run.folder.path.absolute().name,
        "step": run.step,
        "images": loss.total,
        "seed": seed,
        "at": at,
        "loss": loss_slice(loss, at, *directions),
    }


def check_out(out: Path) -> None:
    """Check the file of the picture before the long work.

    Raises:
        UserError: its folder is missing, or it is the file of the numbers.
    """
    if out.suffix == ".json":
        raise UserError(f"--out {out}: the numbers get this name. Fix: --out {out.with_suffix('.html')}")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: {out.parent} is not a folder. Fix: create it")


def write_surface(found: dict[str, Any], out: Path | None) -> list[Path]:
    """Write the picture as HTML, and the numbers beside it with the ending ``.json``. Return both files.

    Args:
        out: file of the picture; None: by the run's name, in the current folder.
    """
    import plotly.graph_objects as go

    out = out or Path(f"{found['run']}-surface.html")
    at, rows = found["at"], found["loss"]
    title = f"{found['run']}, step {found['step']:,}: loss over {found['images']:,} training images"
    if len(rows) > 1:
        drawn = go.Contour(x=at, y=at, z=rows, contours={"showlabels": True}, colorbar={"title": {"text": "loss"}})
    else:
        drawn = go.Scatter(x=at, y=rows[0], mode="lines+markers")
    axes = {"xaxis_title": "first direction", "yaxis_title": "second direction" if len(rows) > 1 else "loss"}
    figure = go.Figure(drawn).update_layout(title=title, template="plotly_white", **axes)
    numbers = out.with_suffix(".json")
    write_atomic(numbers, json.dumps(found, indent=1) + "\n")
    write_atomic(out, figure.to_html(div_id="surface"))
    return [out, numbers]
