"""Heartbeats of a job's nodes: files in a shared folder that show which nodes are lost."""

from __future__ import annotations

import time
from pathlib import Path

_BEAT_SECONDS = 5.0
_SILENCE_SECONDS = 20.0  # a node without a beat for so long is lost; file servers show a beat late
_LOOK_SECONDS = 0.5


class Heartbeat:
    """This node's heartbeat file, and those of the job's other nodes.

    A lost node's file stays and gets no new beat. A node whose task has ended, well or not, has removed its file.

    Args:
        folder: the files' folder, on a file system that all nodes share.
        start: the job's number and number of restarts, unique to each start.
        node: this node's index in ``hosts``.
        hosts: names of all nodes.
    """

    def __init__(self, folder: Path, start: str, node: int, hosts: list[str]) -> None:
        self._others = {host: folder / f"{start}_{number}.beats" for number, host in enumerate(hosts)}
        self._own = self._others.pop(hosts[node])
        self._beats, self._last = 0, float("-inf")

    def beat(self) -> None:
        """Write a beat if five seconds have passed since the last one."""
        if self._others and time.monotonic() - self._last >= _BEAT_SECONDS:
            self._beats, self._last = self._beats + 1, time.monotonic()
            self._own.write_text(str(self._beats))

    def end(self) -> None:
        self._own.unlink(missing_ok=True)

    def lost_nodes(self) -> list[str]:
        """Return the lost nodes, after waiting up to 20 seconds for each node's next beat or end."""
        first = {host: _read(file) for host, file in self._others.items()}
        silent, until = [host for host, beats in first.items() if beats], time.monotonic() + _SILENCE_SECONDS
        while silent and time.monotonic() < until:
            time.sleep(_LOOK_SECONDS)
            silent = [host for host in silent if _read(self._others[host]) == first[host]]
        return silent


def _read(file: Path) -> str:
    """Return the beats; empty if the node's task has ended or not started."""
    try:
        return file.read_text()
    except FileNotFoundError:
        return ""
