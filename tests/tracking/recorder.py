"""A loopback server that takes a W&B run: enough of the protocol for an online run, and ways to be unhelpful."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Recorded:
    url: str = ""
    upserts: list[dict[str, Any]] = field(default_factory=list)  # variables of each announcement of the run
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    frozen: threading.Event = field(default_factory=threading.Event)  # set: requests are taken and never answered
    closing: threading.Event = field(default_factory=threading.Event)

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path.endswith("/file_stream"):
            self.take_stream(body)
            return {}
        if path != "/graphql":
            return {}
        operation = re.search(r"\b(?:query|mutation)\s+(\w+)", body.get("query", ""))
        given = body.get("variables") or {}
        name = operation.group(1) if operation else ""
        return {"data": {"UpsertBucket": self.announce, "CreateRunFiles": self.files}.get(name, lambda _: {})(given)}

    def announce(self, given: dict[str, Any]) -> dict[str, Any]:
        self.upserts.append(given)
        project = {"id": "p", "name": given.get("project"), "entity": {"id": "e", "name": "someone"}}
        name = given.get("name")
        bucket = {"id": "cnVu", "name": name, "displayName": name, "config": given.get("config"), "project": project}
        return {"upsertBucket": {"bucket": {**bucket, "historyLineCount": len(self.history)}, "inserted": True}}

    def files(self, given: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/storage/{name}"} for name in given["files"]]
        return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}

    def take_stream(self, body: dict[str, Any]) -> None:
        files = body.get("files") or {}
        if chunk := files.get("wandb-history.jsonl"):
            self.history[chunk["offset"] :] = [json.loads(line) for line in chunk["content"]]
        for line in files.get("wandb-summary.json", {}).get("content", []):
            self.summary.update(json.loads(line))
        if body.get("complete"):
            self.exit_code = body.get("exitcode")


@contextmanager
def recorder() -> Iterator[Recorded]:
    recorded = Recorded()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if recorded.frozen.is_set():
                recorded.closing.wait()
                return
            body = json.loads(raw) if self.headers.get("Content-Type", "").startswith("application/json") else {}
            reply = json.dumps(recorded.answer(self.path, body)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        do_PUT = do_GET = do_POST  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

        def handle(self) -> None:
            with suppress(ConnectionError):  # a client that is done may hang up
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    recorded.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield recorded
    finally:
        recorded.closing.set()
        server.shutdown()
        server.server_close()
