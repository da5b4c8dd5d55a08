"""The saved view and the report show what runs log, and saving them again replaces them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, configuration
from made_runs import write_run
from programs import Ended, Programs
from recorder import recorder

from largebatch import cli
from largebatch.runs.metrics import read_rows
from largebatch.tracking.rows import COLUMNS, Layer, LayerRow
from largebatch.tracking.tracker import shown_config

# wandb-workspaces uses validators of pydantic 1.
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1 style:DeprecationWarning")

Json = dict[str, Any]
KEY = "c0ffee" * 6 + "beef"
OPTIONS = ("--entity", "team", "--project", "bigbatch")


Dashboard = Callable[..., Ended]


@pytest.fixture
def dashboard(process: Programs, tmp_path: Path) -> Dashboard:
    """Return a function that calls ``largebatch dashboard`` in an empty home."""

    def call(*options: str, **variables: str) -> Ended:
        return process.call("largebatch", "dashboard", *options, cwd=tmp_path, **{"HOME": str(tmp_path), **variables})

    return call


@pytest.fixture
def views(capsys: pytest.CaptureFixture[str]) -> list[Json]:
    """Workspace and report as ``--print`` shows them."""
    assert cli.main(["dashboard", *OPTIONS, "--print"]) == 0
    printed: list[Json] = json.loads(capsys.readouterr().out)
    return printed


def panels(tree: Any) -> Iterator[Json]:
    """Yield every panel of a specification, at any depth."""
    if isinstance(tree, dict):
        if "viewType" in tree:
            yield tree
        for branch in tree.values():
            yield from panels(branch)
    elif isinstance(tree, list):
        for branch in tree:
            yield from panels(branch)


# Contents of the panels.


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory, process: Programs) -> tuple[set[str], set[str]]:
    """Names in the rows and in the summaries of a classification and a Barlow Twins run that log everything."""
    rows, summaries = set[str](), set[str]()
    both = [*TINY, "dataset.val_fraction=0.2", "epochs=1", "optimizer=tvlars", "optimizer.lr_1d=0.1", "steps=null"]
    # The cosine of gradients needs 20 steps.
    measured = ["epochs=7", "micro_batch=8", "instruments.noise_scale=true", "instruments.sharpness_every=7"]
    for more in (["mode=clf", *measured], ["mode=bt", "mode.eval_epochs=1", "mode.knn_every=1"]):
        run = process.train(tmp_path_factory.mktemp("run"), *both, *more)
        rows |= {name for row in read_rows(run / "metrics.jsonl") for name in row}
        summaries |= set(json.loads((run / "summary.json").read_text()))
    return rows, summaries


def test_runs_log_every_metric_of_every_panel(views: list[Json], logged: tuple[set[str], set[str]]) -> None:
    rows, summaries = logged
    histograms = set(LayerRow(1, [Layer("conv1.weight", 4)], [[0.5]] * len(COLUMNS)).columns())
    seen = set()
    for panel in panels(views):
        config, kind = panel["config"], panel["viewType"]
        seen.add(kind)
        if kind == "Run History Line Plot":
            assert config["xAxis"] in rows, config
            assert set(config.get("metrics", [])) <= rows | histograms, config
            if regex := config.get("metricRegex"):
                names = [f"layers/{column}/conv1.weight" for column in COLUMNS]
                names += [name for name in rows if name.startswith("noise_layers/conv1.weight")]
                assert [bool(re.search(regex, name)) for name in names].count(True) == 1, regex
            else:
                assert config["metrics"], config
        elif kind == "Bar Chart":
            assert set(config["metrics"]) <= rows | summaries, config
        elif kind == "Parameter Importance":
            assert config["targetKey"] in summaries, config
    assert seen == {
        "Run History Line Plot", "Scatter Plot", "Bar Chart", "Parallel Coordinates Plot", "Parameter Importance",
        "Run Comparer", "Media Browser",
    }  # fmt: skip
    of_summary = set(re.findall(r'"summary:([^"]+)"', json.dumps(views)))
    assert of_summary
    assert of_summary <= summaries


def test_runs_have_every_configuration_key_of_the_panels(views: list[Json]) -> None:
    """W&B keeps a configuration as ``{first: {"value": {rest}}}`` and names its keys by that path."""
    keys = {key for panel in panels(views) if (key := panel["config"].get("groupBy"))}
    keys |= set(re.findall(r'"config:([^"]+)"', json.dumps(views)))
    keys |= set(re.findall(r'"section": "config", "name": "([^"]+)"', json.dumps(views)))
    assert {"optimizer_label.value", "optimizer.value.name", "batch_size.value"} <= keys
    for key in keys:
        first, value, *rest = key.split(".")
        assert value == "value", key
        node: Any = shown_config(configuration("optimizer=tvlars"), {})
        for part in (first, *rest):
            assert part in node, key
            node = node[part]


def test_panels_have_titles_and_unique_ids(views: list[Json]) -> None:
    for view in views:
        ids = [panel["__id__"] for panel in panels(view)]
        assert len(set(ids)) == len(ids)
    titles = [panel["config"].get("chartTitle") for panel in panels(views[0])]
    assert len([title for title in titles if title]) >= len(titles) - 3  # importance and comparer bring their own


# Saving.


def test_saving_again_replaces_the_views_and_sends_the_printed_ones(dashboard: Dashboard, views: list[Json]) -> None:
    with recorder() as server:
        results = [dashboard(*OPTIONS, **server.environment(KEY)) for _ in range(2)]
        other = dashboard(*OPTIONS, "--name", "mine", **server.environment(KEY))
    for result in (*results, other):
        assert (result.code, result.stderr) == (0, ""), result.stderr
    assert results[0].stdout == results[1].stdout != other.stdout
    assert server.unknown == []
    first, second, third = server.views[:2], server.views[2:4], server.views[4:]
    assert [view["type"] for view in first] == ["project-view", "runs"]
    assert first == second  # the same ids too
    assert not {view["id"] for view in first} & {view["id"] for view in third}
    for sent, printed in zip(first, views, strict=True):
        assert (sent["name"], sent["displayName"]) == (printed["name"], printed["title"])
        assert (sent["entityName"], sent["projectName"]) == ("team", "bigbatch")
        assert json.loads(sent["spec"]) == printed["spec"]
    assert f"{server.url}/team/bigbatch?nw={views[0]['name'][3:-2]}" in results[0].stdout
    assert f"{server.url}/team/bigbatch/reports/large-batch--{first[1]['id']}" in results[0].stdout


def test_the_library_reads_and_writes_the_same_workspace(views: list[Json]) -> None:
    """The library parses the specification and writes the same one. W&B's own application does as much."""
    from wandb_workspaces.workspaces import Workspace, internal

    printed = views[0]
    spec = internal.WorkspaceViewspec.model_validate(printed["spec"])
    view = internal.View(entity="team", project="p", display_name="x", name=printed["name"], id="i", spec=spec)
    again = Workspace._from_model(view)._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)
    assert json.loads(again) == printed["spec"]


def test_the_report_contains_the_comparison_of_a_folder_of_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, accuracy in enumerate((0.8, 0.9)):
        write_run(tmp_path, f"seed={seed}", accuracies=(0.5, accuracy))
    assert cli.main(["report", str(tmp_path), "--format", "md"]) == 0
    printed = capsys.readouterr().out.strip()
    assert "| LARS | 85.0 ± 7.1" in printed
    assert cli.main(["dashboard", *OPTIONS, "--print", "--runs", str(tmp_path)]) == 0
    _, report = json.loads(capsys.readouterr().out)
    assert printed in [block.get("content") for block in report["spec"]["blocks"]]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--name", "a+b"], "--name=a+b: W&B refuses the name"),
        (["--runs", "nowhere"], "nowhere: not a folder"),
    ],
)
def test_an_invalid_option_is_one_message(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["dashboard", *OPTIONS, "--print", *options]) == 2
    assert says in capsys.readouterr().err


def test_printing_needs_no_entity_and_both_options_follow_the_environment(dashboard: Dashboard) -> None:
    printed = dashboard("--print")
    assert (printed.code, printed.stderr) == (0, "")
    assert [view["entity"] for view in json.loads(printed.stdout)] == ["ENTITY", "ENTITY"]
    printed = dashboard("--print", WANDB_ENTITY="team", WANDB_PROJECT="bigbatch")
    assert [(v["entity"], v["project"]) for v in json.loads(printed.stdout)] == [("team", "bigbatch")] * 2
    assert "--entity: no W&B user or team" in refused(dashboard())


def refused(result: Ended) -> str:
    """Return the single line on stderr."""
    assert (result.code, result.stdout) == (2, ""), result.stderr
    (line,) = result.stderr.splitlines()
    return line


def test_a_missing_key_server_or_permission_is_one_message(dashboard: Dashboard) -> None:
    assert "no API key. Fix: store a key with `wandb login`" in refused(dashboard(*OPTIONS))
    nobody = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    assert "127.0.0.1:9 can't be reached" in refused(dashboard(*OPTIONS, **nobody))
    with recorder() as server:
        server.project = "other"
        message = refused(dashboard(*OPTIONS, **server.environment(KEY)))
        assert "no project team/bigbatch" in message
        server.status = 403
        assert "error: W&B refused: " in refused(dashboard(*OPTIONS, **server.environment(KEY)))
    assert server.views == []


def test_a_missing_library_is_a_message_with_the_command_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert cli.main(["dashboard", *OPTIONS, "--print"]) == 2
    assert "wandb_workspaces isn't installed. Fix: pip install 'largebatch[wandb]'" in capsys.readouterr().err
