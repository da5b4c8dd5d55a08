"""One real SLURM for all tests in this folder.

Without SLURM the tests are skipped; ``LARGEBATCH_SLURM=required`` makes that an error. ``LARGEBATCH_SLURM=skip`` skips
them always, as ``make test`` does.
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
        pytest.skip("needs SLURM; make test-slurm installs it")
    try:
        check_machine()
    except ClusterError as error:
        if wanted == "required":
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def cluster(_machine: None) -> Iterator[Cluster]:
    """Start two nodes of 4 CPUs and 2 fake GPUs, with accounting; partitions ``high`` (the default) and ``low``."""
    with place() as (folder, port), Cluster(folder, port=port) as cluster:
        yield cluster


@contextlib.contextmanager
def place() -> Iterator[tuple[Path, int]]:
    """Return a new folder and free ports for a cluster, beside those of other tests that run now.

    A lock holds the ports; the system releases it with this process. The lock's file names the folder, so that later
    tests stop the cluster of a killed test. The logs of a cluster that didn't start stay until then.
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
            # The paths of pytest's own folders are too long for sockets.
            folder = tempfile.mkdtemp(prefix="largebatch-slurm-", dir="/tmp")
            lock.write(folder)
            lock.flush()
            yield Path(folder), port
            shutil.rmtree(folder, ignore_errors=True)
            lock.truncate(0)
            return
    raise ClusterError("no free ports from 16817 to 32000")
