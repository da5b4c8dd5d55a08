"""Whether the other nodes of a job are still there: each keeps a file of beats where the others can read it."""

from __future__ import annotations

import time
from pathlib import Path

_BEAT_SECONDS = 5.0
_SILENCE_SECONDS = 20.0  # without a beat, after which a node is lost; a file server may show one late
_LOOK_SECONDS = 0.5


class Heartbeat:
    """This node's file of beats, which is there while its part of a job is at work, and the other nodes'.

    A node that is lost leaves a file in which no beat is added; one whose part has ended, well or not, leaves none.

    Args:
        folder: of the files, in a file system that all nodes share.
        start: the job's number and its restarts, which no other start has.
        node: this one's number among ``hosts``, the names of all.
    """

    def __init__(self, folder: Path, start: str, node: int, hosts: list[str]) -> None:
        self._others = {host: folder / f"{start}_{number}.beats" for number, host in enumerate(hosts)}
        self._own = self._others.pop(hosts[node])
        self._beats, self._last = 0, float("-inf")

    def beat(self) -> None:
        """Say that this node is there, if it is time to."""
        if self._others and time.monotonic() - self._last >= _BEAT_SECONDS:
            self._beats, self._last = self._beats + 1, time.monotonic()
            self._own.write_text(str(self._beats))

    def end(self) -> None:
        self._own.unlink(missing_ok=True)

    def lost_nodes(self) -> list[str]:
        """The nodes that neither go on beating nor have ended; takes until that is certain."""
        first = {host: _read(file) for host, file in self._others.items()}
        silent, until = [host for host, beats in first.items() if beats], time.monotonic() + _SILENCE_SECONDS
        while silent and time.monotonic() < until:
            time.sleep(_LOOK_SECONDS)
            silent = [host for host in silent if _read(self._others[host]) == first[host]]
        return silent


def _read(file: Path) -> str:
    """Empty where the node has ended, or hasn't begun."""
    try:
        return file.read_text()
    except FileNotFoundError:
        return ""
