"""The W&B dashboard as code: which panels a project's saved view has, and what of a run they show.

Panels name metrics as ``metrics.jsonl`` does and configuration keys as ``config.py`` does; a test holds them to what
runs log. Needs the package wandb-workspaces, and takes half a second to import.
"""

from __future__ import annotations

from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from largebatch.errors import UserError

OPTIMIZER = "optimizer_label"  # with its schedule; curves are the mean of its runs, in a band from least to greatest
LAYERS = {"trust_ratio": "Trust ratio", "weight_norm": "Weight norm", "gradient_norm": "Gradient norm"}
SEARCHED = ("optimizer.lr", "optimizer.weight_decay", "optimizer.lmbda", "batch_size")  # over decades: on log axes
CHOSEN = ("schedule.name", "optimizer.name")
FIRST_COLUMNS = ("optimizer.name", "schedule.name", "batch_size", "optimizer.lr", "seed")  # of the table of runs
OUTCOMES = ("test/accuracy", "best/val/accuracy")

Panels = list[Any]


def workspace(entity: str, project: str, name: str) -> ws.Workspace:
    """The saved view ``name``; nothing is sent.

    Raises:
        UserError: when W&B takes no such name.
    """
    sections = [
        ws.Section(name=title, panels=panels, is_open=index < 2) for index, (title, panels) in enumerate(_sections())
    ]
    for section in sections:
        number(section.panels, section.name)
    try:
        return ws.Workspace(
            entity=entity,
            project=project,
            name=name,
            sections=sections,
            settings=ws.WorkspaceSettings(x_axis="step", max_runs=100),
            runset_settings=ws.RunsetSettings(pinned_columns=table_columns()),
        )
    except ValueError as error:
        raise UserError(f"--name {name}: W&B takes no symbols in a view's name") from error


def _sections() -> list[tuple[str, Panels]]:
    return [
        ("Accuracy and loss", accuracy_and_loss()),
        ("Batch size", batch_size()),
        ("Layers", layers()),
        ("Schedules", schedules()),
        ("Throughput", throughput()),
        ("Hyperparameters", hyperparameters()),
        ("Barlow Twins", barlow_twins()),
        ("Runs", runs()),
    ]


def accuracy_and_loss() -> Panels:
    return [
        _curves("Test accuracy", ["test/accuracy"]),
        _curves("Validation accuracy", ["val/accuracy"]),
        _curves("Training loss", ["train/loss"]),
        _curves("Test loss", ["test/loss"]),
        _curves("Validation loss", ["val/loss"]),
        _curves("Training accuracy", ["train/accuracy"]),
        _curves("Test accuracy over images seen", ["test/accuracy"], x="examples"),
        _curves("Test accuracy over seconds", ["test/accuracy"], x="wall_seconds"),
    ]


def batch_size() -> Panels:
    return [
        *(
            wr.ScatterPlot(
                title=f"{title} against batch size", x=wr.Config("batch_size"), y=wr.SummaryMetric(metric), log_x=True
            )
            for title, metric in [("Test accuracy", "test/accuracy"), ("Best validation accuracy", "best/val/accuracy")]
        ),
        *outcome_bars(),
    ]


def outcome_bars() -> Panels:
    return [
        _bars("Test accuracy of each optimizer", "test/accuracy", by=OPTIMIZER),
        _bars("Test accuracy of each batch size", "test/accuracy", by="batch_size"),
    ]


def layers() -> Panels:
    """A line for each layer and optimizer, over steps."""
    return [
        wr.LinePlot(title=title, x="step", metric_regex=f"^layers/{column}/", log_y=True, **_grouped(OPTIMIZER))
        for column, title in LAYERS.items()
    ] + [
        wr.LinePlot(
            title=f"{title}, all layers", x="step", y=[f"layers/{column}"]
        )  # W&B draws a histogram's key as one
        for column, title in LAYERS.items()
    ]


def schedules() -> Panels:
    """Of each run by itself: the mean of two schedules is neither."""
    return [
        wr.LinePlot(
            title="Learning rate, and that of biases and norm parameters", x="step", y=["optim/lr", "optim/lr_1d"]
        ),
        wr.LinePlot(title="TVLARS's phi", x="step", y=["optim/phi"]),
    ]


def throughput() -> Panels:
    return [
        _curves("Images per second", ["perf/images_per_second"], x="step"),
        _curves("Milliseconds a step", ["perf/step_ms"], x="step"),
        _bars("Images per second of each batch size", "images_per_second", by="batch_size"),
    ]


def hyperparameters() -> Panels:
    """What to choose by (validation), and what came of it (test), which chooses nothing."""
    column = wr.ParallelCoordinatesPlotColumn
    keys = [*(column(wr.Config(key), log=True) for key in SEARCHED), *(column(wr.Config(key)) for key in CHOSEN)]
    return [
        *(
            wr.ParallelCoordinatesPlot(
                title=f"Settings and {outcome}",
                columns=[*keys, column(wr.SummaryMetric(outcome))],
            )
            for outcome in reversed(OUTCOMES)
        ),
        *(wr.ParameterImportancePlot(with_respect_to=outcome) for outcome in reversed(OUTCOMES)),
    ]


def barlow_twins() -> Panels:
    return [
        _curves("Pre-training loss: on the diagonal", ["train/on_diagonal"]),
        _curves("Pre-training loss: off the diagonal", ["train/off_diagonal"]),
        _curves("Nearest-neighbour accuracy, test", ["test/knn_accuracy"]),
        _curves("Nearest-neighbour accuracy, validation", ["val/knn_accuracy"]),
        _curves("Standard deviation of embeddings", ["embedding/std"]),
        _curves("Effective rank of embeddings", ["embedding/effective_rank"]),
        _curves("Probe: loss", ["probe/loss"], x="probe/epoch"),
        _curves("Probe: training accuracy", ["probe/accuracy"], x="probe/epoch"),
        _curves("Probe: learning rate", ["probe/lr"], x="probe/epoch"),
    ]


def runs() -> Panels:
    return [wr.RunComparer(diff_only="split"), wr.MediaBrowser(title="Images", media_keys=["images"])]


def table_columns() -> list[str]:
    """The columns that the table of runs begins with, as W&B names columns."""
    keys = [_config_column(key) for key in FIRST_COLUMNS]
    return ["run:displayName", *keys, *(f"summary:{outcome}" for outcome in OUTCOMES)]


def _config_column(key: str) -> str:
    first, *rest = key.split(".")
    return "config:" + ".".join([first, "value", *rest])  # W&B keeps a configuration as {first: {"value": {...}}}


def _curves(title: str, metrics: list[str], x: str = "epoch") -> wr.LinePlot:
    return wr.LinePlot(title=title, x=x, y=metrics, **_grouped(OPTIMIZER))


def _bars(title: str, metric: str, by: str) -> wr.BarPlot:
    return wr.BarPlot(title=title, metrics=[metric], orientation="v", **_grouped(by))


def _grouped(key: str) -> dict[str, Any]:
    return {"groupby": wr.Config(key), "groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}


def number(panels: Panels, prefix: str) -> None:
    """Give panels names that stay, in place of the library's random ones: the same command sends the same view."""
    for index, panel in enumerate(panels):
        panel._id = f"{prefix.lower().replace(' ', '-')}-{index}"
