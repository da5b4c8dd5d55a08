"""Define the W&B dashboard: a project's saved view, and the report of a comparison with the same panels.

Panels name metrics as ``metrics.jsonl`` does and configuration keys as ``config/schema.py`` does. A test compares both
with what runs log. Needs the package wandb-workspaces, which takes half a second to import.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from largebatch.errors import UserError
from largebatch.report.build import report as build_report

_OPTIMIZER = "optimizer_label"  # optimizer and schedule
_LAYERS = {
    "trust_ratio": "Trust ratio", "update_ratio": "Update ratio", "weight_norm": "Weight norm",
    "gradient_norm": "Gradient norm",
}  # fmt: skip
_OUTCOMES = ("best/val/accuracy", "test/accuracy")  # validation, to choose by, and test, to report
# First columns of the table of runs. W&B keeps a configuration as {first: {"value": {...}}}.
_COLUMNS = [
    "run:displayName", "config:optimizer.value.name", "config:schedule.value.name", "config:batch_size.value",
    "config:optimizer.value.lr", "config:seed.value", "summary:test/accuracy", "summary:best/val/accuracy",
    "summary:state",
]  # fmt: skip
_HOW_TO_READ = """\
- **Choose by validation, report the test set.** With `dataset.val_fraction` above 0, `best/val/accuracy` chooses the
  setting and the epoch, and `best/test/accuracy` is their result. The test set chooses nothing.
- **Count the trials.** The best of 49 settings is better than the best of 3 by chance alone. Compare optimizers with
  the same number of settings.
- **Seeds.** A difference within the spread over seeds of one setting is no difference.
- **Divergence is a result.** A diverged run has the `state` `diverged` and counts as a trial.
- Curves are means over the runs of an optimizer in the table. The band goes from the smallest to the largest value.
  Filter the table to compare like with like: one data set, one mode, one batch size.
"""

Panels = list[Any]


def workspace(entity: str, project: str, name: str) -> ws.Workspace:
    """Return the saved view ``name``, without sending it.

    Raises:
        UserError: when W&B doesn't allow the name.
    """
    found = [
        ws.Section(name=title, panels=_numbered(panels, title), is_open=index < 2)
        for index, (title, panels) in enumerate(_sections().items())
    ]
    try:
        return ws.Workspace(
            entity=entity,
            project=project,
            name=name,
            sections=found,
            settings=ws.WorkspaceSettings(x_axis="step", max_runs=100),
            runset_settings=ws.RunsetSettings(pinned_columns=_COLUMNS),
        )
    except ValueError as error:
        raise UserError(f"--name={name}: W&B refuses the name. Allowed: names without symbols") from error


def report(entity: str, project: str, title: str, runs_dir: Path | None) -> wr.Report:
    """Return the report ``title``, without sending it.

    Args:
        runs_dir: folder of runs. The report contains their comparison in Markdown.
    """
    panels = _sections()
    tables = [] if runs_dir is None else [wr.MarkdownBlock(build_report(runs_dir, "-", "md"))]
    blocks = [
        wr.H1("How to read this"),
        wr.MarkdownBlock(_HOW_TO_READ),
        wr.H1("The comparison"),
        *tables,
        wr.P("Runs by optimizer and batch size. Unfold a group to see its settings and seeds."),
        _grid("comparison", _outcome_bars(), [f"config.{_OPTIMIZER}", "config.batch_size"]),
        wr.H1("Accuracy against batch size"),
        _grid("batch-size", panels["Batch size"]),
        wr.H1("Accuracy and loss"),
        _grid("curves", panels["Accuracy and loss"]),
        wr.H1("Layers"),
        wr.P("Trust ratio, weight norm and gradient norm of every layer, over optimizer steps."),
        _grid("layers", panels["Layers"]),
        wr.H1("Instruments"),
        wr.P("Of runs with instruments.noise_scale or instruments.sharpness_every. Sharpness is no verdict."),
        _grid("instruments", panels["Instruments"]),
        wr.H1("Differences between runs"),
        _grid("runs", panels["Runs"]),
    ]
    return wr.Report(
        entity=entity,
        project=project,
        title=title,
        description="Written by `largebatch dashboard`. Running it again replaces this report.",
        blocks=blocks,
        width="fluid",
    )


def _grid(name: str, panels: Panels, groups: list[str] | None = None) -> wr.PanelGrid:
    """Return panels over all runs. With ``groups``, show the table of runs too, grouped by these keys."""
    columns = [*_COLUMNS, "summary:best/test/accuracy"]
    runs = wr.Runset(name="Runs", groupby=groups or [], pinned_columns=columns)
    runs._id = f"report-{name}"
    return wr.PanelGrid(runsets=[runs], panels=_numbered(panels, f"report-{name}"), hide_run_sets=groups is None)


def _sections() -> dict[str, Panels]:
    """Return the panels of each section. A new panel needs one line here."""
    column = wr.ParallelCoordinatesPlotColumn
    searched = ("optimizer.lr", "optimizer.weight_decay", "optimizer.lmbda_relative", "batch_size")
    keys = [column(wr.Config(key), log=True) for key in searched]
    keys += [column(wr.Config(key)) for key in ("schedule.name", "optimizer.name")]
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
            *_outcome_bars(),
        ],
        "Layers": [
            *(_curves(title, x="step", metric_regex=f"^layers/{name}/", log_y=True) for name, title in _LAYERS.items()),
            # W&B draws the key of a histogram as a histogram over all layers.
            *(_lines(f"{title}, all layers", f"layers/{name}") for name, title in _LAYERS.items()),
        ],
        "Schedules": [  # by run: a mean of two schedules is no schedule
            _lines("Learning rate: of weights, and of biases and norm parameters", "optim/lr", "optim/lr_1d"),
            _lines("TVLARS's phi", "optim/phi"),
        ],
        "Instruments": [
            _curves("Gradient noise scale", "noise/scale", x="step", log_y=True),
            _lines("Gradient noise scale, with its interval", "noise/scale", "noise/scale_low", "noise/scale_high"),
            _curves("Gradient noise scale of each layer", x="step", metric_regex="^noise_layers/.*weight$", log_y=True),
            _curves(
                "Variance of each layer's gradient", x="step", metric_regex="^noise_layers/.*_variance$", log_y=True
            ),
            _curves("Cosine of successive gradients", "noise/cosine", x="step"),
            _curves("Sharpness: largest eigenvalue of the Hessian", "sharpness/eigenvalue"),
            _curves("Sharpness: largest preconditioned eigenvalue", "sharpness/preconditioned"),
            _curves("Sharpness: trace of the Hessian", "sharpness/trace"),
            _curves("Sharpness: rise of the loss within SAM's radius", "sharpness/sam"),
            _curves("Sharpness: rise of the loss within ASAM's radius", "sharpness/asam"),
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
                for outcome in _OUTCOMES
            ),
            *(wr.ParameterImportancePlot(with_respect_to=outcome) for outcome in _OUTCOMES),
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


def _outcome_bars() -> Panels:
    return [
        _bars("Test accuracy of each optimizer", "test/accuracy", by=_OPTIMIZER),
        _bars("Test accuracy of each batch size", "test/accuracy", by="batch_size"),
    ]


def _curves(title: str, *metrics: str, x: str = "epoch", **more: Any) -> wr.LinePlot:
    """Return curves by optimizer: the mean over its runs, in a band from the smallest to the largest value."""
    return wr.LinePlot(title=title, x=x, y=list(metrics), **_grouped(_OPTIMIZER), **more)


def _lines(title: str, *metrics: str) -> wr.LinePlot:
    return wr.LinePlot(title=title, x="step", y=list(metrics))


def _points(title: str, metric: str) -> wr.ScatterPlot:
    return wr.ScatterPlot(title=title, x=wr.Config("batch_size"), y=wr.SummaryMetric(metric), log_x=True)


def _bars(title: str, metric: str, by: str) -> wr.BarPlot:
    return wr.BarPlot(title=title, metrics=[metric], orientation="v", **_grouped(by))


def _grouped(key: str) -> dict[str, Any]:
    return {"groupby": wr.Config(key), "groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}


def _numbered(panels: Panels, prefix: str) -> Panels:
    """Replace the library's random panel ids by fixed ones, so that the same command sends the same view."""
    for index, panel in enumerate(panels):
        panel._id = f"{prefix.lower().replace(' ', '-')}-{index}"
    return panels
