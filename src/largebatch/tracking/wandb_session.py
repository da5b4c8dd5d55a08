"""W&B's mode, and the environment of its process.

By default wandb prompts at a terminal, raises without one, waits 90 s for a dead host, and records more of the
environment than should be on a disk.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from largebatch.errors import one_line

CONNECT_TIMEOUT = 3.0  # seconds for a TCP connection to the host

# wandb records every SLURM_* variable in its environment, also the password SLURM_JWT.
SLURM_RECORDED = (
    *("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_PARTITION", "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES"),
    *("SLURM_NTASKS", "SLURM_CPUS_PER_TASK", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"),
)


def choose_mode(asked: str) -> tuple[str, str]:
    """Return ``online``, ``offline`` or ``disabled``, and the reason, for ``tracker.mode`` (auto, online or offline).

    ``auto`` follows WANDB_MODE and the commands ``wandb offline`` and ``wandb disabled``. Online mode needs an API key
    (from the environment, ``~/.netrc`` or ``wandb login``) and a host that accepts a connection.
    """
    import wandb

    if asked == "offline":
        return "offline", "tracker.mode=offline"
    settings = wandb.setup().settings
    if asked == "auto" and settings.mode in ("offline", "disabled"):
        return settings.mode, f"WANDB_MODE={settings.mode}, or `wandb {settings.mode}` was called"
    try:
        has_key = wandb.login(prompt=False, verify=False)
    except Exception as error:
        return "offline", f"the API key can't be used ({one_line(error)})"
    if not has_key:
        return "offline", "no API key"
    problem = unreachable(settings.base_url, CONNECT_TIMEOUT)
    return ("offline", problem) if problem else ("online", "")


def unreachable(url: str, seconds: float) -> str | None:
    """Return why the host of ``url``, or its proxy, accepted no TCP connection in ``seconds``; None if it did."""
    host, port = next_hop(url)
    problems: list[str | None] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), seconds).close()
            problems.append(None)
        except (OSError, ValueError) as error:  # ValueError: not a host name
            problems.append(f"{host}:{port} can't be reached ({one_line(error)})")

    thread = threading.Thread(target=connect, daemon=True)  # because a name's look-up has no time limit of its own
    thread.start()
    thread.join(seconds)
    return problems[0] if problems else f"{host}:{port} can't be reached (no answer in {seconds:g} s)"


def next_hop(url: str) -> tuple[str, int]:
    """Return host and port of a connection to ``url``: its own, or the proxy's from the environment."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    is_local = host in ("localhost", "::1") or host.startswith("127.")  # wandb's process uses no proxy for these
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not is_local and not urllib.request.proxy_bypass(host):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


@contextlib.contextmanager
def session_environment(directory: Path, mode: str) -> Iterator[None]:
    """Set the environment that wandb's session and process see, and restore it on leaving.

    The session reads these variables before it knows a run, so settings given to ``wandb.init`` come too late.

    Args:
        directory: wandb's logs and caches go below it.
        mode: ``tracker.mode``; any but ``auto`` overrides ``wandb offline`` and WANDB_MODE.
    """
    os.environ.pop("WANDB_SERVICE", None)  # a parent's session was started with another environment
    wanted = {
        "WANDB_SILENT": "true",
        "WANDB_X_DISABLE_VIEWER": "true",  # saves two requests for the account, which wait 5 s each on a dead host
        "WANDB_ERROR_REPORTING": "false",  # no crash reports to W&B
        "WANDB_CACHE_DIR": str(directory),  # for wandb/logs, otherwise in the home folder
        "WANDB_DATA_DIR": str(directory / "wandb"),  # for artifacts, likewise
    }
    if mode != "auto":
        wanted["WANDB_MODE"] = mode
    unwanted = [key for key in os.environ if key.startswith("SLURM_") and key not in SLURM_RECORDED]
    unwanted += ["WANDB_DEBUG", "WANDB_CORE_DEBUG"]  # with these, the debug log holds the API key
    saved = {key: os.environ.pop(key, None) for key in [*wanted, *unwanted]}
    arguments = sys.argv
    os.environ.update(wanted)
    sys.argv = arguments[:1]  # a command line may hold a token, and the configuration has the rest
    try:
        yield
    finally:
        sys.argv = arguments
        for key in saved:
            os.environ.pop(key, None)
        os.environ.update({key: value for key, value in saved.items() if value is not None})


def close_session() -> None:
    """End wandb's session and process, so that the next start in this process is fresh.

    If wandb's process is gone, this fails for a reason that was logged before. Without this call, wandb would try at
    exit and print a traceback.
    """
    import wandb

    with contextlib.suppress(Exception):
        wandb.teardown()
