"""Workspaces and reports in W&B, each kept under a name of its own, so that saving again replaces it.

W&B keeps both as views. One is known by its id, which W&B gives, and by its name, which who saves it chooses; the
library that builds them chooses at random, and so saves another one each time. Here the name follows from the project
and the title.
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

from largebatch.errors import UserError
from largebatch.tracking.wandb_session import choose_mode, close_session, one_line, session_environment

_SECONDS = 20  # for an answer of W&B's
_FIND = """
    query View($entityName: String, $name: String, $viewType: String, $viewName: String) {
        project(name: $name, entityName: $entityName) {
            allViews(viewType: $viewType, viewName: $viewName) { edges { node { id } } }
        }
    }
"""


@dataclass(frozen=True)
class SavedView:
    """What W&B is given of a workspace or a report.

    Attributes:
        kind: W&B's word: ``project-view`` for a workspace, ``runs`` for a report.
        name: what it is known by within W&B.
        title: what people see.
        spec: its content.
    """

    entity: str
    project: str
    kind: str
    name: str
    title: str
    description: str
    spec: dict[str, Any]

    def url(self, app: str, view_id: str) -> str:
        at = f"{app}/{quote(self.entity)}/{quote(self.project)}"
        if self.kind == "project-view":
            return f"{at}?nw={self.name.removeprefix('nw-').removesuffix('-v')}"
        return f"{at}/reports/{quote(self.title.replace(' ', '-'))}--{view_id.rstrip('=')}"


def of_workspace(workspace: ws.Workspace) -> SavedView:
    key = _hash(workspace.entity, workspace.project, "workspace", workspace.name)
    spec = _plain(workspace._to_model().spec)
    return SavedView(workspace.entity, workspace.project, "project-view", f"nw-{key}-v", workspace.name, "", spec)


def of_report(report: wr.Report) -> SavedView:
    key = _hash(report.entity, report.project, "report", report.title)
    spec = _plain(report._to_model().spec)
    return SavedView(report.entity, report.project, "runs", key, report.title, report.description, spec)


def save(views: list[SavedView]) -> list[str]:
    """Save each, in place of what has its name. Returns their addresses.

    Raises:
        UserError: when there is no key, W&B can't be reached or refuses.
    """
    with tempfile.TemporaryDirectory(prefix="largebatch-") as scratch, session_environment(Path(scratch), "online"):
        mode, why = choose_mode("online")
        if mode != "online":
            raise UserError(f"W&B can't be reached: {why}; `wandb login` stores a key, --print needs none")
        try:
            return _save(views)
        except UserError:
            raise
        except Exception as error:  # wandb's own, of many kinds, and its process's
            raise UserError(f"W&B refused: {one_line(error)}") from error
        finally:
            close_session()


def _save(views: list[SavedView]) -> list[str]:
    import wandb

    api = wandb.Api(timeout=_SECONDS)
    saved = []
    for view in views:
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
        saved.append(view.url(get_app_url(api).rstrip("/"), answer["upsertView"]["view"]["id"]))
    return saved


def _find(api: Any, view: SavedView) -> str | None:
    """The id of what has the view's name; None where nothing has."""
    asked = {"entityName": view.entity, "name": view.project, "viewType": view.kind, "viewName": view.name}
    project = execute_graphql(api, _FIND, asked).get("project")
    if project is None:
        raise UserError(
            f"W&B shows no project {view.entity}/{view.project} to this key; check --entity and --project. "
            "A project begins with its first run"
        )
    edges = project["allViews"]["edges"]
    return str(edges[0]["node"]["id"]) if edges else None


def _hash(*parts: str) -> str:
    """Eleven characters, as many as W&B's own names have."""
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:11]


def _plain(spec: Any) -> dict[str, Any]:
    return dict(json.loads(spec.model_dump_json(by_alias=True, exclude_none=True)))
