"""How W&B is reached, decided before it is asked: online or offline, and what its process sees of the environment.

Left to itself wandb asks at a terminal, raises without one, waits a minute and a half for a dead host, and records
more of the environment than should be on a disk.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

CONNECT_TIMEOUT = 3.0  # seconds to reach the host at all

# wandb records every SLURM_* variable that it sees, and so SLURM_JWT, a password. These say all that is of use.
SLURM_RECORDED = (
    *("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_PARTITION", "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES"),
    *("SLURM_NTASKS", "SLURM_CPUS_PER_TASK", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"),
)


def choose_mode(asked: str) -> tuple[str, str]:
    """``online``, ``offline`` or ``disabled``, and why, for ``tracker.mode`` (auto, online or offline).

    ``auto`` follows WANDB_MODE and the commands ``wandb offline`` and ``wandb disabled``. Online, asked for or not,
    needs an API key (from the environment, ``~/.netrc`` or ``wandb login``) and a host that takes a connection.
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
    """Why ``url``'s host, or the proxy before it, took no TCP connection in ``seconds``; None if it did."""
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
    """Host and port that a connection to ``url`` really goes to: its own, or its proxy's from the environment."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not is_local(host) and not urllib.request.proxy_bypass(host):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def is_local(host: str) -> bool:
    """Whether it is this machine, for which wandb's process takes no proxy."""
    return host in ("localhost", "::1") or host.startswith("127.")


@contextlib.contextmanager
def session_environment(directory: Path, mode: str) -> Iterator[None]:
    """What wandb's session, and the process that it starts, see of the environment; put back on leaving.

    The session reads these once, before it knows anything of the run, so settings given to ``wandb.init`` are too late.
    """
    os.environ.pop("WANDB_SERVICE", None)  # a parent's session was started without these precautions: have our own
    wanted = {
        "WANDB_SILENT": "true",  # no line of wandb's on the terminal
        "WANDB_X_DISABLE_VIEWER": "true",  # a dead host would be asked twice more who we are, for 5 s each
        "WANDB_ERROR_REPORTING": "false",  # wandb's crash reports go to its makers
        "WANDB_CACHE_DIR": str(directory),  # its process logs to wandb/logs below this, not in the home folder
        "WANDB_DATA_DIR": str(directory / "wandb"),  # where artifacts are prepared, likewise
    }
    if mode != "auto":
        wanted["WANDB_MODE"] = mode  # over `wandb offline` and the like
    unwanted = [key for key in os.environ if key.startswith("SLURM_") and key not in SLURM_RECORDED]
    unwanted += ["WANDB_DEBUG", "WANDB_CORE_DEBUG"]  # with these, the debug log holds the API key
    saved = {key: os.environ.get(key) for key in [*wanted, *unwanted]}
    arguments = sys.argv
    for key in unwanted:
        os.environ.pop(key, None)
    os.environ.update(wanted)
    sys.argv = arguments[:1]  # a command line may hold a token, and says nothing that the configuration doesn't
    try:
        yield
    finally:
        sys.argv = arguments
        for key, value in saved.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def close_session() -> None:
    """End wandb's session and process, so that the next start in this process begins afresh.

    When that process is gone already this fails with what its loss was reported as before; left undone, wandb would
    try it at exit and print a traceback.
    """
    import wandb

    with contextlib.suppress(Exception):
        wandb.teardown()


def one_line(error: Exception) -> str:
    """The error's kind and text in one line of at most 300 characters, without passwords."""
    text = without_password(" ".join(f"{type(error).__name__}: {error}".split()))
    return text if len(text) <= 300 else text[:299] + "…"


def without_password(text: str) -> str:
    """``text`` without the user and password of the addresses in it."""
    return re.sub(r"//[^/\s@]*@", "//", text)
