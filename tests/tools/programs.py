"""Calls of the real programs, one after the other, each in a forked process with a time limit.

All imports happen once, before the forks, so a tiny run or a command takes a fraction of a second. The process reads a
line of JSON for each call from standard input, and answers with the exit code.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import runpy
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 20  # of computing; a call that needs more hangs
WAIT = 400.0  # seconds; a call that waits for longer hangs
MEMORY = 3 << 30  # bytes that a call may allocate
HANGS = "Timeout (0:"  # faulthandler's line


class Ended(NamedTuple):
    """A call's exit code, and its standard output and error together. The code is -24 after too much computing."""

    code: int
    output: str


class Programs:
    """Process that calls ``worker``, ``largebatch`` and ``launch.py``."""

    def __init__(self, folder: Path) -> None:
        self._output = folder / "output.txt"
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "HYDRA_"))}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=kept | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HOME": str(folder), "PYTHONUTF8": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def call(self, program: str, *arguments: str, cwd: Path) -> Ended:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {"program": program, "arguments": arguments, "cwd": str(cwd), "output": str(self._output)}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        return Ended(code, self._output.read_text(errors="replace"))

    def close(self) -> None:
        self._process.communicate()


def assert_ends_in_order(ended: Ended, codes: Collection[int], given: str, log: Path | None = None) -> None:
    """Check that a call ended with one of ``codes``, without a traceback and in time. ``given`` is shown otherwise."""
    text = f"{given}\n{ended}\n{log.read_text(errors='replace') if log and log.exists() else ''}"
    assert HANGS not in text, text
    assert "Traceback" not in text, text
    assert ended.code in codes, text


@contextmanager
def programs(folder: Path) -> Iterator[Programs]:
    process = Programs(folder)
    try:
        yield process
    finally:
        process.close()


def _call(program: str, arguments: list[str]) -> int:
    """Call a program in this process. Return its exit code."""
    from largebatch import cli
    from largebatch.training import worker

    if program == "worker":
        return worker.main(arguments)
    if program == "largebatch":
        return cli.main(arguments)
    sys.argv = [str(ROOT / "launch.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")
    return 0


def _in_child(asked: dict[str, str]) -> int:
    output = os.open(asked["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(output, 1), os.dup2(output, 2)
    os.chdir(asked["cwd"])
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    faulthandler.dump_traceback_later(WAIT, exit=True)
    try:
        return _call(asked["program"], list(asked["arguments"]))
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    finally:
        sys.stdout.flush(), sys.stderr.flush()


def main() -> None:
    import hydra  # noqa: F401
    import timm  # noqa: F401
    import torch
    import torchvision  # noqa: F401
    import wandb  # noqa: F401

    from largebatch.launch import confirm, main, replay  # noqa: F401
    from largebatch.report import build  # noqa: F401
    from largebatch.tracking import sync  # noqa: F401
    from largebatch.training import worker  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            code = 70
            try:
                code = _in_child(json.loads(line))
            except BaseException:
                sys.excepthook(*sys.exc_info())
                sys.stderr.flush()
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
