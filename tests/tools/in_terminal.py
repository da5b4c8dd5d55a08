"""Programs in a terminal of a chosen width."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from conftest import environment


class Shown(NamedTuple):
    """Exit code of a program, and the text that it sent to its terminal."""

    code: int
    sent: str

    @property
    def lines(self) -> list[str]:
        """Lines without control sequences."""
        screens = re.sub(r"\x1b\[(H|\?1049[hl])", "\n", self.sent)  # to the first line, or to another screen
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screens)
        return [line.rstrip() for line in re.split(r"[\r\n]+", plain)]


def in_terminal(
    command: Sequence[str], cwd: Path, columns: int, variables: Mapping[str, str] | None = None,
    heard: Callable[[bytes], object] = lambda sent: None,
) -> Shown:  # fmt: skip
    """Run a program in a terminal of 40 lines, to its end.

    Args:
        variables: of the environment, besides the tests' own.
        heard: is called with all output so far, after each part of it.
    """
    terminal, program_side = pty.openpty()
    fcntl.ioctl(program_side, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    kept = {key: value for key, value in environment().items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    program = subprocess.Popen(
        command, cwd=cwd, env=kept | {"TERM": "xterm"} | dict(variables or {}), stdin=program_side,
        stdout=program_side, stderr=program_side,
    )  # fmt: skip
    os.close(program_side)
    sent = bytearray()
    try:
        while part := os.read(terminal, 1 << 16):
            sent += part
            heard(bytes(sent))
    except OSError:  # the other side of the terminal is closed
        pass
    os.close(terminal)
    return Shown(program.wait(60), sent.decode(errors="replace"))
