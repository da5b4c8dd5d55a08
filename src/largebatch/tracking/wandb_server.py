"""What W&B has of a run: asked of the server, as wandb asks before it resumes one."""

from __future__ import annotations

import base64
import json
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from urllib.parse import urlsplit

from largebatch.tracking.wandb_session import is_local, one_line, without_password

_QUERY = """query RunResumeStatus($project: String, $entity: String, $name: String!) {
  model(name: $project, entityName: $entity) { id bucket(name: $name, missingOk: true) { id historyLineCount } }
}"""


class UploadError(Exception):
    """W&B doesn't take, or doesn't say, what it is asked for; the message says why."""


@dataclass(frozen=True)
class Server:
    """W&B's address and the key to it."""

    url: str
    key: str

    def rows(self, project: str, entity: str, run_id: str, seconds: float = 20.0) -> int:
        """The number of rows that it has of a run; 0 where it doesn't know the run.

        Args:
            project: W&B project.
            entity: user or team; empty for the account's own default.
            run_id: the W&B run's id.
            seconds: to wait for an answer.

        Raises:
            UploadError: when it doesn't say.
        """
        variables = {"project": project, "entity": entity or None, "name": run_id}
        body = {"operationName": "RunResumeStatus", "query": _QUERY, "variables": variables}
        key = base64.b64encode(f"api:{self.key}".encode()).decode()
        headers = {"Content-Type": "application/json", "Authorization": f"Basic {key}"}
        request = urllib.request.Request(f"{self.url}/graphql", json.dumps(body).encode(), headers)
        proxies = {} if is_local(urlsplit(self.url).hostname or "") else urllib.request.getproxies()
        opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies))
        try:
            with opener.open(request, timeout=seconds) as answer:
                model = json.load(answer)["data"]["model"]
        except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:  # ValueError: not JSON
            raise UploadError(f"W&B doesn't say what it has of the run ({one_line(error)})") from error
        bucket = (model or {}).get("bucket") or {}
        return int(bucket.get("historyLineCount") or 0)


def this_server() -> Server:
    """The one that wandb's session in this process is with."""
    import wandb

    settings = wandb.setup().settings
    return Server(without_password(settings.base_url).rstrip("/"), settings.api_key or "")
