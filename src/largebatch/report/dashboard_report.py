"""Write the W&B report of a comparison: how to read it, the table, and the panels behind the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import wandb_workspaces.reports.v2 as wr

from largebatch.report import dashboard
from largebatch.report.build import report as build_report

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
_PINNED = [*dashboard.table_columns(), "summary:best/test/accuracy", "summary:state"]


def report(entity: str, project: str, title: str, runs_dir: Path | None) -> wr.Report:
    """Return the report ``title``, without sending it.

    Args:
        runs_dir: folder of runs. The report contains their comparison in Markdown.
    """
    sections = dashboard.sections()
    tables = [] if runs_dir is None else [wr.MarkdownBlock(build_report(runs_dir, "-", "md"))]
    groups = [f"config.{dashboard.OPTIMIZER}", "config.batch_size"]
    blocks = [
        wr.H1("How to read this"),
        wr.MarkdownBlock(_HOW_TO_READ),
        wr.H1("The comparison"),
        *tables,
        wr.P("Runs by optimizer and batch size. Unfold a group to see its settings and seeds."),
        _grid("comparison", dashboard.outcome_bars(), groups),
        wr.H1("Accuracy against batch size"),
        _grid("batch-size", sections["Batch size"]),
        wr.H1("Accuracy and loss"),
        _grid("curves", sections["Accuracy and loss"]),
        wr.H1("Layers"),
        wr.P("Trust ratio, weight norm and gradient norm of every layer, over optimizer steps."),
        _grid("layers", sections["Layers"]),
        wr.H1("Differences between runs"),
        _grid("runs", sections["Runs"]),
    ]
    return wr.Report(
        entity=entity,
        project=project,
        title=title,
        description="Written by `largebatch dashboard`. Running it again replaces this report.",
        blocks=blocks,
        width="fluid",
    )


def _grid(name: str, panels: dashboard.Panels, groups: list[str] | None = None) -> Any:
    """Return panels over all runs. With ``groups``, show the table of runs too, grouped by these keys."""
    runs = wr.Runset(name="Runs", groupby=groups or [], pinned_columns=_PINNED)
    runs._id = f"report-{name}"
    return wr.PanelGrid(runsets=[runs], panels=dashboard.number(panels, f"report-{name}"), hide_run_sets=groups is None)
