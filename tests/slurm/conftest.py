"""One real SLURM for all tests here.

``LARGEBATCH_SLURM=required`` makes an error of what else skips them; ``skip`` leaves them out, as ``make test`` does.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from private_slurm.cluster import Cluster, check_machine, is_taken
from private_slurm.packages import ClusterError


@pytest.fixture(scope="session", autouse=True)
def _machine() -> None:
    wanted = os.environ.get("LARGEBATCH_SLURM")
    if wanted == "skip":
        pytest.skip("needs SLURM; make test-slurm brings one up")
    try:
        check_machine()
    except ClusterError as error:
        if wanted == "required":
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def cluster(_machine: None) -> Iterator[Cluster]:
    """Two nodes of 4 CPUs and 2 fake GPUs each, with accounting; partitions ``high`` (the default) and ``low``."""
    with place() as (folder, port), Cluster(folder, port=port) as cluster:
        yield cluster


@contextlib.contextmanager
def place() -> Iterator[tuple[Path, int]]:
    """A new folder and free ports for a cluster, beside those of tests that run at the same time.

    The ports are held by a lock that the system drops with this process. It names the folder, so that the next tests
    find and end a cluster whose own were killed. The logs of one that didn't start stay until then.
    """
    for port in range(16817, 32000, 100):
        with Path(f"/run/largebatch-slurm-{port}").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            lock.seek(0)
            if left := lock.read():
                Cluster(left).stop()
                shutil.rmtree(left, ignore_errors=True)
            lock.truncate(0)
            if any(is_taken(each) for each in range(port, port + 100)):
                continue
            # pytest's own folders have too long a path for sockets.
            folder = tempfile.mkdtemp(prefix="largebatch-slurm-", dir="/tmp")
            lock.write(folder)
            lock.flush()
            yield Path(folder), port
            shutil.rmtree(folder, ignore_errors=True)
            lock.truncate(0)
            return
    raise ClusterError("no free ports from 16817 to 32000")
