"""Signs of life that the ranks of a run send to their launcher, which names a rank that hangs.

A rank sends a datagram to the launcher every two seconds: rank, process number, numbers of passes and waits so far, and
a description of the present wait. So a pulse never waits for a disk, and leaves no file.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
ADDRESS = "LARGEBATCH_PULSE"
_BEAT_SECONDS = 2.0
_START_SECONDS = 600.0
_TRACEBACK_SECONDS = 1.0  # for the ranks to write where they wait
_passes = [0]  # of this process; 0: none is expected
_waits: list[int | str] = [0, ""]  # number, and description of the present wait; empty: none


def start_pulse(rank: int) -> None:
    """Send signs of life from a thread until this process ends. SIGUSR1 and crashes write a traceback to stderr."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    port = os.environ.get(ADDRESS)
    if port is None:  # started by hand
        return
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def send() -> None:
        while True:
            with contextlib.suppress(OSError):  # the launcher has ended, and this process ends with it
                pulse = f"{rank} {os.getpid()} {_passes[0]} {_waits[0]} {_waits[1]}"
                sender.sendto(pulse.encode(), ("127.0.0.1", int(port)))
            time.sleep(_BEAT_SECONDS)

    threading.Thread(target=send, name="pulse", daemon=True).start()


def progressed(item: T) -> T:
    """Count a pass over a batch. From the first on, the launcher expects more. Return ``item``."""
    _passes[0] += 1
    return item


def expect_no_progress() -> None:
    """Tell the launcher that the last pass is over."""
    _passes[0] = 0


@contextlib.contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Tell the launcher that this process waits for ``what``. The wait may not be longer than one for a pass."""
    _waits[:] = [int(_waits[0]) + 1, what]
    try:
        yield
    finally:
        _waits[1] = ""


class Watch:
    """The launcher's view of a run's ranks on this machine.

    Args:
        ranks: the ranks on this machine.
        seconds: longest time without a sign of life, and longest time without a pass over a batch once passes began;
            and longest wait of ``waiting_for``.

    Attributes:
        port: number for the ranks' variable ``ADDRESS``.
        verdict: the ranks that hang; empty if none does.
    """

    def __init__(self, ranks: Iterable[int], seconds: float) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.setblocking(False)
        self.port = str(self._socket.getsockname()[1])
        self.verdict = ""
        self._seconds = seconds
        # Seconds. A rank has more time until its first sign of life, because importing torch may take long.
        self._silent = dict.fromkeys(ranks, min(0.0, seconds - _START_SECONDS))
        self._idle = dict.fromkeys(self._silent, 0.0)
        self._progress = dict.fromkeys(self._silent, (0, 0))  # numbers of passes and waits
        self._waits_for = dict.fromkeys(self._silent, "")
        self._pids: dict[int, int] = {}
        self._looked = time.monotonic()

    def look(self) -> bool:
        """Read the signs of life. Return True if a rank hangs; ``verdict`` then names it."""
        self._read()
        # A launcher that was stopped itself, or a machine that slept, has heard nothing for so long.
        passed = min(time.monotonic() - self._looked, _BEAT_SECONDS)
        self._looked = time.monotonic()
        for times in (self._silent, self._idle):
            for rank in times:
                times[rank] += passed
        late = [rank for rank in self._silent if max(self._silent[rank], self._idle[rank]) > self._seconds]
        here = [rank for rank in late if not self._has_ended(rank)]
        if silent := [rank for rank in here if self._silent[rank] > self._seconds]:
            self.verdict = f"{_named(silent)} gave no sign of life for {self._seconds:g} s: stopped or frozen"
        elif waiting := [rank for rank in here if self._waits_for[rank]]:
            self.verdict = f"{_named(waiting)} waited {self._seconds:g} s for {self._waits_for[waiting[0]]}"
        elif min(self._progress.values())[0] > 0 and min(self._idle.values()) > self._seconds:
            fewest = min(self._progress.values())[0]
            behind = [rank for rank, (passes, _) in self._progress.items() if passes == fewest]
            who = f"{_named(behind)} behind the others" if len(behind) < len(self._progress) else _named(behind)
            self.verdict = f"no pass over a batch ended for {self._seconds:g} s; {who} hung"
        return bool(self.verdict)

    def _has_ended(self, rank: int) -> bool:
        """Return True if the rank's process has ended, as others do while rank 0 writes the last files."""
        with contextlib.suppress(KeyError, ProcessLookupError):
            os.kill(self._pids[rank], 0)
            return False
        return rank in self._pids

    def kill(self) -> None:
        """Kill the processes of all ranks. Ranks that hang first write to the log where they wait."""
        self._read()
        if self.verdict:
            for pid in self._pids.values():
                with contextlib.suppress(OSError):  # as below
                    os.killpg(pid, signal.SIGUSR1)
            time.sleep(_TRACEBACK_SECONDS)
        for pid in self._pids.values():
            with contextlib.suppress(OSError):  # none is left, or the rank leads no group
                os.killpg(pid, signal.SIGKILL)

    def close(self) -> None:
        self._socket.close()

    def _read(self) -> None:
        while True:
            try:
                *numbers, what = self._socket.recv(512).decode(errors="replace").split(" ", 4)
                rank, pid, passes, waits = map(int, numbers)
            except BlockingIOError:
                return
            except ValueError:  # from another program
                continue
            if rank in self._silent:
                self._pids[rank], self._silent[rank], self._waits_for[rank] = pid, 0.0, what
                if (passes, waits) != self._progress[rank] or not (passes or what):
                    self._progress[rank], self._idle[rank] = (passes, waits), 0.0


def _named(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
