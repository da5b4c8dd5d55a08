"""Save workspaces and reports in W&B, so that saving again replaces them.

W&B stores both as views. A view has an id, which W&B chooses, and a name, which the client chooses. The library that
builds views chooses random names, so each save makes another view. Here a hash of project and title is the name.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces._graphql import execute_graphql, get_app_url
from wandb_workspaces.reports.v2 import gql

from largebatch.errors import UserError, one_line
from largebatch.tracking.wandb_session import choose_mode, close_session, session_environment

_FIND = """
    query View($entityName: String, $name: String, $viewType: String, $viewName: String) {
        project(name: $name, entityName: $entityName) {
            allViews(viewType: $viewType, viewName: $viewName) { edges { node { id } } }
        }
    }
"""


@dataclass(frozen=True)
class SavedView:
    """A workspace or a report, as W&B stores it.

    Attributes:
        kind: W&B's type: ``project-view`` for a workspace, ``runs`` for a report.
        name: name inside W&B.
        title: name that people see.
        spec: content.
    """

    entity: str
    project: str
    kind: str
    name: str
    title: str
    description: str
    spec: dict[str, Any]


def of_workspace(workspace: ws.Workspace) -> SavedView:
    name = f"nw-{_hash(workspace.entity, workspace.project, 'workspace', workspace.name)}-v"
    return SavedView(workspace.entity, workspace.project, "project-view", name, workspace.name, "", _spec(workspace))


def of_report(report: wr.Report) -> SavedView:
    name = _hash(report.entity, report.project, "report", report.title)
    return SavedView(report.entity, report.project, "runs", name, report.title, report.description, _spec(report))


def _hash(*parts: str) -> str:
    """Return 11 characters, the length of W&B's own names."""
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:11]


def _spec(view: ws.Workspace | wr.Report) -> dict[str, Any]:
    return dict(json.loads(view._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)))


def save(views: list[SavedView]) -> list[str]:
    """Save each view and replace the view of the same name. Return their addresses.

    Raises:
        UserError: when there is no API key, W&B can't be reached, or W&B refuses.
    """
    import wandb

    with tempfile.TemporaryDirectory(prefix="largebatch-") as scratch, session_environment(Path(scratch), "online"):
        mode, why = choose_mode("online")
        if mode != "online":
            raise UserError(f"W&B can't be reached: {why}. Fix: store a key with `wandb login`, or use --print")
        try:
            api = wandb.Api(timeout=20)  # seconds for a request
            return [_save(api, view) for view in views]
        except UserError:
            raise
        except Exception as error:  # of many types, from wandb and from its process
            raise UserError(f"W&B refused: {one_line(error)}") from error
        finally:
            close_session()


def _save(api: Any, view: SavedView) -> str:
    """Save a view. Return its address."""
    given = {
        "id": _find(api, view),
        "name": view.name,
        "entityName": view.entity,
        "projectName": view.project,
        "displayName": view.title,
        "description": view.description,
        "type": view.kind,
        "spec": json.dumps(view.spec),
    }
    answer = execute_graphql(api, gql.upsert_view, {k: v for k, v in given.items() if v is not None})
    at = f"{get_app_url(api).rstrip('/')}/{quote(view.entity)}/{quote(view.project)}"
    if view.kind == "project-view":
        return f"{at}?nw={view.name.removeprefix('nw-').removesuffix('-v')}"
    return f"{at}/reports/{quote(view.title.replace(' ', '-'))}--{answer['upsertView']['view']['id'].rstrip('=')}"


def _find(api: Any, view: SavedView) -> str | None:
    """Return the id of the view with this name. None: there is no such view."""
    asked = {"entityName": view.entity, "name": view.project, "viewType": view.kind, "viewName": view.name}
    project = execute_graphql(api, _FIND, asked).get("project")
    if project is None:
        raise UserError(
            f"--project={view.project}: the API key gives access to no project {view.entity}/{view.project}. "
            "Fix: check --entity and --project. A project's first run creates it"
        )
    edges = project["allViews"]["edges"]
    return str(edges[0]["node"]["id"]) if edges else None
