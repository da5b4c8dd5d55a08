"""Calls of the real programs, one after the other, each in a forked process with a time limit.

All imports happen once, before the forks, so a tiny run or a command takes a fraction of a second. The process reads a
line of JSON for each call from standard input, and answers with the call's number and exit code.
"""

from __future__ import annotations

import faulthandler
import functools
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from largebatch.launch.composition import Composed, plain
from largebatch.launch.local import claim
from largebatch.launch.plan import make_plan
from largebatch.runs.metrics import newest

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 20  # of computing; a call that needs more hangs
WAIT = 400.0  # seconds; a call that waits for longer hangs
MEMORY = 3 << 30  # bytes that a call may allocate
HANGS = "Timeout (0:"  # faulthandler's line


class Ended(NamedTuple):
    """A call's exit code, standard output and standard error. The code is -24 after too much computing."""

    code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


class Programs:
    """Process that calls ``worker``, ``largebatch`` and ``launch.py``."""

    def __init__(self, folder: Path) -> None:
        self._asked = 0
        self._streams = (folder / "stdout.txt", folder / "stderr.txt")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "HYDRA_"))}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=kept | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HOME": str(folder), "PYTHONUTF8": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def call(self, program: str, *arguments: str, cwd: Path, **variables: str) -> Ended:
        """Call a program with ``variables`` in its environment."""
        self._ask(program, *arguments, cwd=cwd, **variables)
        return self._answer()

    def _ask(self, program: str, *arguments: str, cwd: Path, **variables: str) -> None:
        assert self._process.stdin is not None
        self._asked += 1
        asked = {
            "number": self._asked, "program": program, "arguments": arguments, "cwd": str(cwd), "variables": variables,
            "streams": [*map(str, self._streams)],
        }  # fmt: skip
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()

    def _answer(self) -> Ended:
        assert self._process.stdout is not None
        number = 0
        while number < self._asked:  # a test that failed may have left a call without reading its answer
            number, code = map(int, self._process.stdout.readline().split())
        return Ended(code, *(path.read_text(errors="replace") for path in self._streams))

    def train(self, folder: Path, *overrides: str) -> Path:
        """Train or resume a run in ``folder/runs`` to its end, in a fork for each rank. Return the run's folder.

        Plan and workers are those of ``launch.py``, but neither the launcher nor torchrun starts.
        """
        run = self._begin(folder, *overrides)
        ended = self._answer()
        assert ended.code == 0, f"{ended.output}\n{(run / 'log.txt').read_text()}"
        return run

    def kill(self, folder: Path, step: int, *overrides: str) -> Path:
        """Train a run. Kill its processes when its metrics have reached ``step`` and a checkpoint is on the disk."""
        run = self._begin(folder, *overrides)
        deadline = time.monotonic() + 100
        while (newest(run / "metrics.jsonl", "step") or 0) < step or not any(run.glob("checkpoints/step-*.pt")):
            assert time.monotonic() < deadline, f"the run didn't reach step {step}"
            time.sleep(0.01)
        os.kill(json.loads((run / "status.json").read_text())["pid"], signal.SIGKILL)
        assert self._answer().code, "the run ended before it could be killed"
        return run

    def _begin(self, folder: Path, *overrides: str) -> Path:
        from conftest import composition  # not found by this file as a program

        tree = plain(composition(*overrides, "cluster.device=cpu"))
        tree["runs_dir"] = str(folder / tree["runs_dir"])
        (run,) = make_plan([Composed(overrides, tree, None, multirun=False)])
        outcome = claim(run)
        assert outcome is None, outcome
        self._ask("workers", str(run.folder.path), str(run.config.cluster.processes), cwd=folder)
        return run.folder.path

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
    if program == "workers":
        return _call_workers(*arguments)
    if program == "largebatch":
        return cli.main(arguments)
    sys.argv = [str(ROOT / "launch.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")
    return 0


def _call_workers(run: str, processes: str) -> int:
    """Call the worker of each rank in a fork, as torchrun starts them. Return the first exit code other than 0."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    children = set()
    for rank in map(str, range(int(processes))):
        if not (child := os.fork()):
            os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # rank 0 makes no store of its own
            _end(lambda: _call("worker", [run]))
        children.add(child)
    while children:
        child, status = os.wait()
        children.remove(child)
        if code := os.waitstatus_to_exitcode(status):
            for other in children:
                os.kill(other, signal.SIGKILL)  # it waits for the rank that failed
            return code
    return 0


def _in_child(asked: dict[str, Any]) -> int:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(asked["streams"], 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), number)
    os.chdir(asked["cwd"])
    os.environ |= asked["variables"]
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    faulthandler.dump_traceback_later(WAIT, exit=True)
    try:
        return _call(asked["program"], asked["arguments"])
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    finally:
        sys.stdout.flush(), sys.stderr.flush()


def _end(call: Callable[[], int]) -> NoReturn:
    """End this fork with the exit code that ``call`` returns."""
    code = 70
    try:
        code = call()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def main() -> None:
    import hydra  # noqa: F401
    import timm  # noqa: F401
    import torch
    import torch._dynamo  # DistributedDataParallel imports it
    import torchvision  # noqa: F401
    import wandb_workspaces.reports.v2
    import wandb_workspaces.workspaces  # noqa: F401

    from largebatch.launch import confirm, main, replay  # noqa: F401
    from largebatch.report import build  # noqa: F401
    from largebatch.tracking import sync  # noqa: F401
    from largebatch.training import worker  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if not child:
            _end(functools.partial(_in_child, asked))
        _, status = os.waitpid(child, 0)
        print(asked["number"], os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
