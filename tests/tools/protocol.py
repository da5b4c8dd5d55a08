"""The part of W&B's protocol that wandb uses here: received data, and the answer to each operation.

Unknown operations are listed in ``unknown``. Tests expect an empty list, so a newer wandb with more operations fails a
test instead of waiting for an answer.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import yaml

Json = dict[str, Any]
USER = "someone"


@dataclass
class TakenRun:
    """One run on the server."""

    announced: list[Json] = field(default_factory=list)  # variables of each announcement
    history: list[Json] = field(default_factory=list)
    events: list[Json] = field(default_factory=list)  # rows of system metrics
    summary: Json = field(default_factory=dict)
    console: dict[int, str] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    alerts: list[Json] = field(default_factory=list)
    preempting: bool = False
    exit_code: int | None = None  # None until it is complete

    @property
    def config(self) -> Json:
        """The newest announced config, without wandb's own part."""
        found = [json.loads(given["config"]) for given in self.announced if given.get("config")]
        return {k: v["value"] for k, v in found[-1].items() if k != "_wandb"} if found else {}

    def rows(self) -> list[Json]:
        """The history without wandb's own counters."""
        return [{k: v for k, v in row.items() if not k.startswith("_")} for row in self.history]


@dataclass
class Recorded:
    """Received data, and how to answer.

    Attributes:
        frozen: if set, requests are accepted and never answered.
        status: HTTP status of every answer; with any but 200, e.g. 500 or 401, the data is refused.
        delay: seconds that each answer takes.
        freeze_after: the post to runs' streams from which on nothing is answered.
        counts: False for a server that doesn't tell a run's number of rows and ignores offsets.
        project: the only project that has views; None: any.
        refused: ids of runs that are refused.
        arguments: the runs for agents of a W&B sweep, each a dict ``{"key": {"value": ...}}``.
    """

    url: str = ""
    runs: dict[str, TakenRun] = field(default_factory=dict)  # by id
    artifacts: dict[str, Json] = field(default_factory=dict)  # by id: their variables, "files" by name, "committed"
    sweeps: list[Json] = field(default_factory=list)  # variables of each
    views: list[Json] = field(default_factory=list)  # each saving of a workspace or report: its variables and its id
    counts: bool = True
    project: str | None = None
    refused: list[str] = field(default_factory=list)
    arguments: list[Json] = field(default_factory=list)
    beats: int = 0
    posts: int = 0
    operations: list[str] = field(default_factory=list)  # in order
    unknown: list[str] = field(default_factory=list)
    status: int = 200
    delay: float = 0.0
    freeze_after: int | None = None
    frozen: threading.Event = field(default_factory=threading.Event)
    closing: threading.Event = field(default_factory=threading.Event)
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def run(self) -> TakenRun:
        """The only run."""
        (run,) = self.runs.values()
        return run

    def environment(self, key: str) -> dict[str, str]:
        """Return variables that lead a process to this server and disable wandb's crash reports."""
        return {"WANDB_API_KEY": key, "WANDB_BASE_URL": self.url, "WANDB_ERROR_REPORTING": "false"}

    def take(self, path: str, body: bytes) -> Json | None:
        """Return the answer, or None for an unknown path. Raises PermissionError for refused runs."""
        if path == "/graphql":
            asked = json.loads(body)
            named = re.search(r"\b(?:query|mutation)\s+(\w+)", asked["query"])
            name = asked.get("operationName") or (named.group(1) if named else "?")
            self.operations.append(name)
            if name not in OPERATIONS:
                self.unknown.append(name)
                return {"data": {}}
            given = asked.get("variables") or {}
            if given.get("name") in self.refused:
                raise PermissionError
            return {"data": OPERATIONS[name](self, given)}
        if found := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", path):
            self.take_stream(self.runs.setdefault(unquote(found.group(1)), TakenRun()), json.loads(body))
            return {}
        if found := re.fullmatch(r"/storage/(run|artifact)/([^/]+)/(.+)", path):
            kind, owner, name = found.group(1), unquote(found.group(2)), unquote(found.group(3))
            files = self.runs[owner].files if kind == "run" else self.artifacts[owner]["files"]
            files[name] = body
            return {}
        self.unknown.append(path)
        return None

    def take_stream(self, run: TakenRun, body: Json) -> None:
        files = body.get("files") or {}
        for name, rows in (("wandb-history.jsonl", run.history), ("wandb-events.jsonl", run.events)):
            if chunk := files.get(name):
                sent = [json.loads(line) for line in chunk["content"]]
                if self.counts:
                    rows[chunk["offset"] :] = sent  # rows sent again replace the rows that are there
                else:
                    rows += sent
        for line in files.get("wandb-summary.json", {}).get("content", []):
            run.summary = json.loads(line)
        if chunk := files.get("output.log"):
            run.console.update(enumerate(chunk["content"], chunk["offset"]))
        run.preempting |= body.get("preempting", False)
        if body.get("complete"):
            run.exit_code = body.get("exitcode")
        self.posts += 1
        if self.freeze_after is not None and self.posts >= self.freeze_after:
            self.frozen.set()


# ---- answers of operations ----


def _project(given: Json) -> Json:
    name = given.get("project") or given.get("projectName") or "uncategorized"
    return {"id": "UHJvajox", "name": name, "entity": {"id": "RW50OjE=", "name": given.get("entity") or USER}}


def _bucket(server: Recorded, name: str) -> Json:
    """Return the server's description of a run."""
    run = server.runs[name]
    known = {"history": run.history if server.counts else [], "events": run.events}
    tails = {f"{kind}Tail": json.dumps([json.dumps(row) for row in rows[-1:]]) for kind, rows in known.items()}
    counts = {f"{kind}LineCount": len(rows) for kind, rows in known.items()}
    configs = [given["config"] for given in run.announced if given.get("config")]
    return {
        "id": base64.b64encode(f"Run:v1:{name}".encode()).decode(), "name": name, "displayName": name,
        "config": configs[-1] if configs else "{}", "summaryMetrics": json.dumps(run.summary),
        "logLineCount": len(run.console), "tags": [], "wandbConfig": json.dumps({"t": 1}), **tails, **counts,
    }  # fmt: skip


def _viewer(_: Recorded, __: Json) -> Json:
    teams = {"edges": [{"node": {"name": USER}}]}
    return {"viewer": {"id": "VXNlcjox", "entity": USER, "username": USER, "flags": "{}", "teams": teams}}


def _resume_status(server: Recorded, given: Json) -> Json:
    bucket = _bucket(server, given["name"]) if given["name"] in server.runs else None
    return {"model": {**_project(given), "bucket": bucket}}


def _announce(server: Recorded, given: Json) -> Json:
    name = given["name"]
    inserted = name not in server.runs
    server.runs.setdefault(name, TakenRun()).announced.append(given)
    return {"upsertBucket": {"bucket": {**_bucket(server, name), "project": _project(given)}, "inserted": inserted}}


def _files(server: Recorded, given: Json) -> Json:
    files = [{"name": name, "uploadUrl": f"{server.url}/storage/run/{given['run']}/{name}"} for name in given["files"]]
    return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}


def _alert(server: Recorded, given: Json) -> Json:
    server.runs[given["runName"]].alerts.append(given)
    return {"notifyScriptableRunAlert": {"success": True}}


def _artifact(server: Recorded, given: Json) -> Json:
    name = f"art{len(server.artifacts)}"
    server.artifacts[name] = {**(given.get("input") or given), "files": {}, "committed": False}
    sequence = {"id": "U2Vx", "latestArtifact": None}
    found = {"id": name, "state": "PENDING", "artifactSequence": sequence, "versionIndex": 0}
    return {"createArtifact": {"artifact": found}}


def _upload(server: Recorded, artifact: str, name: str) -> Json:
    url = f"{server.url}/storage/artifact/{artifact}/{name}"
    return {"id": "RmlsZQ==", "name": name, "displayName": name, "uploadUrl": url, "uploadHeaders": []}


def _manifest(server: Recorded, given: Json) -> Json:
    asked = given.get("input") or given
    manifest = {"id": "TWFu", "file": _upload(server, asked["artifactID"], "wandb_manifest.json")}
    return {"createArtifactManifest": {"artifactManifest": manifest}}


def _artifact_files(server: Recorded, given: Json) -> Json:
    edges = []
    for asked in (given.get("input") or given)["artifactFiles"]:
        upload = _upload(server, asked["artifactID"], asked["name"])
        more = {"uploadMultipartUrls": None, "storagePath": asked["name"], "artifact": {"id": asked["artifactID"]}}
        edges.append({"node": {**upload, **more}})
    return {"createArtifactFiles": {"files": {"edges": edges}}}


def _commit(server: Recorded, given: Json) -> Json:
    name = (given.get("input") or given)["artifactID"]
    server.artifacts[name]["committed"] = True
    return {"commitArtifact": {"artifact": {"id": name, "digest": "x"}}}


def _new_sweep(server: Recorded, given: Json) -> Json:
    server.sweeps.append(given)
    sweep = {"id": "U3c=", "name": f"sweep{len(server.sweeps)}", "state": "PENDING", "config": _sweep_config(server)}
    return {"upsertSweep": {"sweep": {**sweep, "project": _project(given)}, "configValidationWarnings": []}}


def _sweep_config(server: Recorded) -> str | None:
    given = server.sweeps[-1]
    config: str | None = given.get("config") or (given.get("input") or {}).get("config")
    return config


def _sweep(server: Recorded, given: Json) -> Json:
    at = "2026-01-01T00:00:00"
    found = {
        "id": "U3c=", "name": given.get("sweep") or f"sweep{len(server.sweeps)}", "method": "grid", "state": "RUNNING",
        "description": "", "config": _sweep_config(server), "createdAt": at, "heartbeatAt": at, "updatedAt": at,
        "earlyStopJobRunning": False, "bestLoss": None, "controller": None, "scheduler": None, "runs": {"edges": []},
    }  # fmt: skip
    return {"project": {"sweep": found}}


def _heartbeat(server: Recorded, given: Json) -> Json:
    """Answer with the next run after the previous has ended, and with an exit after the last."""
    server.beats += 1
    commands: list[Json] = []
    if json.loads(given.get("runState") or "{}"):
        pass  # the agent has a run
    elif server.arguments:
        program = yaml.safe_load(_sweep_config(server) or "{}").get("program")
        run = {"type": "run", "run_id": f"swept{server.beats:03}", "program": program, "args": server.arguments.pop(0)}
        commands = [run]
    else:
        commands = [{"type": "exit"}]
    return {"agentHeartbeat": {"agent": {"id": "QWc="}, "commands": json.dumps(commands)}}


def _save_view(server: Recorded, given: Json) -> Json:
    """Replace the view with the given id. Without an id, add a view, even if its name exists."""
    inserted = "id" not in given
    found = {"id": base64.b64encode(f"View:{len(server.views)}".encode()).decode(), "name": "nw-x-v", **given}
    server.views.append(found)
    at = "2026-01-01"
    view = {
        **{key: found.get(key) for key in ("id", "type", "name", "displayName", "description", "spec")},
        "project": {**_project(given), "entityName": given.get("entityName") or USER},
        "createdAt": at,
        "updatedAt": at,
        "locked": False,
    }
    return {"upsertView": {"view": view, "inserted": inserted}}


def _find_view(server: Recorded, given: Json) -> Json:
    if server.project is not None and given["name"] != server.project:
        return {"project": None}
    asked = {"type": given["viewType"], "name": given["viewName"], "entityName": given["entityName"]}
    found = {view["id"]: view for view in server.views if asked.items() <= view.items()}
    return {"project": {"allViews": {"edges": [{"node": view} for view in found.values()]}}}


OPERATIONS: dict[str, Callable[[Recorded, Json], Json]] = {
    "Viewer": _viewer,
    "ServerFeaturesQuery": lambda _, __: {"serverInfo": {"features": []}},
    "OrganizationCoreWeaveOrganizationID": lambda _, __: {"entity": {"organization": {"coreWeaveOrganizationId": ""}}},
    "RunResumeStatus": _resume_status,
    "UpsertBucket": _announce,
    "RunStoppedStatus": lambda _, __: {"project": {"run": {"stopped": False}}},
    "CreateRunFiles": _files,
    "NotifyScriptableRunAlert": _alert,
    "ArtifactType": lambda _, __: {"project": {"artifact": None}},
    "CreateArtifact": _artifact,
    "CreateArtifactManifest": _manifest,
    "CreateArtifactFiles": _artifact_files,
    "CommitArtifact": _commit,
    "UpsertSweep": _new_sweep,
    "SweepWithRuns": _sweep,
    "CreateAgent": lambda _, __: {"createAgent": {"agent": {"id": "QWc="}}},
    "Heartbeat": _heartbeat,
    "UpsertView2": _save_view,
    "upsertView": _save_view,
    "View": _find_view,
}
