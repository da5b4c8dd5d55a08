"""What W&B has of a run: asked of the server, as wandb asks before it resumes one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from largebatch.tracking.wandb_session import one_line

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
        import requests

        variables = {"project": project, "entity": entity or None, "name": run_id}
        body: Any = {"operationName": "RunResumeStatus", "query": _QUERY, "variables": variables}
        try:
            answer = requests.post(f"{self.url}/graphql", json=body, auth=("api", self.key), timeout=seconds)
            answer.raise_for_status()
            model = answer.json()["data"]["model"]
        except (requests.RequestException, KeyError, TypeError) as error:
            raise UploadError(f"W&B doesn't say what it has of the run ({one_line(error)})") from error
        bucket = (model or {}).get("bucket") or {}
        return int(bucket.get("historyLineCount") or 0)


def this_server() -> Server:
    """The one that wandb's session in this process is with."""
    import wandb

    settings = wandb.setup().settings
    return Server(settings.base_url.rstrip("/"), settings.api_key or "")
