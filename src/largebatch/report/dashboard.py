"""Define the W&B dashboard: the panels of a project's saved view.

Panels name metrics as ``metrics.jsonl`` does and configuration keys as ``config/schema.py`` does. A test compares both
with what runs log. Needs the package wandb-workspaces, which takes half a second to import.
"""

from __future__ import annotations

from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from largebatch.errors import UserError

OPTIMIZER = "optimizer_label"  # optimizer and schedule
LAYERS = {"trust_ratio": "Trust ratio", "weight_norm": "Weight norm", "gradient_norm": "Gradient norm"}
SEARCHED = ("optimizer.lr", "optimizer.weight_decay", "optimizer.lmbda", "batch_size")  # on logarithmic axes
CHOSEN = ("schedule.name", "optimizer.name")
FIRST_COLUMNS = ("optimizer.name", "schedule.name", "batch_size", "optimizer.lr", "seed")  # of the table of runs
OUTCOMES = ("best/val/accuracy", "test/accuracy")  # validation, to choose by, and test, to report

Panels = list[Any]


def workspace(entity: str, project: str, name: str) -> ws.Workspace:
    """Return the saved view ``name``, without sending it.

    Raises:
        UserError: when W&B doesn't allow the name.
    """
    found = [
        ws.Section(name=title, panels=number(panels, title), is_open=index < 2)
        for index, (title, panels) in enumerate(sections().items())
    ]
    try:
        return ws.Workspace(
            entity=entity,
            project=project,
            name=name,
            sections=found,
            settings=ws.WorkspaceSettings(x_axis="step", max_runs=100),
            runset_settings=ws.RunsetSettings(pinned_columns=table_columns()),
        )
    except ValueError as error:
        raise UserError(f"--name={name}: W&B refuses the name. Allowed: names without symbols") from error


def sections() -> dict[str, Panels]:
    """Return the panels of each section. A new panel needs one line here."""
    column = wr.ParallelCoordinatesPlotColumn
    keys = [*(column(wr.Config(key), log=True) for key in SEARCHED), *(column(wr.Config(key)) for key in CHOSEN)]
    return {
        "Accuracy and loss": [
            _curves("Test accuracy", "test/accuracy"),
            _curves("Validation accuracy", "val/accuracy"),
            _curves("Training loss", "train/loss"),
            _curves("Test loss", "test/loss"),
            _curves("Validation loss", "val/loss"),
            _curves("Training accuracy", "train/accuracy"),
            _curves("Test accuracy over images seen", "test/accuracy", x="examples"),
            _curves("Test accuracy over seconds", "test/accuracy", x="wall_seconds"),
        ],
        "Batch size": [
            _points("Test accuracy against batch size", "test/accuracy"),
            _points("Best validation accuracy against batch size", "best/val/accuracy"),
            *outcome_bars(),
        ],
        "Layers": [
            *(_curves(title, x="step", metric_regex=f"^layers/{name}/", log_y=True) for name, title in LAYERS.items()),
            # W&B draws the key of a histogram as a histogram over all layers.
            *(_lines(f"{title}, all layers", f"layers/{name}") for name, title in LAYERS.items()),
        ],
        "Schedules": [  # by run: a mean of two schedules is no schedule
            _lines("Learning rate: of weights, and of biases and norm parameters", "optim/lr", "optim/lr_1d"),
            _lines("TVLARS's phi", "optim/phi"),
        ],
        "Throughput": [
            _curves("Images per second", "perf/images_per_second", x="step"),
            _curves("Milliseconds per step", "perf/step_ms", x="step"),
            _bars("Images per second of each batch size", "images_per_second", by="batch_size"),
        ],
        "Hyperparameters": [
            *(
                wr.ParallelCoordinatesPlot(
                    title=f"Settings and {outcome}", columns=[*keys, column(wr.SummaryMetric(outcome))]
                )
                for outcome in OUTCOMES
            ),
            *(wr.ParameterImportancePlot(with_respect_to=outcome) for outcome in OUTCOMES),
        ],
        "Barlow Twins": [
            _curves("Pre-training loss: on the diagonal", "train/on_diagonal"),
            _curves("Pre-training loss: off the diagonal", "train/off_diagonal"),
            _curves("Nearest-neighbour accuracy, test", "test/knn_accuracy"),
            _curves("Nearest-neighbour accuracy, validation", "val/knn_accuracy"),
            _curves("Standard deviation of embeddings", "embedding/std"),
            _curves("Effective rank of embeddings", "embedding/effective_rank"),
            _curves("Probe: loss", "probe/loss", x="probe/epoch"),
            _curves("Probe: training accuracy", "probe/accuracy", x="probe/epoch"),
            _curves("Probe: learning rate", "probe/lr", x="probe/epoch"),
        ],
        "Runs": [wr.RunComparer(diff_only="split"), wr.MediaBrowser(title="Images", media_keys=["images"])],
    }


def outcome_bars() -> Panels:
    return [
        _bars("Test accuracy of each optimizer", "test/accuracy", by=OPTIMIZER),
        _bars("Test accuracy of each batch size", "test/accuracy", by="batch_size"),
    ]


def table_columns() -> list[str]:
    """Return W&B's names of the first columns of the table of runs."""
    outcomes = [f"summary:{outcome}" for outcome in reversed(OUTCOMES)]
    return ["run:displayName", *map(_config_column, FIRST_COLUMNS), *outcomes]


def _config_column(key: str) -> str:
    first, *rest = key.split(".")
    return "config:" + ".".join([first, "value", *rest])  # W&B keeps a configuration as {first: {"value": {...}}}


def _curves(title: str, *metrics: str, x: str = "epoch", **more: Any) -> wr.LinePlot:
    """Return curves by optimizer: the mean over its runs, in a band from the smallest to the largest value."""
    return wr.LinePlot(title=title, x=x, y=list(metrics), **_grouped(OPTIMIZER), **more)


def _lines(title: str, *metrics: str) -> wr.LinePlot:
    """Return curves by run."""
    return wr.LinePlot(title=title, x="step", y=list(metrics))


def _points(title: str, metric: str) -> wr.ScatterPlot:
    return wr.ScatterPlot(title=title, x=wr.Config("batch_size"), y=wr.SummaryMetric(metric), log_x=True)


def _bars(title: str, metric: str, by: str) -> wr.BarPlot:
    return wr.BarPlot(title=title, metrics=[metric], orientation="v", **_grouped(by))


def _grouped(key: str) -> dict[str, Any]:
    return {"groupby": wr.Config(key), "groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}


def number(panels: Panels, prefix: str) -> Panels:
    """Replace the library's random panel ids by fixed ones, so that the same command sends the same view."""
    for index, panel in enumerate(panels):
        panel._id = f"{prefix.lower().replace(' ', '-')}-{index}"
    return panels
