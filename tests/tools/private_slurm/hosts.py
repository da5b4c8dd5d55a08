"""The nodes' names in ``/etc/hosts``: lines that end in the cluster's folder."""

from __future__ import annotations

import fcntl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

HOSTS = Path("/etc/hosts")


def add_names(state: Path, names: Iterable[tuple[str, str]]) -> None:
    """Replace this cluster's lines by ``(address, name)`` pairs."""
    with _locked() as file:
        lines = _others(file, state)
        _rewrite(file, [*lines, *(f"{address} {name} {_mark(state)}\n" for address, name in names)])


def remove_names(state: Path) -> None:
    with _locked() as file:
        _rewrite(file, _others(file, state))


@contextmanager
def _locked() -> Iterator[TextIO]:
    with HOSTS.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another cluster may be starting
        yield file


def _others(file: TextIO, state: Path) -> list[str]:
    lines = file.read().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += "\n"
    return [line for line in lines if not line.endswith(f" {_mark(state)}\n")]


def _rewrite(file: TextIO, lines: list[str]) -> None:
    """Rewrite in place, because a container's file is a mount; the file is never empty meanwhile."""
    file.seek(0)
    file.write("".join(lines))
    file.truncate()


def _mark(state: Path) -> str:
    return f"# largebatch test cluster {state}"
