"""One W&B run, logged as the training loop does, in its own process: ``python one_run.py JSON [ignored ...]``.

Takes ``{"directory", "tracker": {...}, "rows", "first_step", "first_number", "init_timeout", "finish_timeout",
"times", "break": ...}`` and prints one JSON object with the messages and times. ``break`` names the fault after the
first row: ``core`` kills wandb's process, ``type`` logs something that isn't a row, ``self`` kills this process after
2 s, ``wait`` prints ``ready`` and waits for a line.
"""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from largebatch.config.schema import Config
from largebatch.config.typed import from_composed
from largebatch.tracking import tracker, wandb_run


def configuration(**tracker: Any) -> Config:
    return from_composed(
        {
            "dataset": {"name": "digits"},
            "model": {"name": "smallcnn"},
            "optimizer": {"name": "tvlars", "lr": 2.0},
            "schedule": {"name": "constant"},
            "mode": {"name": "clf"},
            "cluster": {"name": "local"},
            "tracker": {"name": "wandb", **tracker},
        }
    )


def training_row(step: int) -> dict[str, Any]:
    counters = {"step": step, "epoch": step / 4, "examples": 512 * step, "wall_seconds": 0.1 * step}
    return {**counters, "train/loss": 1.0 / step, "optim/lr": 2.0, "optim/phi": None}


def evaluation_row(step: int) -> dict[str, Any]:
    return {"step": step, "epoch": step / 4, "examples": 512 * step, "wall_seconds": 1.0, "test/accuracy": 0.5}


def kill_core() -> None:
    """Kill the process that wandb started for this process."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # another process that has ended
            name, rest = stat.read_text().rsplit(")", 1)
            if rest.split()[1] == str(os.getpid()) and "wandb-core" in name:
                os.kill(int(stat.parent.name), signal.SIGKILL)
                time.sleep(0.3)
                return
    raise RuntimeError("this process has no wandb-core")


def carry_out(asked: dict[str, Any], said: list[str]) -> dict[str, Any]:
    began = time.monotonic()
    for key in ("init_timeout", "finish_timeout"):
        if key in asked:
            setattr(wandb_run, key.upper(), asked[key])
    run = tracker.start_tracker(
        configuration(**asked.get("tracker", {})),
        Path(asked["directory"]),
        asked.get("id", "0123abcd"),
        "digits-tvlars-0123abcd",
        {"lr": 4.0, "commit": "0" * 40, "steps": 20},
        said.append,
    )
    report: dict[str, Any] = {"mode": getattr(run, "mode", None), "start_seconds": time.monotonic() - began}
    if run is None:
        return report
    first, number = asked.get("first_step", 1), asked.get("first_number", 0)
    end = first + asked.get("rows", 3)
    for step in range(first, end):
        run.log(number + step - first, training_row(step))
        if step == first:
            interfere(run, asked.get("break"))
    run.log(number + end - first, evaluation_row(end - 1))
    run.summarize({"test/accuracy": 0.875, "best/test/accuracy": 0.9, "test/top5": None})
    began = time.monotonic()
    run.finish(asked.get("state", "finished"))
    return {**report, "finish_seconds": time.monotonic() - began}


def interfere(run: tracker.Tracker, how: str | None) -> None:
    if how == "core":
        kill_core()
    elif how == "type":
        run.log(1, ["not", "a", "row"])  # type: ignore[arg-type]
    elif how == "self":
        time.sleep(2.0)
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "wait":
        print("ready", flush=True)
        sys.stdin.readline()


if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    heard: list[str] = []
    environment = dict(os.environ)
    report = carry_out(wanted, heard)
    for _ in range(wanted.get("times", 1) - 1):
        time.sleep(1.1)  # wandb names its folders by the second
        report = carry_out(wanted, heard)
    changed = {key for key in {*environment, *os.environ} if environment.get(key) != os.environ.get(key)}
    print(json.dumps({**report, "said": heard, "changed": sorted(changed), "wandb": "wandb" in sys.modules}))
