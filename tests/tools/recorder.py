"""Loopback server for W&B runs, sweeps and workspaces (``protocol.py``), which can fail on request."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from protocol import Recorded


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, recorded: Recorded) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.recorded = recorded


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_POST(self) -> None:
        body, recorded = self.body(), self.server.recorded
        if recorded.frozen.is_set():
            recorded.closing.wait()
            return
        time.sleep(recorded.delay)
        if recorded.status != 200:
            self.reply(recorded.status, {"error": "as told"})
            return
        with recorded.lock:
            try:
                answer = recorded.take(self.path, body)
            except PermissionError:
                self.reply(403, {"error": "not yours"})
                return
            except Exception as error:  # our own error; the test shows it
                recorded.unknown.append(f"{self.path}: {type(error).__name__}: {error}")
                answer = None
        if recorded.frozen.is_set():
            recorded.closing.wait()
            return
        self.reply(404 if answer is None else 200, answer or {})

    do_PUT = do_GET = do_HEAD = do_POST  # noqa: N815

    def body(self) -> bytes:
        raw = b""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                raw += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(raw) if self.headers.get("Content-Encoding") == "gzip" else raw

    def reply(self, status: int, answer: dict[str, Any]) -> None:
        reply = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        with suppress(ConnectionError):  # a client may hang up
            super().handle()


@contextmanager
def recorder() -> Iterator[Recorded]:
    recorded = Recorded()
    server = _Server(recorded)
    recorded.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield recorded
    finally:
        recorded.closing.set()
        server.shutdown()
        server.server_close()
