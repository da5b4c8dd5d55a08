"""Output that outlives its reader, text that is safe to print, and the exit code of a program."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import Any

from largebatch.errors import UserError, missing_extra


def restart_in_utf8() -> None:
    """Start this program again in Python's UTF-8 mode if names of files would have another encoding.

    Python's own choice is UTF-8, also in the locale ``C``. With ``PYTHONUTF8=0`` there, a name with an umlaut is no
    valid text, which libraries refuse.
    """
    if sys.getfilesystemencoding().lower() != "utf-8":
        os.environ["PYTHONUTF8"] = "1"  # for workers
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def outlive_terminal() -> None:
    """Make output that can't be written disappear, instead of raising an error in the middle of a training.

    The reader of a pipe may end, a terminal may close, and a disk may be full. A closed standard file becomes
    ``/dev/null``, else the next opened file would take its number. Characters that the encoding lacks are escaped.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    sys.stdout, sys.stderr = _stream(sys.stdout, 1), _stream(sys.stderr, 2)


def escape_unprintable() -> None:
    """Escape characters that the encoding of the output lacks, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None if closed
            stream.reconfigure(errors="backslashreplace")


def printable(text: str) -> str:
    """Return ``text`` with control characters escaped, except tabs and newlines: a log can hold any byte."""
    return "".join(c if c.isprintable() or c in "\t\n" else ascii(c)[1:-1] for c in text)


def exit_code_of(program: Callable[[], int]) -> int:
    """Run ``program`` and return its exit code: 2 after a ``UserError``, 130 after Ctrl-C, 141 after a closed pipe.

    The code is also 2 after an error of a file or folder, such as another user's. Its message names the file. So it is
    if a module of an extra isn't installed; the message then has the command that installs it.
    """
    try:
        return program()
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader closed the pipe, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ModuleNotFoundError as error:
        if not (message := missing_extra(error)):
            raise
    except OSError as error:
        if error.filename is None:
            raise
        message = f"{error.filename}: {error.strerror}"
    print("\n".join(f"error: {line}" for line in printable(message).splitlines()), file=sys.stderr)
    return 2


class _Output(io.FileIO):
    """A file that drops what it can't write, and everything after that."""

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        try:
            written = super().write(data)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return size
        return size if written is None else written  # None: a pipe that is full and doesn't block


def _stream(stream: Any, number: int) -> io.TextIOWrapper:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    raw = _Output(number, "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=True)
