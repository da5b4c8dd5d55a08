"""Runs workers and launchers, one after the other, each in a forked process with one fault in its files.

``LD_PRELOAD=faulty_files.so python faulty_run.py`` reads from standard input a line of JSON for each process,
``{"folder", "below", "launch", "at", "kind", "trace"}``, and answers with a line, ``{"code", "operations"}``. Without
``launch``, the process is the worker of the run in ``folder``. Else it is ``launch.py`` in ``folder`` with these
arguments; its workers have no fault. Only operations in the subfolder ``below`` count. ``kind`` is ``count``, ``kill``,
``fail`` (the operation ``at`` fails with an input/output error) or ``full`` (from there on the disk is full). All
imports happen once, before the forks, so a tiny run takes a fraction of a second.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import sys
import traceback
import warnings
from pathlib import Path

import torch
import torch.utils.tensorboard.summary
import wandb  # noqa: F401

from largebatch.training import worker

LAUNCHER = str(Path(__file__).resolve().parents[2] / "launch.py")

KINDS = ("count", "kill", "fail", "full")


def work(asked: dict[str, object], files: ctypes.CDLL, answer: int) -> int:
    """Run the worker or the launcher in this process, with its output in a file beside the folder."""
    folder, launch = Path(str(asked["folder"])), asked["launch"]
    log = os.open(folder.parent / f"{folder.name}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    kind = KINDS.index(str(asked["kind"]))
    files.arm(
        os.fsencode(folder / str(asked["below"])), int(str(asked["at"])), kind, os.fsencode(str(asked["trace"] or ""))
    )
    try:
        if not isinstance(launch, list):
            return worker.main([str(folder)])
        os.chdir(folder)
        sys.argv = [LAUNCHER, *launch]
        runpy.run_path(LAUNCHER, run_name="__main__")
    except SystemExit as error:
        return int(error.code or 0)
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        count = files.operations()
        files.arm(b"", 0, 0, b"")
        os.write(answer, str(count).encode())
    return 70


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
