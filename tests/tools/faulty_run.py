"""Works on copies of a run folder, one after the other, each in a forked process with one fault in its files.

``LD_PRELOAD=faulty_files.so python faulty_run.py`` reads from standard input a line of JSON for each run, ``{"run",
"at", "kind", "trace"}``, and answers with a line, ``{"code", "operations"}``. ``kind`` is ``count``, ``kill``, ``fail``
(the operation ``at`` fails with an input/output error) or ``full`` (from there on the disk is full). All imports happen
once, before the forks, so a tiny run takes a fraction of a second.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import warnings
from pathlib import Path

import torch

from largebatch.training import worker

KINDS = ("count", "kill", "fail", "full")


def work(asked: dict[str, object], files: ctypes.CDLL, answer: int) -> int:
    """Train the run in this process, with its output in a file beside the run's folder."""
    run = Path(str(asked["run"]))
    log = os.open(run.parent / f"{run.name}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    kind = KINDS.index(str(asked["kind"]))
    files.arm(os.fsencode(run), int(str(asked["at"])), kind, os.fsencode(str(asked.get("trace") or "")))
    try:
        return worker.main([str(run)])
    finally:
        count = files.operations()
        files.arm(b"", 0, 0, b"")
        os.write(answer, str(count).encode())
        sys.stdout.flush()


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
    files = ctypes.CDLL(os.environ.pop("LD_PRELOAD"))
    files.arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_char_p]
    files.operations.restype = ctypes.c_long
    for line in sys.stdin:
        asked = json.loads(line)
        read, write = os.pipe()
        child = os.fork()
        if not child:
            code = 70
            try:
                code = work(asked, files, write)
            finally:
                os._exit(code)
        os.close(write)
        _, status = os.waitpid(child, 0)
        operations = os.read(read, 100).decode()
        os.close(read)
        code = os.waitstatus_to_exitcode(status)
        print(json.dumps({"code": code, "operations": int(operations or 0)}), flush=True)


if __name__ == "__main__":
    main()
