"""A job's nodes, and their heartbeats: files in a shared folder that show which nodes are lost."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

_BEAT_SECONDS = 5.0
_SILENCE_SECONDS = 20.0  # a node without a beat for so long is lost; file servers show a beat late
_LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Place:
    """A task's job and node."""

    job_id: str  # 12, or 12_3 in an array
    node: int  # index in hosts
    hosts: list[str]
    restarts: int


class Heartbeat:
    """This node's heartbeat file, and those of the job's other nodes, in a ``folder`` that all nodes share.

    A lost node's file stays and gets no new beat. A node whose task has ended, well or not, has removed its file.
    """

    def __init__(self, folder: Path, place: Place) -> None:
        start = f"{place.job_id}_{place.restarts}"
        self._others = {host: folder / f"{start}_{number}.beats" for number, host in enumerate(place.hosts)}
        self._own = self._others.pop(place.hosts[place.node])
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
